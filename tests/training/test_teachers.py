"""Runs from the command line whose teacher is a network of another kind, in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitrail.cli import main
from vitrail.config import load_config
from vitrail.datasets import ImageSet, Splits, load_dataset
from vitrail.pretrained import load_model, save_program, trust_program
from vitrail.tasks import Distill
from vitrail.training import loop as training_loop
from vitrail.training import prepare, train, training_batches
from vitrail.training.checkpoint import TrainingState

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = [str(number) for number in range(10)]
PREPARED: dict[str, Any] = {
    "img_size": [16, 12],
    "in_chans": 3,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear",
    "crop_ratio": 1.0,
}
TINY = {
    "model.depth": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "train.duration": "3 epochs",
    "train.batch_size": 256,
    "train.save_every": "4 steps",
    "train.device": "cpu",
}


def cnn(channels: int = 3) -> nn.Module:
    """Two convolutions, for images of any size."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    network = cnn()
    file = tmp_path_factory.mktemp("networks") / "cnn.pt2"
    save_program(file, network, classes=CLASSES, preprocessing=PREPARED)
    return file, network


def config(file: Path, **changes: Any) -> Any:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("digits-distill", TINY | {"task.teacher": str(file)} | changes)


def words(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def test_a_student_learns_from_a_cnn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes to answer as a teacher that learnt the digits does, and no label is read."""
    torch.manual_seed(0)
    digits, network = load_dataset("digits"), cnn(channels=1)
    pixels = torch.from_numpy(digits.train.images).float() / 255
    labels = torch.from_numpy(digits.train.labels).long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(80):
        some = torch.randint(len(pixels), (128,))
        loss = F.cross_entropy(network((pixels[some] - 0.3) / 0.4), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prepared = PREPARED | {"img_size": [8, 8], "in_chans": 1, "mean": [0.3], "std": [0.4]}
    save_program(tmp_path / "cnn.pt2", network, classes=digits.train.classes, preprocessing=prepared)
    options = TINY | {"train.duration": "20 epochs", "train.batch_size": 64, "model.embed_dim": 32}
    options |= {
        "optim.lr": 5e-3,
        "train.save_every": "20 epochs",
        "task.teacher": str(tmp_path / "cnn.pt2"),
        "train.output": str(tmp_path / "run"),
    }
    main(["train", "digits-distill", *words(options)])
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert float(accuracy) > 80
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    agreement = [record["agreement"] for record in records if "agreement" in record]
    assert agreement[-1] > 0.8 > agreement[0]


def test_the_teacher_sees_images_of_its_own_kind(teacher: tuple[Path, nn.Module]) -> None:
    """Grey images of 8 pixels, at the student's mean -> three channels of 16 x 12, at the teacher's."""
    run = prepare(config(teacher[0], train__progressive={"0%": 6, "60%": 8}))
    assert isinstance(run.task, Distill)
    for step, size in ((0, 6), (run.plan.total - 1, 8)):
        images = next(training_batches(run, step))["images"]
        assert images.shape[1:] == (1, size, size)
        own = images * run.preprocessing.std[0] + run.preprocessing.mean[0]
        wide = F.interpolate(own, (16, 12), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(PREPARED[name]).view(3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            expected = teacher[1]((wide - mean) / std)
            torch.testing.assert_close(run.task._ask(images)[0], expected, atol=1e-5, rtol=1e-4)
    assert run.task.state_dict().keys() == {f"model.{name}" for name in run.model.state_dict()}


def test_a_run_resumes_to_the_same_weights(
    teacher: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(teacher[0]), tmp_path / "whole", command="test")
    save = training_loop.save_checkpoint

    def save_then_stop(folder: Path, state: TrainingState) -> None:
        save(folder, state)
        if state.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config(teacher[0]), tmp_path / "half", command="test")
    train(config(teacher[0], train__resume=True), tmp_path / "half", command="test")
    whole, half = (load_model(tmp_path / name).model.state_dict() for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_what_cannot_teach_is_said_in_one_line(teacher: tuple[Path, nn.Module], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classes": ["zero", *CLASSES[1:]]}, "class 0 is '0' in the data, 'zero' for the teacher"),
        (
            {"preprocessing": PREPARED | {"interpolation": "cubic"}},
            r"cnn\.pt2\.json: unknown interpolation 'cubic'",
        ),
        (
            {"preprocessing": {key: value for key, value in PREPARED.items() if key != "mean"}},
            r"cnn\.pt2\.json: preprocessing: mean is missing",
        ),
    ]
    file = tmp_path / "cnn.pt2"
    file.write_bytes(teacher[0].read_bytes())
    good = json.loads(Path(f"{teacher[0]}.json").read_text())
    for changes, message in cases:
        Path(f"{file}.json").write_text(json.dumps(good | changes))
        trust_program(file)
        with pytest.raises(ValueError, match=message) as error:
            prepare(config(file))
        assert "\n" not in str(error.value)
    Path(f"{file}.json").unlink()
    with pytest.raises(ValueError, match=r"does not tell its classes and preprocessing: expected cnn\.pt2"):
        prepare(config(file))
    with pytest.raises(ValueError, match="Program gives no features to learn from: leave features out"):
        prepare(config(teacher[0], task__features="l2"))
    with pytest.raises(ValueError, match=r"task distill needs a teacher: .* or FILE\.pt2"):
        prepare(load_config("digits-vit", {"task.name": "distill"}))


def test_the_command_says_it_in_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cnn.pt2").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits-distill", "--task.teacher", str(tmp_path / "cnn.pt2")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_a_teacher_of_images_refuses_clips(teacher: tuple[Path, nn.Module]) -> None:
    clips = ImageSet.from_arrays(np.zeros((20, 3, 1, 14, 14), np.uint8), np.arange(20) % 10)
    tiny = {"model.name": "video_vit_28", "model.img_size": 14, "task.name": "distill"}
    asked = load_config(None, tiny | {"task.teacher": str(teacher[0]), "train.device": "cpu"})
    with pytest.raises(ValueError, match=r"the teacher .*cnn\.pt2 takes images, and .* has clips"):
        prepare(asked, Splits(train=clips, val=None, test=clips))
