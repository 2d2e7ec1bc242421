"""One epoch of the recipe `mnist-vit` on real MNIST: Vitrail's batches against torch's DataLoader.

    python benchmarks/mnist_epoch.py [--quick]        needs VITRAIL_DATA, a folder that holds mnist/

Two ways to get the same augmented batches, each of them feeding the same training loop:

- vitrail: `training_batches`, indexed reads of one uint8 array and augmentation of whole batches.
- torch: DataLoader with two workers that start anew each epoch, over PIL images that were decoded before the
  clock started, with torchvision's RandomAffine (bilinear), ToTensor and Normalize.

Measured, in seconds: `epoch`, the loop fed by that way; `data`, iterating the same batches without a model;
and `model`, the loop fed with one ready batch over and over, which no way of loading can beat.

Fairness: both run in one process, on the same threads, in turn, with the order reversed from one
repetition to the next, and each epoch starts from the same weights. The loop is the package's own
(`vitrail.training.loop.fit`: forward, backward, clipping, fused AdamW, moving average, a log record every 50
steps and the checkpoint at the end), so model, precision, optimiser and number of steps are equal; building
the model is not timed, starting the workers is. Both draw from the same ranges of angle, shift and scale, but
not the same numbers: the training loss of the last steps, written beside the times, shows that both learn the
same thing. An epoch goes over all 60,000 training images; both leave out the last batch, which is not full.
`--quick` is a smoke test: 2,000 images, once.
"""

from __future__ import annotations

import vitrail.torchvision_ops  # noqa: F401  (before torchvision)

# isort: split
import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from measure import machine, median_ratio, summary, write_result
from vitrail.config import AugmentSection, RunConfig, load_config
from vitrail.datasets import ImageSet
from vitrail.tasks import Batch
from vitrail.training import Run, prepare, training_batches
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import TrainingState
from vitrail.training.loop import fit
from vitrail.training.optim import build_optimizer, learning_rate

RECIPE = "mnist-vit"
TARGET = 3.0
WORKERS = 2
REPETITIONS = 3
QUICK_IMAGES = 2_000

Batches = Callable[[Run], Iterator[Batch]]


