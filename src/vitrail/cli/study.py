"""`vitrail study`: train, measure and answer a set of questions."""

from __future__ import annotations

import shlex
from pathlib import Path

from vitrail.cli.words import Parser, Verbs, parse_overrides

_HELP = """\
usage: vitrail study NAME [--section.key VALUE]... [--seeds N] [--quick] [--output FOLDER] [--dry-run]

Train everything that a question needs, measure it, and write one report that answers: yes, no or undecided.

  vitrail study mae-infonce
  vitrail study mae-infonce --data.name digits --quick     a try, in a minute or two
  vitrail study vit-swin --dry-run

NAME is one of these, or a YAML file (docs/studies.md says how to write one):

{studies}

  --seeds N          seeds of every run (default: as the study says)
  --quick            very short runs with one seed: shows what comes out, proves nothing
  --output FOLDER    where the runs and the report lie (default runs/study-NAME)
  --dry-run          list the runs and what they would cost; train nothing

A study that was stopped goes on where it was when the same command is given again.
"""


def add(verbs: Verbs) -> None:
    """Add `study` to the verbs."""
    verbs.add_parser("study", help="train, measure and answer a set of questions", add_help=False)


def run(words: list[str]) -> None:
    """Plan a study, train and measure what it needs, write its page; or print the help, or the plan."""
    if not words or {"-h", "--help"} & set(words):
        from vitrail.config import shipped_yaml

        listed = shipped_yaml("studies").items()  # `vitrail.studies` would import torch
        lines = (f"  {name:<14} {text.splitlines()[0].lstrip('# ')}" for name, text in listed)
        print(_HELP.format(studies="\n".join(lines)), end="")
        return
    from vitrail.studies import outline, plan_study, run_study, write_study

    own = Parser(prog="vitrail study", add_help=False, allow_abbrev=False)
    own.add_argument("name")
    own.add_argument("--seeds", type=int)
    own.add_argument("--quick", action="store_true")
    own.add_argument("--dry-run", "--dry_run", action="store_true")
    own.add_argument("--output", type=Path)
    options, rest = own.parse_known_args(words)
    folder = options.output or Path("runs") / f"study-{Path(options.name).stem}"
    study = plan_study(
        options.name, folder, overrides=parse_overrides(rest), seeds=options.seeds, quick=options.quick
    )
    if options.dry_run:
        print(outline(study))
        return
    command = shlex.join(["vitrail", "study", *words])
    try:
        found = run_study(study, command=command, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{stopped or 'stopped'}; go on with: {command}") from None
    page = write_study(folder, found)
    print(found.text())
    print(f"report {page}")
