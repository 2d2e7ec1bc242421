"""The fastest form of a model on this machine's CPU that still gives its answers, as a model folder.

Candidates are float32, bfloat16 and int8 (`vitrail.shipping.int8`), each compiled by AOTInductor with the
weights frozen into the code, for batches of any size. Eager PyTorch in float32, compiled and measured in
turns on the same images, is what all are compared with; a candidate whose most probable class is another one
too often is refused. What is written is described in `vitrail.pretrained.compiled`.

AOTInductor rather than `torch.compile` with its cache: another process starts without a compiler and without
tracing the model, in a fraction of a second.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.datasets import Images, Preprocessing, Splits
from vitrail.evaluation.timing import in_turns
from vitrail.files import write_whole
from vitrail.pretrained import ModelFolder, save_model
from vitrail.pretrained.compiled import (
    PACKAGE,
    RECORD,
    CompiledModel,
    cpu_features,
    load_package,
    write_record,
)
from vitrail.shipping.ahead import check_compiler, compile_ahead
from vitrail.shipping.int8 import quantise, why_no_int8

Precision = Literal["auto", "float32", "bf16", "fp16", "int8"]

AGREEMENT = {"float32": 0.99, "bf16": 0.99, "int8": 0.98}
"""At least this share of images must keep their most probable class."""
JUDGED = 256
"""Images on which agreement is measured."""
FEWEST_JUDGED = 200
CALIBRATION = 128
"""Images that set the ranges of int8."""

_REPETITIONS, _LONG_ENOUGH_S = 15, 2.0
_CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the model, measured."""

    precision: str
    speed_up: float
    """Time of eager float32 over its own, median over repetitions in which all take turns."""
    speed_up_quartiles: tuple[float, float]
    seconds: float
    """Median time of a batch."""
    agreement: float
    """Share of images with the most probable class of eager float32."""
    cosine: float
    """Mean cosine between its logits and those of eager float32."""
    compile_s: float
    """What compiling cost, quantisation included."""

    def text(self) -> str:
        """The measurements in a line."""
        low, high = self.speed_up_quartiles
        return (
            f"{self.precision:<8} {1e3 * self.seconds:9.2f} ms  {self.speed_up:5.2f} x as fast "
            f"({low:.2f} to {high:.2f})  agreement {100 * self.agreement:6.2f} %  cosine {self.cosine:.5f}  "
            f"compiled in {self.compile_s:.0f} s"
        )


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """What `optimize` chose, and why."""

    folder: Path
    chosen: Candidate | None
    """None where eager float32 was the fastest."""
    candidates: tuple[Candidate, ...]
    eager_s: float
    """Median time of a batch in eager float32."""
    batch: int
    judged_on: str
    """The images on which agreement was measured."""
    notes: tuple[str, ...]
    """What was decided on the way, with reasons."""

    def text(self) -> str:
        """All of it, for people."""
        head = f"{'eager':<8} {1e3 * self.eager_s:9.2f} ms  float32, a batch of {self.batch}"
        chosen = "eager float32: nothing that was tried is faster here"
        if self.chosen is not None:
            chosen = f"{self.chosen.precision}, {self.chosen.speed_up:.2f} x as fast as eager float32"
        lines = [*self.notes, head, *(one.text() for one in self.candidates)]
        return "\n".join([*lines, f"agreement is of {self.judged_on}", f"chosen {chosen}", f"{self.folder}"])


