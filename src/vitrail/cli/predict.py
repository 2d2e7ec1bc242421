"""`vitrail predict`: classify image files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cli.words import Verbs

if TYPE_CHECKING:
    from vitrail.serving import Prediction, Predictor


def add(verbs: Verbs) -> None:
    """Add `predict` to the verbs."""
    parser = verbs.add_parser("predict", help="classify image files")
    parser.add_argument("run", metavar="RUN", help="run folder or model folder")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files, or folders, of which the images directly in them are taken",
    )
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default 3)")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=8, help="images a core at a time")
    parser.add_argument("--json", action="store_true", help="print JSON, one object an image")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write a table (.jsonl, .csv or .parquet) instead; the same command again goes on with it",
    )
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Print the classes of images as they are found, or write them as a table."""
    from vitrail.serving import Prediction, Predictor, find_files, predict_files

    files, broken = find_files(options.images)
    predictor = Predictor.from_source(options.run)
    if options.output is not None:
        if broken:
            raise ValueError("; ".join(map(str, broken)))
        _predict_to(predictor, files, options)
        return
    for batch in predict_files(predictor, files, top=options.top, batch_size=options.batch_size):
        for found in batch:
            if isinstance(found, Prediction):
                print(_prediction_line(found, as_json=options.json), flush=True)
            else:
                broken.append(found)
    if broken:
        raise ValueError("; ".join(map(str, broken)))


def _predict_to(predictor: Predictor, files: Sequence[Path], options: argparse.Namespace) -> None:
    from vitrail.serving import predict_to

    if options.json:
        raise ValueError("--json prints and --output writes: leave one out (--output FILE.jsonl writes JSON)")
    try:
        found = predict_to(predictor, files, options.output, top=options.top, batch_size=options.batch_size)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None
    print(found.text())
    if found.broken:
        raise ValueError(found.broken_text())


def _prediction_line(found: Prediction, *, as_json: bool) -> str:
    named = list(zip(found.classes, found.probabilities, strict=True))
    if as_json:
        predictions = [{"class": name, "confidence": share} for name, share in named]
        return json.dumps({"image": found.source, "predictions": predictions})
    return f"{found.source}  " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in named)
