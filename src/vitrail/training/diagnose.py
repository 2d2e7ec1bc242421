"""Where the first number that is not finite comes from.

Called once, after a loss or gradient was not finite: the batch runs forward and backward again with a hook on
every module, so that the steps of a healthy run pay nothing. torch's anomaly mode, the usual way, watches the
backward pass only, slows every step and names an operator instead of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.tasks import Batch, Task

_EXPLICIT = (".scores", ".weights")
"""Taps that stay without a hook: watching them would replace the fused attention kernel by the explicit path,
which overflows elsewhere in half precision, and forbidden pairs have scores of -inf."""


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """The first thing in a step that is not finite."""

    kind: Literal["input", "weight", "activation", "loss", "gradient"]
    name: str
    """Dotted name in the task of the module or parameter; the key in the batch; or "loss"."""
    dtype: torch.dtype
    """In which the step computes: autocast's type, or the tensor's own where there is no autocast."""
    images: tuple[int, ...] = ()
    """For an input: which images of the batch."""

    def advice(self) -> str:
        """What it is and what to do, in one line."""
        match self.kind:
            case "input":
                found = ", ".join(str(number) for number in self.images[:8])
                more = ", ..." if len(self.images) > 8 else ""
                what = f"{self.name!r} of the batch is not finite (image {found}{more} of the batch)"
                todo = "look for damaged files, a standard deviation of 0, and at the augmentation"
            case "weight":
                what = f"the weight {self.name} is not finite already"
                todo = (
                    "go on from a checkpoint before it (--train.resume true) with a lower optim.lr or a "
                    "longer optim.warmup"
                )
            case "activation":
                what = f"the first output that is not finite is that of {self.name}"
                todo = f"{self._precision()}lower optim.lr, lengthen optim.warmup, or try qk_norm"
            case "loss":
                what = f"all outputs of modules are finite, but {self.name} is not"
                todo = f"{self._precision()}look in the task for a division or logarithm of 0"
            case "gradient":
                what = f"the loss is finite, but the gradient of {self.name} is not"
                todo = (
                    f"{self._precision()}set optim.clip_norm to 1, lower optim.lr, or lengthen optim.warmup"
                )
        return f"{what}: {todo}"

    def _precision(self) -> str:
        if self.dtype == torch.float16:
            return "take --train.precision bf16 (float16 ends at 65504), or fp32; or "
        if self.dtype == torch.bfloat16:
            return "see whether --train.precision fp32 is finite; or "
        return ""


def first_nonfinite(task: Task, batch: Batch, step: int) -> NonFinite | None:
    """Find the first thing in a step that is not finite.

    In this order: the batch, the weights, the outputs of the modules as they run (a module before the one
    that holds it), the loss, the gradients from the last parameter to the first, as they are computed.
    Weights, buffers, gradients and the random state are afterwards as before.

    Args:
        task: In training mode, on its device; without DDP or torch.compile around it.
        batch: The batch of the failed step.
        step: Its number, for the task. Call under the autocast of the run, and after seeding torch as that
            step did: dropout then falls on the same places.

    Returns:
        What was found; None where all is finite this time (the weights moved on, or dropout fell elsewhere).
    """
    if (found := _bad_input(batch) or _bad_weight(task)) is not None:
        return found
    with _as_before(task):
        outputs: list[NonFinite] = []
        with _watched(task, outputs):
            loss = task(batch, step)["loss"]
        if outputs:
            return outputs[0]
        if not bool(loss.isfinite()):
            return NonFinite(kind="loss", name="loss", dtype=_computed_in(loss))
        return _first_bad_gradient(task, loss)


def _bad_input(batch: Mapping[str, Tensor]) -> NonFinite | None:
    for name, values in batch.items():
        bad = ~values.isfinite().flatten(1).all(dim=1) if values.ndim > 1 else ~values.isfinite()  # [B]
        if bool(bad.any()):
            images = tuple(bad.nonzero()[:, 0].tolist())
            return NonFinite(kind="input", name=name, dtype=_computed_in(values), images=images)
    return None


def _bad_weight(task: Task) -> NonFinite | None:
    for name, values in (*task.named_parameters(), *task.named_buffers()):
        if not bool(values.isfinite().all()):
            return NonFinite(kind="weight", name=name, dtype=_computed_in(values))
    return None


def _first_bad_gradient(task: Task, loss: Tensor) -> NonFinite | None:
    """The parameter nearest to the loss: going backward, it got its gradient before the others."""
    named = [(name, own) for name, own in task.named_parameters() if own.requires_grad]
    found: list[NonFinite] = []
    precision = _computed_in(loss)

    def check(name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not found and not bool(gradient.isfinite().all()):
                found.append(NonFinite(kind="gradient", name=name, dtype=precision))

        return hook

    handles = [parameter.register_hook(check(name)) for name, parameter in named]
    try:
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def _watched(task: Task, found: list[NonFinite]) -> Iterator[None]:
    """Note the first module whose output is not finite."""

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found:
                bad = next((own for own in _tensors(output) if not bool(own.isfinite().all())), None)
                if bad is not None:
                    found.append(NonFinite(kind="activation", name=name, dtype=_computed_in(bad)))

        return hook

    inner = [(name, module) for name, module in task.named_modules() if name and not name.endswith(_EXPLICIT)]
    handles = [module.register_forward_hook(check(name)) for name, module in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _computed_in(values: Tensor) -> torch.dtype:
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned; what makes up other records comes from modules of its own."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


@contextmanager
def _as_before(task: Task) -> Iterator[None]:
    """Whatever runs inside leaves gradients, buffers and the random state as they are."""
    gradients = [(parameter, parameter.grad) for parameter in task.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]
    gpus = {parameter.device.index for parameter, _ in gradients if parameter.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, before in buffers:
                buffer.copy_(before)