def optimize(
    stored: ModelFolder,
    output: str | Path,
    *,
    precision: Precision = "auto",
    data: Splits | None = None,
    batch: int = 8,
    agreement: float | None = None,
) -> Optimized:
    """Write a model folder that runs as fast as this machine's CPU can run the model.

    Args:
        stored: What `vitrail.pretrained.load_model` gives.
        output: A new or empty folder, or one that an earlier call wrote, which is replaced.
        precision: auto measures what this CPU is made for and takes the fastest; fp16 is answered with bf16,
            because CPUs have no arithmetic for it.
        data: int8 is calibrated on training images; agreement is measured on test images. Without data only
            float32 can be had, judged on random images.
        batch: Images at a time, for which speed is measured; the result takes any number.
        agreement: Least share of images that keep their most probable class, 0 to 1; when not given, that of
            `AGREEMENT`.

    Raises:
        ValueError: A model that has no head or takes clips, a precision that cannot be had here or without
            data, an answer that changes too often, or an output folder with something else in it; one line.
    """
    output = Path(output)
    _check(stored, output, precision=precision, data=data, batch=batch, agreement=agreement)
    wanted, notes = _wanted(precision, data)
    prepared = Preprocessing.from_dict(stored.preprocessing)
    images, judged_on = _judged(data, prepared)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        packages = {name: Path(folder) / f"{name}.pt2" for name in wanted}
        compile_s = {}
        for name, package in packages.items():
            began = time.perf_counter()
            compile_ahead(_in_precision(name, stored.model, data, prepared), images.shape[1:], package)
            compile_s[name] = time.perf_counter() - began
        candidates, eager_s = _measured(stored.model, packages, images, batch=batch, compile_s=compile_s)
        best, more = choose(precision, candidates, agreement=agreement, judged_on=judged_on)
        found = Optimized(
            folder=output,
            chosen=best,
            candidates=candidates,
            eager_s=eager_s,
            batch=batch,
            judged_on=judged_on,
            notes=(*notes, *more),
        )
        _write(found, stored, None if best is None else packages[best.precision])
    return found


def choose(
    precision: Precision, candidates: Sequence[Candidate], *, agreement: float | None, judged_on: str
) -> tuple[Candidate | None, list[str]]:
    """The fastest candidate that gives the model's answers, and what is to be said about that.

    Args:
        precision: What was asked for; unless it is auto, the only candidate is taken even where it is slow.
        candidates: At least one.
        agreement: Least agreement; None: that of `AGREEMENT`.
        judged_on: The images, for the message.

    Returns:
        None where auto found nothing faster than eager float32.

    Raises:
        ValueError: Another precision than auto, and its answers differ too often.
    """
    good, notes = [], []
    for one in candidates:
        least = AGREEMENT[one.precision] if agreement is None else agreement
        if one.agreement >= least:
            good.append(one)
            continue
        reason = (
            f"{one.precision} keeps the most probable class of {100 * one.agreement:.1f} % of {judged_on}, "
            f"expected {100 * least:g} %"
        )
        if precision != "auto":
            raise ValueError(f"{reason}; try another --precision, or lower --agreement")
        notes.append(f"{reason}: not taken")
    best = max(good, key=lambda one: one.speed_up, default=None)
    if best is not None and best.speed_up <= 1:
        notes.append(f"{best.precision} is slower than eager float32 on this machine")
        best = None if precision == "auto" else best
    return best, notes


def _check(
    stored: ModelFolder,
    output: Path,
    *,
    precision: str,
    data: Splits | None,
    batch: int,
    agreement: float | None,
) -> None:
    """Refuse at once what cannot end well."""
    if not stored.model.has_head:
        raise ValueError("the model has no head, so there are no answers to keep; optimise a classifier")
    if hasattr(stored.model.config, "num_frames"):
        raise ValueError("the model takes clips; `vitrail optimize` takes models of images")
    if batch < 1:
        raise ValueError(f"--batch: expected 1 or more, got {batch}")
    if agreement is not None and not 0 < agreement <= 1:
        raise ValueError(f"--agreement: expected a share above 0 and up to 1, got {agreement}")
    if output.exists() and not (output / RECORD).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: choose another --output")
    if precision in ("bf16", "fp16", "int8") and data is None:
        raise ValueError(f"{precision} is judged on real images: add --calibrate DATASET")
    if precision == "int8" and (reason := why_no_int8()):
        raise ValueError(reason)
    if data is not None and len(data.test) < FEWEST_JUDGED:
        raise ValueError(
            f"{data.test.name} has {len(data.test)} test images, and agreement needs {FEWEST_JUDGED}; "
            "give a larger data set"
        )
    check_compiler()


