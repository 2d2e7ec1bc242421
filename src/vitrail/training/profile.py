"""Where the time of a training step goes, and what to change.

The loop itself is measured, not a copy of it: what it is given (batches, backward, optimiser, average) tells
a stopwatch when it begins and ends. On a GPU the device is waited for at each of these points, which costs
the overlap of host and device: the shares are right, but their sum is longer than an undisturbed step.
Operators are counted by torch.profiler in steps of their own, because it slows them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitrail.config import RunConfig
from vitrail.evaluation.timing import waiting
from vitrail.tasks import Batch
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import TrainingState
from vitrail.training.loop import fit
from vitrail.training.lr_range import shortened
from vitrail.training.optim import build_optimizer, learning_rate
from vitrail.training.setup import Run, augmented_batches, make_plan, prepare, read_batches, training_batches

PARTS = {
    "data": "wait for data",
    "augmentation": "to the device, augmentation",
    "forward": "forward",
    "backward": "backward",
    "clip": "gradient clipping",
    "optimiser": "optimiser",
    "average": "moving average",
    "logging": "logging",
    "other": "rest of the loop",
}
"""The parts of a step, in their order, and what the table calls them."""

_WARMUP, _PROFILED, _MOST_OPERATORS = 3, 5, 10
_MUCH = {"data": 20.0, "augmentation": 30.0, "clip": 10.0, "logging": 5.0}
"""Shares in per cent from which on a part is worth a change."""
_MUCH_UPDATING = 30.0
"""The same of optimiser and average together: their time does not depend on the batch."""
_BUSY = 50.0
"""A GPU that computes for less than this share of a step waits for the host."""
_SHORT_US = 20.0
"""An operator's own time on a CPU below which a good part of it is the call."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One of torch's operators, by its own time without what it calls."""

    name: str
    calls: float
    """A step."""
    milliseconds: float
    """A step; on the GPU where there is one."""
    share: float
    """Of all operators' own time, in per cent."""


@dataclass(frozen=True, kw_only=True)
class TrainingProfile:
    """Where the time of a step goes."""

    device: str
    precision: str
    """accelerate's word: no, bf16 or fp16."""
    batch_size: int
    milliseconds: float
    """Of a step."""
    shares: dict[str, float]
    """Per cent of a step by the names of `PARTS`; they sum to 100."""
    operators: tuple[Operator, ...]
    """The longest ones."""
    operator_us: float
    """Mean of all operators' own time, microseconds a call."""
    busy: float | None
    """Per cent of a step in which the GPU computes; None without one."""

    @property
    def images_per_second(self) -> float:
        """Of this process."""
        return 1000 * self.batch_size / self.milliseconds

    def advice(self) -> list[str]:
        """What to change, one line each; what promises most comes first."""
        found: list[tuple[float, str]] = []
        updating = self.shares["optimiser"] + self.shares["average"]
        for part, line in (
            ("data", "take --data.storage memory, or more --data.workers"),
            (
                "augmentation",
                "take fewer or cheaper parts of augment (RandAugment and large rotations cost most)",
            ),
            ("clip", "take --optim.clip_norm 0 where the gradient norms in the report are steady"),
            ("logging", "take a longer --train.log_every"),
        ):
            if self.shares[part] > _MUCH[part]:
                found.append((self.shares[part], f"{PARTS[part]} {self.shares[part]:.0f} %: {line}"))
        if updating > _MUCH_UPDATING:
            line = "take a larger --train.batch_size (and optim.lr); it costs the same for any batch"
            found.append((updating, f"{PARTS['optimiser']} and {PARTS['average']} {updating:.0f} %: {line}"))
        if self.busy is not None and self.busy < _BUSY:
            line = "it waits for the host; take --train.compile true, or a larger --train.batch_size"
            found.append((100 - self.busy, f"the GPU computes {self.busy:.0f} % of the time: {line}"))
        if self.busy is None and self.operator_us < _SHORT_US:
            line = "much of that is calling it; take a larger --train.batch_size or --train.compile true"
            found.append((50.0, f"an operator takes {self.operator_us:.0f} microseconds on average: {line}"))
        if self.device.startswith("cuda") and self.precision == "fp32":
            found.append((60.0, "float32 on a GPU: take --train.precision bf16"))
        computing = self.shares["forward"] + self.shares["backward"]
        if not found:
            found.append((0.0, f"forward and backward are {computing:.0f} %: only a smaller model, smaller "
                               "images or a faster machine would change much"))  # fmt: skip
        return [line for _, line in sorted(found, reverse=True)]

    def to_dict(self) -> dict[str, Any]:
        """All of it, images a second and advice too, as plain values."""
        return asdict(self) | {"images_per_second": self.images_per_second, "advice": self.advice()}

    def text(self) -> str:
        """Tables and advice, for a terminal."""
        lines = [
            f"{self.device}, precision {self.precision}, {self.batch_size} images a step: "
            f"{self.milliseconds:.1f} ms a step, {self.images_per_second:.0f} images/s",
            "",
            *(f"{name:<30}{self.shares[part]:6.1f} %" for part, name in PARTS.items()),
            "",
            f"{'operator (own time)':<60}{'calls':>6}{'ms':>9}{'share':>9}",
            *(
                f"{own.name[:59]:<60}{own.calls:6.0f}{own.milliseconds:9.2f}{own.share:7.1f} %"
                for own in self.operators
            ),
            "",
            *(f"- {line}" for line in self.advice()),
        ]
        return "\n".join(lines)


