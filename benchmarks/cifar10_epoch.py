"""One epoch of the recipe `cifar10-vit` on real CIFAR-10: `vitrail train` against a usual script with timm.

    python benchmarks/cifar10_epoch.py [--repetitions N] [--quick]

VITRAIL_DATA must be a folder that holds cifar10/.

- vitrail: the recipe as it is (Muon, clipping, moving average, logging, checkpoint), at 32 pixels from the
  first step on; the recipe itself starts with smaller images.
- timm: its VisionTransformer of the same width, depth and convolutional stem, in a plain PyTorch loop (AdamW,
  label smoothing; neither clipping nor moving average) over a DataLoader with two workers and torchvision's
  RandomCrop, RandomHorizontalFlip, ToTensor and Normalize on decoded PIL images.

The multiply-adds of both, counted by PyTorch's own counter, must agree within 1 %: timm averages the patches
where ours weighs them first. Both run in one process, on the same threads, in turns; building models and
decoding PNGs is not timed, starting workers is. Where the CPU multiplies tiles in bfloat16 (AMX), both run
under bfloat16 autocast too. `--quick` is a smoke test: 400 images, once.
"""

from __future__ import annotations

import vitrail.torchvision_ops  # noqa: F401  (before timm)

# isort: split
import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from measure import machine, median_ratio, summary, write_result
from mnist_epoch import PictureSet, time_epoch
from vitrail.components.patch import StemPatchEmbedding
from vitrail.config import AugmentSection, RunConfig, load_config
from vitrail.models import build_model
from vitrail.training import Run, prepare, training_batches

RECIPE = "cifar10-vit"
TARGET = 1.5
WORKERS = 2
REPETITIONS = 2
QUICK_IMAGES = 400


def timm_model(config: Any) -> nn.Module:
    """timm's ViT with the stem's layers as its backbone; `config` is our model's."""
    stem = StemPatchEmbedding(config.patch_size, config.in_chans, config.embed_dim).proj
    return VisionTransformer(
        img_size=config.img_size,
        patch_size=1,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        embed_layer=partial(HybridEmbed, stem, proj=False),
    )


def macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of a forward pass, an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() / 2 / len(images)


def pipeline(run: Run) -> transforms.Compose:
    """The recipe's augmentation and normalisation in torchvision's transforms."""
    section, (height, width) = run.config.augment, run.preprocessing.img_size
    if section != AugmentSection(flip=section.flip, crop=section.crop):
        raise ValueError(f"{RECIPE} augments by more than crop and flip: add it here too")
    return transforms.Compose(
        [
            transforms.RandomCrop((height, width), padding=section.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(run.preprocessing.mean, run.preprocessing.std),
        ]
    )


def time_script(model: nn.Module, pictures: Dataset[Any], config: RunConfig, *, bf16: bool) -> float:
    """Seconds of an epoch as most training scripts have it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=config.optim.weight_decay)
    smoothing = config.task.model_extra["label_smoothing"]
    began = time.perf_counter()
    loader = DataLoader(
        pictures, batch_size=config.train.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS
    )
    for images, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def time_recipe(config: RunConfig) -> float:
    """Seconds of an epoch of `vitrail train`."""
    return time_epoch(config, lambda run: training_batches(run, 0))[0]


def measure(repetitions: int, quick: bool) -> dict[str, Any]:
    """Take all times.

    Raises:
        ValueError: CIFAR-10 is not there, or the models are not of one cost; in one line.
    """
    if not os.environ.get("VITRAIL_DATA"):
        raise ValueError("this needs the real CIFAR-10: set VITRAIL_DATA to a folder that holds cifar10/")
    overrides: dict[str, Any] = {
        "data.val_fraction": 0.0,
        "train.duration": "1 epoch",
        "train.device": "cpu",
        "train.progressive": {},
    }
    if quick:
        overrides["data.train_fraction"] = QUICK_IMAGES / 50_000
    config = load_config(RECIPE, overrides)
    run = prepare(config)
    described = machine()
    ours = build_model(config.model.name)
    cost = {
        name: macs(model, torch.randn(2, 3, 32, 32))
        for name, model in (("vitrail", ours), ("timm", timm_model(ours.config)))
    }
    if abs(cost["vitrail"] / cost["timm"] - 1) > 0.01:
        raise ValueError(f"the models are not of one cost: {cost}")
    pictures = PictureSet(run.splits.train, pipeline(run))
    ways: dict[str, Callable[[], float]] = {}
    for precision in ("fp32", "bf16") if torch.cpu.get_capabilities().get("amx_bf16") else ("fp32",):
        own = load_config(RECIPE, overrides | {"train.precision": precision})
        ways[f"vitrail {precision}"] = partial(time_recipe, own)
        ways[f"timm {precision}"] = partial(
            time_script, timm_model(ours.config), pictures, own, bf16=precision == "bf16"
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        for name in list(ways)[:: 1 if repetition % 2 == 0 else -1]:
            seconds[name].append(ways[name]())
            print(f"repetition {repetition + 1}: {name} {seconds[name][-1]:.1f} s", file=sys.stderr)
    return {
        "benchmark": "cifar10_epoch",
        "quick": quick,
        "machine": described,
        "settings": {
            "recipe": RECIPE,
            "images": len(run.splits.train),
            "steps": run.plan.total,
            "batch_size": config.train.batch_size,
            "macs_an_image": cost,
            "workers": WORKERS,
            "repetitions": repetitions,
        },
        "epoch": {name: summary(own) for name, own in seconds.items()},
        "timm_fp32_over_this": {
            name: median_ratio(seconds["timm fp32"], own) for name, own in seconds.items()
        },
        "target": TARGET,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: 400 images, one repetition")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help=f"default {REPETITIONS}")
    options = parser.parse_args()
    try:
        result = measure(1 if options.quick else options.repetitions, options.quick)
    except ValueError as error:
        sys.exit(f"cifar10_epoch: {error}")
    for name, own in result["epoch"].items():
        ratio = result["timm_fp32_over_this"][name]
        print(f"{name:14}{own['median_s']:8.1f} s an epoch  timm fp32 / this {ratio:.2f} (target {TARGET})")
    write_result("cifar10_epoch", result, quick=options.quick)


if __name__ == "__main__":
    main()
