"""Where a patch is: six ways to tell a transformer, all for any grid.

    N = rows * columns patches in row-major order, P prefix tokens, D width, d head width, H heads

| kind | added to | learned | on another grid | paper |
|---|---|---|---|---|
| learned | tokens | yes | bicubic resampling | Dosovitskiy et al. 2021 |
| learned_2d | tokens | yes, rows + columns | bicubic resampling of each | the same, appendix D.4 |
| sincos_1d | tokens | no | formula over the patch number | Vaswani et al. 2017, section 3.5 |
| sincos_2d | tokens | no | formula over row and column | Chen et al. 2021 (MoCo v3) |
| relative | attention scores | yes | bicubic resampling | Liu et al. 2021 (Swin); prefix: Bao et al. 2021 |
| rotary | queries, keys | no | formula over row and column | Su et al. 2021; Heo et al. 2024 (base 100) |

What differs: learned_2d adds the two tables at full width instead of concatenating halves, so that it also
works for odd widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]


def resample_table(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Resample a table of positions to another grid, bicubic with antialiasing (timm's choice).

    Args:
        table: [1, N, D] with N = rows * columns of `grid`.
        grid: Rows and columns of the table.
        new_grid: Rows and columns wanted.

    Returns:
        [1, rows * columns of `new_grid`, D]; the table itself when the grids are equal.
    """
    # While a model is exported for images of any size, sizes are symbols, and asking whether they are equal
    # would tie the file to one answer; resampling to the same grid changes nothing.
    if all(isinstance(size, int) for size in new_grid) and grid == new_grid:
        return table
    maps = table.reshape(1, *grid, -1).permute(0, 3, 1, 2).float()  # [1, D, rows, columns]
    maps = F.interpolate(maps, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(table.dtype)  # [1, N', D]


@dataclass(frozen=True)
class TableLayout:
    """What the rows of a learned table of positions are for: [.., rows, D], the grid in row-major order."""

    grid: Grid
    first: int = 0
    """Rows before the grid's: those of prefix tokens."""
    last: int = 0
    """Rows after the grid's."""

    @property
    def rows(self) -> int:
        """Number of rows of the table."""
        return self.first + self.grid[0] * self.grid[1] + self.last


def refit_table(table: Tensor, layout: TableLayout, new_layout: TableLayout) -> Tensor:
    """Resample the part of a table that belongs to the grid; the rows before and after it stay as they are.

    Args:
        table: [rows, D] or [1, rows, D].
        layout: What its rows are for.
        new_layout: What those of the result are for.

    Raises:
        ValueError: The layouts differ in more than their grids.
    """
    if (layout.first, layout.last) != (new_layout.first, new_layout.last):
        raise ValueError(f"positions for other tokens: {layout} does not become {new_layout}")
    rows = table.reshape(-1, table.shape[-1])  # [rows, D]
    first, cells, last = rows.split([layout.first, layout.rows - layout.first - layout.last, layout.last])
    cells = resample_table(cells[None], layout.grid, new_layout.grid)[0]
    return torch.cat([first, cells, last]).reshape(*table.shape[:-2], -1, table.shape[-1])


class LearnedPosition2d(nn.Module):
    """One learned vector a row plus one a column; (rows + columns) * D parameters."""

    def __init__(self, grid: Grid, dim: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.empty(1, grid[0], dim))
        self.column = nn.Parameter(torch.empty(1, grid[1], dim))
        nn.init.trunc_normal_(self.row, std=0.02)
        nn.init.trunc_normal_(self.column, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """The table [1, N, D] for a grid."""
        row, column = (
            resample_table(table, (table.shape[1], 1), (size, 1))
            for table, size in ((self.row, grid[0]), (self.column, grid[1]))
        )
        return (row[:, :, None] + column[:, None]).flatten(1, 2)  # [1, rows * columns, D]


def sincos_frequencies(dim: int, base: float = 10_000.0) -> Tensor:
    """Angular frequencies of `dim` sine-cosine features (Vaswani et al. 2017, section 3.5), [dim / 2]."""
    if dim % 2:
        raise ValueError(f"sine-cosine positions need an even width, got {dim}")
    return base ** -(torch.arange(dim // 2) / (dim // 2))


def sincos(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Sine and cosine features of positions: sines first, then cosines.

    Args:
        positions: [N], in patches.
        frequencies: [F], in radians a patch.

    Returns:
        [N, 2 F].
    """
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SinCosPosition1d(nn.Module):
    """Sine-cosine features of the patch number; no parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", sincos_frequencies(dim), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """The table [1, N, D] for a grid."""
        numbers = torch.arange(grid[0] * grid[1], device=self.frequencies.device)
        return sincos(numbers, self.frequencies)[None]


class SinCosPosition2d(nn.Module):
    """Sine-cosine features of the column in the first half of the channels, of the row in the second."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"sincos_2d positions need embed_dim divisible by 4, got {dim}")
        self.frequencies: Tensor
        self.register_buffer("frequencies", sincos_frequencies(dim // 2), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """The table [1, N, D] for a grid."""
        rows, columns = coordinates(grid, self.frequencies.device)
        return torch.cat([sincos(columns, self.frequencies), sincos(rows, self.frequencies)], dim=1)[None]


def coordinates(grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of each patch as floats, each [N], in row-major order."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    return rows.flatten().float(), columns.flatten().float()


def relative_index(grid: Grid) -> Tensor:
    """Which entry of a (2 rows - 1) x (2 columns - 1) table belongs to each pair of patches, [N, N].

    Entry (i, j) depends on the offset of i from j only; the order is Swin's.
    """
    rows, columns = (axis.long() for axis in coordinates(grid))
    row_offset = rows[:, None] - rows[None] + grid[0] - 1
    column_offset = columns[:, None] - columns[None] + grid[1] - 1
    return row_offset * (2 * grid[1] - 1) + column_offset


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each offset between two patches (Swin), and three for the prefix.

    The last three rows of the table are for prefix to patch, patch to prefix, prefix to prefix (BEiT); they
    are absent where a model has no prefix.
    """

    def __init__(self, grid: Grid, num_heads: int, num_prefix: int) -> None:
        super().__init__()
        self.grid, self.num_prefix = grid, num_prefix
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(offsets + (3 if num_prefix else 0), num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.index: Tensor
        self.register_buffer("index", relative_index(grid), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """The bias [1, H, P + N, P + N] for a grid."""
        rows, columns = (2 * size - 1 for size in self.grid)
        table = self.relative_position_bias_table
        patches, prefix = table[: rows * columns], table[rows * columns :]
        index = self.index
        if grid != self.grid:
            new_size = (2 * grid[0] - 1, 2 * grid[1] - 1)
            patches = resample_table(patches[None], (rows, columns), new_size)[0]
            index = relative_index(grid).to(table.device)
        bias = patches[index].permute(2, 0, 1)  # [H, N, N]
        if not self.num_prefix:
            return bias[None]
        P, N = self.num_prefix, bias.shape[-1]
        to_patch, to_prefix, within = prefix[:, :, None, None]  # each [H, 1, 1]
        top = torch.cat([within.expand(-1, P, P), to_patch.expand(-1, P, N)], dim=2)
        bottom = torch.cat([to_prefix.expand(-1, N, P), bias], dim=2)
        return torch.cat([top, bottom], dim=1)[None]


class RotaryPosition2d(nn.Module):
    """Axial rotary positions: half of a head's channels turns with the row, half with the column."""

    def __init__(self, head_dim: int, num_prefix: int, base: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need a head width divisible by 4, got {head_dim}")
        self.num_prefix = num_prefix
        self.frequencies: Tensor
        self.register_buffer("frequencies", sincos_frequencies(head_dim // 2, base), persistent=False)

    def forward(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, 1, P + N, d]; prefix tokens are not turned (cosine 1, sine 0)."""
        rows, columns = coordinates(grid, self.frequencies.device)
        angles = torch.cat([rows[:, None] * self.frequencies, columns[:, None] * self.frequencies], dim=1)
        angles = F.pad(angles, (0, 0, self.num_prefix, 0)).repeat_interleave(2, dim=1)  # [P + N, d]
        return angles.cos()[None, None], angles.sin()[None, None]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle (Su et al. 2021, equation 34).

    Args:
        x: [B, H, N, d].
        cosine: Broadcastable to [B, H, N, d]; both channels of a pair hold the same value.
        sine: The same.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cosine.to(x.dtype) + turned * sine.to(x.dtype)
