"""What is measured on finished runs, kept in the run folder so that it is measured once.

<run>/measures/<name>.json    what was asked, and the numbers with their intervals
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitrail.datasets import Images, Preprocessing, Splits, load_section
from vitrail.evaluation.corruptions import robustness
from vitrail.evaluation.dense import dense_probe
from vitrail.evaluation.probe import Share, probe
from vitrail.explain.heads import head_statistics
from vitrail.files import write_whole
from vitrail.models import Encoder
from vitrail.pretrained import load_model
from vitrail.studies.intervals import Estimate, over_seeds, share
from vitrail.studies.plan import Measure
from vitrail.studies.runs import FinishedRun

HEAD_IMAGES, HEAD_PARTS = 1000, 10
"""Test images on which attention is measured; the interval comes from so many parts of them."""
_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How a number is written."""

    name: str
    percent: bool = False
    digits: int = 3
    unit: str = ""

    def number(self, value: float) -> str:
        """A value without its unit."""
        return f"{100 * value:.2f}" if self.percent else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)} {'%' if self.percent else self.unit}".rstrip()

    def gap(self, value: float) -> str:
        """A difference with its unit."""
        return f"{self.number(value)} {'points' if self.percent else self.unit}".rstrip()


UNITS = {
    "test": Unit(name="test accuracy", percent=True),
    "val": Unit(name="validation accuracy", percent=True),
    "linear": Unit(name="linear classifier", percent=True),
    "knn": Unit(name="nearest training images", percent=True),
    "r2": Unit(name="edges told by single patches, R²"),
    "distance": Unit(name="reach of attention", digits=2, unit="pixels"),
}
"""How the numbers of measures are written; those of robustness are accuracies."""


def unit_of(number: str) -> Unit:
    """How `probe.linear`, `robustness.noise` or `test` is written."""
    measure, _, name = number.rpartition(".")
    if name not in UNITS:
        under = "over all damage" if name == "mean" else f"under {name}"
        return Unit(name=f"accuracy {under}", percent=True)
    found = UNITS[name]
    if measure in ("", "probe", "dense", "heads"):
        return found
    return Unit(name=f"{measure}, {found.name}", percent=found.percent, digits=found.digits, unit=found.unit)


def kept(folder: Path, measure: Measure) -> dict[str, Estimate] | None:
    """The numbers of a measure that a run folder holds; None where it was not measured or asked otherwise."""
    file = _file(folder, measure)
    if not file.is_file():
        return None
    stored = json.loads(file.read_text())
    if stored["asked"] != measure.model_dump(mode="json"):
        return None
    return {name: Estimate(**own) for name, own in stored["numbers"].items()}


def measured(run: FinishedRun, measure: Measure) -> dict[str, Estimate]:
    """The numbers of a measure on a run: read where they were measured before, else measured and written."""
    if (found := kept(run.folder, measure)) is not None:
        return found
    found = _measure(run, measure)
    file = _file(run.folder, measure)
    file.parent.mkdir(exist_ok=True)
    content = {
        "asked": measure.model_dump(mode="json"),
        "numbers": {name: own.to_dict() for name, own in found.items()},
    }
    write_whole(file, json.dumps(content, indent=1) + "\n")
    return found


def _file(folder: Path, measure: Measure) -> Path:
    return folder / "measures" / f"{measure.title.replace('/', '_')}.json"


def _measure(run: FinishedRun, measure: Measure) -> dict[str, Estimate]:
    stored = load_model(run.folder)
    preprocessing = Preprocessing.from_dict(stored.preprocessing)
    on_gpu = torch.cuda.is_available() and run.config.train.device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    model = stored.model.to(device)
    splits = _splits(run, measure, preprocessing)
    if measure.kind == "probe":
        judged = probe(model, preprocessing, splits, batch_size=_BATCH, device=device)
        return {"linear": _estimate(judged.linear), "knn": _estimate(judged.knn)}
    if measure.kind == "dense":
        dense = dense_probe(model, preprocessing, splits, batch_size=_BATCH, device=device)
        low, high = dense.interval
        return {"r2": Estimate(value=dense.r2, low=low, high=high, seeds=1)}
    if measure.kind == "heads":
        return {"distance": _reach(model, splits.test, preprocessing, device)}
    test = splits.test
    found = robustness(
        model, test, preprocessing, corruptions=measure.corruptions, batch_size=_BATCH, device=device
    )
    # Five severities of the same images count as one look at each: rather too wide than too narrow.
    shares = {name: share(found.mean(name), len(test)) for name in found.accuracy}
    return shares | {"mean": share(found.overall, len(test))}


def _reach(model: Encoder, images: Images, preprocessing: Preprocessing, device: torch.device) -> Estimate:
    """Mean attention distance over all heads and layers, in pixels."""
    count = min(len(images), HEAD_IMAGES)
    distances = []
    for part in np.array_split(np.arange(count), HEAD_PARTS):
        inputs = preprocessing.prepare(images.pixels(part).to(device))
        layers = head_statistics(model, [inputs])
        distances.append(float(torch.cat([own.distance for own in layers]).nanmean()))
    found = over_seeds(distances)
    return Estimate(value=found.value, low=found.low, high=found.high, seeds=1)


def _splits(run: FinishedRun, measure: Measure, preprocessing: Preprocessing) -> Splits:
    """The images that a measure takes, as the run's model takes them."""
    data = run.config.data
    wanted = {
        "name": measure.dataset or data.name,
        "train_fraction": measure.train_fraction,
        "synthetic": 0.0,
    }
    return load_section(
        data.model_copy(update=wanted), img_size=preprocessing.img_size, in_chans=preprocessing.in_chans
    )


def _estimate(found: Share) -> Estimate:
    low, high = found.interval
    return Estimate(value=found.accuracy, low=low, high=high, seeds=1)
