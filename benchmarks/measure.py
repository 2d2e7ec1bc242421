"""What the benchmarks share: timing, memory, the machine, and the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitrail.bench.machine import machine
from vitrail.bench.memory import peak_growth, printed_by
from vitrail.evaluation.timing import in_turns, median_ratio, summary

__all__ = [
    "RESULTS",
    "in_turns",
    "machine",
    "median_ratio",
    "peak_growth",
    "printed_by",
    "summary",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"


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
