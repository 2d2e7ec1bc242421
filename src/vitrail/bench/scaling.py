"""How the cost of a pass grows with image side, batch, depth and width, and what a training would take.

Each is varied alone, from half the model's to twice (the batch from one to eight times), and a power law
time = c * value^k is fitted by least squares on the logarithms. The exponent of the multiply-adds stands
beside: what is above it is overhead that grows, what is below it is overhead that is paid only once.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.bench.bench import aligned, checked, heading, table_csv, threads
from vitrail.bench.chart import scaling_chart, write_charts
from vitrail.bench.machine import machine
from vitrail.bench.measure import DTYPES, Settings, find_models, make_pass, placed, training_step, with_size
from vitrail.bench.peers import input_shape, random_model
from vitrail.evaluation.cost import count_macs
from vitrail.evaluation.timing import Act, in_turns, waiting
from vitrail.files import write_whole
from vitrail.models import model_config

_FACTORS = (0.5, 1.0, 1.5, 2.0)
_IMAGENET = 1_281_167
_CLEAR = 0.9
"""R squared below which an exponent says little."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The cost of a pass against one thing."""

    what: str
    """image side, batch, depth or width."""
    values: tuple[float, ...]
    """Pixels, images, blocks or channels."""
    seconds: tuple[float, ...]
    """Median of a pass at each value."""
    macs: tuple[int, ...]
    """Multiply-adds of a forward pass at each value, of the whole batch."""
    exponent: float
    """Of the time."""
    fit: float
    """Coefficient of determination (R squared) of that fit; 1: exactly a power law."""
    macs_exponent: float

    def text(self) -> str:
        """The fitted law and a table, for a terminal."""
        columns = zip(self.values, self.seconds, self.macs, strict=True)
        rows = [(self.what, "ms/batch", "GMACs/batch")]
        rows += [(f"{v:g}", f"{1000 * second:.2f}", f"{macs / 1e9:.3f}") for v, second, macs in columns]
        law = f"time ~ {self.what} ^ {self.exponent:.2f} (R squared {self.fit:.3f})"
        lines = [f"{law}, MACs ~ {self.what} ^ {self.macs_exponent:.2f}", aligned(rows)]
        if self.fit < _CLEAR:
            lines.append("no clear power law: the model is too small, or the machine too busy, to tell")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """What a training would take at the speed of a few steps."""

    images: int
    """Of the data set."""
    epochs: int
    batch: int
    seconds_per_step: float
    """Forward, backward and AdamW's update, median; no reading or augmenting of images."""
    hardware: str
    """What took these steps."""

    @property
    def seconds_per_epoch(self) -> float:
        """The last batch may be smaller and counts as a whole one."""
        return self.seconds_per_step * math.ceil(self.images / self.batch)

    @property
    def seconds(self) -> float:
        """Of all epochs."""
        return self.epochs * self.seconds_per_epoch

    def text(self) -> str:
        """One line."""
        return (
            f"{self.epochs} epochs of {self.images:,} images would take {_duration(self.seconds)} "
            f"({_duration(self.seconds_per_epoch)} an epoch) on {self.hardware}: "
            f"{1000 * self.seconds_per_step:.1f} ms a step of {self.batch} images with AdamW, measured, to "
            "which reading and augmenting the images add"
        )


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """All that a run of `vitrail bench --scaling` found."""

    model: str
    machine: dict[str, Any]
    settings: Settings
    growths: tuple[Growth, ...]
    training_time: TrainingTime

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = self.training_time
        extrapolated = {"seconds_per_epoch": found.seconds_per_epoch, "seconds": found.seconds}
        return asdict(self) | {"training_time": asdict(found) | extrapolated}

    def csv(self) -> str:
        """A line for each value."""
        return table_csv(
            [
                {"model": self.model, "what": growth.what, "value": value, "ms_per_batch": 1000 * second,
                 "macs_per_batch": macs, "exponent": growth.exponent, "fit": growth.fit,
                 "macs_exponent": growth.macs_exponent}
                for growth in self.growths
                for value, second, macs in zip(growth.values, growth.seconds, growth.macs, strict=True)
            ]
        )  # fmt: skip


def run_scaling(
    pattern: str,
    settings: Settings,
    say: Callable[[str], object],
    *,
    dataset_size: int = _IMAGENET,
    epochs: int = 300,
) -> Scaling:
    """Measure how a model's cost grows.

    Args:
        pattern: One model; see `find_models`.
        settings: The passes; its largest batch is that of the training, its smallest that of depth, width
            and image side.
        say: Is given the lines for a terminal as soon as they are known.
        dataset_size: Images of the training to extrapolate to; default ImageNet-1k.
        epochs: Of that training.

    Raises:
        ValueError: No such model or device, or several models; settings that make no sense.
    """
    settings = checked(settings, say)
    for what, number in (("--dataset-size", dataset_size), ("--epochs", epochs)):
        if number < 1:
            raise ValueError(f"{what}: expected a whole number from 1 on, got {number}")
    if len(models := find_models(pattern)) != 1:
        raise ValueError(f"--scaling takes one model, {pattern!r} matches {len(models)}: name one of them")
    ((name, changes),) = models
    changes = with_size(changes, settings.img_size)
    about = machine(device=torch.device(settings.device))
    points = _points(name, changes, settings)
    say(f"{heading(about, settings)}\n{name}")
    growths = []
    for what, own in points.items():
        growths.append(_grow(name, what, own, settings))
        say("\n" + growths[-1].text())
    training = _training_time(name, changes, settings, about, dataset_size, epochs)
    say("\n" + training.text())
    return Scaling(
        model=name, machine=about, settings=settings, growths=tuple(growths), training_time=training
    )


