"""Run folders, seen from outside: bring one to its end, and read what came out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitrail.config import RunConfig, load_config
from vitrail.studies.intervals import Estimate, share
from vitrail.training import train
from vitrail.training.judge import JUDGED

Score = Literal["accuracy", "knn_accuracy"]
"""What a run is judged by: a classifier's right answers, or those of the neighbours of its features."""

_NO_PART_OF_IT = {"train.seed", "train.output", "train.resume", "train.overwrite"}
"""Keys that do not make a run another one, but the same with another seed or elsewhere."""

_FILLED_IN = {"model.name", "data.frames"}
"""Keys that a run fills in itself where the config leaves them open."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a finished run found and what it cost."""

    folder: Path
    config: RunConfig
    score: Score
    test: Estimate | None
    """None: there were no test images."""
    val: Estimate | None
    """Of the weights that were kept; None: no validation images were held out."""
    curve: tuple[tuple[float, float], ...]
    """Epoch and validation score."""
    parameters: int
    macs_per_image: int
    images_seen: int
    petaflop: float
    """Of the training, all that a step computes: both passes, and those of decoders and teachers."""
    seconds: float
    tested_on: str
    """Fingerprint of the test images."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        ValueError: It is no run folder, or the run is not finished.
    """
    if not (folder / "config.yaml").is_file():
        what = "no run folder (it has no config.yaml)" if folder.is_dir() else "not there"
        raise ValueError(f"{folder} is {what}: expected the folder of a run, such as runs/digits-vit")
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} holds an unfinished run: vitrail train --output {folder} --resume")
    config = load_config(folder / "config.yaml")
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "val"]
    score: Score = "accuracy"
    if "knn_accuracy" in manifest or any("knn_accuracy" in record for record in records):
        score = "knn_accuracy"
    images = {name: part["images"] for name, part in manifest["data"].items()}
    if score == "knn_accuracy":
        images = {name: min(count, JUDGED) for name, count in images.items()}
    best = manifest.get("best_step")  # else the weights are those of the end
    kept = [record[score] for record in records if best in (None, record["step"])]
    val = kept[-1] if kept else None
    test = manifest.get("test_accuracy" if score == "accuracy" else "knn_accuracy")
    return FinishedRun(
        folder=folder,
        config=config,
        score=score,
        test=None if test is None else share(test, images["test"]),
        val=None if val is None else share(val, images["val"]),
        curve=tuple((record["epoch"], record[score]) for record in records),
        parameters=manifest["parameters"],
        macs_per_image=manifest["macs_per_image"],
        images_seen=manifest["images_seen"],
        petaflop=manifest["training_petaflop"],
        seconds=manifest["training_seconds"],
        tested_on=manifest["data"]["test"]["fingerprint"],
    )


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end in this folder."""
    return (folder / "manifest.json").is_file()


def finish_run(config: RunConfig, folder: Path, *, command: str) -> FinishedRun:
    """Read a run where it is finished, go on where it was interrupted, train it where there is none.

    Args:
        config: What it is to be; weights that it starts from must be there.
        folder: Its run folder.
        command: What the manifest states as the command.

    Raises:
        ValueError: The folder holds another run, or as `train`.
    """
    if (folder / "config.yaml").is_file():
        stored, wanted = settings(load_config(folder / "config.yaml")), settings(config)
        others = [
            key
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key) and not (key in _FILLED_IN and wanted[key] == "null")
        ]
        if others:
            raise ValueError(
                f"{folder} holds a run with another config ({', '.join(others)}): choose another folder with "
                "--output"
            )
    if not is_finished(folder):
        started = (folder / "checkpoints" / "last.pt").is_file()
        section = config.train.model_copy(update={"resume": started, "overwrite": not started})
        train(config.model_copy(update={"train": section}), folder, command=command)
    return read_run(folder)


def settings(config: RunConfig) -> dict[str, str]:
    """Everything that decides a run but its seed and where it lies: dotted key -> value as text."""
    flat = _flat(config.model_dump(mode="json"))
    return {key: text for key, text in flat.items() if key not in _NO_PART_OF_IT}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found
