"""Muon: the matrices of a network follow their orthogonalised momentum, everything else follows AdamW.

    m = 0.95 m + 0.05 g                                    momentum of the gradient g
    W = W - lr (wd W + 0.2 sqrt(max(rows, columns)) O)     O = orthogonalise(0.05 g + 0.95 m)

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (momentum, the five
Newton-Schulz steps and their coefficients); the factor 0.2 sqrt(...), with which learning rate and weight
decay mean as much as AdamW's, is from Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.

A matrix is the weight of a linear layer or of a convolution (its kernels as rows), heads left out. Different
from `torch.optim.Muon`: it takes convolutions, does AdamW's part in the same optimiser, and multiplies in
bfloat16 on a GPU only, since most CPUs are slower in it than in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vitrail.training.sharding import sharded_like, whole

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """One optimiser for a whole network; groups with `muon` set hold matrices, the others are AdamW's.

    Args:
        groups: `params`, `weight_decay` and `muon` each.
        lr: Learning rate.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._follow_momentum(parameter, group["lr"], group["weight_decay"])
            else:
                self._follow_adamw(parameters, group)

    def _follow_momentum(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1.0 - MOMENTUM)
        update = gradient.lerp(momentum, MOMENTUM)
        matrix = whole(update).flatten(1)  # [rows, columns]
        scale = 0.2 * max(matrix.shape) ** 0.5
        orthogonal = sharded_like(parameter, orthogonalise(matrix).reshape(parameter.shape))
        parameter.mul_(1.0 - lr * weight_decay).add_(orthogonal, alpha=-lr * scale)

    def _follow_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]  # step() leaves out None
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T [rows, columns]: its singular values end between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)
