"""`vitrail train`: train a model, test it, write its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cli.words import Verbs, parse_overrides, run_name, split_recipe

if TYPE_CHECKING:
    from vitrail.config import RunConfig

_HELP = """\
usage: vitrail train [RECIPE] [--section.key VALUE]... [--dry-run]

Train a model, test it, and write a run folder with its report.

RECIPE is a name that `vitrail recipes` lists, or a YAML file such as runs/<name>/config.yaml, which repeats
that run. Every value of a recipe can be changed on the command line:

  vitrail train mnist-vit
  vitrail train mnist-vit --optim.lr 1e-3 --train.duration "5 epochs"
  vitrail train --model vit_cifar --dataset cifar10 --epochs 10
  vitrail train cifar10-vit --resume            go on where the run was interrupted

  --dry-run        print the resolved config, parameters, MACs and estimated time; train nothing
  --debug          show the traceback of an error

short forms: {short}

"""


def add(verbs: Verbs) -> None:
    """Add `train` to the verbs."""
    verbs.add_parser("train", help="train a model, test it, write its report", add_help=False)


def run(words: list[str]) -> None:
    """Train as recipe and flags say and write the report; or print the help, or what it would cost."""
    from vitrail.config import load_config

    recipe, flags = split_recipe(words)
    if {"-h", "--help"} & set(flags):
        _print_help(load_config(recipe))
        return
    dry_run = "--dry-run" in flags or "--dry_run" in flags
    overrides = parse_overrides([flag for flag in flags if flag not in {"--dry-run", "--dry_run"}])
    if recipe is None and {"train.resume", "train.output"} <= overrides.keys():
        own = Path(overrides["train.output"]) / "config.yaml"
        recipe = str(own) if own.is_file() else None
    config = load_config(recipe, overrides)
    folder = config.train.output or Path("runs") / run_name(config, recipe)
    if dry_run:
        _dry_run(config)
        return
    from vitrail.processes import is_main
    from vitrail.reporting import write_report
    from vitrail.training import train

    command = shlex.join(["vitrail", "train", *words])
    try:
        result = train(config, folder, command=command)
    except KeyboardInterrupt as stopped:
        if not str(stopped):
            raise
        resume = command if "--resume" in words else f"{command} --resume"
        raise KeyboardInterrupt(f"{stopped}; go on with: {resume}") from None
    if not is_main():
        return
    report = folder / "report.html"
    if result.already_finished and report.is_file():
        print("already finished: nothing was trained")
    else:
        report = write_report(
            folder, model=result.model, preprocessing=result.preprocessing, test=result.test
        )
    if result.metrics is not None:
        print(result.metrics.headline())
    print(f"report {report}")


def _print_help(config: RunConfig) -> None:
    from vitrail.config import SHORT_KEYS

    short = ", ".join(f"--{name}" for name in SHORT_KEYS)
    print(_HELP.format(short=short), end="")
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        print(f"{section_name}: {(type(section).__doc__ or '').strip()}")
        for name, inner in type(section).model_fields.items():
            value = getattr(section, name)
            shown = "" if value is None or value == {} else f" [{value}]"
            print(f"  --{section_name}.{name}{shown}\n      {inner.description}")
        for name, value in (section.model_extra or {}).items():
            print(f"  --{section_name}.{name} [{value}]")
        print()


def _dry_run(config: RunConfig) -> None:
    from vitrail.training import estimate

    print(config.to_yaml())
    cost = estimate(config)
    epochs = cost.steps / cost.steps_per_epoch
    minutes = cost.seconds_per_epoch * epochs / 60
    print(f"parameters        {cost.parameters:,}")
    print(f"MACs an image     {cost.macs_per_image:,}")
    print(f"steps             {cost.steps:,} ({epochs:.1f} epochs of {cost.steps_per_epoch:,})")
    print(f"estimated time    {cost.seconds_per_epoch:.1f} s an epoch, {minutes:.1f} min in all, here")
