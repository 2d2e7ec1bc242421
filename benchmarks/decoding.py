"""JPEG files to normalised batches with two worker processes: Vitrail against torchvision in a DataLoader.

    python benchmarks/decoding.py [--quick]        needs VITRAIL_DATA, a folder that holds imagenet-sample/

200 photographs of ImageNet (median 500 x 375 pixels), each read twice in a pass, 40 a batch. Three jobs:

- evaluate_224: the shorter side to 224 pixels, the centre 224 x 224.
- evaluate_64: the same with 64, where most files can be decoded at a reduced scale.
- train_224: a random part of 8 % to 100 % of the area, resized to 224 x 224.

And the ways to do them:

- vitrail: `BatchReader` over a `FileSet` (bicubic), the batch normalised in the main process.
- vitrail_bytes: the same up to the uint8 batch, which is what a GPU is sent; it normalises by itself.
- torchvision: `PIL.Image.open`, convert, then Resize and CenterCrop or RandomResizedCrop on the PIL image, as
  Vitrail in size and (bicubic) filter, ToTensor and Normalize.
- torchvision_usual: the line that most training scripts have: the filter is bilinear, and for 224 pixels the
  shorter side is resized to 256 first.
- torchvision_v2: as torchvision, but transforms.v2 on uint8 tensors, which resizes with the vector
  instructions that Vitrail uses.

Fairness: one process of one thread (a second would only wait beside the workers), every way with two
persistent workers of one thread each, the same files in the same order, started before the clock; the files
are in the page cache. Passes are taken in turn, and the order is
reversed from one repetition to the next. Ratios are of medians, and the median of ratios within a repetition.
`difference` is the mean absolute difference between the pixels of vitrail and of torchvision, of 255, over
the 200 images. `--quick` is a smoke test: 16 images, two repetitions.
"""

from __future__ import annotations

import vitrail.torchvision_ops  # noqa: F401  (before torchvision)

# isort: split
import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from measure import machine, median_ratio, summary, write_result
from vitrail.datasets.file_set import FileSet
from vitrail.datasets.items import FileItems
from vitrail.datasets.loading import BatchReader
from vitrail.datasets.transforms import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 0.08
JOBS = {"evaluate_224": 224, "evaluate_64": 64, "train_224": 224}
WAYS = ("vitrail", "vitrail_bytes", "torchvision", "torchvision_usual", "torchvision_v2")
WORKERS = 2
TARGET = 1.5

Pass = Callable[[], Iterable[Tensor]]
"""Gives the batches of one pass."""


class Files(Dataset):
    """Image files, as torchvision's ImageFolder reads them."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with self.paths[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def own_ways(paths: list[Path], size: int, train: bool, batch_size: int) -> dict[str, Pass]:
    """Vitrail's two ways over one reader."""
    items = FileItems(paths, [0] * len(paths), classes=("photo",), name="sample", split="train")
    images = FileSet.from_items(items, img_size=(size, size), in_chans=3, mean=MEAN, std=STD)
    crop = SMALLEST if train else None
    reader = BatchReader(
        images, batch_size, seed=0, shuffle=False, drop_last=False, workers=WORKERS, resized_crop=crop
    )
    preprocessing = Preprocessing((size, size), 3, MEAN, STD)
    return {
        "vitrail": lambda: (preprocessing.normalise(batch) for batch, _ in reader.epoch(0)),
        "vitrail_bytes": lambda: (batch for batch, _ in reader.epoch(0)),
    }


