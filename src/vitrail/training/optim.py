"""The optimiser's parameter groups and the learning rate at every step.

AdamW: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
Reciprocal square root: Vaswani et al. 2017, section 5.3. Warm-up, stable, decay (wsd): Hu et al. 2024.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vitrail.config import OptimSection, steps
from vitrail.models import Encoder
from vitrail.training.muon import Muon

Schedule = Callable[[int], float]


def learning_rate(section: OptimSection, total: int, steps_per_epoch: int, batch_size: int) -> Schedule:
    """The learning rate as a pure function of the step, so that a resumed run follows the same curve.

    Args:
        section: Peak, shape, warm-up, share at the end.
        total: Steps of the run.
        steps_per_epoch: For warm-up in epochs.
        batch_size: For warm-up in images.

    Returns:
        Step (0 to total - 1) -> learning rate. Warm-up is linear and reaches the peak at its end.
    """
    warmup = steps(section.warmup, batch_size=batch_size, steps_per_epoch=steps_per_epoch, total=total)
    peak, end = section.lr, section.lr * section.final_lr

    def at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(total - warmup, 1)
        match section.schedule:
            case "cosine":
                return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return peak + (end - peak) * done
            case "rsqrt":
                return peak * math.sqrt(max(warmup, 1) / max(step + 1, warmup, 1))
            case "wsd":
                return peak if done < 0.8 else peak + (end - peak) * (done - 0.8) / 0.2
            case _:
                return peak

    return at


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switch off the gradients of parameters by shell-style patterns over their names.

    Args:
        model: Changed in place.
        patterns: `blocks.[0-5].*` freezes what matches; `!head.*` freezes what does not match.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not matched:
            layers = sorted({f"{layer}.*" if (layer := layer_name(name)) != name else name for name in names})
            near = difflib.get_close_matches(pattern.removeprefix("!"), layers, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"optim.freeze: no parameter matches {pattern.removeprefix('!')!r}; {meant}"
                f"the model's layers are {', '.join(layers)}"
            )
        frozen |= set(names) - matched if pattern.startswith("!") else matched
    if len(frozen) == len(names):
        raise ValueError(f"optim.freeze {list(patterns)} leaves nothing to train")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


def parameter_groups(
    task: nn.Module, model: Encoder, *, weight_decay: float, layer_decay: float = 1.0, muon: bool = False
) -> list[dict[str, Any]]:
    """Parameters with equal weight decay and equal share of the learning rate, one group each.

    Matrices and kernels decay; biases, norms, scales, tokens and positions do not. With `layer_decay` d < 1,
    a parameter at depth i of a model with n blocks has the share d^(n + 1 - i) (Clark et al. 2020, ELECTRA);
    what the task has besides the model has the share 1. Muon takes the weights of linear layers and of
    convolutions over all channels, but not of heads, nor of layers with a single output or input.

    Args:
        task: Whose parameters; frozen ones are left out.
        model: The part of the task that knows depths and exemptions from decay.
        weight_decay: Of matrices and kernels.
        layer_decay: Above 0 to 1.
        muon: Set those groups apart that Muon takes, which have `muon` set.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`, those with decay first, deepest last.
    """
    exempt = model.no_weight_decay()
    matrices = _matrices(task, model) if muon else set()
    deepest = len(model.block_names()) + 1
    inside = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for parameter in task.parameters():
        if parameter.requires_grad:
            name = inside.get(id(parameter))
            depth = deepest if name is None or layer_decay == 1.0 else model.layer_of(name)
            plain = parameter.ndim < 2 or name in exempt
            groups.setdefault((plain, depth, id(parameter) in matrices), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": layer_decay ** (deepest - depth),
            **({"muon": True} if matrix else {}),
        }
        for (plain, depth, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _matrices(task: nn.Module, model: Encoder) -> set[int]:
    """What Muon takes, by identity: a depth-wise kernel is many small filters, not a matrix."""
    heads = {id(own) for name, own in model.named_parameters() if name.startswith(model.head_names)}
    weights = (
        module.weight
        for module in task.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    )
    return {id(own) for own in weights if min(own.flatten(1).shape) > 1} - heads


def build_optimizer(task: nn.Module, model: Encoder, section: OptimSection) -> torch.optim.Optimizer:
    """The optimiser that a config asks for; AdamW in its fused form, one kernel for all of a group."""
    groups = parameter_groups(
        task,
        model,
        weight_decay=section.weight_decay,
        layer_decay=section.layer_decay,
        muon=section.name == "muon",
    )
    if section.name == "muon":
        return Muon(groups, lr=section.lr, betas=section.betas, eps=section.eps)
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def layer_name(parameter: str) -> str:
    """The layer of a parameter: `patch_embed`, `blocks.0`, ..., `head`."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient norm of each layer, by the layer's name: `patch_embed`, `blocks.0`, ..., `head`.

    Returns:
        Scalars still on the device: nothing waits for it here.
    """
    layers: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(layer_name(name), []).append(parameter.grad)
    return {layer: nn.utils.get_total_norm(grads) for layer, grads in layers.items()}
