"""`vitrail data`: look at a data set before a model is trained on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `data` to the verbs."""
    parser = verbs.add_parser("data", help="look at a data set before a model is trained on it")
    parser.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument(
        "--label-column",
        "--label_column",
        "--data.label_column",
        metavar="NAME",
        help="column of the label, where there are several",
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw some images of each class")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Print what a data set holds; draw the sheet where one is wanted."""
    from vitrail.datasets import find_items
    from vitrail.datasets.inspect import contact_sheet, inspect_dataset
    from vitrail.files import write_whole

    if options.sheet is not None and options.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet writes a PNG: expected a name that ends in .png, got {options.sheet}")
    if options.sheet is not None and not options.sheet.parent.is_dir():
        raise ValueError(f"--sheet {options.sheet}: no folder {options.sheet.parent}")
    parts, ignored = find_items(options.dataset, root=options.root, label_column=options.label_column)
    found = inspect_dataset(parts, ignored)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if options.sheet is not None:
        write_whole(options.sheet, contact_sheet(next(iter(parts.values()))))
        if not options.json:
            print(f"sheet {options.sheet}")
