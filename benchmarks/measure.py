"""What the benchmarks share: the machine in words, medians of times, the result file."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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


def in_turns(acts: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of several ways to do a thing, in turns, after one of each to warm up."""
    seconds: dict[str, list[float]] = {way: [] for way in acts}
    for act in acts.values():
        act()
    for _ in range(repetitions):
        for way, act in acts.items():
            began = time.perf_counter()
            act()
            seconds[way].append(time.perf_counter() - began)
    return seconds


def peak_growth(act: Callable[[], object], times: int) -> float:
    """MiB by which this process's highest memory (ru_maxrss) grows while something is done some times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(times):
        act()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def printed_by(script: str, *options: str) -> float:
    """The number that a benchmark prints in a process of its own."""
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    return float(done.stdout)


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
