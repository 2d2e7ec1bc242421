"""How the tokens of a model hear of each other: which attention asks whom, and where cells are merged.

An image becomes one or more branches of tokens (two in CrossViT). A [`Flow`][] lists what mixes them, in the
order of the forward pass, with the place of every token in the image. Attention maps, rollout and relevance
are computed from it for every architecture alike: the models describe themselves, nobody guesses from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.components.position import Grid
from vitrail.components.window import WindowLayout

Spans = tuple[tuple[int, int], ...]


class Footprint(NamedTuple):
    """What each cell of a grid stands for: cell (i, j) for `rows[i]` times `columns[j]`.

    Each span is a start and a stop, in cells of a finer grid or in pixels. Spans may overlap (the pooled keys
    of PVT v2 Li); the last ones of padded grids are cut at the border.
    """

    rows: Spans
    columns: Spans
    side: int | None = None
    """Rows and columns of a whole square where the last ones are filled with zeros (padding)."""

    @property
    def grid(self) -> Grid:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    def spread(self, values: Tensor) -> Tensor:
        """Give each cell's value to what it stands for, in equal parts.

        The sum stays, but for the part of padded squares that falls on padding.

        Args:
            values: [..., rows * columns].

        Returns:
            [..., height * width], in cells of the finer grid or in pixels.
        """
        down, across = (_parts(spans, self.side).to(values) for spans in (self.rows, self.columns))
        return (down.mT @ values.unflatten(-1, self.grid) @ across).flatten(-2)

    def paint(self, values: Tensor) -> Tensor:
        """Show each cell's value on what it stands for, [..., rows, columns] -> [..., height, width].

        Where cells overlap, their mean.
        """
        down, across = (_covering(spans).to(values) for spans in (self.rows, self.columns))
        return down.mT @ values @ across

    def collect(self, values: Tensor) -> Tensor:
        """Add up what lies on each cell, [..., height, width] -> [..., rows, columns]; the sum stays.

        Where cells overlap, they share.
        """
        down, across = (_covering(spans).to(values) for spans in (self.rows, self.columns))
        return down @ values @ across.mT

    def find(self, row: int, column: int) -> tuple[int, int]:
        """The first cell that stands for a place of the finer grid, or for a pixel.

        Raises:
            ValueError: The place lies outside.
        """
        found = []
        for place, spans, name in ((row, self.rows, "row"), (column, self.columns, "column")):
            cell = next((i for i, (start, stop) in enumerate(spans) if start <= place < stop), None)
            if cell is None:
                raise ValueError(f"{name} {place} lies outside: expected 0 to {spans[-1][1] - 1}")
            found.append(cell)
        return found[0], found[1]

    def centres(self) -> Tensor:
        """Row and column of the middle of each cell, [rows * columns, 2]."""
        rows, columns = (torch.tensor([(a + b) / 2 for a, b in spans]) for spans in (self.rows, self.columns))
        return torch.cartesian_prod(rows, columns)


def _parts(spans: Spans, whole: int | None = None) -> Tensor:
    """Which share of each span falls on each place, [spans, places]; rows of whole spans sum to one."""
    shares = torch.zeros(len(spans), max(stop for _, stop in spans))
    for number, (start, stop) in enumerate(spans):
        shares[number, start:stop] = 1 / (whole or stop - start)
    return shares


def _covering(spans: Spans) -> Tensor:
    """Which share each span has in each place, [spans, places]; columns sum to one."""
    covered = _parts(spans).gt(0).float()
    return covered / covered.sum(dim=0)


def squares(grid: Grid, side: int) -> Footprint:
    """Squares of `side` x `side` cells next to each other; the last ones are cut at the border."""
    rows, columns = (
        tuple((start, min(start + side, size)) for start in range(0, size, side)) for size in grid
    )
    return Footprint(rows, columns)


def padded_squares(grid: Grid, side: int) -> Footprint:
    """Squares of `side` x `side` cells, the last ones filled up with zeros: they count as whole ones."""
    return squares(grid, side)._replace(side=side)


def even(grid: Grid, image_shape: tuple[int, int]) -> Footprint:
    """An image cut into equal parts, as far as pixels allow."""
    rows, columns = (
        tuple((i * size // count, -(-(i + 1) * size // count)) for i in range(count))
        for count, size in zip(grid, image_shape, strict=True)
    )
    return Footprint(rows, columns)


@dataclass(frozen=True)
class Tokens:
    """A sequence: prefix tokens (class token first), then patches in row-major order."""

    cells: Footprint
    """The pixels that each patch stands for."""
    prefix: int = 0

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return self.cells.grid

    @property
    def count(self) -> int:
        """Prefix tokens and patches."""
        return self.prefix + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class AttentionStep:
    """An attention with the residual sum around it; what passes its tap `<name>.weights` are [B, H, Q, K].

    Keys are the tokens that take part, or what `keys` or `asked` says. Who does not ask stays as it is.
    """

    name: str
    """The module: `blocks.3.attn`."""
    tokens: Tokens
    """The branch whose tokens ask."""
    branch: int = 0
    skipped: int = 0
    """Prefix tokens that take no part (CaiT's class token in the blocks before it joins)."""
    class_only: bool = False
    """Only the class token asks; weights are [B, H, 1, K]."""
    windows: WindowLayout | None = None
    """Patches attend within windows; weights are [B * W, H, n, n]."""
    keys: Footprint | None = None
    """Keys are squares of patches, in cells of the grid."""
    asked: tuple[int, Tokens] | None = None
    """Keys are the class token itself and the patches of another branch: its number and its tokens."""


@dataclass(frozen=True)
class MergeStep:
    """Patches of a finer grid become one of a coarser; new prefix tokens know nothing of the image yet."""

    before: Tokens
    after: Tokens
    cells: Footprint
    """Which patches of the finer grid become which of the coarser one."""
    branch: int = 0


@dataclass(frozen=True)
class Readout:
    """What a head reads: the mean of the first `prefix` tokens of a branch, or the patches.

    Patches count alike, or by what passes the tap `shares`, [B, N, 1] (sequence pooling).
    """

    branch: int = 0
    prefix: int = 0
    shares: str | None = None


@dataclass(frozen=True)
class Flow:
    """Everything that mixes the tokens of a model, for images of one size."""

    start: tuple[Tokens, ...]
    """The branches' tokens as they enter the first block."""
    steps: tuple[AttentionStep | MergeStep, ...]
    reads: tuple[Readout, ...]
    """The heads, whose mean is the model's answer."""

    @property
    def attentions(self) -> tuple[AttentionStep, ...]:
        """The attentions, in the order of the forward pass."""
        return tuple(step for step in self.steps if isinstance(step, AttentionStep))
