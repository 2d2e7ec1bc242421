"""Where the evidence is known: do maps of an answer peak on the digit that was planted in clutter?

    python benchmarks/planted_evidence.py [--models NAMES] [--quick]    needs VITRAIL_DATA with mnist/

Real digits of MNIST are pasted at a random place into a canvas of 56 x 56 pixels with twelve fragments
(9 x 9) of other digits. A small model of each architecture learns to name the digit from training digits;
then, on 200 canvases with test digits that it answers rightly, each method of `vitrail explain` says where
the evidence is. Counted is how often the largest value lies within the digit's bounding box, by the cells of
an 8 x 8 grid (finer maps are averaged over its cells first); `area` is the share of a random cell.

The models see the canvas in 8 x 8 cells of 7 pixels (pyramids and the convolutional models end there or
near it). The result is written after each model. `--quick` is a smoke test: one step, four canvases.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from measure import RESULTS, machine
from vitrail.config import OptimSection
from vitrail.datasets import load_dataset
from vitrail.evaluation.cost import count_parameters
from vitrail.explain.methods import METHODS
from vitrail.files import write_whole
from vitrail.models import Encoder, build_model
from vitrail.tasks import build_task
from vitrail.training.optim import build_optimizer, learning_rate

SIDE, DIGIT, FRAGMENT, FRAGMENTS, CELLS = 56, 28, 9, 12, 8

STEM = {"patch_size": 8, "patch_embed": "stem", "depth": 3, "embed_dim": 96, "num_heads": 4}


@dataclass(frozen=True)
class Subject:
    """A model, what is changed about it, and for how many steps it learns.

    With plain patches a model needs two or three times as many as with a convolutional stem or overlapping
    patches: there a digit looks different at each of the places that it may have within its patches.
    """

    architecture: str
    changes: dict[str, Any]
    steps: int = 900


MODELS = {
    "vit": Subject("vit_cifar_plain", STEM),
    "diffvit": Subject("diffvit_cifar", STEM),
    "deit": Subject("deit_cifar", STEM),
    "cait": Subject("cait_cifar", {"patch_size": 7, "depth": 4}, steps=5400),
    "crossvit": Subject("crossvit_cifar", {"patch_size": (7, 14), "depth": 2}, steps=5400),
    "cct": Subject("cct_2_3x2_32", {"num_convs": 3}),
    "swin": Subject("swin_cifar", {"patch_size": 4, "window_size": 7}, steps=1800),
    "pvt_v2": Subject("pvt_v2_cifar", {"patch_size": 4}),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models learn, and on how many canvases methods are tried."""

    batch_size: int = 64
    learning_rate: float = 3e-3
    canvases: int = 200
    seed: int = 0


QUICK = Settings(batch_size=8, canvases=4)


