"""`vitrail probe`: judge frozen features by nearest neighbours and a linear classifier."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitrail.cli.images import load_splits
from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `probe` to the verbs."""
    parser = verbs.add_parser("probe", help="judge frozen features: nearest neighbours, a linear classifier")
    parser.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    parser.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument(
        "--train-fraction",
        "--train_fraction",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the training images to learn from, the same of each class (default 1)",
    )
    parser.add_argument("--neighbours", type=int, default=20, metavar="K", help="how many vote (default 20)")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Print how well features alone tell the classes."""
    import torch

    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.evaluation.probe import probe
    from vitrail.pretrained.hub import from_pretrained

    stored = from_pretrained(options.model)
    wanted = DataSection(
        name=options.dataset,
        root=options.root,
        train_fraction=options.train_fraction,
        frames=getattr(stored.model.config, "num_frames", None),
    )
    found = probe(
        stored.model,
        Preprocessing.from_dict(stored.preprocessing),
        load_splits(wanted, stored.preprocessing),
        neighbours=options.neighbours,
        batch_size=options.batch_size,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(
        f"{found.train_images} training images, {found.test_images} test images, {found.dimensions} channels"
    )
    print(f"{found.neighbours} nearest neighbours  {found.knn.text()}")
    print(f"linear classifier      {found.linear.text()}, C {found.strength:g}")