class PictureSet(Dataset[tuple[torch.Tensor, int]]):
    """Decoded PIL images with torchvision transforms, as torchvision's own MNIST class is used."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        # [C, H, W] -> [H, W] of grey, [H, W, 3] of colours
        self.pictures = [
            Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
            for array in images.images
        ]
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def pipeline(run: Run) -> transforms.Compose:
    """The recipe's augmentation and normalisation in torchvision's transforms."""
    section = run.config.augment
    if section != AugmentSection(rotate=section.rotate, translate=section.translate, scale=section.scale):
        raise ValueError(f"{RECIPE} augments by more than rotation, translation and scale: add it here too")
    affine = transforms.RandomAffine(
        section.rotate,
        translate=(section.translate, section.translate),
        scale=(1 - section.scale, 1 + section.scale),
        interpolation=transforms.InterpolationMode.BILINEAR,
    )
    normalise = transforms.Normalize(run.preprocessing.mean, run.preprocessing.std)
    return transforms.Compose([affine, transforms.ToTensor(), normalise])


def torch_batches(pictures: PictureSet, run: Run) -> Iterator[Batch]:
    """One epoch through a DataLoader, whose workers start here."""
    section = run.config.train
    loader = DataLoader(
        pictures,
        batch_size=section.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        generator=torch.Generator().manual_seed(section.seed),
    )
    for images, labels in loader:
        yield {"images": images, "targets": labels}


def time_epoch(config: RunConfig, batches: Batches) -> tuple[float, float]:
    """Seconds of the training loop over the batches, and the mean loss of its last log record."""
    run = prepare(config)
    section, optim, plan = config.train, config.optim, run.plan
    schedule = learning_rate(optim, plan.total, plan.steps_per_epoch, section.batch_size)
    state = TrainingState(
        task=run.task,
        optimizer=build_optimizer(run.task, run.model, optim),
        average=MovingAverage(run.task.trained(), section.ema) if section.ema else None,
    )
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        metrics = Path(place) / "metrics.jsonl"
        began = time.perf_counter()
        fit(
            state,
            lambda _: batches(run),
            plan=plan,
            schedule=schedule,
            accelerator=run.accelerator,
            clip_norm=optim.clip_norm,
            metrics=metrics,
            seed=section.seed,
            checkpoints=Path(place),
        )
        seconds = time.perf_counter() - began
        loss = json.loads(metrics.read_text().splitlines()[-1])["loss"]
        return seconds, loss


def time_data(run: Run, batches: Batches) -> float:
    """Seconds to iterate the batches of an epoch."""
    began = time.perf_counter()
    steps = sum(1 for _ in batches(run))
    seconds = time.perf_counter() - began
    if steps != run.plan.total:
        raise ValueError(f"expected {run.plan.total} batches, got {steps}")
    return seconds


def settings_of(quick: bool) -> RunConfig:
    """The recipe for one epoch on all training images.

    Raises:
        ValueError: MNIST is not there; in one line.
    """
    if not os.environ.get("VITRAIL_DATA"):
        raise ValueError("this needs the real MNIST: set VITRAIL_DATA to a folder that holds mnist/")
    overrides = {"data.val_fraction": 0.0, "train.duration": "1 epoch", "train.device": "cpu"}
    if quick:
        overrides["data.train_fraction"] = QUICK_IMAGES / 60_000
    return load_config(RECIPE, overrides)


def measure(quick: bool) -> dict[str, Any]:
    """Take all times.

    Raises:
        ValueError: MNIST is not there; in one line.
    """
    config = settings_of(quick)
    run = prepare(config)
    described = machine()
    transform = pipeline(run)
    pictures = PictureSet(run.splits.train, transform)
    ways: dict[str, Batches] = {
        "vitrail": lambda run: training_batches(run, 0),
        "torch": lambda run: torch_batches(pictures, run),
    }
    ready = next(training_batches(run, 0))

    # Untimed, so that memory is mapped and kernels are chosen.
    time_epoch(config, lambda _: itertools.repeat(ready, 50))
    for batches in ways.values():
        list(itertools.islice(batches(run), 20))

    data: dict[str, list[float]] = {name: [] for name in ways}
    epoch: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    model: list[float] = []
    repetitions = 1 if quick else REPETITIONS
    for repetition in range(repetitions):
        for name in list(ways)[:: 1 if repetition % 2 == 0 else -1]:
            data[name].append(time_data(run, ways[name]))
            seconds, loss = time_epoch(config, ways[name])
            epoch[name].append(seconds)
            losses[name].append(loss)
        model.append(time_epoch(config, lambda _: itertools.repeat(ready, run.plan.total))[0])
        print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr)

    trained = run.plan.total * config.train.batch_size
    return {
        "benchmark": "mnist_epoch",
        "quick": quick,
        "machine": described,
        "settings": {
            "recipe": RECIPE,
            "model": config.model.name,
            "images": len(run.splits.train),
            "images_trained": trained,
            "batch_size": config.train.batch_size,
            "steps": run.plan.total,
            "precision": run.accelerator.mixed_precision.replace("no", "fp32"),
            "augment": config.augment.model_dump(exclude_defaults=True),
            "workers": WORKERS,
            "transforms": [str(part) for part in transform.transforms],
            "repetitions": repetitions,
        },
        "ways": {
            name: {
                "epoch": summary(epoch[name]),
                "data": summary(data[name]),
                "epoch_images_per_s": trained / statistics.median(epoch[name]),
                "data_images_per_s": trained / statistics.median(data[name]),
                "last_loss": statistics.median(losses[name]),
            }
            for name in ways
        },
        "model": summary(model) | {"images_per_s": trained / statistics.median(model)},
        "torch_over_vitrail": {
            "epoch": statistics.median(epoch["torch"]) / statistics.median(epoch["vitrail"]),
            "epoch_paired": median_ratio(epoch["torch"], epoch["vitrail"]),
            "data": statistics.median(data["torch"]) / statistics.median(data["vitrail"]),
            "epoch_if_vitrail_data_were_free": statistics.median(epoch["torch"]) / statistics.median(model),
            "epoch_target": TARGET,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    settings, described, ratios = result["settings"], result["machine"], result["torch_over_vitrail"]
    print(
        f"{settings['recipe']}: {settings['images_trained']} MNIST images, {settings['steps']} steps of "
        f"{settings['batch_size']}, {settings['precision']}; {described['cpu']}, {described['cores']} cores, "
        f"{described['torch_threads']} torch threads; median of {settings['repetitions']}"
    )
    print(f"{'':10}{'epoch s':>10}{'images/s':>10}{'data s':>10}{'images/s':>10}{'last loss':>11}")
    for name, way in result["ways"].items():
        print(
            f"{name:10}{way['epoch']['median_s']:10.2f}{way['epoch_images_per_s']:10.0f}"
            f"{way['data']['median_s']:10.2f}{way['data_images_per_s']:10.0f}{way['last_loss']:11.3f}"
        )
    model = result["model"]
    print(f"{'model only':10}{model['median_s']:10.2f}{model['images_per_s']:10.0f}")
    verdict = "reached" if ratios["epoch_paired"] >= ratios["epoch_target"] else "NOT reached"
    print(
        f"torch / vitrail: epoch {ratios['epoch']:.2f} (paired {ratios['epoch_paired']:.2f}, target "
        f"{ratios['epoch_target']:.1f} {verdict}), data {ratios['data']:.2f}; with free data Vitrail's epoch "
        f"would reach {ratios['epoch_if_vitrail_data_were_free']:.2f}"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2,000 images, one repetition")
    quick = parser.parse_args().quick
    try:
        result = measure(quick)
    except ValueError as error:
        sys.exit(f"mnist_epoch: {error}")
    show(result)
    write_result("mnist_epoch", result, quick=quick)


if __name__ == "__main__":
    main()