def _wanted(precision: Precision, data: Splits | None) -> tuple[list[str], list[str]]:
    """Precisions to try, and the reasons for what is not tried."""
    if precision == "fp16":
        return ["bf16"], ["CPUs have no float16 arithmetic: bfloat16 instead"]
    if precision != "auto":
        return [precision], []
    wanted, notes = ["float32"], []
    if data is None:
        return wanted, ["bf16 and int8 are judged on real images (--calibrate DATASET): not tried"]
    found = torch.cpu.get_capabilities()
    if any(here for name, here in found.items() if "bf16" in name):
        wanted.append("bf16")
    else:
        notes.append("this CPU has no bfloat16 instructions: bf16 not tried")
    if reason := why_no_int8():
        notes.append(reason)
    else:
        wanted.append("int8")
    return wanted, notes


def _judged(data: Splits | None, prepared: Preprocessing) -> tuple[Tensor, str]:
    """Normalised images [N, C, H, W] on which answers are compared, and what they are."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        shape = (JUDGED, prepared.in_chans, *prepared.img_size)
        return torch.randn(shape, generator=generator), f"{JUDGED} random images"
    images = _drawn(data.test, JUDGED, prepared)
    return images, f"{len(images)} test images of {data.test.name}"


def _drawn(images: Images, count: int, prepared: Preprocessing) -> Tensor:
    """Some images of a set, drawn by chance but always the same, normalised."""
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    return prepared.prepare(images.batch(rows)[0])


def _in_precision(name: str, model: nn.Module, data: Splits | None, prepared: Preprocessing) -> nn.Module:
    """The model as it is to be compiled."""
    if name == "int8":
        assert data is not None
        return quantise(model, _drawn(data.train, CALIBRATION, prepared).split(_CHUNK))
    return Bfloat16(model) if name == "bf16" else model


class Bfloat16(nn.Module):
    """A model in bfloat16, with float32 images and logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        logits: Tensor = self.model(images.bfloat16())
        return logits.float()


def _measured(
    model: nn.Module,
    packages: Mapping[str, Path],
    images: Tensor,
    *,
    batch: int,
    compile_s: Mapping[str, float],
) -> tuple[tuple[Candidate, ...], float]:
    """Answers on all images and times of a batch; also the median seconds of eager float32."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        name: CompiledModel(load_package(package), images.shape[1:]) for name, package in packages.items()
    }
    timed = images[torch.arange(batch) % len(images)]
    acts = {"eager": partial(model, timed), **{name: partial(way, timed) for name, way in ways.items()}}
    seconds = in_turns(acts, _REPETITIONS, lasting=_LONG_ENOUGH_S)
    expected = _logits(model, images)
    candidates = []
    for name, way in ways.items():
        ratios = [eager / own for eager, own in zip(seconds["eager"], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        came = _logits(way, images)
        candidates.append(
            Candidate(
                precision=name,
                speed_up=middle,
                speed_up_quartiles=(low, high),
                seconds=statistics.median(seconds[name]),
                agreement=float((came.argmax(dim=1) == expected.argmax(dim=1)).float().mean()),
                cosine=float(F.cosine_similarity(came, expected).mean()),
                compile_s=compile_s[name],
            )
        )
    return tuple(candidates), statistics.median(seconds["eager"])


def _logits(way: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([way(part) for part in images.split(_CHUNK)])


def _write(found: Optimized, stored: ModelFolder, package: Path | None) -> None:
    """The record goes first and comes last: without it the folder is an ordinary one at every moment."""
    folder, prepared = found.folder, stored.preprocessing
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, PACKAGE):
        (folder / name).unlink(missing_ok=True)
    save_model(folder, stored.model, name=stored.name, classes=stored.classes, preprocessing=prepared)
    if package is not None:
        write_whole(folder / PACKAGE, package.read_bytes())
    record: dict[str, Any] = {
        "compiled": package is not None,
        "precision": "float32" if found.chosen is None else found.chosen.precision,
        "batch": found.batch,
        "image_shape": [prepared["in_chans"], *prepared["img_size"]],
        "eager_seconds": found.eager_s,
        "chosen": None if found.chosen is None else asdict(found.chosen),
        "candidates": [asdict(one) for one in found.candidates],
        "judged_on": found.judged_on,
        "notes": list(found.notes),
        "machine": {
            "cpu": torch.cpu.get_capabilities()["cpu_name"],
            "cpu_features": cpu_features(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
    }
    write_record(folder, record)
