"""Attention of all tokens to fewer keys: the keys and values come from a coarser grid than the queries.

    B batch, H heads, N tokens that ask, S keys, D width, d = D / H head width

| class | how keys come about | keys | paper |
|---|---|---|---|
| SpatialReductionAttention | a convolution over squares of r x r cells | N / r^2 | PVT, equations 1 to 4 |
| PooledAttention | means of 7 x 7 regions, a 1 x 1 convolution, GELU | 49 | PVT v2, section 3 |

Papers: Wang et al. 2021, "Pyramid Vision Transformer"; Wang et al. 2022, "PVT v2". SegFormer and Twins use
the first kind too. With a fixed number of keys, time and memory grow linearly with the number of tokens.
Parameter names are those of both papers' code and of timm: `q`, `kv`, `sr`, `norm`, `proj`.

Which cells a key stands for is what `footprint` tells: attention maps are drawn with it. What differs from
the papers' code: a grid that r does not divide is padded with zeros on the right and below instead of
losing its last rows and columns; where r divides it the numbers are equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import attend, split_heads
from vitrail.components.flow import Footprint, padded_squares
from vitrail.components.position import Grid
from vitrail.components.tap import Tap


class ReducedAttention(nn.Module, ABC):
    """Multi-head attention whose keys and values come from `reduce`.

    Taps: `query` [B, H, N, d], `key` and `value` [B, H, S, d], `scores` and `weights` [B, H, N, S], `mixed`
    [B, N, D].
    """

    def __init__(self, dim: int, num_heads: int, *, attn_drop: float = 0.0, drop: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    @abstractmethod
    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, N, D] on a grid -> [B, S, D], from which keys and values are made."""

    @abstractmethod
    def footprint(self, grid: Grid) -> Footprint:
        """Which cells of `grid` the keys stand for."""

    def forward(self, x: Tensor, grid: Grid, queries: int | None = None) -> Tensor:
        """Attend from every token to the reduced grid.

        Args:
            x: [B, N, D].
            grid: Rows and columns of the tokens.
            queries: How many tokens, from the first on, ask; None: all N.

        Returns:
            [B, N, D], or [B, queries, D].
        """
        k, v = self.kv(self.reduce(x, grid)).chunk(2, dim=2)  # each [B, S, D]
        mixed = attend(
            self.query(split_heads(self.q(x[:, :queries]), self.num_heads)),
            self.key(split_heads(k, self.num_heads)),
            self.value(split_heads(v, self.num_heads)),
            scores=self.scores,
            weights=self.weights,
            dropout=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(self.mixed(mixed.transpose(1, 2).flatten(2))))


class SpatialReductionAttention(ReducedAttention):
    """Keys from squares of `ratio` x `ratio` cells (Wang et al. 2021, equation 3); ratio 1: from every token.

    With ratio 1 there may be prefix tokens among the tokens; otherwise they must fill the grid.
    """

    def __init__(
        self, dim: int, num_heads: int, ratio: int, *, attn_drop: float = 0.0, drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, drop=drop)
        self.ratio = ratio
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, rows * columns, D] -> [B, ceil(rows / ratio) * ceil(columns / ratio), D]."""
        r = self.ratio
        if r == 1:
            return x
        maps = x.unflatten(1, grid)  # [B, rows, columns, D]
        below, right = -grid[0] % r, -grid[1] % r
        if below or right:
            maps = F.pad(maps, (0, 0, 0, right, 0, below))
        # The convolution as one product: a fifth faster to train on a CPU.
        squares = maps.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3)  # [B, h, w, r, r, D]
        weight = self.sr.weight.permute(0, 2, 3, 1).flatten(1)  # [D, r * r * D]
        return self.norm(F.linear(squares.flatten(3), weight, self.sr.bias)).flatten(1, 2)

    def footprint(self, grid: Grid) -> Footprint:
        """Squares next to each other, the last ones filled up with zeros."""
        return padded_squares(grid, self.ratio)


class PooledAttention(ReducedAttention):
    """Keys from the means of 7 x 7 regions (PVT v2's linear spatial-reduction attention).

    Regions of grids that 7 does not divide overlap by a cell (adaptive average pooling); of grids smaller
    than 7 they repeat cells.
    """

    side = 7

    def __init__(self, dim: int, num_heads: int, *, attn_drop: float = 0.0, drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, drop=drop)
        self.sr = nn.Conv2d(dim, dim, kernel_size=1)
        self.norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, rows * columns, D] -> [B, 49, D]."""
        maps = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, grid), self.side)  # [B, D, 7, 7]
        means = maps.flatten(2).transpose(1, 2)  # [B, 49, D]
        return F.gelu(self.norm(F.linear(means, self.sr.weight.flatten(1), self.sr.bias)))

    def footprint(self, grid: Grid) -> Footprint:
        """Regions i from floor(i * size / 7) to ceil((i + 1) * size / 7)."""
        rows, columns = (
            tuple(
                (i * size // self.side, ((i + 1) * size + self.side - 1) // self.side)
                for i in range(self.side)
            )
            for size in grid
        )
        return Footprint(rows, columns)
