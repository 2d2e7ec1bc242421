"""`vitrail evaluate`: test a trained model on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cli.images import load_test_images
from vitrail.cli.words import Verbs

if TYPE_CHECKING:
    from vitrail.evaluation.corruptions import Robustness
    from vitrail.evaluation.metrics import ClassificationMetrics


def add(verbs: Verbs) -> None:
    """Add `evaluate` to the verbs."""
    parser = verbs.add_parser("evaluate", help="test a trained model on a data set")
    parser.add_argument(
        "run", metavar="RUN", help="run folder, model folder, timm:NAME.TAG, torchvision:NAME or owner/name"
    )
    parser.add_argument("--dataset", help="data set to test on; the run's own when not given")
    parser.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    parser.add_argument(
        "--robustness", action="store_true", help="also under noise, blur, occlusion, rotation, low contrast"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Test a model, keep the numbers in its folder where it has one, and print them."""
    from dataclasses import asdict

    import torch

    from vitrail.config import DataSection, load_config
    from vitrail.datasets import Preprocessing
    from vitrail.datasets.items import first_names
    from vitrail.evaluation.corruptions import robustness
    from vitrail.pretrained.compiled import load_compiled
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.training import evaluate_and_write

    stored = from_pretrained(options.run)
    folder = Path(options.run) if Path(options.run).is_dir() else None
    recipe = Path(options.run) / "config.yaml"
    if options.dataset is None and not recipe.is_file():
        raise ValueError(f"{options.run} is a model alone, which names no data set: give one with --dataset")
    data = load_config(recipe).data if recipe.is_file() else DataSection()
    wanted = {"name": options.dataset or data.name, "root": options.root or data.root}
    test = load_test_images(data.model_copy(update=wanted), stored.preprocessing)
    name = test.name
    if not stored.model.has_head:
        raise ValueError(
            f"{options.run} has no head to test; judge its features with `vitrail probe {options.run} {name}`"
        )
    if test.classes != stored.classes:
        raise ValueError(
            f"the model's {len(stored.classes)} classes ({first_names(stored.classes)}) are not the "
            f"{len(test.classes)} of {name} ({first_names(test.classes)})"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = load_compiled(options.run) if device.type == "cpu" else None
    model = stored.model if compiled is None else compiled
    preprocessing = Preprocessing.from_dict(stored.preprocessing)
    metrics = evaluate_and_write(
        folder, model, preprocessing, test, batch_size=options.batch_size, device=device
    )
    damaged = None
    if options.robustness:
        damaged = robustness(model, test, preprocessing, batch_size=options.batch_size, device=device)
    if options.json:
        found = metrics.to_dict()
        print(json.dumps(found if damaged is None else found | {"robustness": asdict(damaged)}, indent=2))
        return
    _print_metrics(name, metrics)
    if damaged is not None:
        _print_robustness(damaged, width=max(map(len, test.classes)))


def _print_metrics(name: str, metrics: ClassificationMetrics) -> None:
    low, high = metrics.accuracy_interval
    print(f"{name} test, {metrics.count} images")
    print(f"accuracy {100 * metrics.accuracy:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})")
    if metrics.top5 is not None:
        print(f"top-5 accuracy {100 * metrics.top5:.2f} %")
    print(f"loss {metrics.loss:.4f}  calibration error {100 * metrics.calibration_error:.2f} %")
    width = max(len(score.name) for score in metrics.per_class)
    print(f"{'class':<{width}}  images  precision  recall     F1")
    for score in metrics.per_class:
        numbers = f"{score.count:6d}  {score.precision:9.3f}  {score.recall:6.3f}  {score.f1:5.3f}"
        print(f"{score.name:<{width}}  {numbers}")


def _print_robustness(damaged: Robustness, width: int) -> None:
    print("accuracy on damaged images, severity 1 to 5, and their mean")
    for corruption, shares in damaged.accuracy.items():
        each = "  ".join(f"{100 * share:5.1f}" for share in shares)
        print(f"{corruption:<{width}}  {each}  {100 * damaged.mean(corruption):5.1f} %")
