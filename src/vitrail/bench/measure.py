"""One measurement: a model's passes in turns with those of its peers and with the machine's limit.

Inference: evaluation mode, no gradients; weights and images have the type asked for. Training: forward,
cross-entropy, backward, gradients freed, under autocast where the type is not float32, as `vitrail train`
has it; no optimiser, which is the same for all.

MACs are multiply-adds as `vitrail.evaluation.cost` counts them; one is two floating-point operations (FLOPs),
and a training step counts as three forward passes. The ceiling is what a product of two square matrices of
the same type reaches, taken in turns with the passes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.bench.memory import PeakMemory, printed_by
from vitrail.bench.peers import OURS, RUNTIMES, build_peer, contest, input_shape, random_model
from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.evaluation.timing import Act, in_turns, median_ratio, product, product_rate, summary, waiting
from vitrail.models import SHORT_NAMES, VARIANTS
from vitrail.models.catalogue import find_variants
from vitrail.pretrained.folder import read_folder_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRODUCT = "product"
_PASSES = 2
"""Of each batch when memory is measured: the second with what the first has left."""
_GAIN_SIZE, _GAIN_REPETITIONS = 512, 5
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""What /proc/cpuinfo calls instructions for bfloat16, on x86 and on ARM."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how."""

    batches: tuple[int, ...] = (1, 8)
    img_size: int | None = None
    """Pixels of a side; the variant's when not given."""
    dtype: str = "float32"
    """Of `DTYPES`."""
    device: str = "cpu"
    training: bool = False
    repetitions: int = 10
    warmup: int = 2
    against: tuple[str, ...] = ()
    """Of `vitrail.bench.peers.PEERS`."""

    @property
    def product_size(self) -> int:
        """Rows of the matrices of the ceiling: large enough to be limited by arithmetic alone."""
        return 1024 if self.device == "cpu" else 4096


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The passes of one library's model with batches of one size."""

    library: str
    batch: int
    """Images."""
    seconds: tuple[float, ...]
    """Of a batch, one for each repetition."""
    over_vitrail: float | None
    """Median of the ratios to our times of the same repetition; None for ours."""
    share_of_ceiling: float
    """Of the floating-point operations that the machine could do in the median time, 0 to 1."""
    peak_mib: float
    """Weights, images, and what the passes add to them at the highest."""

    def to_dict(self) -> dict[str, Any]:
        """A row of the table: plain values with their unit in the name."""
        times = summary(self.seconds)
        return {
            "library": self.library,
            "batch": self.batch,
            "ms_per_batch": 1000 * times["median_s"],
            "ms_per_batch_quartiles": [1000 * quartile for quartile in times["quartiles_s"]],
            "ms_per_image": 1000 * times["median_s"] / self.batch,
            "images_per_second": self.batch / times["median_s"],
            "share_of_ceiling": self.share_of_ceiling,
            "peak_mib": self.peak_mib,
            "over_vitrail": self.over_vitrail,
            "raw_ms_per_batch": [1000 * second for second in self.seconds],
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was found of one model."""

    model: str
    image_shape: tuple[int, ...]
    """Channels, height and width; of a clip with its frames before them."""
    parameters: int
    macs_per_image: int
    weights_mib: float
    """In the type of the weights."""
    ceiling: dict[int, float]
    """Batch -> floating-point operations a second that the products beside it reached."""
    timings: tuple[Timing, ...]
    logit_differences: dict[str, float]
    """Peer -> largest difference of its logits from ours."""
    absent: dict[str, str]
    """Peer -> why it was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "model": self.model,
            "image_shape": list(self.image_shape),
            "parameters": self.parameters,
            "macs_per_image": self.macs_per_image,
            "flops_per_image": 2 * self.macs_per_image,
            "weights_mib": self.weights_mib,
            "ceiling_gflop_per_s": {batch: rate / 1e9 for batch, rate in self.ceiling.items()},
            "timings": [timing.to_dict() for timing in self.timings],
            "logit_differences": self.logit_differences,
            "absent": self.absent,
        }


