"""Windows: attention among neighbours only, in windows that are shifted in every second block.

    B batch, N tokens of a grid in row-major order, n tokens of a window, W windows an image, D width, H heads

Paper: Liu et al. 2021, "Swin Transformer" (section 3.2, figures 2 and 4; equation 4). Others call the two
kinds of blocks W-MSA and SW-MSA.

What differs from the released code:

- A grid that is no whole number of windows is padded on the right and below, and padding is never attended
  to; there it is. Where nothing is padded both give the same numbers.
- Tokens from opposite borders, which the cyclic shift brings into one window, are kept apart by minus
  infinity instead of -100.
- No side of a window is larger than the grid's: it shrinks to it, is then not shifted (there is one window
  on that axis), and the offsets that remain keep their biases. That is the same as a full window whose
  padding is masked. (timm resamples the table of offsets instead.)
- Tokens move into shifted windows and back with one selection each, instead of roll, permutation and copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import attend, attention_scores
from vitrail.components.position import Grid, relative_index
from vitrail.components.tap import Tap


@dataclass(frozen=True)
class WindowLayout:
    """How a block cuts a grid of tokens into windows."""

    grid: Grid
    """Rows and columns of tokens."""
    window: Grid
    """Rows and columns of a window, at most the grid's."""
    shift: Grid
    """By how many rows and columns the windows are moved down and to the right."""

    @property
    def num_windows(self) -> Grid:
        """Rows and columns of windows."""
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    @property
    def padded(self) -> Grid:
        """Rows and columns of tokens, padded to whole windows."""
        rows, columns = self.num_windows
        return rows * self.window[0], columns * self.window[1]

    def order(self) -> Tensor:
        """For each place in the windows, one after the other, its token in the padded grid: [W * n]."""
        (rows, columns), (high, wide) = self.num_windows, self.window
        height, width = self.padded
        numbers = torch.arange(height * width).reshape(height, width)
        numbers = numbers.roll((-self.shift[0], -self.shift[1]), dims=(0, 1))
        return numbers.reshape(rows, high, columns, wide).transpose(1, 2).flatten()

    def mask(self) -> Tensor | None:
        """[W, n, n]: 0 where a token (row) may see another (column), else minus infinity; None: all may."""
        if self.shift == (0, 0) and self.padded == self.grid:
            return None
        row, column = (
            _segments(*axis) for axis in zip(self.grid, self.padded, self.window, self.shift, strict=True)
        )
        segments = (row[:, None] * (self.padded[1] + 2) + column).flatten()  # [rows * columns]
        segments = segments[self.order()].unflatten(0, (-1, self.window[0] * self.window[1]))  # [W, n]
        together = segments[:, :, None] == segments[:, None]
        return torch.where(together, 0.0, float("-inf"))


def _segments(size: int, padded: int, side: int, shift: int) -> Tensor:
    """Which window each place of an axis belongs to, [padded]; 0 before the first whole one, -1: padding."""
    places = torch.arange(padded)
    return torch.where(places < size, (places - shift).div(side, rounding_mode="floor") + 1, -1)


