"""`vitrail bench`: models measured one after the other, as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vitrail.bench.chart import contest_chart, write_charts
from vitrail.bench.machine import machine
from vitrail.bench.measure import DTYPES, Gain, Measurement, Settings, bfloat16_gain, find_models, measure
from vitrail.bench.peers import PEERS
from vitrail.files import write_whole

_COLUMNS = ("library", "batch", "ms/batch", "(quartiles)", "ms/image", "images/s", "of ceiling", "peak MiB")
_RATIO = "time/vitrail"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All that a run of `vitrail bench` found."""

    machine: dict[str, Any]
    settings: Settings
    gain: Gain
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "machine": self.machine,
            "settings": asdict(self.settings),
            "bfloat16": asdict(self.gain),
            "models": [found.to_dict() for found in self.measurements],
        }

    def csv(self) -> str:
        """A line for each model, library and batch, without the single times."""
        shared = {
            "device": self.machine.get("gpu", self.machine["cpu"]),
            "threads": self.machine["torch_threads"],
            "dtype": self.settings.dtype,
            "mode": _mode(self.settings),
        }
        rows = []
        for found in self.measurements:
            own = {
                "model": found.model,
                "image_shape": "x".join(map(str, found.image_shape)),
                "parameters": found.parameters,
                "macs_per_image": found.macs_per_image,
            }
            for timing in found.timings:
                row = timing.to_dict()
                low, high = row.pop("ms_per_batch_quartiles")
                del row["raw_ms_per_batch"]
                quartiles = {"ms_per_batch_quartile_1": low, "ms_per_batch_quartile_3": high}
                rate = {"ceiling_gflop_per_s": found.ceiling[timing.batch] / 1e9}
                rows.append(own | shared | row | quartiles | rate)
        return table_csv(rows)


def run_bench(pattern: str, settings: Settings, say: Callable[[str], object]) -> Bench:
    """Measure one model or several.

    Args:
        pattern: See `find_models`.
        settings: How; see `checked`.
        say: Is given the lines for a terminal as soon as they are known.

    Raises:
        ValueError: No such model, peer or device; settings that make no sense.
    """
    settings = checked(settings, say)
    models = find_models(pattern)
    about = machine(device=torch.device(settings.device))
    say(heading(about, settings))
    found = []
    for name, changes in models:
        found.append(measure(name, changes, settings))
        say("\n" + measurement_text(found[-1], settings))
    gain = bfloat16_gain(torch.device(settings.device))
    say("\n" + gain.text())
    return Bench(machine=about, settings=settings, gain=gain, measurements=tuple(found))


def write_bench(folder: Path, found: Bench) -> Path:
    """Write bench.json, bench.csv, bench.png and bench.svg into a folder, which is made where it is missing.

    Returns:
        The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "bench.json", json.dumps(found.to_dict(), indent=2) + "\n")
    write_whole(folder / "bench.csv", found.csv())
    return write_charts(folder, "bench", contest_chart(found.measurements, _mode(found.settings)))


def checked(settings: Settings, say: Callable[[str], object]) -> Settings:
    """The settings as they can be run, each batch once; what is changed is said with the reason.

    Raises:
        ValueError: A setting that makes no sense here; one line.
    """
    for what, numbers in (("--batch", settings.batches), ("--repetitions", (settings.repetitions,))):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{what}: expected whole numbers from 1 on, got {', '.join(map(str, numbers))}")
    if settings.img_size is not None and settings.img_size < 1:
        raise ValueError(f"--size: expected pixels of a side, 1 or more, got {settings.img_size}")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    for peer in settings.against:
        if peer not in PEERS:
            raise ValueError(f"--against: expected some of {', '.join(PEERS)}, got {peer!r}")
    _check_device(settings.device)
    if settings.device == "cpu" and settings.dtype == "float16":
        say("float16 is emulated on a CPU and a hundred times slower: bfloat16 is measured instead")
        settings = replace(settings, dtype="bfloat16")
    return replace(settings, batches=tuple(dict.fromkeys(settings.batches)))


def _check_device(name: str) -> None:
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = ("cpu",) if own is None else ("cpu", own.type)
    if name not in there:
        raise ValueError(f"--device: expected {' or '.join(there)} on this machine, got {name!r}")


def heading(about: dict[str, Any], settings: Settings) -> str:
    """What was measured on what, and how, in two lines."""
    gpu = f"{about['gpu']}, " if "gpu" in about else ""
    return (
        f"{gpu}{about['cpu']}, {about['cores']} cores, {threads(about)}, "
        f"load {about['load_before']} before; torch {about['versions']['torch']}\n"
        f"{_mode(settings)}, {settings.dtype}: medians of {settings.repetitions} repetitions in turns, "
        f"after {settings.warmup} to warm up"
    )


def threads(about: dict[str, Any]) -> str:
    """How many threads computed, in words."""
    count = about["torch_threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def measurement_text(found: Measurement, settings: Settings) -> str:
    """One model's lines: what it is, the table, who is not in it and why."""
    rates = list(found.ceiling.values())
    low, high = min(rates) / 1e9, max(rates) / 1e9
    rows = [(*_COLUMNS, _RATIO) if len(found.timings) > len(settings.batches) else _COLUMNS]
    for timing in found.timings:
        row = timing.to_dict()
        first, third = row["ms_per_batch_quartiles"]
        cells = (
            timing.library,
            str(timing.batch),
            f"{row['ms_per_batch']:.2f}",
            f"({first:.2f}-{third:.2f})",
            f"{row['ms_per_image']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{100 * timing.share_of_ceiling:.0f} %",
            f"{timing.peak_mib:.0f}",
        )
        ratio = "" if timing.over_vitrail is None else f"{timing.over_vitrail:.2f}"
        rows.append((*cells, ratio) if len(rows[0]) > len(_COLUMNS) else cells)
    work = f"{found.macs_per_image / 1e9:.3f} GMACs an image (1 MAC = 2 FLOP)"
    return "\n".join(
        [
            f"{found.model}, {'x'.join(map(str, found.image_shape))}: {found.parameters:,} parameters, "
            f"{found.weights_mib:.0f} MiB of weights, {work}",
            f"ceiling {low:.1f} to {high:.1f} GFLOP/s: products of {settings.product_size}x"
            f"{settings.product_size} {settings.dtype} matrices, in turns with the passes",
            aligned(rows),
            *(f"{peer} takes no part: {reason}" for peer, reason in found.absent.items()),
        ]
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def table_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV with a header."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _mode(settings: Settings) -> str:
    return "training step" if settings.training else "inference"
