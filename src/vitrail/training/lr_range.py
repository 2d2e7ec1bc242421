"""The learning rate range test: train while the rate grows, see where the loss is lowest.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3. What differs: the rate grows
exponentially, and the loss is smoothed without delay (a plain moving average of ten steps lags by them, which
at 100 steps over six decades is a factor of four in the rate).

Which rate to take from the curve: others take that of the steepest descent, or a tenth of that at the
minimum. Measured over 21 tests of three recipes (AdamW; 100, 200 and 400 steps; three seeds), the steepest
descent lay anywhere from 1e-6 to 4e-3, because AdamW makes the loss fall at every small rate, and first of
all from its random start. The rate at the lowest smoothed loss lay from 1.4e-3 to 5e-3 (with 200 steps and
more from 1.4e-3 to 3.9e-3), and whole runs were best from 2e-3 to 4e-3, with warm-up. So that is suggested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrail.config import RunConfig
from vitrail.training.checkpoint import TrainingState
from vitrail.training.loop import NotFiniteError, fit
from vitrail.training.optim import build_optimizer
from vitrail.training.setup import prepare, training_batches

_MEMORY = 0.1
"""Share of the ramp over which the loss is smoothed."""
_STOP = 4.0
"""The ramp ends where the smoothed loss is this many times its minimum."""
_CAUTIOUS = 1 / 3
"""Smith's lower bound for a cycle is a third or a quarter of the upper one."""


@dataclass(frozen=True, kw_only=True)
class LrRange:
    """What a range test found."""

    suggestion: float
    """The rate at the lowest smoothed loss, for `optim.lr`: the peak of a schedule with warm-up."""
    cautious: float
    """A third of it, where there is no warm-up or pretrained weights are to be kept."""
    steepest: float
    """The rate at which the smoothed loss falls fastest; see the module for why it is not the suggestion."""
    configured: float
    """The recipe's `optim.lr`."""
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def text(self) -> str:
        """What was found, in one line."""
        return (
            f"learning rate {self.suggestion:.1e}, where the smoothed loss is lowest (cautious: "
            f"{self.cautious:.1e}, a third of it); the recipe has {self.configured:.1e}"
        )


def find_learning_rate(
    config: RunConfig, lowest: float = 1e-6, highest: float = 1.0, steps: int = 200
) -> LrRange:
    """Train a fresh model for some steps while the learning rate grows exponentially; nothing is kept of it.

    Warm-up and schedule are the ramp's; everything else is the config's, clipping and augmentation too.

    Args:
        config: Of the run whose learning rate is looked for.
        lowest: Learning rate of the first step.
        highest: Learning rate of the last one; the ramp ends before where the loss explodes.
        steps: Length of the ramp, at least 20.

    Raises:
        ValueError: As `prepare` would; a range that is none; or the lowest loss lies at an end of the range.
    """
    if not 0.0 < lowest < highest:
        raise ValueError(f"expected 0 < lowest < highest, got {lowest:g} and {highest:g}")
    if steps < 20:
        raise ValueError(f"steps: expected at least 20, got {steps}")
    rates = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    return evaluate_ramp(rates, _ramp(config, rates), configured=config.optim.lr)


def evaluate_ramp(rates: Sequence[float], losses: Sequence[float], *, configured: float) -> LrRange:
    """Find the rates in a finished ramp.

    Args:
        rates: Learning rate of every step of the whole ramp, exponentially growing.
        losses: Loss of every step that was made; fewer, where the ramp was stopped.
        configured: The recipe's learning rate, for comparison.

    Raises:
        ValueError: The lowest loss lies at an end of the range.
    """
    made = len(losses)
    smoothed = smooth(losses, _MEMORY * len(rates))
    best = int(smoothed.argmin())
    if best == 0:
        raise ValueError(
            f"the loss rose from the lowest learning rate on ({rates[0]:g}): begin lower, or see whether the "
            "model learns at all"
        )
    if best == len(rates) - 1:
        raise ValueError(f"the loss still fell at the highest learning rate ({rates[-1]:g}): end higher")
    slopes = np.gradient(smoothed, np.log(rates[:made]))
    return LrRange(
        suggestion=rates[best],
        cautious=_CAUTIOUS * rates[best],
        steepest=rates[int(slopes[: best + 1].argmin())],
        configured=configured,
        rates=tuple(rates[:made]),
        losses=tuple(losses),
        smoothed=tuple(smoothed.tolist()),
    )


def smooth(losses: Sequence[float], memory: float) -> npt.NDArray[np.float64]:
    """Exponential average over `memory` steps, forwards and backwards, so that minima stay where they are.

    Both are corrected for their start (Kingma and Ba 2015, section 3).
    """
    values = np.asarray(losses, dtype=np.float64)
    return (_average(values, memory) + _average(values[::-1], memory)[::-1]) / 2


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """A config whose run has so many steps, each like most of the whole run's.

    Images have the size that the run ends with, all augmentation is on, and every step is logged.
    """
    last = {"0%": list(config.train.progressive.values())[-1]} if config.train.progressive else {}
    train = {"duration": f"{steps} steps", "log_every": "1 step", "progressive": last}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "augment": config.augment.model_copy(update={"stop_at": "100%"}),
        }
    )


def _average(values: npt.NDArray[np.float64], memory: float) -> npt.NDArray[np.float64]:
    decay, state, averages = 1 - 1 / max(memory, 1.0), 0.0, []
    for count, value in enumerate(values, start=1):
        state = decay * state + (1 - decay) * value
        averages.append(state / (1 - decay**count))
    return np.array(averages)


class _ExplodedError(Exception):
    """The ramp has gone far enough."""


def _ramp(config: RunConfig, rates: Sequence[float]) -> list[float]:
    """Train with these rates, one a step -> the losses until the end or the explosion."""
    run = prepare(shortened(config, len(rates)))
    section = config.train
    state = TrainingState(
        task=run.task,
        optimizer=build_optimizer(run.task, run.model, config.optim),
        scaler=run.accelerator.scaler,
    )
    losses: list[float] = []

    def keep(record: dict[str, Any]) -> list[str]:
        losses.append(record["loss"])
        averages = _average(np.array(losses), _MEMORY * len(rates))
        lowest = averages.min()
        if averages[-1] > lowest + (_STOP - 1) * abs(lowest):
            raise _ExplodedError
        return []

    # Either is how a ramp should end.
    with TemporaryDirectory() as folder, suppress(_ExplodedError, NotFiniteError):
        fit(
            state,
            partial(training_batches, run),
            plan=run.plan,
            schedule=rates.__getitem__,
            accelerator=run.accelerator,
            clip_norm=config.optim.clip_norm,
            metrics=Path(folder) / "metrics.jsonl",
            seed=section.seed,
            micro_batch=None if section.micro_batch == "auto" else section.micro_batch,
            split_on_out_of_memory=section.micro_batch == "auto",
            compile=section.compile,
            watch=keep,
        )
    return [loss for loss in losses if math.isfinite(loss)]
