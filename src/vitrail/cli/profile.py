"""`vitrail profile`: tell where the time of a training step goes."""

from __future__ import annotations

import json

from vitrail.cli.words import Parser, Verbs, read_config

_HELP = """\
usage: vitrail profile [RECIPE] [--steps N] [--json] [--section.key VALUE]...

Train a fresh model for some steps and tell where the time of a step goes: waiting for data, augmentation,
forward, backward, clipping, optimiser, moving average, logging; the longest operators; and what to change.

  --steps N    measured steps (default 20)
  --json       print everything as JSON
"""


def add(verbs: Verbs) -> None:
    """Add `profile` to the verbs."""
    verbs.add_parser("profile", help="tell where the time of a training step goes", add_help=False)


def run(words: list[str]) -> None:
    """Train for some steps and print where their time went."""
    if {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return
    own = Parser(prog="vitrail profile", add_help=False, allow_abbrev=False)
    own.add_argument("--steps", type=int, default=20)
    own.add_argument("--json", action="store_true")
    _, options, config = read_config(own, words)
    from vitrail.training.profile import profile_training

    found = profile_training(config, options.steps)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.text())