def profile_training(config: RunConfig, steps: int = 20) -> TrainingProfile:
    """Train a fresh model for some steps and measure; nothing is kept of it.

    A part's time is its median over the steps. One step writes a record; what it takes longer counts as
    logging, spread over `train.log_every`.

    Args:
        config: Of the run in question; images have the size that it ends with.
        steps: Measured steps, at least 5; 3 before them are not counted, 5 more are for the operators.

    Raises:
        ValueError: As `prepare` would, or too few steps.
    """
    if steps < 5:
        raise ValueError(f"steps: expected at least 5, got {steps}")
    run = prepare(shortened(config, _WARMUP + steps))
    longer = replace(run, plan=replace(run.plan, total=run.plan.total + _PROFILED))
    clock = _Stopwatch(run.accelerator.device)
    state = TrainingState(
        task=run.task,
        optimizer=build_optimizer(run.task, run.model, config.optim),
        average=_TimedAverage(run.task.trained(), config.train.ema, clock) if config.train.ema else None,
        scaler=run.accelerator.scaler,
    )
    with _timed(run, state, clock):
        _fit(run, state, partial(_timed_batches, run, clock=clock))
    parts = _typical(clock.steps[_WARMUP:], make_plan(config.train, len(run.splits.train)).log_every)
    milliseconds = 1000 * sum(parts.values())

    # libkineto would report its start and stop on the terminal; it reads this when it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if run.accelerator.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        _fit(longer, state, partial(training_batches, longer))
    operators = _operators(profiler)
    on_gpu = run.accelerator.device.type == "cuda"
    return TrainingProfile(
        device=str(run.accelerator.device),
        precision=run.accelerator.mixed_precision.replace("no", "fp32"),
        batch_size=config.train.batch_size,
        milliseconds=milliseconds,
        shares={part: 100_000 * seconds / milliseconds for part, seconds in parts.items()},
        operators=tuple(operators[:_MOST_OPERATORS]),
        operator_us=1000 * sum(own.milliseconds for own in operators) / sum(own.calls for own in operators),
        busy=min(100.0, 100 * _busy_ms(profiler) / milliseconds) if on_gpu else None,
    )


class _Stopwatch:
    """Time since the last mark, added up by part and step."""

    def __init__(self, device: torch.device) -> None:
        self._wait = waiting(device)
        self.steps: list[dict[str, float]] = []
        self._step = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Everything since the last mark was this part."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        self._step[part] += now - self._last
        self._last = now

    def end_step(self) -> None:
        """What comes belongs to the next step."""
        self.steps.append(self._step)
        self._step = dict.fromkeys(PARTS, 0.0)


