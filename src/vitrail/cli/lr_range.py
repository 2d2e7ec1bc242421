"""`vitrail lr-range`: find a learning rate for a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from vitrail.cli.words import Parser, Verbs, read_config, run_name

_HELP = """\
usage: vitrail lr-range [RECIPE] [--lowest R] [--highest R] [--steps N] [--output FOLDER] [--json]
                        [--section.key VALUE]...

Train a fresh model for some steps while the learning rate grows, and suggest one for the recipe.
Writes lr_range.json and lr_range.png.

  --lowest R       learning rate of the first step (default 1e-6)
  --highest R      learning rate of the last step (default 1)
  --steps N        length of the test (default 100)
  --output FOLDER  where to write (default runs/lr-range-RECIPE)
  --json           print everything as JSON
"""


def add(verbs: Verbs) -> None:
    """Add `lr-range` to the verbs."""
    verbs.add_parser("lr-range", help="find a learning rate for a recipe", add_help=False)


def run(words: list[str]) -> None:
    """Train while the learning rate grows; write the curve and print the suggestion."""
    if {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return
    own = Parser(prog="vitrail lr-range", add_help=False, allow_abbrev=False)
    own.add_argument("--lowest", type=float, default=1e-6)
    own.add_argument("--highest", type=float, default=1.0)
    own.add_argument("--steps", type=int, default=100)
    own.add_argument("--output", type=Path)
    own.add_argument("--json", action="store_true")
    recipe, options, config = read_config(own, words)
    from vitrail.reporting.lr_curve import write_lr_range
    from vitrail.training.lr_range import find_learning_rate

    found = find_learning_rate(config, options.lowest, options.highest, options.steps)
    folder = options.output or Path("runs") / f"lr-range-{run_name(config, recipe)}"
    picture = write_lr_range(folder, found.to_dict())
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found.text())
    print(f"curve {picture}")
