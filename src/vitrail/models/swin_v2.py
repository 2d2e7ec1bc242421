"""Swin Transformer V2: cosine attention, a position bias computed from the offset, norms after the branches.

    B batch, N tokens of a stage's grid, n tokens of a window, W windows an image, D width, H heads

Paper: Liu et al. 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution". Parameter names are timm's,
so its checkpoints load strictly. Other than in version 1 (`vitrail.models.swin`), the similarity is the
cosine, scaled by a learned factor for each head; the bias comes from a small network over logarithmic
offsets, so that it also exists for offsets that were never trained; and each branch is normalised before it
is added.

What differs from timm: the scale of the offsets is part of the config and never follows from the image size,
so that the same weights are the same function whatever size the model is built for. (timm stretches the
offsets where a window shrinks to its grid; the released weights were trained so, and the variants say it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import split_heads
from vitrail.components.mlp import Mlp, hidden_width
from vitrail.components.position import Grid
from vitrail.components.residual import DropPath
from vitrail.components.tap import Tap
from vitrail.components.window import (
    WindowLayout,
    WindowPartition,
    attend_with_learned_bias,
    offset_bias,
    offset_index,
)
from vitrail.models.swin import SIZES, SwinConfig, WindowEncoder, merge_neighbours

LARGEST_SCALE = 100.0
"""The cosine is multiplied by at most this (the paper divides by a temperature of at least 0.01)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinV2Config(SwinConfig):
    """Everything that decides a Swin V2; the defaults are SwinV2-T with windows of 8 at 256 pixels."""

    img_size: int | tuple[int, int] = 256
    window_size: int = 8
    # Windows of each stage in whose scale the network of the position bias counts offsets: those with which
    # the weights were trained. None: window_size in all stages.
    pretrained_window_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        SwinConfig.__post_init__(self)  # a dataclass with slots cannot use super()
        trained = self.pretrained_window_sizes
        if trained is not None and len(trained) != len(self.depths):
            raise ValueError(
                f"pretrained_window_sizes needs one size for each of {len(self.depths)} stages, got {trained}"
            )

    @property
    def trained_windows(self) -> tuple[int, ...]:
        """The window of each stage in whose scale offsets count."""
        return self.pretrained_window_sizes or (self.window_size,) * len(self.depths)

    def build(self) -> SwinV2:
        """The model, freshly initialised."""
        return SwinV2(self)


def log_offsets(window: Grid, trained_size: int) -> Tensor:
    """All offsets within a window on a logarithmic scale (section 3.3, equation 4).

    Args:
        window: Rows and columns of the window in use.
        trained_size: Rows, and columns, of the window whose largest offset counts as 8.

    Returns:
        [(2 rows - 1) * (2 columns - 1), 2], rows first: sign(x) log2(1 + |x|) / log2(8), x in eighths of the
        largest trained offset; within -1.06 to 1.06 where both windows are equal.
    """
    axes = [torch.arange(1 - size, size) * (8 / max(trained_size - 1, 1)) for size in window]
    offsets = torch.cartesian_prod(*axes).reshape(-1, 2)
    return offsets.sign() * (1 + offsets.abs()).log2() / math.log2(8)


class CosineWindowAttention(nn.Module):
    """Self-attention within a window by scaled cosine, with a bias computed from offsets (section 3.2).

    The projection of the keys has no bias (the released code). Taps: as in
    `vitrail.components.attention.Attention`, for each window; `query` holds the unit vectors times the
    learned scale and sqrt(d), `key` the unit vectors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        trained_size: int,
        *,
        qkv_bias: bool,
        attn_drop: float,
        drop: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.trained_size = num_heads, window, trained_size
        self.attn_drop = attn_drop
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.index: Tensor
        self.offsets: Tensor
        self.register_buffer("index", offset_index(window, window), persistent=False)
        self.register_buffer("offsets", log_offsets(window, trained_size), persistent=False)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    def bias(self, window: Grid) -> Tensor:
        """[H, n, n] for any window, each entry between 0 and 16."""
        offsets, index = self.offsets, self.index
        if window != self.window:
            offsets = log_offsets(window, self.trained_size).to(offsets)
            index = offset_index(window, window).to(index.device)
        return offset_bias(16 * self.cpb_mlp(offsets).sigmoid(), index)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B * W, n, D] and a bias that fits [B * W, H, n, n] -> [B * W, n, D]."""
        D = x.shape[2]
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        packed = F.linear(x, self.qkv.weight, qkv_bias).unflatten(2, (3, D))
        q, k, v = (split_heads(part, self.num_heads) for part in packed.unbind(2))  # each [B * W, H, n, d]
        scale = self.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp() * q.shape[-1] ** 0.5
        mixed = attend_with_learned_bias(
            self.query(_unit(q) * scale),
            self.key(_unit(k)),
            self.value(v),
            scores=self.scores,
            weights=self.weights,
            bias=bias,
            dropout=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(self.mixed(mixed.transpose(1, 2).flatten(2))))


