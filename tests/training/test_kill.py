"""Runs that are killed (SIGKILL) at any moment go on to the same bits.

VITRAIL_KILLS=20 makes the long form; its result is in RESULTS.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from vitrail.config import RunConfig, load_config
from vitrail.training import train

KILLS = int(os.environ.get("VITRAIL_KILLS", "4"))
CONFIG = {
    "model.depth": 1,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "model.drop": 0.1,
    "model.drop_path": 0.2,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "augment.erase": 0.3,
    "augment.randaugment": 1,
    "train.ema": 0.9,
    "train.duration": "100 steps",
    "train.batch_size": 64,
    "train.log_every": "1 step",
    "train.eval_every": "20 steps",
    "train.save_every": "2 steps",
    "train.device": "cpu",
}


def _config(resume: bool = False) -> RunConfig:
    return load_config("digits-vit", CONFIG | {"train.resume": resume})


def _run(folder: str, resume: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress of a process that will be killed
    train(_config(resume), Path(folder), command="")


def _last_written(folder: Path) -> int:
    """When a step was last logged; 0: never."""
    try:
        return (folder / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _records(folder: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    train(_config(), folder, command="")
    return folder, time.monotonic() - began


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_runs_resume_to_the_same_bits(whole: tuple[Path, float], tmp_path: Path) -> None:
    expected, seconds = whole
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitrail.training"])
    moments = random.Random(0)
    folder = tmp_path / "run"
    kills = written = 0
    while kills < KILLS:
        before = _last_written(folder)
        process = context.Process(target=_run, args=(str(folder), folder.exists()))
        process.start()
        # From its first step on, which comes sooner or later by the machine: all kills together leave half
        # of the run.
        patience = moments.uniform(0.0, seconds / KILLS)
        deadline, hopeless = None, time.monotonic() + 120
        # Every other kill waits for a checkpoint that is being written.
        while process.is_alive() and time.monotonic() < hopeless:
            if kills % 2 and any(folder.glob("checkpoints/*.part")):
                written += 1
                break
            if deadline is None and _last_written(folder) != before:
                deadline = time.monotonic() + patience
            if kills % 2 == 0 and deadline is not None and time.monotonic() > deadline:
                break
        if not process.is_alive():
            break  # it came to its end before the blow
        process.kill()
        process.join()
        kills += 1
    assert kills >= min(KILLS, 3)
    assert written >= 1
    train(_config(resume=folder.exists()), folder, command="")
    for name in ("model/model.safetensors", "model/config.json", "evaluation/digits-test.npz"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert _records(folder) == _records(expected)
    assert not list(folder.rglob("*.part"))
