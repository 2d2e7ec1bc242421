"""`vitrail download`: fetch weights now, to use them without network later."""

from __future__ import annotations

import argparse

from vitrail.cli.words import SOURCES, Verbs


def add(verbs: Verbs) -> None:
    """Add `download` to the verbs."""
    parser = verbs.add_parser("download", help="fetch weights now, to use them without network later")
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=SOURCES)
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Fetch each source and print where its file lies."""
    from vitrail.pretrained import find_weights

    for source in options.source:
        found = find_weights(source)
        print(f"{source}: {found.file}")