def _unit(x: Tensor) -> Tensor:
    """Vectors [..., d] of length one; zero stays zero.

    The bound is 1e-12 in the released code. That is zero in float16, where padding would become NaN, and a
    token of zeros would multiply its gradient by 1e12.
    """
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


class SwinV2Block(nn.Module):
    """x + norm(attention(x)) within windows, then x + norm(mlp(x)) (section 3.2, "res-post-norm").

    The norms' weights start at zero, so that a fresh block is the identity (the released code). Taps as in
    `vitrail.models.swin.SwinBlock`.
    """

    def __init__(self, config: SwinV2Config, stage: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        dim, size = config.widths[stage], config.window_size
        self.windows = WindowPartition(config.grids[stage], (size, size), shifted)
        self.attn = CosineWindowAttention(
            dim,
            config.num_heads[stage],
            self.windows.usual.window,
            config.trained_windows[stage],
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            drop=config.drop,
        )
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratio), config.drop)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)
        self.drop_path = DropPath(drop_path)
        self.mid, self.out = Tap(), Tap()

    def layout(self, grid: Grid) -> WindowLayout:
        """How this block cuts a grid of its stage into windows."""
        return self.windows.layout(grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        windows = self.windows(grid)
        parts = windows.partition(x)  # [B * W, n, D]
        bias = windows.masked(self.attn.bias(windows.layout.window), parts.shape[0])
        attended = windows.reverse(self.attn(parts, bias))
        x = self.mid(x + self.drop_path(self.norm1(attended)))
        return self.out(x + self.drop_path(self.norm2(self.mlp(x))))


class PatchMergingV2(nn.Module):
    """Half the rows and columns, twice the width: 2 x 2 neighbours, linear, norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """[B, N, D] -> [B, N / 4, 2 D] and the new grid."""
        merged, grid = merge_neighbours(x, grid)
        return self.norm(self.reduction(merged)), grid


class SwinV2(WindowEncoder):
    """Swin Transformer, version 2."""

    block = SwinV2Block
    merging = PatchMergingV2
    without_decay = ("cpb_mlp", "logit_scale")


VARIANTS: dict[str, SwinV2Config] = {
    **{f"swinv2_{size}_window8_256": SwinV2Config(**SIZES[size]) for size in ("tiny", "small", "base")},
    **{
        f"swinv2_{size}_window16_256": SwinV2Config(
            window_size=16, pretrained_window_sizes=(16, 16, 16, 8), **SIZES[size]
        )
        for size in ("tiny", "small", "base")
    },
    # Trained at 192 pixels with 21,841 classes, then at larger sizes with larger windows and 1,000 classes.
    **{
        f"swinv2_{size}_window12_192": SwinV2Config(
            img_size=192,
            window_size=12,
            num_classes=21_841,
            pretrained_window_sizes=(12, 12, 12, 6),
            **SIZES[size],
        )
        for size in ("base", "large")
    },
    **{
        f"swinv2_{size}_window12to{window}_192to{img_size}": SwinV2Config(
            img_size=img_size, window_size=window, pretrained_window_sizes=(12, 12, 12, 6), **SIZES[size]
        )
        for size in ("base", "large")
        for window, img_size in ((16, 256), (24, 384))
    },
    # For 32-pixel images (CIFAR): grids of 16 x 16 and 8 x 8 patches, 4 x 4 and 2 x 2 windows.
    "swinv2_cifar": SwinV2Config(
        img_size=32,
        patch_size=2,
        num_classes=10,
        embed_dim=64,
        depths=(2, 4),
        num_heads=(2, 4),
        window_size=4,
    ),
}