def peer_ways(paths: list[Path], size: int, train: bool, batch_size: int) -> dict[str, Pass]:
    """torchvision's three ways."""
    cubic, linear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    usual = 256 if size == 224 else size

    def sized(module: Any, shorter: int, interpolation: InterpolationMode) -> list[Any]:
        if train:
            return [module.RandomResizedCrop(size, (SMALLEST, 1.0), interpolation=interpolation)]
        return [module.Resize(shorter, interpolation), module.CenterCrop(size)]

    chains = {
        "torchvision": transforms.Compose(
            [*sized(transforms, size, cubic), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        ),
        "torchvision_usual": transforms.Compose(
            [*sized(transforms, usual, linear), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        ),
        "torchvision_v2": v2.Compose(
            [
                v2.PILToTensor(),
                *sized(v2, size, cubic),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        ),
    }
    return {
        name: DataLoader(
            Files(paths, chain), batch_size=batch_size, num_workers=WORKERS, persistent_workers=True
        ).__iter__
        for name, chain in chains.items()
    }


def seconds(one: Pass, count: int) -> float:
    """Time of a pass, which must give `count` images."""
    began = time.perf_counter()
    found = sum(len(batch) for batch in one())
    elapsed = time.perf_counter() - began
    if found != count:
        raise ValueError(f"expected {count} images, got {found}")
    return elapsed


def difference(own: Pass, peer: Pass) -> float:
    """Mean absolute difference between the pixels of two passes, of 255."""
    scale = torch.tensor(STD).view(1, 3, 1, 1) * 255
    pairs = zip(own(), peer(), strict=True)
    return statistics.mean(float(((a - b) * scale).abs().mean()) for a, b in pairs)


def measure_job(paths: list[Path], job: str, batch_size: int, repetitions: int) -> dict[str, Any]:
    """Times of all ways to do one job."""
    size, train = JOBS[job], job.startswith("train")
    ways = own_ways(paths, size, train, batch_size) | peer_ways(paths, size, train, batch_size)
    for one in ways.values():
        seconds(one, len(paths))  # starts the workers
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repetitions):
        for name in [*ways][:: 1 if number % 2 else -1]:
            times[name].append(seconds(ways[name], len(paths)))
        print(f"{job}: repetition {number + 1} of {repetitions}", file=sys.stderr)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "ways": {
            name: summary(taken) | {"images_per_s": len(paths) / medians[name]}
            for name, taken in times.items()
        },
        "difference": None if train else difference(ways["vitrail"], ways["torchvision"]),
        "peer_over_vitrail": {
            name: {
                "medians": medians[name] / medians["vitrail"],
                "paired": median_ratio(times[name], times["vitrail"]),
            }
            for name in WAYS[2:]
        },
    }


def measure(quick: bool) -> dict[str, Any]:
    """Take all times.

    Raises:
        ValueError: The photographs are not there.
    """
    torch.set_num_threads(1)
    described = machine("torchvision", "pillow")
    root = os.environ.get("VITRAIL_DATA")
    files = sorted((Path(root) / "imagenet-sample").glob("*.JPEG")) if root else []
    if not files:
        raise ValueError("no photographs: set VITRAIL_DATA to a folder that holds imagenet-sample/")
    paths = files[:16] if quick else files * 2
    batch_size, repetitions = (8, 2) if quick else (40, 7)
    return {
        "benchmark": "decoding",
        "quick": quick,
        "machine": described,
        "settings": {
            "files": len(set(paths)),
            "images_a_pass": len(paths),
            "batch_size": batch_size,
            "workers": WORKERS,
            "repetitions": repetitions,
            "target": TARGET,
        },
        "jobs": {job: measure_job(paths, job, batch_size, repetitions) for job in JOBS},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    described, settings = result["machine"], result["settings"]
    print(
        f"{described['cpu']}, {described['cores']} cores; {settings['workers']} workers, "
        f"{settings['images_a_pass']} images a pass, {settings['repetitions']} passes"
    )
    print(f"{'images a second':20}" + "".join(f"{way:>19}" for way in WAYS))
    for job, found in result["jobs"].items():
        print(f"{job:20}" + "".join(f"{found['ways'][way]['images_per_s']:19.0f}" for way in WAYS))
    for job, found in result["jobs"].items():
        ratios = (
            f"{way} {ratio['medians']:.2f} (paired {ratio['paired']:.2f})"
            for way, ratio in found["peer_over_vitrail"].items()
        )
        print(f"time over vitrail's, {job}: {', '.join(ratios)}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: 16 images, two passes")
    quick = parser.parse_args().quick
    result = measure(quick)
    show(result)
    write_result("decoding", result, quick=quick)


if __name__ == "__main__":
    main()
