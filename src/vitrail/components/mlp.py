"""The two feed-forward parts: the plain MLP and SwiGLU.

Papers: Vaswani et al. 2017 (section 3.3); Hendrycks and Gimpel 2016 (GELU, exact form); Shazeer 2020, "GLU
Variants Improve Transformer" (SwiGLU, packed: gate and value share one projection, as in DINOv2).
Parameter names are timm's `Mlp` and `GluMlp`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.tap import Tap


def hidden_width(dim: int, ratio: float) -> int:
    """Width of the hidden layer of an MLP, rounded down.

    Args:
        dim: Width of its input.
        ratio: How many times as wide, what configs call `mlp_ratio`.

    Raises:
        ValueError: Nothing is left.
    """
    hidden = int(dim * ratio)
    if hidden < 1:
        raise ValueError(f"mlp_ratio {ratio} leaves no hidden layer of an MLP that is {dim} wide")
    return hidden


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear, dropout; the tap `hidden` sees [B, N, hidden_dim] after the GELU."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.hidden = Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.drop(self.fc2(self.drop(self.hidden(F.gelu(self.fc1(x))))))


class SwiGLU(nn.Module):
    """silu(gate) * value, then linear; `hidden` sees the product, [B, N, hidden_dim]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.hidden = Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(self.hidden(F.silu(gate) * value))))
