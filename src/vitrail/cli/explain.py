"""`vitrail explain`: show what a model sees in images, as a page and pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `explain` to the verbs."""
    parser = verbs.add_parser("explain", help="show what a model sees in images, as a page and pictures")
    parser.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="again for each; all: every method (default: quick ones)",
    )
    parser.add_argument("--target", metavar="CLASS", help="name or number of the class (default: predicted)")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layers to show, counted from 1 (default: all)"
    )
    parser.add_argument(
        "--heads",
        default="mean",
        metavar="HEADS",
        help="of the attention's picture: mean, max, min, all, or a number from 1 (default mean)",
    )
    parser.add_argument("--output", type=Path, default=Path("explanation"), help="default explanation/")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the page of pictures and print its numbers."""
    from vitrail.datasets.folder import image_files
    from vitrail.reporting.explanation import write_explanation
    from vitrail.serving import Predictor

    predictor = Predictor.from_source(options.model)
    found = write_explanation(
        options.output,
        [file for path in options.images for file in image_files(Path(path))],
        model=predictor.model,
        preprocessing=predictor.preprocessing,
        classes=predictor.classes,
        title=options.model,
        methods=options.method,
        target=None if options.target is None else predictor.class_number(options.target),
        layers=options.layers,
        heads=int(options.heads) if options.heads.isdigit() else options.heads,
    )
    if options.json:
        print(json.dumps([own.to_dict() for own in found.images], indent=2))
        return
    for own in found.images:
        print(own.table())
    print(f"page {found.page}")
