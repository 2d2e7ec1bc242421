"""What the benchmarks share: the machine in words, medians of times, the result file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitrail.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results"


def machine(*peers: str) -> dict[str, Any]:
    """The machine and the versions that decide the times.

    Args:
        peers: Packages to name besides torch and what Vitrail itself runs on.
    """
    found = hardware(torch.device("cpu"))
    return {
        "cpu": found["cpu"].rsplit(",", 1)[0],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions() | {name: metadata.version(name) for name in peers},
    }


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


def write_result(name: str, content: dict[str, Any], *, quick: bool) -> Path:
    """Keep a result as JSON; a quick run never replaces a real one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    path.write_text(json.dumps(_rounded(content), indent=2) + "\n")
    return path


def _rounded(value: Any) -> Any:
    """Floats with six significant digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
