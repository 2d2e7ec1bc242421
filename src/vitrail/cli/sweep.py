"""`vitrail sweep`: train a recipe with some values varied, and tell what is best."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vitrail.cli.words import Verbs, parse_overrides, split_recipe

_HELP = """\
usage: vitrail sweep [RECIPE] (--over KEY=VALUE,... | --variants SET) [--seeds N] [--section.key VALUE]

Train a recipe once for each combination of values and each seed; write a table, best validation first.

  vitrail sweep digits-vit --over model.position=none,learned,sincos_2d,rotary --seeds 3
  vitrail sweep digits-vit --over model.depth=2,4 --over optim.lr=1e-3,2e-3
  vitrail sweep cifar10-vit --variants augmentation --epochs 10

  --over KEY=A,B     values of one key; several --over give all combinations; lists: KEY=[[1, 2], [3, 4]]
  --variants SET     a set of the package (augmentation), or a YAML file with name: {section.key: value}
  --seeds N          seeds 0 to N-1 for every variant (default 1)

A sweep that was stopped goes on where it was when the same command is given again.
"""


def add(verbs: Verbs) -> None:
    """Add `sweep` to the verbs."""
    verbs.add_parser(
        "sweep", help="train a recipe with some values varied, tell what is best", add_help=False
    )


def run(words: list[str]) -> None:
    """Train every variant with every seed; the table is written anew after each run."""
    if not words or {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return
    from vitrail.studies import grid, load_variants, run_sweep, write_sweep

    recipe, flags = split_recipe(words)
    over: dict[str, list[Any]] = {}
    named: str | None = None
    seeds, rest = 1, []
    left = iter(flags)
    for flag in left:
        if flag not in {"--over", "--variants", "--seeds"}:
            rest.append(flag)
            continue
        value = next(left, None)
        if value is None:
            raise ValueError(f"{flag} needs a value")
        if flag == "--variants":
            named = value
        elif flag == "--seeds":
            if not value.isdigit():
                raise ValueError(f"--seeds: expected a whole number, got {value!r}")
            seeds = int(value)
        else:
            key, values = _varied(value)
            over[key] = values
    if (named is None) == (not over):
        raise ValueError(
            "a sweep needs what to vary: either --over section.key=VALUE,VALUE,... or --variants SET"
        )
    overrides: dict[str, Any] = dict(parse_overrides(rest))
    stem = Path(recipe).stem if recipe else "sweep"
    folder = Path(overrides.pop("train.output", f"runs/{stem}-{named or 'sweep'}"))
    variants = grid(over) if named is None else load_variants(named)
    command = shlex.join(["vitrail", "sweep", *words])
    finished = []
    for variant, trained in run_sweep(
        recipe, variants, seeds=seeds, folder=folder, overrides=overrides, command=command
    ):
        finished.append((variant, trained))
        table = write_sweep(folder, finished)
        found = "" if trained.test is None else f": test {100 * trained.test.value:.2f} %"
        print(f"{variant}, seed {trained.seed}{found}", flush=True)
    print(table, end="")
    print(f"table {folder / 'sweep.md'}")


def _varied(text: str) -> tuple[str, list[Any]]:
    """`section.key=VALUE,VALUE` or `section.key=[...]`, a list as YAML has it -> the key and its values."""
    from vitrail.config import parse_value

    key, equals, listed = text.partition("=")
    if not equals:
        raise ValueError(f"--over: expected section.key=VALUE,VALUE,..., got {text!r}")
    if listed.startswith("["):
        return key, parse_value(listed)
    return key, [parse_value(own) for own in listed.split(",")]