@dataclass(frozen=True)
class Windows:
    """A layout with its tables, ready to move tokens."""

    layout: WindowLayout
    order: Tensor
    """`WindowLayout.order`, [W * n]."""
    inverse: Tensor
    """For each token of the padded grid its place in `order`, [W * n]."""
    mask: Tensor | None
    """`WindowLayout.mask`, [W, n, n]."""

    def partition(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> windows [B * W, n, D], those of an image one after the other."""
        layout = self.layout
        if layout.window == layout.grid:
            return x
        if layout.padded != layout.grid:
            below, right = (padded - size for padded, size in zip(layout.padded, layout.grid, strict=True))
            x = F.pad(x.unflatten(1, layout.grid), (0, 0, 0, right, 0, below)).flatten(1, 2)
        x = x.index_select(1, self.order)  # [B, W * n, D]
        return x.unflatten(1, (-1, layout.window[0] * layout.window[1])).flatten(0, 1)

    def reverse(self, windows: Tensor) -> Tensor:
        """Windows [B * W, n, D] -> tokens [B, N, D]; what stands in the padding is dropped."""
        layout = self.layout
        if layout.window == layout.grid:
            return windows
        x = windows.unflatten(0, (-1, layout.num_windows[0] * layout.num_windows[1])).flatten(1, 2)
        x = x.index_select(1, self.inverse)  # [B, padded rows * columns, D]
        if layout.padded == layout.grid:
            return x
        rows, columns = layout.grid
        return x.unflatten(1, layout.padded)[:, :rows, :columns].flatten(1, 2)

    def masked(self, bias: Tensor, batch: int) -> Tensor:
        """Add the mask to a position bias.

        Args:
            bias: [H, n, n].
            batch: B * W, the number of windows of all images.

        Returns:
            What is added to the scores: [B * W, H, n, n], or [1, H, n, n] where nothing is masked.
        """
        if self.mask is None:
            return bias[None]
        merged = bias + self.mask.to(bias.dtype)[:, None]  # [W, H, n, n]
        return merged.expand(batch // self.mask.shape[0], *merged.shape).flatten(0, 1)


class WindowPartition(nn.Module):
    """The windows of one block, for any grid.

    The tables of the usual grid are kept as buffers outside the state dictionary; those of other grids are
    computed in every pass. Build a model with the `img_size` that it mostly gets.
    """

    def __init__(self, grid: Grid, window: Grid, shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.usual = self.layout(grid)
        order = self.usual.order()
        self.order: Tensor
        self.inverse: Tensor
        self.mask: Tensor | None
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)
        self.register_buffer("mask", self.usual.mask(), persistent=False)

    def layout(self, grid: Grid) -> WindowLayout:
        """How this block cuts a grid: windows shrink to it, and shift by half where there are several."""
        (rows, columns), (high, wide) = grid, self.window
        shift = (
            high // 2 if self.shifted and high < rows else 0,
            wide // 2 if self.shifted and wide < columns else 0,
        )
        return WindowLayout(grid, (min(high, rows), min(wide, columns)), shift)

    def forward(self, grid: Grid) -> Windows:
        """The windows of a grid."""
        layout = self.layout(grid)
        if layout == self.usual:
            return Windows(layout, self.order, self.inverse, self.mask)
        order, mask = layout.order().to(self.order.device), layout.mask()
        return Windows(layout, order, order.argsort(), None if mask is None else mask.to(order.device))


def offset_index(window: Grid, table_window: Grid) -> Tensor:
    """Which row of a table of offsets belongs to each pair of tokens of a window.

    Args:
        window: Rows and columns of the window in use.
        table_window: Those of the window whose offsets the table lists, at least as large.

    Returns:
        [n, n]; the same offset has the same row whatever the window.
    """
    rows, columns = window
    index = relative_index(table_window).reshape(*table_window, *table_window)
    return index[:rows, :columns, :rows, :columns].reshape(rows * columns, rows * columns)


def offset_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each pair of tokens: table [offsets, H], index [n, n] -> [H, n, n]."""
    return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)


def attend_with_learned_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scores: Tap,
    weights: Tap,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend`, but explicit where the bias learns on a CPU; arguments and result are those of `attend`.

    The fused kernel of the CPU has no gradient for a bias, and what PyTorch runs in its place takes up to
    a fifth longer than the explicit path. On a GPU the fused kernel has it.
    """
    if bias is None or not bias.requires_grad or query.device.type != "cpu":
        return attend(query, key, value, scores=scores, weights=weights, bias=bias, dropout=dropout)
    shares = weights(scores(attention_scores(query, key, bias)).softmax(dim=-1))
    return F.dropout(shares, dropout) @ value
