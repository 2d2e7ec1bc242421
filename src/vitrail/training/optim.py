"""AdamW's parameter groups and the learning rate at every step.

AdamW: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
Reciprocal square root: Vaswani et al. 2017, section 5.3. Warm-up, stable, decay (wsd): Hu et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from vitrail.config import OptimSection, steps

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


def parameter_groups(model: nn.Module, no_decay: set[str], weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels with weight decay; biases, norms, scales, tokens, positions without.

    Args:
        model: Whose parameters; frozen ones are left out.
        no_decay: Names without decay, besides all parameters with fewer than two dimensions.
        weight_decay: Of the first group.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in no_decay else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, no_decay: set[str], section: OptimSection) -> torch.optim.AdamW:
    """AdamW in its fused form: one kernel for all parameters of a group."""
    groups = parameter_groups(model, no_decay, section.weight_decay)
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient norm of each layer, by the layer's name: `patch_embed`, `blocks.0`, ..., `head`.

    Returns:
        Scalars still on the device: nothing waits for it here.
    """
    layers: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            layer = ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
            layers.setdefault(layer, []).append(parameter.grad)
    return {layer: nn.utils.get_total_norm(grads) for layer, grads in layers.items()}