def plant(digits: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste digits into clutter.

    Args:
        digits: uint8 [B, 28, 28].
        others: uint8 [M, 28, 28], of which the fragments are cut.
        generator: Of places and fragments.

    Returns:
        Canvases, uint8 [B, 1, 56, 56], and the boxes of the digits: top, bottom, left, right [B, 4].
    """
    B = len(digits)
    canvases = torch.zeros(B, SIDE, SIDE, dtype=torch.uint8)
    boxes = torch.zeros(B, 4, dtype=torch.long)

    def below(most: int, *shape: int) -> Tensor:
        return torch.randint(most + 1, shape, generator=generator)

    sources = below(len(others) - 1, B, FRAGMENTS)
    cuts, places = below(DIGIT - FRAGMENT, B, FRAGMENTS, 2), below(SIDE - FRAGMENT, B, FRAGMENTS, 2)
    corners = below(SIDE - DIGIT, B, 2)
    for number in range(B):
        canvas = canvases[number]
        for source, (y, x), (top, left) in zip(
            sources[number].tolist(), cuts[number].tolist(), places[number].tolist(), strict=True
        ):
            part = canvas[top : top + FRAGMENT, left : left + FRAGMENT]
            torch.maximum(part, others[source, y : y + FRAGMENT, x : x + FRAGMENT], out=part)
        top, left = corners[number].tolist()
        part = canvas[top : top + DIGIT, left : left + DIGIT]
        torch.maximum(part, digits[number], out=part)
        rows, columns = (digits[number] > 0).any(dim=1).nonzero(), (digits[number] > 0).any(dim=0).nonzero()
        boxes[number] = torch.tensor(
            [top + int(rows[0]), top + int(rows[-1]) + 1, left + int(columns[0]), left + int(columns[-1]) + 1]
        )
    return canvases[:, None], boxes


def on_digit(maps: Tensor, boxes: Tensor) -> Tensor:
    """Whether the centre of the largest cell of each map [B, rows, columns] lies in its box: booleans [B]."""
    cells = maps
    if max(maps.shape[1:]) > CELLS:
        cells = F.adaptive_avg_pool2d(maps[:, None], CELLS)[:, 0]
    rows, columns = cells.shape[1:]
    best = cells.flatten(1).argmax(dim=1)
    row, column = (best // columns + 0.5) * SIDE / rows, (best % columns + 0.5) * SIDE / columns
    top, bottom, left, right = boxes.T
    return (top <= row) & (row < bottom) & (left <= column) & (column < right)


def learn(model: Encoder, digits: Tensor, labels: Tensor, steps: int, settings: Settings) -> None:
    """Train in place, on canvases that are made as they are needed."""
    generator = torch.Generator().manual_seed(settings.seed)
    section = OptimSection(name="muon", lr=settings.learning_rate, warmup="10%")
    task = build_task("classify", model)
    optimizer = build_optimizer(task, model, section)
    rate = learning_rate(section, steps, steps_per_epoch=1, batch_size=settings.batch_size)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(digits), (settings.batch_size,), generator=generator)
        canvases, _ = plant(digits[chosen], digits, generator)
        loss = task({"images": prepare(canvases), "targets": labels[chosen]}, step)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  step {step + 1}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def prepare(canvases: Tensor) -> Tensor:
    """uint8 -> what the models get; 0 is the black ground, which hidden parts show."""
    return canvases.float() / 128


def measure(subject: Subject, settings: Settings, data: Mapping[str, Tensor]) -> dict[str, Any]:
    """Train one model and try all methods on it."""
    torch.manual_seed(settings.seed)
    model = build_model(
        subject.architecture, **{"img_size": SIDE, "in_chans": 1, "num_classes": 10, **subject.changes}
    )
    began = time.perf_counter()
    learn(model, data["train"], data["train_labels"], subject.steps, settings)
    trained = time.perf_counter() - began
    canvases, boxes = plant(data["test"], data["test"], torch.Generator().manual_seed(settings.seed + 1))
    images = prepare(canvases)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(dim=1) for part in images.split(100)]) == data["test_labels"]
    kept = right.nonzero()[: settings.canvases, 0]
    kept = (
        kept if len(kept) else torch.arange(settings.canvases)
    )  # a model of one step answers nothing rightly
    images, boxes, labels = images[kept], boxes[kept], data["test_labels"][kept]
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    found = {}
    for method, named in METHODS.items():
        began = time.perf_counter()
        hits = [
            on_digit(named.run(model, part, own).detach(), box)
            for part, box, own in zip(images.split(20), boxes.split(20), labels.split(20), strict=True)
        ]
        found[method] = {
            "on_digit": float(torch.cat(hits).float().mean()),
            "seconds_an_image": (time.perf_counter() - began) / len(images),
        }
    return {
        "model": subject.architecture,
        "changes": subject.changes,
        "steps": subject.steps,
        "parameters": count_parameters(model),
        "training_s": trained,
        "test_accuracy": float(right.float().mean()),
        "canvases": len(images),
        "area": float((heights * widths).float().mean() / SIDE**2),
        "methods": found,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", default="*", metavar="NAMES", help=f"pattern over {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args(arguments)
    names = fnmatch.filter(MODELS, options.models)
    if not names:
        parser.error(f"no model matches {options.models!r}; expected one of {', '.join(MODELS)}")
    if not os.environ.get("VITRAIL_DATA"):
        parser.error("set VITRAIL_DATA to a folder that holds mnist/")
    settings = QUICK if options.quick else Settings()
    splits = load_dataset("mnist")
    data = {}
    for part, own, most in (("train", splits.train, None), ("test", splits.test, 2000)):
        images, labels = own.batch(torch.arange(len(own) if most is None else most).numpy())
        data |= {part: images[:, 0], f"{part}_labels": labels}
    path = RESULTS / f"planted_evidence{'-quick' if options.quick else ''}.json"
    for name in names:
        subject = replace(MODELS[name], steps=1) if options.quick else MODELS[name]
        found = measure(subject, settings, data)
        # Read as late as this, so that models can be measured side by side.
        content = (
            json.loads(path.read_text()) if path.exists() else {"benchmark": "planted_evidence", "models": {}}
        )
        content["models"][name] = {"machine": machine(), "settings": vars(settings) | {}} | found
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")
        ranked = sorted(found["methods"], key=lambda own: -found["methods"][own]["on_digit"])
        listed = "  ".join(f"{own} {100 * found['methods'][own]['on_digit']:.0f} %" for own in ranked)
        accuracy, area = 100 * found["test_accuracy"], 100 * found["area"]
        print(f"{name}: accuracy {accuracy:.1f} %, area {area:.0f} %: {listed}")


if __name__ == "__main__":
    main()
