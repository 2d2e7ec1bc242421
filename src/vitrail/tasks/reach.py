"""Which parameters of an encoder a task can train.

A task that predicts patches does not use what leads to the classifier only: sequence pooling, or CaiT's
class-attention where nothing but patches counts. Several processes (DDP) wait for the gradient of every
parameter that asks for one, so such parameters are frozen. A model that starts from the weights of such a run
has all its parameters free again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.models.encoder import Encoder, Features


def blank_features(model: Encoder, **arguments: Any) -> Features:
    """What an encoder makes of one blank image of its own size, with gradients; the model stays as it is.

    Args:
        model: In any mode; it is asked in evaluation mode, where it draws no random numbers.
        arguments: For `forward_features`.

    Raises:
        ValueError: The encoder refuses the arguments.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, model.config.in_chans, *model.config.image_shape, device=parameter.device)
    mode = model.training
    model.eval()
    try:
        with torch.enable_grad():
            return model.forward_features(image.to(parameter.dtype), **arguments)
    finally:
        model.train(mode)


def one_patch_features(model: Encoder, task: str) -> Features:
    """The same of an image's first patch alone: whether a task can leave patches out.

    Raises:
        ValueError: This encoder needs all patches; the message names the task that does not leave any out.
    """
    keep = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    try:
        return blank_features(model, keep=keep)
    except ValueError as error:
        raise ValueError(
            f"task {task} leaves patches out, which {type(model).__name__} cannot: use task simmim, or a ViT"
        ) from error


def freeze_unreached(model: nn.Module, *outputs: Tensor) -> None:
    """Switch off the gradients of the parameters on which no output depends.

    Args:
        model: Changed in place.
        outputs: What the task goes on with, with their gradient history.
    """
    used: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of a history: a parameter
            used.add(id(node.variable))
        nodes.extend(before for before, _ in node.next_functions)
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
