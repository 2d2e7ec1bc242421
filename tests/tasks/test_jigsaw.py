"""Jigsaw: tiles go where they were told, any architecture answers for each, and it can be learnt."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits

from vitrail.models import build_model
from vitrail.tasks.jigsaw import Jigsaw, shuffle_tiles

EVERY = (
    "vit_mnist_2blk",
    "vit_cifar",
    "diffvit_cifar",
    "deit_cifar",
    "cait_cifar",
    "cct_2_3x2_32",
    "crossvit_cifar",
    "pvt_cifar",
    "pvt_v2_cifar",
    "swin_cifar",
    "swinv2_cifar",
)


def test_tiles_by_hand() -> None:
    images = torch.arange(24.0).reshape(1, 1, 4, 6)
    shuffled = shuffle_tiles(images, torch.tensor([[3, 0, 2, 1]]))
    top, bottom, left, right = slice(0, 2), slice(2, 4), slice(0, 3), slice(3, 6)
    assert torch.equal(shuffled[..., top, left], images[..., bottom, right])
    assert torch.equal(shuffled[..., top, right], images[..., top, left])
    assert torch.equal(shuffled[..., bottom, left], images[..., bottom, left])
    assert torch.equal(shuffled[..., bottom, right], images[..., top, right])


def test_shuffling_back_restores_images() -> None:
    images = torch.randn(5, 3, 28, 36)
    origins = torch.rand(5, 16).argsort(dim=1)
    assert torch.equal(shuffle_tiles(shuffle_tiles(images, origins), origins.argsort(dim=1)), images)


def test_loss_is_that_of_a_slow_loop() -> None:
    task = Jigsaw(build_model("vit_mnist_2blk"), tiles=4).eval()
    images = torch.randn(3, 1, 28, 28)
    torch.manual_seed(0)
    origins = torch.rand(3, 16).argsort(dim=1)
    assert not torch.equal(origins.argsort(dim=1), origins)  # there and back are two things
    logits = task.predict(shuffle_tiles(images, origins)).double()
    total, right = 0.0, 0
    for image in range(3):
        for place in range(16):
            row = logits[image, place].tolist()
            wanted = int(origins[image, place])
            total += math.log(sum(math.exp(value) for value in row)) - row[wanted]
            right += row.index(max(row)) == wanted
    torch.manual_seed(0)
    output = task({"images": images}, 0)
    assert abs(float(output["loss"].detach()) - total / 48) < 1e-6
    assert float(output["placed"]) == pytest.approx(right / 48)


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_learns_with_all_its_parameters(name: str) -> None:
    model = build_model(name)
    task = Jigsaw(model).train()
    images = torch.randn(2, model.config.in_chans, *model.config.image_shape)
    assert task.predict(images).shape == (2, 16, 16)
    task({"images": images}, 0)["loss"].backward()
    assert [key for key, own in task.named_parameters() if own.requires_grad and own.grad is None] == []
    assert task.trained() is model


def test_same_seed_same_loss() -> None:
    task = Jigsaw(build_model("swin_cifar")).eval()
    images = torch.randn(5, 3, 32, 32)

    def loss(part: torch.Tensor, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        return task({"images": part}, 0)["loss"]

    assert torch.equal(loss(images), loss(images))
    assert not torch.equal(loss(images), loss(images, 1))
    for part in images.split(2):
        assert loss(part).isfinite()


@pytest.mark.parametrize("tiles", [1, 5])
def test_tiles_must_fit_the_map(tiles: int) -> None:
    with pytest.raises(ValueError, match=rf"tiles must lie between 2 and 4: .* 4 x 4 cells .*; got {tiles}"):
        Jigsaw(build_model("vit_mnist_2blk"), tiles=tiles)


def test_tiles_must_fit_the_image() -> None:
    task = Jigsaw(build_model("vit_mnist_2blk"), tiles=3)
    with pytest.raises(ValueError, match="images of 28 x 28 pixels cannot be cut into 3 x 3 equal tiles"):
        task({"images": torch.randn(2, 1, 28, 28)}, 0)


def test_state_goes_round() -> None:
    images = torch.randn(2, 1, 28, 28)
    first, second = (Jigsaw(build_model("vit_mnist_2blk")).eval() for _ in range(2))
    assert not torch.equal(first.predict(images), second.predict(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.predict(images), second.predict(images))


def test_it_learns_where_parts_of_digits_belong() -> None:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:, None]).float()
    images = (images - images.mean()) / images.std()
    model = build_model("vit_digits", img_size=8, patch_size=2, embed_dim=32, num_heads=2, depth=2)
    task = Jigsaw(model, tiles=2).train()
    optimizer = torch.optim.AdamW((own for own in task.parameters() if own.requires_grad), lr=3e-3)
    placed = []
    for step in range(80):
        output = task({"images": images[torch.randint(len(images), (64,))]}, step)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        placed.append(float(output["placed"]))
    assert sum(placed[-10:]) / 10 > 0.6
    assert sum(placed[:3]) / 3 < 0.4  # chance: a quarter