def write_scaling(folder: Path, found: Scaling) -> Path:
    """Write scaling.json, scaling.csv, scaling.png and scaling.svg into a folder, made where it is missing.

    Returns:
        The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "scaling.json", json.dumps(found.to_dict(), indent=2) + "\n")
    write_whole(folder / "scaling.csv", found.csv())
    return write_charts(folder, "scaling", scaling_chart(found.growths))


def fit_power_law(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Least squares of log cost = log c + k log value.

    Args:
        values: Positive, at least two different ones.
        costs: Positive.

    Returns:
        The exponent k, and R squared.
    """
    x, y = ([math.log(own) for own in row] for row in (values, costs))
    slope, _ = statistics.linear_regression(x, y)
    return slope, 1.0 if len(set(y)) == 1 else statistics.correlation(x, y) ** 2


_Point = tuple[float, dict[str, Any], int]
"""The value of what varies, fields of the config, images a batch."""


def _points(name: str, changes: dict[str, Any], settings: Settings) -> dict[str, list[_Point]]:
    """What varies -> its points, each value once."""
    config, batch = model_config(name, **changes), min(settings.batches)
    side, depth = max(config.image_shape), "depth" if hasattr(config, "depth") else "depths"
    width = "embed_dim" if hasattr(config, "embed_dim") else "embed_dims"
    found: dict[str, dict[float, _Point]] = {"image side": {}, "batch": {}, "depth": {}, "width": {}}
    for factor in _FACTORS:
        pixels = round(side * factor)
        found["image side"][pixels] = (pixels, {**changes, "img_size": pixels}, batch)
        blocks = _scaled(getattr(config, depth), factor)
        found["depth"][_total(blocks)] = (_total(blocks), {**changes, depth: blocks}, batch)
        # As many heads as before, of another width: their number need not divide.
        channels = _scaled(getattr(config, width), factor)
        found["width"][_total(channels)] = (_total(channels), {**changes, width: channels}, batch)
    found["batch"] = {
        images: (images, changes, images) for images in (batch, 2 * batch, 4 * batch, 8 * batch)
    }
    return {what: list(points.values()) for what, points in found.items()}


def _scaled(value: Any, factor: float) -> Any:
    """A whole number, or one for each stage, times a factor."""
    return (
        tuple(_scaled(own, factor) for own in value)
        if isinstance(value, tuple)
        else max(1, round(value * factor))
    )


def _total(value: Any) -> int:
    return sum(value) if isinstance(value, tuple) else int(value)


def _grow(name: str, what: str, points: Sequence[_Point], settings: Settings) -> Growth:
    """Take the times of all points, in turns."""
    acts: dict[str, Act] = {}
    macs = []
    for value, changes, batch in points:
        model = random_model(name, changes)
        shape = input_shape(model.config)
        macs.append(batch * count_macs(model, shape))
        acts[str(value)] = make_pass(placed(model, settings), batch, shape, settings)
    wait = waiting(torch.device(settings.device))
    taken = in_turns(acts, settings.repetitions, warmup=settings.warmup, wait=wait)
    values, seconds = [point[0] for point in points], [statistics.median(own) for own in taken.values()]
    exponent, fit = fit_power_law(values, seconds)
    return Growth(
        what=what,
        values=tuple(values),
        seconds=tuple(seconds),
        macs=tuple(macs),
        exponent=exponent,
        fit=fit,
        macs_exponent=fit_power_law(values, macs)[0],
    )


def _training_time(
    name: str, changes: dict[str, Any], settings: Settings, about: dict[str, Any], images: int, epochs: int
) -> TrainingTime:
    """Take some whole steps at the largest batch."""
    settings = replace(settings, training=True)
    model = placed(random_model(name, changes), settings)
    batch, device = max(settings.batches), torch.device(settings.device)
    step = training_step(
        model,
        torch.randn(batch, *input_shape(model.config), device=device),
        dtype=DTYPES[settings.dtype],
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
    )
    taken = in_turns({name: step}, settings.repetitions, warmup=settings.warmup, wait=waiting(device))
    hardware = about.get("gpu") or f"{about['cpu']} with {threads(about)}"
    return TrainingTime(
        images=images,
        epochs=epochs,
        batch=batch,
        seconds_per_step=statistics.median(taken[name]),
        hardware=f"{hardware} in {settings.dtype}",
    )


def _duration(seconds: float) -> str:
    """Seconds in the unit in which they are a number of moderate size."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