class _TimedAverage(MovingAverage):
    """A moving average that tells a stopwatch."""

    def __init__(self, model: nn.Module, decay: float, clock: _Stopwatch) -> None:
        super().__init__(model, decay)
        self._clock = clock

    def update(self) -> None:
        self._clock.mark("other")
        super().update()
        self._clock.mark("average")


@contextmanager
def _timed(run: Run, state: TrainingState, clock: _Stopwatch) -> Iterator[None]:
    """While inside, backward and optimiser tell a stopwatch."""
    accelerator = run.accelerator
    backward = accelerator.backward

    def timed_backward(loss: Tensor, **arguments: Any) -> None:
        clock.mark("forward")
        backward(loss, **arguments)
        clock.mark("backward")

    handles = [
        state.optimizer.register_step_pre_hook(lambda *_: clock.mark("clip")),
        state.optimizer.register_step_post_hook(lambda *_: clock.mark("optimiser")),
    ]
    accelerator.backward = timed_backward
    try:
        yield
    finally:
        accelerator.backward = backward
        for handle in handles:
            handle.remove()


def _timed_batches(run: Run, start: int, *, clock: _Stopwatch) -> Iterator[Batch]:
    """What `training_batches` gives; a step ends when the next batch is asked for."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        reading = read_batches(run, start)
        while True:
            clock.mark("augmentation")
            found = next(reading, None)
            clock.mark("data")
            if found is None:
                return
            yield found

    for batch in augmented_batches(run, read(), start):
        clock.mark("augmentation")
        yield batch
        clock.mark("other")
        clock.end_step()


def _fit(run: Run, state: TrainingState, batches: Callable[[int], Iterator[Batch]]) -> None:
    """Train to the end of the run's plan; the last step writes the only record."""
    section, optim = run.config.train, run.config.optim
    with TemporaryDirectory() as folder:
        fit(
            state,
            batches,
            plan=replace(run.plan, log_every=run.plan.total),
            schedule=learning_rate(optim, run.plan.total, run.plan.steps_per_epoch, section.batch_size),
            accelerator=run.accelerator,
            clip_norm=optim.clip_norm,
            metrics=Path(folder) / "metrics.jsonl",
            seed=section.seed,
            micro_batch=None if section.micro_batch == "auto" else section.micro_batch,
            split_on_out_of_memory=section.micro_batch == "auto",
            compile=section.compile,
        )


def _typical(steps: list[dict[str, float]], log_every: int) -> dict[str, float]:
    """Seconds of each part in a typical step; the last of the steps wrote a record."""
    *plain, logging = steps
    parts = {part: median(step[part] for step in plain) for part in PARTS}
    extra = sum(max(0.0, logging[part] - parts[part]) for part in ("clip", "other"))
    return parts | {"logging": extra / log_every}


def _operators(profiler: profile) -> list[Operator]:
    """All operators, longest own time first; on a GPU the time is that of their kernels."""
    # Kernels have rows of their own besides, and autograd's engine has some for its nodes.
    rows = [
        row
        for row in profiler.key_averages()
        if row.device_type == DeviceType.CPU
        and not row.is_user_annotation
        and not row.key.startswith("autograd::")
    ]
    on_gpu = any(row.self_device_time_total for row in rows)
    times = [row.self_device_time_total if on_gpu else row.self_cpu_time_total for row in rows]
    found = [
        Operator(
            name=row.key.removeprefix("aten::"),
            calls=row.count / _PROFILED,
            milliseconds=own / 1000 / _PROFILED,
            share=100 * own / sum(times),
        )
        for row, own in zip(rows, times, strict=True)
        if own
    ]
    return sorted(found, key=lambda own: -own.milliseconds)


def _busy_ms(profiler: profile) -> float:
    """Time of the GPU's kernels, milliseconds a step."""
    kernels = [
        row
        for row in profiler.key_averages()
        if row.device_type == DeviceType.CUDA and not row.is_user_annotation
    ]
    return sum(row.self_device_time_total for row in kernels) / 1000 / _PROFILED
