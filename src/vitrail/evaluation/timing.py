"""Times that can be compared: warmed up, taken in turns, told as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Act = Callable[[], object]
"""What is timed."""

_MOST = 20


def waiting(device: torch.device) -> Act | None:
    """What waits until a device has done all that it was given; None for a CPU, which nobody waits for."""
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)


def in_turns(
    acts: Mapping[str, Act],
    repetitions: int,
    *,
    warmup: int = 1,
    wait: Act | None = None,
    lasting: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of several ways to do a thing, in each repetition.

    They take turns and the order rotates, so that a busy moment of the machine, and what one leaves in the
    caches, hits all alike.

    Args:
        acts: Name -> what is timed.
        repetitions: Of each, at least 1.
        warmup: Further ones before, which are not timed.
        wait: What waits for the device, see `waiting`.
        lasting: Seconds. Where the repetitions are over before, more follow, at most 20 times as many.
    """
    seconds: dict[str, list[float]] = {way: [] for way in acts}
    started = time.perf_counter()
    for number in range(-warmup, _MOST * repetitions):
        if number >= repetitions and time.perf_counter() - started >= lasting:
            break
        at = number % len(acts)
        for way in [*acts][at:] + [*acts][:at]:
            began = time.perf_counter()
            acts[way]()
            if wait is not None:
                wait()
            taken = time.perf_counter() - began
            if number >= 0:
                seconds[way].append(taken)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, quartiles and all of several times."""
    quartiles = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    )
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "quartiles_s": [quartiles[0], quartiles[2]],
        "raw_s": list(seconds),
    }


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of times that were taken next to each other."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A product of two square matrices, to be called again and again: the fastest thing a machine does.

    Args:
        size: Rows and columns of both.
        dtype: Of both.
        device: Where they lie.
    """
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return lambda: left @ right


def product_rate(size: int, seconds: Sequence[float]) -> float:
    """Floating-point operations a second of such a product, two for each multiply-add, by the median time."""
    return 2 * size**3 / statistics.median(seconds)
