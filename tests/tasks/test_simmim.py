"""SimMIM: L1 on hidden pixels only, by any architecture, none of which sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vitrail.components.tap import record
from vitrail.models import build_model
from vitrail.tasks.simmim import SimMIM

EVERY = {
    "vit_mnist_2blk": {},
    "vit_cifar": {"embed_dim": 32, "num_heads": 2},
    "diffvit_cifar": {"depth": 2},
    "deit_cifar": {"depth": 2},
    "cait_cifar": {"depth": 2},
    "cct_2_3x2_32": {},
    "crossvit_cifar": {},
    "pvt_cifar": {},
    "pvt_v2_cifar": {},
    "swin_cifar": {},
    "swinv2_cifar": {},
}


def _task(name: str, **options: Any) -> SimMIM:
    return SimMIM(build_model(name, **EVERY[name]), **options)


def _images(task: SimMIM, count: int = 2, shape: tuple[int, int] | None = None) -> Tensor:
    config = task.model.config
    return torch.randn(count, config.in_chans, *(shape or config.image_shape))


@pytest.mark.parametrize("name", ["vit_mnist_2blk", "swin_cifar", "crossvit_cifar"])
def test_loss_is_that_of_a_slow_loop(name: str) -> None:
    task = _task(name).eval()
    images = _images(task)
    torch.manual_seed(0)
    mask, hidden = task.mask(images)
    prediction = task.predict(images, mask, hidden)
    total, count = 0.0, 0
    for image in range(2):
        for row in range(images.shape[2]):
            for column in range(images.shape[3]):
                if hidden[image, 0, row, column]:
                    for channel in range(images.shape[1]):
                        place = (image, channel, row, column)
                        total += abs(float(prediction[place].detach()) - float(images[place]))
                        count += 1
    torch.manual_seed(0)
    assert abs(float(task({"images": images}, 0)["loss"].detach()) - total / count) < 1e-6


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [None, (40, 28)])
def test_nobody_sees_hidden_pixels(name: str, shape: tuple[int, int] | None) -> None:
    """Overlapping embeddings, second branches and padded borders included."""
    task = _task(name).eval()
    images = _images(task, shape=shape)
    mask, hidden = task.mask(images)
    prediction = task.predict(images, mask, hidden)
    assert prediction.shape == images.shape
    other = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(task.predict(other, mask, hidden), prediction)
    changed = torch.where(hidden, images, torch.randn_like(images))
    assert not torch.allclose(task.predict(changed, mask, hidden), prediction)


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_learns_and_the_rest_is_frozen(name: str) -> None:
    task = _task(name).train()
    loss = task({"images": _images(task)}, 0)["loss"]
    loss.backward()
    assert [key for key, own in task.named_parameters() if own.requires_grad and own.grad is None] == []
    assert all(own.requires_grad for own in (task.mask_token, *task.head.parameters()))
    assert task.trained() is task.model


@pytest.mark.parametrize(
    ("name", "mask_size", "ratio", "share", "side"),
    [
        ("vit_mnist_2blk", None, 0.5, 8 / 16, 7),  # 28 pixels: squares of 4, no less than a patch of 7
        ("swin_cifar", None, 0.6, 38 / 64, 4),  # a seventh of 32, in patches of 2
        ("swin_cifar", 8, 0.75, 12 / 16, 8),
        ("pvt_v2_cifar", 16, 0.5, 2 / 4, 16),
    ],
)
def test_squares_have_their_size_and_their_share_is_exact(
    name: str, mask_size: int | None, ratio: float, share: float, side: int
) -> None:
    task = _task(name, mask_size=mask_size, ratio=ratio)
    images = _images(task, count=8)
    mask, hidden = task.mask(images)
    assert torch.equal(hidden.float().mean(dim=(1, 2, 3)), torch.full((8,), share))
    assert torch.equal(mask.float().mean(dim=1), torch.full((8,), share))
    squares = hidden[:, 0].unflatten(2, (-1, side)).unflatten(1, (-1, side)).float().mean(dim=(2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}


def test_the_paper_s_squares() -> None:
    """32 of 224 pixels: two patches of a ViT, eight of Swin."""
    assert SimMIM(build_model("vit_tiny_patch16_224", depth=1)).unit == 2
    assert SimMIM(build_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))).unit == 8
    assert SimMIM(build_model("crossvit_9_240")).unit == 2


@pytest.mark.parametrize("name", ["vit_mnist_2blk", "swin_cifar"])
def test_masked_tokens_are_the_mask_token(name: str) -> None:
    task = _task(name).eval()
    torch.nn.init.constant_(task.mask_token, 7.0)
    if name == "vit_mnist_2blk":
        torch.nn.init.zeros_(task.model.pos_embed)
    images = _images(task)
    mask, hidden = task.mask(images)
    with record(task.model, "embed") as seen:
        task.predict(images, mask, hidden)
    tokens = seen["embed"][:, -mask.shape[1] :]
    assert torch.equal(tokens.eq(7.0).all(dim=2), mask)


def test_cells_of_the_head_lie_where_they_belong() -> None:
    """Each cell's bias pattern shows up once a cell, rows and columns in order."""
    task = _task("vit_mnist_2blk").eval()
    torch.nn.init.zeros_(task.head.weight)
    task.head.bias.data = torch.arange(49.0)
    images = _images(task, shape=(28, 30))  # padded by five columns
    prediction = task.predict(images, *task.mask(images))
    assert torch.equal(prediction[0, 0], torch.arange(49.0).reshape(7, 7).tile(4, 5)[:, :30])


def test_same_seed_same_loss_and_parts_of_a_batch_serve() -> None:
    task = _task("swin_cifar").eval()
    images = _images(task, count=5)

    def loss(part: Tensor, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return task({"images": part}, 0)["loss"]

    assert torch.equal(loss(images), loss(images))
    assert not torch.equal(loss(images), loss(images, 1))
    for part in images.split(2):
        assert loss(part).isfinite()


def test_the_gallery_leaks_nothing() -> None:
    task = _task("pvt_v2_cifar").train()
    images = _images(task)
    first = task.reconstruct(images, torch.Generator().manual_seed(5))
    assert task.training
    other = torch.where(first.hidden, torch.randn_like(images), images)
    second = task.reconstruct(other, torch.Generator().manual_seed(5))
    assert torch.equal(first.masked, second.masked)
    assert torch.equal(first.prediction, second.prediction)
    shown = ~first.hidden.expand_as(images)
    assert torch.equal(first.prediction[shown], images[shown])
    assert first.masked[~shown].eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio must lie between 0 and 1, got 1.5"),
        ({"mask_size": 0}, "mask_size must be at least 1 pixel, got 0"),
    ],
)
def test_bad_options_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _task("vit_mnist_2blk", **options)


def test_state_goes_round() -> None:
    first, second = _task("swin_cifar").eval(), _task("swin_cifar").eval()
    images = _images(first)
    masks = first.mask(images)
    assert not torch.equal(first.predict(images, *masks), second.predict(images, *masks))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.predict(images, *masks), second.predict(images, *masks))


def test_it_learns_to_fill_in_digits() -> None:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:, None]).float()
    images = (images - images.mean()) / images.std()
    model = build_model("vit_digits", img_size=8, patch_size=2, embed_dim=32, num_heads=2, depth=2)
    task = SimMIM(model).train()
    optimizer = torch.optim.AdamW((own for own in task.parameters() if own.requires_grad), lr=3e-3)
    losses = []
    for step in range(80):
        loss = task({"images": images[torch.randint(len(images), (64,))]}, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
