"""`vitrail adaptive`: measure token merging and early exit on a trained plain ViT."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vitrail.cli.images import load_splits
from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `adaptive` to the verbs."""
    parser = verbs.add_parser(
        "adaptive", help="measure token merging and early exit on a trained plain ViT: accuracy, cost, time"
    )
    parser.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    parser.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write adaptive.json and .png there")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Print, and write where a folder is given, what fewer tokens and blocks cost and gain."""
    from vitrail.adaptive import adaptive_curve
    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained.hub import from_pretrained

    stored = from_pretrained(options.model)
    if options.output is not None:  # what cannot be written is to be known before minutes of measuring
        options.output.mkdir(parents=True, exist_ok=True)
    curve = adaptive_curve(
        stored.model,
        Preprocessing.from_dict(stored.preprocessing),
        load_splits(DataSection(name=options.dataset, root=options.root), stored.preprocessing),
        batch_size=options.batch_size,
    )
    print(json.dumps(curve.to_dict(), indent=2) if options.json else curve.text())
    if options.output is not None:
        from vitrail.adaptive.chart import curve_chart
        from vitrail.explain.draw import png
        from vitrail.files import write_whole

        write_whole(options.output / "adaptive.json", json.dumps(curve.to_dict(), indent=2) + "\n")
        write_whole(options.output / "adaptive.png", png(curve_chart(curve)))
        print(f"{options.output / 'adaptive.png'} and adaptive.json", file=sys.stderr)
