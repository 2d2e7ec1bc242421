"""Checkpoints: damaged, hostile, of another model, and disks that are full."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from vitrail.config import OptimSection
from vitrail.models import build_model
from vitrail.tasks import build_task
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import TrainingState, read_checkpoint, restore_checkpoint, save_checkpoint
from vitrail.training.optim import build_optimizer


def _state(depth: int = 1, step: int = 0) -> TrainingState:
    torch.manual_seed(step)
    model = build_model("vit_digits", depth=depth, embed_dim=16, num_heads=2)
    task = build_task("classify", model)
    optimizer = build_optimizer(task, model, OptimSection())
    average = MovingAverage(model, 0.9)
    task({"images": torch.randn(4, 1, 8, 8), "targets": torch.arange(4)}, 0)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update()
    return TrainingState(task=task, optimizer=optimizer, average=average, step=step, seconds=1.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, after steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, _state(step=step))
    return tmp_path


def _step(folder: Path) -> int:
    state = _state()
    assert restore_checkpoint(folder, state)
    return state.step


def test_everything_comes_back(folder: Path) -> None:
    saved, found = _state(step=2), _state(step=7)
    assert restore_checkpoint(folder, found)
    assert (found.step, found.seconds) == (2, 1.5)
    for name, value in saved.task.state_dict().items():
        assert torch.equal(value, found.task.state_dict()[name]), name
    for name, value in saved.average.model.state_dict().items():
        assert torch.equal(value, found.average.model.state_dict()[name]), name
    for ours, theirs in zip(found.optimizer.state.values(), saved.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_no_checkpoint_changes_nothing(tmp_path: Path) -> None:
    state = _state(step=3)
    assert not restore_checkpoint(tmp_path, state)
    assert state.step == 3


class _Run:
    """A pickle that wants to run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def _damages(folder: Path) -> dict[str, bytes]:
    whole = (folder / "last.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    hostile = io.BytesIO()
    torch.save({"step": 9, "task": _Run(folder / "ran")}, hostile)
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("notes.txt", "hello")
    other = io.BytesIO()
    torch.save([1, 2, 3], other)
    legacy = io.BytesIO()
    torch.save({"step": 9, "task": _Run(folder / "ran")}, legacy, _use_new_zipfile_serialization=False)
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "half": whole[: len(whole) // 2],
        "tail missing": whole[:-100],
        "one bit flipped": bytes(flipped),
        "zip of something else": foreign.getvalue(),
        "list": other.getvalue(),
        "raw pickle that runs code": pickle.dumps(_Run(folder / "ran")),
        "checkpoint that runs code": hostile.getvalue(),
        "old format that runs code": legacy.getvalue(),
    }


@pytest.mark.parametrize("kind", [
    "empty", "text", "half", "tail missing", "one bit flipped", "zip of something else", "list",
    "raw pickle that runs code", "checkpoint that runs code", "old format that runs code",
])  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = _damages(folder)[kind]
    (folder / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*last\.pt cannot be read") as error:
        read_checkpoint(folder / "last.pt")
    assert "\n" not in str(error.value)
    assert _step(folder) == 1
    assert "going on from previous.pt, step 1" in capsys.readouterr().err
    (folder / "previous.pt").write_bytes(content)
    with pytest.raises(ValueError, match="no other checkpoint is whole: start anew with --overwrite"):
        _step(folder)
    assert not (folder / "ran").exists()


def test_a_run_killed_between_two_renamings_has_its_newest_checkpoint(folder: Path) -> None:
    (folder / "last.pt").rename(folder / "new.pt")
    assert _step(folder) == 2


def test_a_checkpoint_of_another_model_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another model or optimiser") as error:
        restore_checkpoint(folder, _state(depth=2))
    assert "\n" not in str(error.value)


def test_a_full_disk_keeps_what_is_there(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # without a handler the process would end
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a file that can grow no further
    try:
        with pytest.raises(ValueError, match=r"after step 3 cannot be written .*make room there") as error:
            save_checkpoint(folder, _state(step=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
