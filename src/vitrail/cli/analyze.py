"""`vitrail analyze`: show what a model has learnt, on a data set, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cli.images import load_test_images
from vitrail.cli.words import Verbs

if TYPE_CHECKING:
    from vitrail.reporting.analysis import Subject


def add(verbs: Verbs) -> None:
    """Add `analyze` to the verbs."""
    parser = verbs.add_parser("analyze", help="show what a model has learnt, on a data set, as a page")
    parser.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    parser.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument("--against", metavar="MODEL", help="a second model, to stand beside the first")
    parser.add_argument("--images", type=int, default=1000, help="test images to use (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which images are drawn (default 0)")
    parser.add_argument("--output", type=Path, help="default analysis/MODEL-DATASET/")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the page of a model, or of two, and print what was found."""
    from vitrail.reporting.analysis_page import write_analysis

    names = (Path(name).resolve().name.replace(":", "-") for name in (options.model, options.dataset))
    found = write_analysis(
        options.output or Path("analysis") / "-".join(names),
        _subject(options.model, options),
        None if options.against is None else _subject(options.against, options),
        images=options.images,
        seed=options.seed,
    )
    print(found.found.text())
    if found.comparison is not None:
        print(f"{found.comparison.second.text()}\n{found.comparison.finding()}")
    print(f"page {found.page}")


def _subject(model: str, options: argparse.Namespace) -> Subject:
    """A model with the images of the set in its own size, on the device that is there."""
    import torch

    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.reporting.analysis import Subject

    stored = from_pretrained(model)
    return Subject(
        title=model,
        model=stored.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        preprocessing=Preprocessing.from_dict(stored.preprocessing),
        classes=stored.classes,
        images=load_test_images(DataSection(name=options.dataset, root=options.root), stored.preprocessing),
    )