def find_models(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """The variants that a name, a shell-style pattern, or a run or model folder stands for.

    Returns:
        Names, each with the fields of its config that a folder changes.

    Raises:
        ValueError: No such model or folder; the message names the nearest.
    """
    if set("*?[") & set(pattern):
        return [(variant.name, {}) for variant in find_variants(pattern)]
    name = SHORT_NAMES.get(pattern, pattern)
    if name not in VARIANTS and ("/" in pattern or Path(pattern).exists()):
        stored = read_folder_config(pattern)
        return [(stored.name, stored.changes)]
    return [(name, {})]  # whoever builds it tells of an unknown one


def measure(name: str, changes: Mapping[str, Any], settings: Settings) -> Measurement:
    """Take all times and peaks of one model.

    Args:
        name: A variant.
        changes: Fields of its config.
        settings: How.

    Raises:
        ValueError: Unknown model or size, a device that is not there, or not enough memory.
    """
    device, changes = torch.device(settings.device), with_size(changes, settings.img_size)
    plain = (settings.device, settings.dtype, settings.training) == ("cpu", "float32", False)
    found = contest(name, changes, [own for own in settings.against if plain or own not in RUNTIMES])
    absent = {
        own: "it is measured at inference in float32 on a CPU only"
        for own in settings.against
        if own not in found.models and own not in found.absent
    }
    ours = found.models[OURS]
    shape = input_shape(ours.config)
    macs, parameters = count_macs(ours, shape), count_parameters(ours)
    peaks = {
        library: peak_memory(name, changes, library, settings) for library in found.models
    }  # before this process is busy
    for model in found.models.values():
        placed(model, settings)
    timings, ceiling = [], {}
    for batch in settings.batches:
        acts = {library: make_pass(model, batch, shape, settings) for library, model in found.models.items()}
        acts[_PRODUCT] = product(settings.product_size, DTYPES[settings.dtype], device)
        seconds = in_turns(acts, settings.repetitions, warmup=settings.warmup, wait=waiting(device))
        ceiling[batch] = product_rate(settings.product_size, seconds.pop(_PRODUCT))
        work = (6 if settings.training else 2) * macs * batch
        timings += [
            Timing(
                library=library,
                batch=batch,
                seconds=tuple(own),
                over_vitrail=None if library == OURS else median_ratio(own, seconds[OURS]),
                share_of_ceiling=work / statistics.median(own) / ceiling[batch],
                peak_mib=peaks[library][batch],
            )
            for library, own in seconds.items()
        ]
    return Measurement(
        model=name,
        image_shape=shape,
        parameters=parameters,
        macs_per_image=macs,
        weights_mib=weights_mib(ours),
        ceiling=ceiling,
        timings=tuple(timings),
        logit_differences=found.logit_differences,
        absent=found.absent | absent,
    )


def with_size(changes: Mapping[str, Any], img_size: int | None) -> dict[str, Any]:
    """Fields of a config, with the size of the images where one is given."""
    return {**changes} if img_size is None else {**changes, "img_size": img_size}


def placed(model: nn.Module, settings: Settings) -> nn.Module:
    """The model itself, in the mode, the type and on the device of the settings."""
    if settings.training:
        return model.train().to(settings.device)  # autocast keeps the weights in float32
    return model.eval().to(settings.device, DTYPES[settings.dtype])


def make_pass(model: nn.Module, batch: int, shape: Sequence[int], settings: Settings) -> Act:
    """What is timed: a forward pass, or a training step without optimiser.

    Args:
        model: In its mode, on its device.
        batch: Random images, so many.
        shape: Of one of them.
        settings: Which of the two, and the type of the numbers.
    """
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    images = torch.randn(batch, *shape, device=device)
    if settings.training:
        return training_step(model, images, dtype=dtype)
    return forward_pass(model, images.to(dtype))


def forward_pass(model: nn.Module, images: Tensor) -> Act:
    """A forward pass, to be called again and again."""

    @torch.no_grad()
    def run() -> None:
        model(images)

    return run


def training_step(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: torch.optim.Optimizer | None = None,
) -> Act:
    """A training step, to be called again and again.

    Args:
        model: In training mode; what it gives [B, K], features too, is taken as logits.
        images: [B, ...].
        dtype: Of autocast; float32: none.
        optimizer: Its update is part of the step; without one the gradients are only freed.
    """
    labels = torch.arange(len(images), device=images.device)

    def precision() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype=dtype)

    def run() -> None:
        with precision():
            logits = model(images)
            loss = F.cross_entropy(logits, labels % logits.shape[1])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return run


