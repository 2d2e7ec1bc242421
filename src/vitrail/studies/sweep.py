"""The same recipe with some values changed, each with several seeds, and what came out.

Every run of a sweep is an ordinary run folder, so that it can be looked into, evaluated and repeated like any
other. A sweep that was stopped goes on where it was: finished runs are read, the interrupted one resumes.
Variants are ranked by validation accuracy; the test accuracy stands beside it and decides nothing.

    runs/<name>/
      <variant>/seed0/   a run folder
      sweep.csv          one line a run
      sweep.md           one line a variant: mean and spread over the seeds
      curves.png         validation accuracy over the epochs, mean over the seeds
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from vitrail.config import RunConfig, load_config, read_yaml, shipped_yaml
from vitrail.explain.draw import png
from vitrail.files import write_whole
from vitrail.models import model_config
from vitrail.training import architecture, train

Variants = dict[str, dict[str, Any]]
"""Name of each variant to the dotted keys it changes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run of a sweep."""

    variant: str
    seed: int
    folder: str
    val_accuracy: float | None
    """At the end of the run; None where the recipe holds out no validation images."""
    test_accuracy: float
    parameters: int
    macs_per_image: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One variant over its seeds."""

    variant: str
    seeds: int
    val_accuracy: float | None
    test_accuracy: float
    spread: float
    """Sample standard deviation of the test accuracy over the seeds; 0 with one seed."""
    parameters: int
    macs_per_image: int
    seconds: float


def grid(over: Mapping[str, Sequence[Any]]) -> Variants:
    """All combinations of some values: `{"model.depth": [2, 4]}` gives the variants depth=2 and depth=4.

    Raises:
        ValueError: A key without values.
    """
    for key, values in over.items():
        if not values:
            raise ValueError(f"sweep over {key}: expected some values, got none")
    variants = {}
    for chosen in itertools.product(*over.values()):
        changes = dict(zip(over, chosen, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
        variants[name] = changes
    return variants


def list_variant_sets() -> list[str]:
    """Names of the sets of variants that come with the package."""
    return list(shipped_yaml("studies"))


def load_variants(name: str | Path) -> Variants:
    """Read a set of variants: one that comes with the package, or a YAML file.

    Raises:
        ValueError: No such set, or a file of another shape.
    """
    variants = read_yaml(name, "studies", "set of variants")
    if not all(isinstance(changes, dict) for changes in variants.values()):
        raise ValueError(f"{name}: expected dotted keys below each name, such as 'deep: {{model.depth: 6}}'")
    return {str(variant): changes for variant, changes in variants.items()}


def run_sweep(
    recipe: str | Path | None,
    variants: Variants,
    *,
    seeds: int,
    folder: Path,
    overrides: Mapping[str, Any],
    command: str,
) -> Iterator[Outcome]:
    """Train every variant with every seed, one after the other.

    Args:
        recipe: What `load_config` takes.
        variants: From `grid` or `load_variants`.
        seeds: Number of seeds, 0 to seeds - 1.
        folder: Where the run folders go.
        overrides: Dotted keys that all variants share.
        command: What the manifests state as the command.

    Yields:
        One outcome a run, as it is finished.

    Raises:
        ValueError: A config that does not fit (all are checked first), or a folder of another sweep.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    planned: list[tuple[str, int, Path, RunConfig]] = []
    for variant, changes in variants.items():
        for seed in range(seeds):
            own = folder / variant.replace("/", "_") / f"seed{seed}"
            values = {**overrides, **changes, "train.seed": seed, "train.output": own}
            config = load_config(recipe, values)
            name, options, _ = architecture(config)
            model_config(name, **options)  # refuses options that do not fit
            planned.append((variant, seed, own, config))
    for variant, seed, own, config in planned:
        if not (own / "manifest.json").is_file():
            started = (own / "checkpoints" / "last.pt").is_file()
            section = config.train.model_copy(update={"resume": started, "overwrite": not started})
            train(config.model_copy(update={"train": section}), own, command=command)
        elif (own / "config.yaml").read_text() != config.to_yaml():
            raise ValueError(f"{own} holds a run with another config: choose another folder with --output")
        yield _read(variant, seed, own)


def summarize(outcomes: Sequence[Outcome]) -> list[Summary]:
    """Means over the seeds, best validation accuracy first (test accuracy where there is none)."""
    summaries = []
    for variant in dict.fromkeys(outcome.variant for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.variant == variant]
        val = [outcome.val_accuracy for outcome in own if outcome.val_accuracy is not None]
        test = [outcome.test_accuracy for outcome in own]
        summaries.append(
            Summary(
                variant=variant,
                seeds=len(own),
                val_accuracy=fmean(val) if val else None,
                test_accuracy=fmean(test),
                spread=stdev(test) if len(test) > 1 else 0.0,
                parameters=own[0].parameters,
                macs_per_image=own[0].macs_per_image,
                seconds=fmean(outcome.seconds for outcome in own),
            )
        )
    return sorted(
        summaries,
        key=lambda own: own.test_accuracy if own.val_accuracy is None else own.val_accuracy,
        reverse=True,
    )


def write_sweep(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Write `sweep.csv`, `sweep.md` and `curves.png`; the table of `sweep.md` is returned."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Outcome)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    write_whole(folder / "sweep.csv", text.getvalue())
    rows = [
        "| variant | seeds | val accuracy | test accuracy | parameters | MMACs | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for own in summarize(outcomes):
        val = "-" if own.val_accuracy is None else f"{100 * own.val_accuracy:.2f} %"
        test = f"{100 * own.test_accuracy:.2f} ± {100 * own.spread:.2f} %"
        rows.append(
            f"| {own.variant} | {own.seeds} | {val} | {test} | {own.parameters:,} | "
            f"{own.macs_per_image / 1e6:.2f} | {own.seconds:.0f} |"
        )
    table = "\n".join(rows) + "\n"
    write_whole(folder / "sweep.md", table)
    write_whole(folder / "curves.png", png(_curves(outcomes)))
    return table


def _read(variant: str, seed: int, folder: Path) -> Outcome:
    manifest = json.loads((folder / "manifest.json").read_text())
    val = _val_curve(folder)
    return Outcome(
        variant=variant,
        seed=seed,
        folder=str(folder),
        val_accuracy=val[-1][1] if val else None,
        test_accuracy=manifest["test_accuracy"],
        parameters=manifest["parameters"],
        macs_per_image=manifest["macs_per_image"],
        seconds=manifest["training_seconds"],
    )


def _val_curve(folder: Path) -> list[tuple[float, float]]:
    """Epoch and validation accuracy of a run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["epoch"], record["accuracy"]) for record in records if record["kind"] == "val"]


def _curves(outcomes: Sequence[Outcome]) -> Figure:
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="validation accuracy, %")
    for variant in dict.fromkeys(outcome.variant for outcome in outcomes):
        curves = [_val_curve(Path(own.folder)) for own in outcomes if own.variant == variant]
        if not curves[0]:
            continue
        epochs = [epoch for epoch, _ in curves[0]]
        means = [100 * fmean(value for _, value in points) for points in zip(*curves, strict=True)]
        axes.plot(epochs, means, marker=".", label=variant)
    if axes.lines:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure
