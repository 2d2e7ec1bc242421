"""`vitrail convert`: bring a model into another library's form, and check it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitrail.cli.words import SOURCES, Verbs


def add(verbs: Verbs) -> None:
    """Add `convert` to the verbs."""
    parser = verbs.add_parser("convert", help="bring a model into another library's form, and check it")
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write")
    formats = ("vitrail", "timm", "transformers", "torchvision")
    parser.add_argument("--to", choices=formats, default="vitrail", help="whose form (default vitrail)")
    parser.add_argument("--model", metavar="NAME", help="architecture, for a file that does not tell")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            help="a number for each channel, for a file that does not tell",
        )
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write a model in the other form and print what reading it back has shown."""
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained import export_model, import_model

    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std belong together: give both or neither")
    if options.target.exists() and (not options.target.is_dir() or any(options.target.iterdir())):
        raise ValueError(f"{options.target} is not an empty folder: choose another target")
    model, report = import_model(options.source, model=options.model, mean=options.mean, std=options.std)
    Preprocessing.from_dict(model.preprocessing)  # complete, or refused before anything is written
    print(report.text())
    check = export_model(model, options.target, options.to)
    print(f"{options.target}: {options.to}; read back, its logits differ by {check.read_back:.2g}")
    if check.library is not None:
        print(f"loaded by {options.to}, they differ by {check.library:.2g}")
    elif options.to != "vitrail":
        print(f"{options.to} is not installed: that it can load this was not checked")
