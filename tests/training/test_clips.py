"""Runs on clips: they train, start from a video MAE, and change all frames of a clip alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.config import RunConfig, load_config
from vitrail.datasets import ImageSet, Splits
from vitrail.models.video_vit import VideoViT
from vitrail.pretrained import load_model
from vitrail.training import prepare, train, training_batches

TINY = {
    "model.name": "video_vit_28",
    "model.depth": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.img_size": 14,
    "data.frames": 3,
    "train.duration": "2 epochs",
    "train.batch_size": 8,
    "train.device": "cpu",
}


def _config(**changes: Any) -> RunConfig:
    return load_config(None, TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of five frames, in which a bright square wanders to the right (class a) or to the left (b)."""
    place = tmp_path_factory.mktemp("films")
    for split, count in (("train", 20), ("test", 5)):
        for label in "ab":
            for clip in range(count):
                own = place / split / label / f"{clip}"
                own.mkdir(parents=True)
                for frame in range(5):
                    pixels = np.zeros((14, 14), dtype=np.uint8)
                    column = 2 * (frame if label == "a" else 4 - frame)
                    pixels[clip % 7 : clip % 7 + 6, column : column + 5] = 200
                    Image.fromarray(pixels).save(own / f"{frame}.png")
    return place


@pytest.fixture(scope="module")
def masked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished video MAE."""
    run = tmp_path_factory.mktemp("runs") / "masked"
    train(_config(task__name="video_mae", data__name=str(folder)), run, command="test")
    return run


def test_a_video_mae_writes_its_gallery_frame_beside_frame(masked: Path) -> None:
    assert np.load(masked / "augmented.npy").shape == (8, 1, 14, 42)
    assert np.load(masked / "reconstructed.npy").shape == (3, 8, 1, 14, 42)
    manifest = json.loads((masked / "manifest.json").read_text())
    assert manifest["data"]["train"]["images"] == 36
    model = load_model(masked / "model").model
    assert isinstance(model, VideoViT)
    assert model.config.num_frames == 3
    assert model.config.num_classes == 0
    assert "frames: 3" in (masked / "config.yaml").read_text()


def test_it_becomes_a_classifier_by_one_option(folder: Path, masked: Path, tmp_path: Path) -> None:
    changes = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    started = load_config(None, {**changes, "model.pretrained": str(masked), "data.name": str(folder)})
    run = prepare(started)
    before = load_model(masked / "model").model.state_dict()
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    train(started, tmp_path / "run", command="test")
    assert load_model(tmp_path / "run").classes == ("a", "b")


def test_from_three_frames_to_one_and_to_five(folder: Path, masked: Path) -> None:
    for count in (1, 5):
        config = load_config(
            None, {"model.pretrained": str(masked), "data.name": str(folder), "data.frames": count}
        )
        run = prepare(config)
        assert run.model.config.num_frames == count
        assert next(training_batches(run, 0))["images"].shape[1:] == (count, 1, 14, 14)


def test_motion_is_learnt_from_three_frames_and_not_from_one_or_in_a_random_order(
    folder: Path, tmp_path: Path
) -> None:
    """The class is the direction: the middle frame is the same for both."""
    long = {"data__name": str(folder), "train__duration": "24 epochs", "optim__lr": 5e-3}
    accuracy = {}
    for name, changes in (
        ("plain", {}),
        ("alone", {"data__frames": 1}),
        ("shuffled", {"data__shuffle_frames": True}),
    ):
        result = train(_config(**long, **changes), tmp_path / name, command="test")
        accuracy[name] = result.metrics.accuracy
    assert accuracy["plain"] == 1.0
    assert accuracy["alone"] == 0.5
    assert accuracy["shuffled"] < 0.9


def test_every_frame_of_a_clip_is_changed_alike() -> None:
    """A clip that stands still does so after augmentation too; mixing mixes whole clips."""
    images = np.random.default_rng(0).integers(0, 256, (16, 1, 2, 14, 14), dtype=np.uint8)
    still = ImageSet.from_arrays(np.repeat(images, 3, axis=1), np.arange(16) % 2)
    splits = Splits(train=still, val=None, test=still)
    every = {
        "augment.flip": True, "augment.crop": 2, "augment.rotate": 20, "augment.scale": 0.2,
        "augment.shear": 5, "augment.translate": 0.1, "augment.resized_crop": 0.4,
    }  # fmt: skip
    for more in ({}, {"augment.mixup": 0.8}, {"augment.cutmix": 1.0}):
        run = prepare(load_config(None, TINY | every | more), splits)
        batch = next(training_batches(run, 0))
        assert batch["images"].shape == (8, 3, 2, 14, 14)
        first = batch["images"][:, :1]
        torch.testing.assert_close(batch["images"], first.expand_as(batch["images"]))
        assert batch["targets"].shape == (8, 2)
        assert not torch.equal(first[0], first[1])
    plain = next(training_batches(prepare(load_config(None, TINY), splits), 0))["images"]
    mean, std = (torch.tensor(own).view(-1, 1, 1) for own in (still.mean, still.std))
    known = {tuple(clip.flatten().tolist()) for clip in torch.from_numpy(still.images)}
    seen = (plain * std + mean).mul(255).round().to(torch.uint8)
    assert all(tuple(clip.flatten().tolist()) in known for clip in seen)


def test_what_does_not_fit_is_said_in_one_line(folder: Path) -> None:
    cases = {
        "vit_digits takes images, and .* has clips: choose a model video_vit_": {"model__name": "vit_digits"},
        "augment.randaugment is for images, and .* has clips": {"augment__randaugment": 2},
        "augment.jitter is for images": {"augment__jitter": 0.5},
        "num_frames 3 is not divisible by tubelet 2": {"model__tubelet": 2},
        "task mae hides patches of images, which VideoViT does not take": {"task__name": "mae"},
        "6 frames at stride 1 need 6, got 5": {"data__frames": 6},
    }
    for message, changes in cases.items():
        config = _config(data__name=str(folder), **changes)
        if "vit_digits" in message:
            config = load_config(
                None, {"model.name": "vit_digits", "data.name": str(folder), "data.frames": 3}
            )
        with pytest.raises(ValueError, match=message) as error:
            prepare(config)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="digits has images, not clips"):
        prepare(load_config(None, {"model.name": "video_vit_28", "data.name": "digits"}))


def test_a_video_model_asks_for_as_many_frames_as_it_takes(folder: Path) -> None:
    config = load_config(None, {"model.name": "video_vit_28", "data.name": str(folder)})
    run = prepare(config)
    assert run.splits.train.stored.shape[1] == 3
    assert run.config.data.frames == 3
    config = load_config(
        None, {"model.name": "video_vit_28", "model.num_frames": 5, "data.name": str(folder)}
    )
    assert prepare(config).splits.train.stored.shape[1] == 5


def test_the_commands_take_clips(
    folder: Path, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    main(["train", *options, "--dataset", str(folder), "--output", str(run)])
    assert re.search(r"^test accuracy .* 10 images\)$", capsys.readouterr().out, re.MULTILINE)
    assert (run / "figures" / "attention.png").is_file()
    assert (run / "figures" / "predictions.png").is_file()
    main(["evaluate", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["count"] == 10
    main(["probe", str(masked), str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["test_images"] == 10
