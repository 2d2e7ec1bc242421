"""`vitrail compare`: put finished runs side by side, with intervals over seeds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `compare` to the verbs."""
    parser = verbs.add_parser("compare", help="put finished runs side by side, with intervals over seeds")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="default comparison/")
    parser.add_argument(
        "--latency", action="store_true", help="time one image through each model, in turns, on this machine"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the comparison of finished runs and print it."""
    from vitrail.studies import compare, with_latency, write_comparison

    found = compare(options.runs)
    if options.latency:
        found = with_latency(found)
    write_comparison(options.output, found)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found.text(), end="")
    print(f"curves {options.output / 'compare.png'}")
