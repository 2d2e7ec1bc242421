"""One training step of ViT-S/16 on a CPU in float32: Vitrail against timm and transformers.

    python benchmarks/training_step.py [--quick]

A step is: forward, cross-entropy, backward, AdamW step, zero_grad; 8 images of 224 x 224, 1000 classes.
Beside it stands the machine's ceiling, the speed of a float32 product of two 2048 x 2048 matrices, and which
share of it each contestant reaches: 6 floating-point operations a multiply-add (2 forward, 4 backward), with
the multiply-adds of `count_macs`.

Fairness: one process, the same threads, inputs, labels and optimiser (fused AdamW over all parameters), train
mode with every dropout 0, equal numbers of parameters (checked), and each library's own default attention
(all three call torch's scaled_dot_product_attention). Steps are taken in turn, one of each contestant and one
matrix product a round, and the order rotates from round to round, so that a busy moment of the machine hits
all alike. The first two rounds do not count. Ratios are against the faster peer: of the medians, and the
median of the ratios within a round. `--quick` is a smoke test: a tiny model of two blocks, batch 2, two
rounds.
"""

from __future__ import annotations

import vitrail.torchvision_ops  # noqa: F401  (before timm, which imports torchvision)

# isort: split
import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from measure import machine, median_ratio, summary, write_result
from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.pretrained import create_model

WARMUP = 2
PRODUCT_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all contestants have in common."""

    variant: str = "vit_small_patch16_224"
    dim: int = 384
    depth: int = 12
    heads: int = 6
    img_size: int = 224
    num_classes: int = 1000
    batch_size: int = 8
    rounds: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.05


QUICK = Settings(variant="vit_tiny_patch16_224", dim=192, depth=2, heads=3, batch_size=2, rounds=2)


class Logits(nn.Module):
    """A transformers classifier that takes and gives plain tensors."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def contestants(settings: Settings) -> dict[str, nn.Module]:
    """The same model from three libraries, in train mode, with fresh weights."""
    torch.manual_seed(0)
    peer_config = ViTConfig(
        hidden_size=settings.dim,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.dim,
        image_size=settings.img_size,
        num_labels=settings.num_classes,
    )
    models = {
        "vitrail": create_model(settings.variant, depth=settings.depth),
        "timm": timm.create_model(settings.variant, depth=settings.depth),
        "transformers": Logits(ViTForImageClassification(peer_config)),
    }
    counts = {name: count_parameters(model) for name, model in models.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the models differ: {counts}")
    return {name: model.train() for name, model in models.items()}


def training_step(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> Callable[[], None]:
    """One step of a model, to be called again and again."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(settings: Settings, quick: bool) -> dict[str, Any]:
    """Take all times."""
    described = machine("timm", "transformers")
    models = contestants(settings)
    size = settings.img_size
    macs, parameters = count_macs(models["vitrail"], (3, size, size)), count_parameters(models["vitrail"])
    images = torch.randn(settings.batch_size, 3, size, size)
    labels = torch.randint(settings.num_classes, (settings.batch_size,))
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    runs: dict[str, Callable[[], object]] = {
        name: training_step(model, images, labels, settings) for name, model in models.items()
    }
    runs["product"] = lambda: left @ right
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-WARMUP, settings.rounds):
        at = number % len(runs)
        for name in [*runs][at:] + [*runs][:at]:
            began = time.perf_counter()
            runs[name]()
            seconds = time.perf_counter() - began
            if number >= 0:
                times[name].append(seconds)
        print(f"round {number + 1 + WARMUP} of {settings.rounds + WARMUP}", file=sys.stderr)

    ceiling = 2 * PRODUCT_SIZE**3 / statistics.median(times["product"]) / 1e9
    work = 6 * macs * settings.batch_size / 1e9
    faster_peer = min(("timm", "transformers"), key=lambda name: statistics.median(times[name]))
    return {
        "benchmark": "training_step",
        "quick": quick,
        "machine": described,
        "settings": {
            **asdict(settings),
            "precision": "fp32",
            "optimizer": "AdamW, fused",
            "warmup_rounds": WARMUP,
            "parameters": parameters,
            "macs_per_image": macs,
        },
        "ceiling": {"gflop_per_s": ceiling, "matrix_size": PRODUCT_SIZE} | summary(times["product"]),
        "contestants": {
            name: summary(times[name])
            | {
                "images_per_s": settings.batch_size / statistics.median(times[name]),
                "gflop_per_s": work / statistics.median(times[name]),
                "share_of_ceiling": work / statistics.median(times[name]) / ceiling,
            }
            for name in models
        },
        "faster_peer": faster_peer,
        "faster_peer_over_vitrail": {
            "medians": statistics.median(times[faster_peer]) / statistics.median(times["vitrail"]),
            "paired": median_ratio(times[faster_peer], times["vitrail"]),
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    settings, described, ceiling = result["settings"], result["machine"], result["ceiling"]
    print(
        f"{settings['variant']}, {settings['depth']} blocks, batch {settings['batch_size']}, fp32; "
        f"{described['cpu']}, {described['cores']} cores, {described['torch_threads']} torch threads; "
        f"{settings['rounds']} rounds"
    )
    print(f"{'':14}{'median s':>10}{'min s':>10}{'quartiles s':>18}{'GFLOP/s':>10}{'of ceiling':>12}")
    for name, found in result["contestants"].items():
        low, high = found["quartiles_s"]
        quartiles = f"{low:.3f} to {high:.3f}"
        print(
            f"{name:14}{found['median_s']:10.3f}{found['min_s']:10.3f}{quartiles:>18}"
            f"{found['gflop_per_s']:10.1f}{found['share_of_ceiling']:12.1%}"
        )
    side = ceiling["matrix_size"]
    print(f"ceiling: {ceiling['gflop_per_s']:.1f} GFLOP/s ({side} x {side} float32 matrix product)")
    ratios = result["faster_peer_over_vitrail"]
    print(f"{result['faster_peer']} / vitrail: {ratios['medians']:.3f} (paired {ratios['paired']:.3f})")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model, two rounds")
    quick = parser.parse_args().quick
    result = measure(QUICK if quick else Settings(), quick)
    show(result)
    write_result("training_step", result, quick=quick)


if __name__ == "__main__":
    main()
