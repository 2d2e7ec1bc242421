"""Runs of tasks without labels: no label is read, they learn, resume exactly, and their model can be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitrail.config import RunConfig, list_recipes, load_config
from vitrail.datasets import ImageSet, Splits, load_dataset
from vitrail.evaluation.metrics import ClassificationMetrics
from vitrail.evaluation.representation import RepresentationMetrics
from vitrail.pretrained import load_model
from vitrail.reporting import write_report
from vitrail.training import loop as training_loop
from vitrail.training import prepare, train, training_batches

TINY = {
    "model.depth": 1,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "train.duration": "2 epochs",
    "train.batch_size": 256,
    "train.eval_every": "1 epoch",
    "train.save_every": "4 steps",
    "train.device": "cpu",
}
WITHOUT_LABELS = ["mae", "simmim", "jepa", "jigsaw", "infonce", "dino", "mae-infonce"]


def config(recipe: str, **changes: Any) -> RunConfig:
    return load_config(recipe, TINY | {key.replace("__", "."): value for key, value in changes.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Secret(ImageSet):
    """Images whose labels nobody may read."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"labels", "counts", "batch"} and object.__getattribute__(self, "split") == "train":
            raise AssertionError(f"{name} of the training images was read")
        return super().__getattribute__(name)

    def __post_init__(self) -> None:
        """Nothing to check: the labels must not be looked at."""


@pytest.fixture(scope="module")
def secret() -> Splits:
    digits = load_dataset("digits")
    train = digits.train
    hidden = Secret(
        stored=train.images,
        labels=np.zeros(0, dtype=np.int64),
        classes=train.classes,
        name=train.name,
        split="train",
        fingerprint=train.fingerprint,
        mean=train.mean,
        std=train.std,
    )
    return Splits(train=hidden, val=digits.val, test=digits.test)


def test_the_secret_is_kept(secret: Splits, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was read"):
        secret.train.batch([0])
    with pytest.raises(AssertionError, match="was read"):
        train(config("digits-vit"), tmp_path / "run", command="", splits=secret)


@pytest.mark.parametrize("method", WITHOUT_LABELS)
def test_no_label_of_the_training_images_is_read(method: str, secret: Splits, tmp_path: Path) -> None:
    result = train(config(f"digits-{method}"), tmp_path / "run", command="test", splits=secret)
    assert isinstance(result.metrics, RepresentationMetrics)
    assert result.metrics.count == 359
    assert not result.model.has_head
    stored = load_model(tmp_path / "run")
    assert stored.classes == ()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["knn_accuracy"] == result.metrics.knn_accuracy
    assert (tmp_path / "run" / "reconstructed.npy").is_file() == (method in {"mae", "simmim", "mae-infonce"})
    report = write_report(
        tmp_path / "run", model=result.model, preprocessing=result.preprocessing, test=result.test
    ).read_text()
    assert "Neighbours agree" in report
    assert "Features without a classifier" in report
    again = train(config(f"digits-{method}", train__resume=True), tmp_path / "run", command="", splits=secret)
    assert again.already_finished
    assert again.metrics == result.metrics


def test_pictures_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        pixels = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    folder = {"data__name": str(tmp_path / "photos"), "train__duration": "2 steps"}
    result = train(config("digits-mae", **folder), tmp_path / "run", command="")
    assert isinstance(result.metrics, RepresentationMetrics)
    assert result.model.config.in_chans == 3
    said = capsys.readouterr().err
    assert "\nphotos has one class, so neighbours always agree: k-NN accuracy says nothing" in said
    with pytest.raises(ValueError, match=r"photos has one class only \(photos\): expected two or more"):
        train(config("digits-vit", **folder), tmp_path / "supervised", command="")


def test_a_teacher_alone_teaches(secret: Splits, tmp_path: Path) -> None:
    longer = {"train__duration": "8 epochs", "train__batch_size": 64, "optim__name": "muon"}
    train(config("digits-vit", **longer), tmp_path / "vit", command="")
    made = config("digits-distill", task__teacher=str(tmp_path / "vit"), **longer)
    result = train(made, tmp_path / "student", command="", splits=secret)
    assert isinstance(result.metrics, ClassificationMetrics)
    assert result.metrics.accuracy > 0.5  # ten classes
    assert load_model(tmp_path / "student").classes == load_dataset("digits").train.classes


def test_a_teacher_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task distill needs a teacher: --task\.teacher with a run"):
        prepare(load_config(None, {"task.name": "distill"}))
    train(config("digits-mae", train__duration="1 step"), tmp_path / "mae", command="")
    with pytest.raises(ValueError, match="has no head, so it has no answers to learn from"):
        prepare(config("digits-distill", task__teacher=str(tmp_path / "mae")))


def test_the_teachers_own_size_channels_and_normalisation(tmp_path: Path) -> None:
    changes = {
        "model__name": "vit_cifar",
        "model__patch_embed": "conv",
        "model__img_size": 16,
        "model__in_chans": 3,
    }
    digits = load_dataset("digits", img_size=(16, 16), in_chans=3)
    made = config("digits-vit", train__duration="1 step", **changes)
    result = train(made, tmp_path / "teacher", command="", splits=digits)
    run = prepare(config("digits-distill", task__teacher=str(tmp_path / "teacher")))
    pixels = load_dataset("digits").test.pixels(np.arange(5))
    seen = run.task.prepare(run.preprocessing.prepare(pixels))
    assert seen.shape == (5, 3, 16, 16)
    expected = result.preprocessing.prepare(pixels.expand(-1, 3, -1, -1))
    torch.testing.assert_close(seen, expected, atol=2e-2, rtol=0)  # resized before or after rounding


@pytest.mark.parametrize("method", ["mae", "dino", "jepa"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(f"digits-{method}")
    train(made, tmp_path / "whole", command="")
    save = training_loop.save_checkpoint

    def save_then_stop(folder: Path, state: Any) -> None:
        save(folder, state)
        if state.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "cut", command="")
    train(config(f"digits-{method}", train__resume=True), tmp_path / "cut", command="")
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_views_and_crops_are_augmented_each_by_itself() -> None:
    run = prepare(config("digits-dino", task__crops=3, task__crop_size=4, augment__resized_crop=0.3))
    batch = next(training_batches(run, 0))
    assert batch.keys() == {"views", "crops"}
    assert batch["views"].shape == (256, 2, 1, 8, 8)
    assert batch["crops"].shape == (256, 3, 1, 4, 4)
    assert (batch["views"][:, 0] != batch["views"][:, 1]).flatten(1).any(dim=1).float().mean() > 0.99
    assert (batch["crops"][:, 0] != batch["crops"][:, 1]).flatten(1).any(dim=1).float().mean() > 0.9
    again = next(training_batches(run, 0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with pytest.raises(ValueError, match="task dino compares views of one image: leave mixup and cutmix out"):
        prepare(config("digits-dino", augment__mixup=0.5))


def test_what_is_learnt_without_labels_starts_a_classifier(tmp_path: Path) -> None:
    before = train(config("digits-mae"), tmp_path / "mae", command="").model
    made = load_config(
        "digits-vit",
        {"model.name": None, "model.pretrained": str(tmp_path / "mae"), "train.duration": "1 step"},
    )
    run = prepare(made)
    own, other = run.model.state_dict(), before.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in other)
    assert own.keys() - other.keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("imagenet-")])
def test_published_settings_are_whole_recipes(name: str) -> None:
    made = load_config(name)
    assert made.data.name == "imagenet"
    assert made.train.batch_size >= 512
