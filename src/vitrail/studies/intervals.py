"""How far a number can be trusted: intervals of means over seeds, of shares of images, and of differences.

All are 95 % intervals.

- several seeds: Student's t of the mean (Student 1908, "The probable error of a mean"); they say how far the
  mean of all seeds may lie, on these test images;
- one run: Wilson's interval of a share of right answers (Wilson 1927); it says how far the accuracy on all
  images may lie, for these weights;
- a difference: Welch's t where both sides have several seeds (Welch 1947); else both intervals are joined by
  the squares of their halves (Newcombe 1998, method 10, for shares; Zou and Donner 2008 for all). Both sides
  saw the same test images, which this leaves unused: the interval is rather too wide than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import binomtest
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int
    """Runs with different seeds behind it. With one, the interval is that of the test images."""
    deviation: float = 0.0
    """Sample standard deviation over the seeds; 0 with one."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        return asdict(self)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of several seeds, with Student's t.

    Args:
        values: One a seed, two or more.
    """
    mean, deviation = fmean(values), stdev(values)
    half = _quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half, seeds=len(values), deviation=deviation)


def share(accuracy: float, images: int) -> Estimate:
    """A share of right answers of one run, with Wilson's interval.

    Args:
        accuracy: 0 to 1.
        images: How many were asked.
    """
    found = binomtest(round(accuracy * images), images).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(value=accuracy, low=float(found.low), high=float(found.high), seeds=1)


def joined(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over seeds of estimates that are one a seed; a single one stays what it is."""
    if len(estimates) == 1:
        return estimates[0]
    return over_seeds([own.value for own in estimates])


def difference(first: Estimate, second: Estimate) -> Estimate:
    """First - second."""
    value, seeds = first.value - second.value, min(first.seeds, second.seeds)
    if seeds > 1:
        parts = [own.deviation**2 / own.seeds for own in (first, second)]
        total = sum(parts)
        degrees = total**2 / sum(
            part**2 / (own.seeds - 1) for part, own in zip(parts, (first, second), strict=True)
        ) if total else 1.0  # fmt: skip
        below = above = _quantile(degrees) * math.sqrt(total)
    else:
        below = math.hypot(first.value - first.low, second.high - second.value)
        above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value=value, low=value - below, high=value + above, seeds=seeds)


def _quantile(degrees: float) -> float:
    """Half-width of the interval in standard errors."""
    return float(student.ppf((1 + CONFIDENCE) / 2, degrees))
