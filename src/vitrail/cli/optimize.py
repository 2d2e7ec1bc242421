"""`vitrail optimize`: compile a model for this machine's CPU, and measure it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitrail.cli.images import load_splits
from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `optimize` to the verbs."""
    parser = verbs.add_parser("optimize", help="compile a model for this machine's CPU, and measure it")
    parser.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "fp16", "int8"),
        default="auto",
        metavar="NAME",
        help="auto (default: the fastest here), float32, bf16 or int8",
    )
    parser.add_argument(
        "--calibrate", metavar="DATASET", help="images to calibrate int8 with, and to compare answers on"
    )
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images at a time to be fast for (default 8)"
    )
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="of images that must keep their answer (default 0.99, int8 0.98)",
    )
    parser.add_argument("--output", type=Path, default=Path("optimized"), help="default optimized/")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the compiled model beside its weights and print what was measured."""
    from vitrail.config import DataSection
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.shipping.optimize import optimize

    stored = from_pretrained(options.model)
    data = None
    if options.calibrate is not None:
        wanted = DataSection(name=options.calibrate, root=options.root)
        data = load_splits(wanted, stored.preprocessing)
    found = optimize(
        stored,
        options.output,
        precision=options.precision,
        data=data,
        batch=options.batch,
        agreement=options.agreement,
    )
    print(found.text())