def weights_mib(model: nn.Module) -> float:
    """MiB of parameters and buffers as they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def peak_memory(name: str, changes: Mapping[str, Any], library: str, settings: Settings) -> dict[int, float]:
    """MiB at the peak for each batch, of a model in a process of its own.

    Args:
        name: A variant.
        changes: Fields of its config.
        library: Ours, or a peer that has the model.
        settings: Its batches are taken from small to large.

    Raises:
        ValueError: The process failed, perhaps for want of memory.
    """
    order = {
        "name": name,
        "changes": dict(changes),
        "library": library,
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
    }
    printed = printed_by("-m", "vitrail.bench.own_process", json.dumps(order))
    return {int(batch): peak for batch, peak in json.loads(printed.splitlines()[-1]).items()}


def peaks_here(name: str, changes: Mapping[str, Any], library: str, settings: Settings) -> dict[int, float]:
    """What `peak_memory` gives, of this process: true if it has done nothing else before."""
    ours = random_model(name, changes)
    shape = input_shape(ours.config)
    model = ours if library == OURS else build_peer(library, name, ours)
    weights = weights_mib(placed(ours, settings))  # every library holds as many of the same type
    del ours
    placed(model, settings)
    peak = PeakMemory(torch.device(settings.device))
    found = {}
    for batch in sorted(settings.batches):
        run = make_pass(model, batch, shape, settings)
        for _ in range(_PASSES):
            run()
        found[batch] = weights + peak.grown()
    return found


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What bfloat16 brings, measured by matrix products."""

    ratio: float
    """Time of a float32 product over that of a bfloat16 one."""
    why_none: str
    """Where there is no gain: the reason, as far as the machine tells; else empty."""

    def text(self) -> str:
        """One line."""
        if self.ratio > 1:
            return (
                f"bfloat16: matrix products run {self.ratio:.2f} times as fast as in float32 (measured): "
                "--dtype bfloat16 gains that much at most"
            )
        return (
            f"bfloat16: no gain here, matrix products take {1 / self.ratio:.1f} times as long as in float32 "
            f"(measured): {self.why_none}"
        )


def bfloat16_gain(device: torch.device) -> Gain:
    """Measure what to expect of bfloat16 on a device; takes a second."""
    acts: dict[str, Callable[[], object]] = {
        name: product(_GAIN_SIZE if device.type == "cpu" else 8 * _GAIN_SIZE, DTYPES[name], device)
        for name in ("float32", "bfloat16")
    }
    seconds = in_turns(acts, _GAIN_REPETITIONS, wait=waiting(device))
    ratio = median_ratio(seconds["float32"], seconds["bfloat16"])
    return Gain(ratio=ratio, why_none="" if ratio > 1 else _why_no_gain(device))


def _why_no_gain(device: torch.device) -> str:
    if device.type != "cpu":
        return "the device computes it no faster"
    listed = Path("/proc/cpuinfo")
    words = set(listed.read_text().split()) if listed.is_file() else set()
    if has := [flag for flag in _BFLOAT16_FLAGS if flag in words]:
        return f"although the CPU has {', '.join(has)}; this torch may not use it"
    return "the CPU has neither avx512_bf16 nor AMX, so each number is converted on the way"
