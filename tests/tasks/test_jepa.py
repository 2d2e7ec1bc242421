"""I-JEPA: the loss is the paper's, the target encoder follows on schedule and gets no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vitrail.components.tap import record
from vitrail.models import Encoder, build_model
from vitrail.tasks.jepa import JEPA
from vitrail.tasks.masking import block_masking

DROPPING = {
    "vit_mnist_2blk": {},
    "vit_cifar": {"embed_dim": 32, "num_heads": 2},
    "diffvit_cifar": {"depth": 2},
    "deit_cifar": {"depth": 2},
    "cait_cifar": {"depth": 2},
    "cct_2_3x2_32": {},
}


def _vit(**changes: Any) -> Encoder:
    return build_model("vit_mnist_2blk", **{"patch_size": 4, "embed_dim": 32, "num_heads": 2, **changes})


def _run(task: JEPA, images: Tensor, seed: int = 0, step: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return task({"images": images}, step)


def test_loss_is_that_of_a_slow_loop() -> None:
    task = JEPA(_vit()).double().eval()
    nn.init.normal_(task.target.blocks[0].mlp.fc1.bias)  # the encoders differ
    images = torch.randn(3, 1, 28, 20, dtype=torch.float64)
    torch.manual_seed(0)
    blocks = block_masking(3, (7, 5))
    prediction = task.predict(images, blocks.context, blocks.targets)
    features = task.target.forward_features(images).patches
    total, count = 0.0, 0
    for image in range(3):
        for block in range(4):
            for place, number in enumerate(blocks.targets[image, block].tolist()):
                vector = features[image, number]
                mean = vector.sum() / 32
                variance = ((vector - mean) ** 2).sum() / 32
                wanted = (vector - mean) / (variance + 1e-5).sqrt()
                total += float(((prediction[image, block, place] - wanted) ** 2).sum().detach())
                count += 32
    assert abs(float(_run(task, images)["loss"].detach()) - total / count) < 1e-6


def test_context_encoder_sees_the_context_only_and_the_target_encoder_all() -> None:
    task = JEPA(_vit()).eval()
    images = torch.randn(2, 1, 28, 28)
    torch.manual_seed(0)
    context = block_masking(2, (7, 7)).context.shape[1]
    with record(task.model, "embed") as seen, record(task.target, "embed") as seen_by_target:
        _run(task, images)
    assert seen["embed"].shape == (2, 1 + context, 32)
    assert seen_by_target["embed"].shape == (2, 50, 32)


@pytest.mark.parametrize("name", DROPPING)
def test_prediction_does_not_depend_on_pixels_outside_the_context(name: str) -> None:
    model = build_model(name, **DROPPING[name])
    task = JEPA(model).eval()
    images = torch.randn(2, model.config.in_chans, *model.config.image_shape)
    size = task.patch_size
    rows, columns = (length // size for length in images.shape[2:])
    blocks = block_masking(2, (rows, columns))
    shown = torch.zeros(2, rows * columns, dtype=torch.bool).scatter(1, blocks.context, True)
    shown = shown.unflatten(1, (1, rows, columns)).repeat_interleave(size, 2).repeat_interleave(size, 3)
    before = task.predict(images, *blocks)
    other = torch.where(shown, images, torch.randn_like(images))
    assert torch.equal(task.predict(other, *blocks), before)
    assert not torch.allclose(task.predict(torch.randn_like(images), *blocks), before)


def test_blocks_are_predicted_one_by_one() -> None:
    """A block's prediction is the same whatever the other blocks are."""
    task = JEPA(_vit()).eval()
    images = torch.randn(2, 1, 28, 28)
    blocks = block_masking(2, (7, 7))
    together = task.predict(images, *blocks)
    for number in range(4):
        alone = task.predict(images, blocks.context, blocks.targets[:, number : number + 1])
        torch.testing.assert_close(alone[:, 0], together[:, number])


@pytest.mark.parametrize("name", DROPPING)
def test_gradients_reach_encoder_and_predictor_but_no_target(name: str) -> None:
    model = build_model(name, **DROPPING[name])
    task = JEPA(model).train()
    output = _run(task, torch.randn(3, model.config.in_chans, *model.config.image_shape))
    output["loss"].backward()
    learning = [key for key, own in task.named_parameters() if own.requires_grad]
    assert [key for key in learning if task.get_parameter(key).grad is None] == []
    assert {key.split(".")[0] for key in learning} == {"model", "predictor"}
    assert all(own.grad is None for own in task.target.parameters())
    assert not task.target.training
    assert task.model.training
    assert task.trained() is task.target


