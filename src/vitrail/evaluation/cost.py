"""What a model costs: parameters and multiply-adds, of the whole and of each module.

"MACs" are the multiply-adds of linear layers, convolutions and both attention products. Counters that leave
attention out, or that mix multiply-adds with floating-point operations (two each), are why published tables
differ by a third.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.components.linear_attention import attend_linear
from vitrail.components.tap import record, taps


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds of one image [C, H, W] through the model; the model stays as it is.

    Counted is what the architecture's equations say for all tokens, not what a shortcut saves (a last block
    that computes the class token alone, one query that needs no keys).
    """
    return macs_by_module(without_numbers(model), image_shape).get("", 0)


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode: its tensors have shapes only, and cost nothing."""
    return copy.deepcopy(model).to("meta").eval()


def macs_by_module(model: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of one image [C, H, W] in each module.

    Args:
        model: As `without_numbers` gives it.
        image_shape: Channels, height and width.

    Returns:
        Name of the module ("" is the model) -> MACs, including those of the modules in it. Modules without
        any are left out, and so are those whose weights another module uses without calling them.
    """
    with torch.no_grad(), record(model, *_explicit(model)), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *image_shape, device="meta"))
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(operations.values()) // 2
        for name, operations in counter.get_flop_counts().items()
        if name != "Global"
    }


def count_training_operations(task: nn.Module, batch: Mapping[str, Tensor], step: int = 0) -> float:
    """Floating-point operations of one image in a training step: forward and backward, all that takes part.

    A teacher, a decoder and the views of an image are counted, hidden patches that no encoder sees are not.
    Counted is a copy on real numbers; the task, and the random state, stay as they are.

    Args:
        task: `task(batch, step)["loss"]` is what is minimised.
        batch: Some images, as the task takes them.
        step: For the task.
    """
    copied = copy.deepcopy(task)
    with (
        torch.random.fork_rng(),
        record(copied, *_explicit(copied)),
        FlopCounterMode(display=False) as counter,
    ):
        copied(dict(batch), step)["loss"].backward()
    return counter.get_total_flops() / len(next(iter(batch.values())))


def _explicit(model: nn.Module) -> list[str]:
    """The taps to watch so that the products of the equations are taken, which every counter knows.

    Watching its weights makes an attention module form the matrix of all pairs. Linear attention exists to
    avoid that matrix: there the queries are watched, which changes no product but, as any watched tap, sees
    to it that the last block computes all tokens.
    """
    linear = {name for name, part in model.named_modules() if getattr(part, "core", None) is attend_linear}
    found = []
    for name in taps(model):
        module, _, tap = name.rpartition(".")
        if tap == ("query" if module in linear else "weights"):
            found.append(name)
    return found
