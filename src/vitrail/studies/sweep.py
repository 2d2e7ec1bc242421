"""The same recipe with some values changed, each with several seeds, and what came out.

Every run of a sweep is an ordinary run folder, so that it can be looked into, evaluated and repeated like any
other. A sweep that was stopped goes on where it was: finished runs are read, the interrupted one resumes.
Variants are ranked by their validation score; the test score stands beside it and decides nothing.

    runs/<name>/
      <variant>/seed0/   a run folder
      sweep.csv          one line a run
      sweep.md           one line a variant: mean over the seeds, with its interval
      sweep.png          validation score over the epochs, mean and spread over the seeds
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrail.config import RunConfig, load_config, read_yaml, shipped_yaml
from vitrail.models import model_config
from vitrail.studies.compare import INTERVALS, Row, numbers, write_rows
from vitrail.studies.runs import FinishedRun, finish_run
from vitrail.training import architecture

Variants = dict[str, dict[str, Any]]
"""Name of each variant to the dotted keys it changes."""

_SETS = "studies/variants"


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
    return list(shipped_yaml(_SETS))


def load_variants(name: str | Path) -> Variants:
    """Read a set of variants: one that comes with the package, or a YAML file.

    Raises:
        ValueError: No such set, or a file of another shape.
    """
    variants = read_yaml(name, _SETS, "set of variants")
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
) -> Iterator[tuple[str, FinishedRun]]:
    """Train every variant with every seed, one after the other.

    Args:
        recipe: What `load_config` takes.
        variants: From `grid` or `load_variants`.
        seeds: Number of seeds, 0 to seeds - 1.
        folder: Where the run folders go.
        overrides: Dotted keys that all variants share.
        command: What the manifests state as the command.

    Yields:
        The variant and its run, as each is finished.

    Raises:
        ValueError: A config that does not fit (all are checked first), or a folder of another sweep.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    planned: list[tuple[str, Path, RunConfig]] = []
    for variant, changes in variants.items():
        for seed in range(seeds):
            own = folder / variant.replace("/", "_") / f"seed{seed}"
            config = load_config(recipe, {**overrides, **changes, "train.seed": seed})
            name, options, _ = architecture(config)
            model_config(name, **options)  # refuses options that do not fit
            planned.append((variant, own, config))
    for variant, own, config in planned:
        yield variant, finish_run(config, own, command=command)


def rank(finished: Sequence[tuple[str, FinishedRun]]) -> list[Row]:
    """A row a variant over its seeds, best validation score first (test score where there is none)."""
    rows = [
        Row(name=variant, runs=tuple(run for name, run in finished if name == variant))
        for variant in dict.fromkeys(name for name, _ in finished)
    ]

    def score(row: Row) -> float:
        judged = row.val or row.test
        return -1.0 if judged is None else judged.value

    return sorted(rows, key=score, reverse=True)


def write_sweep(folder: Path, finished: Sequence[tuple[str, FinishedRun]]) -> str:
    """Write `sweep.csv`, `sweep.md` and `sweep.png`; the text of `sweep.md` is returned."""
    rows = rank(finished)
    text = f"{numbers(rows).markdown()}\n{INTERVALS}\n"
    write_rows(folder, "sweep", rows, text)
    return text
