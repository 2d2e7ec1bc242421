"""VideoMAE: as many hidden as asked, in tubes or anywhere; absolute differences; order lost and found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.components.tap import record
from vitrail.models import Encoder, build_model
from vitrail.tasks import VideoMAE, build_task
from vitrail.tasks.masking import take

GRID = (3, 4, 4)


def _model(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 28, "patch_size": 7}
    return build_model("video_vit_28", **{**options, **changes})


def _clips(count: int = 3, frames: int = 3, channels: int = 1, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, frames, channels, 28, 28, generator=generator, **options)


@pytest.mark.parametrize(("mask", "hidden"), [("tube", 14), ("random", 36)])
def test_exactly_as_many_are_hidden_in_every_clip(mask: Any, hidden: int) -> None:
    """Tubes: 0.9 of the 16 places of a frame; random: 0.75 of all 48."""
    task = VideoMAE(_model(), mask=mask)
    masking = task.masking(_clips(50))
    total = 3 * hidden if mask == "tube" else hidden
    assert masking.masked.shape == (50, total)
    assert masking.keep.shape == (50, 48 - total)
    everything = torch.cat([masking.keep, masking.masked], dim=1)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(48).expand(50, -1))
    in_frames = torch.stack([(masking.masked // 16 == frame).sum(dim=1) for frame in range(3)], dim=1)
    if mask == "tube":
        assert in_frames.eq(14).all()
        places = masking.masked % 16
        assert all(len(set(own.tolist())) == 14 for own in places)
    else:
        assert in_frames.float().std() > 0.5
    assert task({"images": _clips()}, 0)["loss"].isfinite()


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_the_order_that_was_shuffled_is_restored(mask: Any) -> None:
    task = VideoMAE(_model(), mask=mask, ratio=0.5)
    clips = _clips()
    masking, patches = task.masking(clips), task.patches(clips)
    assert not torch.equal(masking.keep, masking.keep.sort(dim=1).values)
    parts = torch.cat([take(patches, masking.keep), take(patches, masking.masked)], dim=1)
    assert torch.equal(take(parts, masking.restore), patches)
    assert torch.equal(task.images_of(patches, clips), clips)


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize(("norm", "normalise"), [("l1", True), ("l1", False), ("l2", True)])
def test_loss_is_that_of_a_slow_loop(norm: Any, normalise: bool, tubelet: int) -> None:
    model = _model(num_frames=4, tubelet=tubelet, in_chans=2)
    task = VideoMAE(model, mask="random", norm=norm, normalise_targets=normalise).double().eval()
    clips = _clips(2, 4, 2, dtype=torch.float64)
    torch.manual_seed(5)
    masking = task.masking(clips)
    guess = task.predict(clips, masking)
    total, count = 0.0, 0
    for clip in range(2):
        for place, number in enumerate(masking.masked[clip].tolist()):
            moment, row, column = number // 16 * tubelet, number % 16 // 4 * 7, number % 4 * 7
            patch = [
                float(clips[clip, moment + frame, channel, row + i, column + j])
                for frame in range(tubelet) for channel in range(2) for i in range(7) for j in range(7)
            ]  # fmt: skip
            if normalise:
                mean = sum(patch) / len(patch)
                deviation = math.sqrt(sum((v - mean) ** 2 for v in patch) / (len(patch) - 1) + 1e-6)
                patch = [(value - mean) / deviation for value in patch]
            for value, said in zip(patch, guess[clip, place].tolist(), strict=True):
                total += abs(said - value) if norm == "l1" else (said - value) ** 2
                count += 1
    assert count == masking.masked.numel() * 49 * 2 * tubelet
    torch.manual_seed(5)
    assert abs(float(task({"images": clips}, 0)["loss"].detach()) - total / count) < 1e-6


def test_l1_is_the_default_and_the_encoder_sees_visible_patches_only() -> None:
    task = VideoMAE(_model())
    assert (task.norm, task.mask, task.ratio) == ("l1", "tube", 0.9)
    with record(task.model, "embed", "blocks.*.out") as seen:
        task({"images": _clips()}, 0)
    assert {tuple(tokens.shape) for tokens in seen.values()} == {(3, 6, 32)}


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_nothing_hidden_is_seen(mask: Any) -> None:
    task = VideoMAE(_model(tubelet=2, num_frames=4), mask=mask).train()
    clips = _clips(2, 4)
    first = task.reconstruct(clips, torch.Generator().manual_seed(3))
    assert task.training
    assert first.hidden.shape == (2, 4, 1, 28, 28)
    assert torch.equal(first.masked, clips * ~first.hidden)
    assert torch.equal(first.prediction[~first.hidden], clips[~first.hidden])
    if mask == "tube":
        assert torch.equal(first.hidden, first.hidden[:, :1].expand_as(first.hidden))
    other = torch.where(first.hidden, 10 * torch.randn_like(clips) + 3, clips)
    second = task.reconstruct(other, torch.Generator().manual_seed(3))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.prediction, second.prediction)


def test_a_hidden_patch_is_asked_for_by_its_place_in_time() -> None:
    """Two hidden patches at one place of different frames are different questions."""
    task = VideoMAE(_model()).eval()
    clips = _clips()
    masking = task.masking(clips)
    guess = task.predict(clips, masking).unflatten(1, (3, 14))  # frame by frame, the same places in each
    assert not torch.allclose(guess[:, 0], guess[:, 2], atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 28, 28), (5, 28, 28), (3, 30, 17)])
def test_clips_of_any_size_and_every_parameter_learns(shape: tuple[int, int, int]) -> None:
    task = VideoMAE(_model()).train()
    clips = torch.randn(2, shape[0], 1, *shape[1:])
    output = task({"images": clips}, 0)
    output["loss"].backward()
    assert [name for name, own in task.named_parameters() if own.grad is None] == []
    made = task.reconstruct(clips)
    assert all(own.shape[-2:] == shape[1:] for own in made)


def test_refusals() -> None:
    for name, model, message in (
        ("mae", "video_vit_28", "task mae hides patches of images, which VideoViT does not take"),
        ("video_mae", "vit_mnist_2blk", "task video_mae hides patches of clips, which ViT does not take"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(name, build_model(model))
    with pytest.raises(ValueError, match="mask must be tube or random, got 'cube'"):
        VideoMAE(_model(), mask="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1, got 1"):
        VideoMAE(_model(), ratio=1)
    with pytest.raises(ValueError, match="task video_mae has no option 'masks': did you mean mask"):
        build_task("video_mae", _model(), masks="tube")
    with pytest.raises(ValueError, match="expected clips"):
        VideoMAE(_model())({"images": torch.randn(2, 1, 28, 28)}, 0)