def test_momentum_grows_linearly_to_one() -> None:
    task = JEPA(_vit(), momentum=0.9).train()
    images = torch.randn(2, 1, 28, 28)
    task.begin(10)
    for step, momentum in ((0, 0.9), (5, 0.95), (9, 0.99)):
        for own in task.model.parameters():
            own.data += torch.randn_like(own)
        before = {key: value.clone() for key, value in task.target.state_dict().items()}
        _run(task, images, step=step)
        task.after_step()
        for key, value in task.target.state_dict().items():
            expected = momentum * before[key] + (1 - momentum) * task.model.state_dict()[key]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_without_a_schedule_the_momentum_stays_and_counters_are_copied() -> None:
    model = build_model("vit_cifar", embed_dim=32, num_heads=2)  # a stem with batch normalisation
    task = JEPA(model, momentum=1.0).train()
    weights = task.target.norm.weight.clone()
    model.norm.weight.data += 1
    _run(task, torch.randn(4, 3, 32, 32), step=3)
    task.after_step()
    assert torch.equal(task.target.norm.weight, weights)
    for mine, other in zip(task.target.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert task.target.patch_embed.proj[1].num_batches_tracked == 1


def test_health() -> None:
    task = JEPA(_vit()).eval()
    images = torch.randn(4, 1, 28, 28)
    output = _run(task, images)
    assert output["ema_gap"] == 0
    features = task.target.forward_features(images).patches
    standard = (features - features.mean(2, keepdim=True)) / features.var(
        2, correction=0, keepdim=True
    ).sqrt()
    torch.testing.assert_close(
        output["target_std"], standard.flatten(0, 1).std(dim=0).mean().detach(), atol=1e-4, rtol=1e-4
    )
    for own in task.target.parameters():
        own.data.mul_(0.5)
    torch.testing.assert_close(_run(task, images)["ema_gap"], torch.tensor(0.5))
    for block in task.target.blocks:  # nothing of the image goes through: all patches alike
        nn.init.zeros_(block.attn.proj.weight)
    nn.init.zeros_(task.target.patch_embed.proj.weight)
    nn.init.zeros_(task.target.pos_embed)
    assert _run(task, images)["target_std"] < 1e-4


def test_the_paper_s_predictor() -> None:
    def sizes(model: Encoder, **options: Any) -> tuple[int, int, int]:
        predictor = JEPA(model, **options).predictor
        return predictor.embed.out_features, len(predictor.blocks), predictor.blocks[0].attn.num_heads

    assert sizes(build_model("vit_small_patch16_224", depth=2)) == (192, 1, 6)
    assert sizes(build_model("vit_base_patch16_224", depth=2), predictor_depth=6) == (384, 6, 12)
    assert sizes(build_model("vit_cifar", depth=12, embed_dim=64, num_heads=2)) == (32, 6, 1)


@pytest.mark.parametrize("name", ["swin_cifar", "pvt_cifar", "pvt_v2_cifar", "crossvit_cifar"])
def test_who_cannot_drop_patches_is_sent_to_simmim(name: str) -> None:
    with pytest.raises(ValueError, match=r"task jepa leaves patches out, which \w+ cannot: use task simmim"):
        JEPA(build_model(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "targets must be at least 1, got 0"),
        ({"momentum": 1.1}, r"momentum must lie in \[0, 1\], got 1.1"),
        ({"predictor_dim": 6}, "multiple of 4 and of its heads.*got width 6"),
    ],
)
def test_bad_options_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JEPA(_vit(), **options)


def test_state_goes_round_and_parts_of_a_batch_serve() -> None:
    images = torch.randn(5, 1, 28, 28)
    first, second = JEPA(_vit()).eval(), JEPA(_vit()).eval()
    nn.init.normal_(first.target.norm.bias)
    assert not torch.equal(_run(first, images)["loss"], _run(second, images)["loss"])
    second.load_state_dict(first.state_dict())
    assert torch.equal(_run(first, images)["loss"], _run(second, images)["loss"])
    assert not torch.equal(_run(first, images)["loss"], _run(first, images, seed=1)["loss"])
    for part in images.split(2):
        assert _run(first, part)["loss"].isfinite()


def test_it_learns_on_digits_and_does_not_collapse() -> None:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:, None]).float()
    images = (images - images.mean()) / images.std()
    model = build_model("vit_digits", img_size=8, patch_size=2, embed_dim=32, num_heads=2, depth=2)
    task = JEPA(model).train()
    task.begin(50)
    optimizer = torch.optim.AdamW((own for own in task.parameters() if own.requires_grad), lr=1e-3)
    losses = []
    for step in range(50):
        output = task({"images": images[torch.randint(len(images), (64,))]}, step)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        task.after_step()
        losses.append(float(output["loss"].detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert output["target_std"] > 0.3
    assert 0 < output["ema_gap"] < 1
