"""What less work costs and gains: accuracy, multiply-adds and wall time, setting by setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.adaptive.early_exit import EarlyExit, fit_early_exit
from vitrail.adaptive.merging import MergedViT
from vitrail.adaptive.plain import plain_vit
from vitrail.datasets import Images, Preprocessing, Splits
from vitrail.evaluation.cost import count_macs, macs_by_module, without_numbers
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.timing import in_turns, summary
from vitrail.models import Encoder

THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.6)
"""Confidences at which images leave."""
BATCHES = (1, 32)
"""Batch sizes that are timed."""
_TIMED_IMAGES, _REPETITIONS = 64, 5


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting."""

    method: str
    """none, merging or early exit."""
    setting: float
    """Patches merged in each block, or the confidence at which an image leaves; 0 for none."""
    accuracy: float
    """Share of right answers on the test images."""
    agreement: float
    """Share of answers that are the whole model's."""
    macs: float
    """Multiply-adds of an image, on average over the test images."""
    milliseconds: dict[int, float]
    """Batch size -> milliseconds an image, median."""
    depth: float
    """Blocks that an image passes, on average."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """All settings of one model on one set of test images; the first is the model as it is."""

    points: tuple[Point, ...]
    test_images: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return asdict(self)

    def text(self) -> str:
        """A table for a terminal; times in milliseconds an image, with the gain over the whole model."""
        whole = self.points[0]
        timed = [f"batch {batch}" for batch in BATCHES]
        lines = [
            f"{self.test_images} test images, {self.threads} threads; ms an image, times as fast as without",
            f"{'':22}{'accuracy':>10}{'same':>9}{'blocks':>8}{'MMACs':>9}"
            + "".join(f"{own:>17}" for own in timed),
        ]
        for point in self.points:
            name = point.method if point is whole else f"{point.method} {point.setting:g}"
            times = ""
            for batch in BATCHES:
                gain = whole.milliseconds[batch] / point.milliseconds[batch]
                times += f"{point.milliseconds[batch]:10.3f}{gain:5.2f} x"
            lines.append(
                f"{name:22}{100 * point.accuracy:9.2f}%{100 * point.agreement:8.2f}%{point.depth:8.2f}"
                f"{point.macs / 1e6:9.2f}{times}"
            )
        return "\n".join(lines)


def adaptive_curve(
    model: Encoder,
    preprocessing: Preprocessing,
    splits: Splits,
    *,
    merged: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 500,
) -> Curve:
    """Measure a trained plain ViT with token merging and with early exits, against itself.

    Exits are fitted on the validation images, or on training images where there are none.

    Args:
        model: Plain ViT with a classifier.
        preprocessing: How images become its input.
        splits: Test images to judge by, and images to fit exits on.
        merged: Patches to merge in each block; None: up to what leaves a quarter of them at the end.
        thresholds: Confidences at which images leave.
        batch_size: Images at a time, where nothing is timed.

    Raises:
        ValueError: A model that cannot compute adaptively, or no test images.
    """
    vit = plain_vit(model).eval()
    test = splits.test
    if not len(test):
        raise ValueError(f"{test.name} has no test images to judge by")
    patches = vit.config.grid[0] * vit.config.grid[1]
    if merged is None:
        most = max(1, round(0.75 * patches / len(vit.blocks)))
        merged = sorted({max(1, round(most * share)) for share in (0.25, 0.5, 0.75, 1.0)})
    held = splits.val if splits.val is not None and len(splits.val) else splits.train
    ways: dict[tuple[str, float], nn.Module] = {("none", 0): vit}
    ways |= {("merging", count): MergedViT(vit, count) for count in merged}
    if len(vit.blocks) > 1:
        fitted = fit_early_exit(vit, held, preprocessing, batch_size=batch_size)
        ways |= {("early exit", own): fitted.at(own) for own in thresholds}

    labels = torch.from_numpy(test.labels)
    answers, costs, depths = {}, {}, {}
    for key, way in ways.items():
        answers[key], costs[key], depths[key] = _judged(way, len(vit.blocks), test, preprocessing, batch_size)
    times = _times(ways, test, preprocessing)
    points = tuple(
        Point(
            method=method,
            setting=setting,
            accuracy=float((answers[method, setting] == labels).float().mean()),
            agreement=float((answers[method, setting] == answers["none", 0]).float().mean()),
            macs=costs[method, setting],
            milliseconds={batch: times[batch][method, setting] for batch in BATCHES},
            depth=depths[method, setting],
        )
        for method, setting in ways
    )
    return Curve(points=points, test_images=len(test), threads=torch.get_num_threads())


def _judged(
    way: nn.Module, depth: int, test: Images, preprocessing: Preprocessing, batch_size: int
) -> tuple[Tensor, float, float]:
    """The answers [N], mean multiply-adds and mean number of blocks an image passes."""
    shape = (preprocessing.in_chans, *preprocessing.img_size)
    if not isinstance(way, EarlyExit):
        logits = predict_logits(way, test, preprocessing, batch_size=batch_size, device=torch.device("cpu"))
        return logits.argmax(dim=1), float(count_macs(way, shape)), float(depth)
    both = predict_logits(
        _WithDepth(way), test, preprocessing, batch_size=batch_size, device=torch.device("cpu")
    )
    left_after = both[:, -1].long()
    macs = float(macs_by_exit(way, shape)[left_after].mean())
    return both[:, :-1].argmax(dim=1), macs, float(left_after.double().mean()) + 1


class _WithDepth(nn.Module):
    """Logits and the block after which an image left, in one tensor [B, K + 1], for `predict_logits`."""

    def __init__(self, way: EarlyExit) -> None:
        super().__init__()
        self.way = way

    def forward(self, images: Tensor) -> Tensor:
        logits, left_after = self.way.answer(images)
        return torch.cat([logits, left_after[:, None].to(logits.dtype)], dim=1)


def macs_by_exit(way: EarlyExit, image_shape: Sequence[int]) -> Tensor:
    """Multiply-adds of an image [C, H, W] that leaves after the n-th block, exits it passed too: [depth]."""
    vit = way.model
    costs = macs_by_module(without_numbers(vit), image_shape)
    blocks = [costs[f"blocks.{number}"] for number in range(len(vit.blocks))]
    heads = [
        sum(parameter.numel() for parameter in way.exits[str(number)].parameters() if parameter.ndim == 2)
        if str(number) in way.exits
        else 0
        for number in range(len(blocks))
    ]
    before = costs[""] - sum(blocks) - costs.get("head", 0) - costs.get("head_dist", 0)
    passed = before + torch.tensor([block + head for block, head in zip(blocks, heads, strict=True)]).cumsum(
        0
    )
    passed[-1] += costs.get("head", 0) + costs.get("head_dist", 0)
    return passed.double()


def _times(
    ways: dict[tuple[str, float], nn.Module], test: Images, preprocessing: Preprocessing
) -> dict[int, dict[tuple[str, float], float]]:
    """Batch size -> way -> milliseconds an image, on the first test images, all ways in turns."""
    pixels = preprocessing.prepare(test.batch(range(min(_TIMED_IMAGES, len(test))))[0])
    found = {}
    for batch in BATCHES:
        acts = {str(key): partial(_run, way, pixels.split(batch)) for key, way in ways.items()}
        seconds = in_turns(acts, repetitions=_REPETITIONS)
        found[batch] = {
            key: 1000 * summary(own)["median_s"] / len(pixels)
            for key, own in zip(ways, seconds.values(), strict=True)
        }
    return found


@torch.inference_mode()
def _run(way: nn.Module, parts: Sequence[Tensor]) -> None:
    for part in parts:
        way(part)
