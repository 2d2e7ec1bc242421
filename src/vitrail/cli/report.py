"""`vitrail report`: write a run's report again."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitrail.cli.images import load_test_images
from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `report` to the verbs."""
    parser = verbs.add_parser("report", help="write a run's report again")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the report of a run folder from what lies in it."""
    from vitrail.config import load_config
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained import load_model
    from vitrail.reporting import write_report

    folder = Path(options.run)
    stored = load_model(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder (no config.yaml)")
    data = load_config(folder / "config.yaml").data
    report = write_report(
        folder,
        model=stored.model,
        preprocessing=Preprocessing.from_dict(stored.preprocessing),
        test=load_test_images(data, stored.preprocessing),
    )
    print(f"report {report}")
