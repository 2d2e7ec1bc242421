"""What stands between a block's branch and its residual sum: DropPath and LayerScale.

Papers: Huang et al. 2016, "Deep Networks with Stochastic Depth" (per image, rescaled by the survival rate, as
everywhere in vision transformers); Touvron et al. 2021, "Going deeper with Image Transformers" (LayerScale).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the whole branch of an image with probability `rate` while training; the mean is kept."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0.0:
            return x
        survival = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(survival).div_(survival)

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to `rate` at the last (Huang et al. 2016)."""
    return [rate * layer / max(depth - 1, 1) for layer in range(depth)]


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor that starts at `init`."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma
