"""Windows: against full attention with a mask, what each token sees, padding, odd grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.attention import attend, attention_scores
from vitrail.components.position import Grid
from vitrail.components.tap import Tap, record
from vitrail.components.window import (
    WindowLayout,
    WindowPartition,
    attend_with_learned_bias,
    offset_bias,
    offset_index,
)

# Grid and window: whole, padded on both axes, on one, shrunk on one, on both, odd windows, single cells.
CASES = [
    ((8, 8), (4, 4)),
    ((7, 10), (4, 4)),
    ((8, 5), (4, 4)),
    ((9, 3), (4, 4)),
    ((3, 2), (7, 7)),
    ((6, 11), (3, 5)),
    ((4, 3), (1, 1)),
    ((1, 1), (4, 4)),
    ((1, 9), (4, 4)),
]
TABLE_WINDOW = (7, 7)


def _together(layout: WindowLayout) -> Tensor:
    """[N, N]: whether two tokens share a window, counted cell by cell from the shift."""
    (rows, columns), (high, wide), (down, right) = layout.grid, layout.window, layout.shift
    window = [((r - down) // high, (c - right) // wide) for r in range(rows) for c in range(columns)]
    return torch.tensor([[a == b for b in window] for a in window])


def expanded(layout: WindowLayout, weights: Tensor) -> Tensor:
    """Weights within windows [B * W, H, n, n] among all tokens of the image [B, H, N, N], one by one."""
    (rows, columns), W = layout.grid, layout.num_windows[0] * layout.num_windows[1]
    places = layout.order().reshape(W, -1).tolist()  # [W, n], numbers on the padded grid
    full = weights.new_zeros(len(weights) // W, weights.shape[1], rows * columns, rows * columns)
    for window, here in enumerate(places):
        for i, asking in enumerate(here):
            for j, asked in enumerate(here):
                (r, c), (s, d) = divmod(asking, layout.padded[1]), divmod(asked, layout.padded[1])
                if r < rows and c < columns and s < rows and d < columns:
                    full[:, :, r * columns + c, s * columns + d] = weights[window::W, :, i, j]
    return full


def _full_bias(table: Tensor, layout: WindowLayout) -> Tensor:
    """[H, N, N] over the whole grid: the bias of the offset within a window, elsewhere minus infinity."""
    cells = [(r, c) for r in range(layout.grid[0]) for c in range(layout.grid[1])]
    bias = torch.full((table.shape[1], len(cells), len(cells)), float("-inf"), dtype=table.dtype)
    high, wide = TABLE_WINDOW
    for i, j in _together(layout).nonzero().tolist():
        row = (cells[i][0] - cells[j][0] + high - 1) * (2 * wide - 1) + cells[i][1] - cells[j][1] + wide - 1
        bias[:, i, j] = table[row]
    return bias


class _Attention(torch.nn.Module):
    """The windows at work: tokens [B, N, D] are queries, keys and values at once, with two heads."""

    def __init__(self, grid: Grid, window: Grid, shifted: bool) -> None:
        super().__init__()
        self.windows = WindowPartition(grid, window, shifted)
        self.scores, self.weights = Tap(), Tap()

    def forward(self, x: Tensor, table: Tensor, padding: float = 0.0) -> Tensor:
        """`padding`: what to put where the windows are padded."""
        windows = self.windows(self.windows.usual.grid)
        parts = windows.partition(x - padding) + padding
        heads = parts.unflatten(2, (2, -1)).transpose(1, 2)
        bias = windows.masked(
            offset_bias(table, offset_index(windows.layout.window, TABLE_WINDOW)), len(parts)
        )
        mixed = attend(heads, heads, heads, scores=self.scores, weights=self.weights, bias=bias)
        return windows.reverse(mixed.transpose(1, 2).flatten(2))


def _inputs(grid: Grid) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    offsets = (2 * TABLE_WINDOW[0] - 1) * (2 * TABLE_WINDOW[1] - 1)
    return torch.randn(3, grid[0] * grid[1], 6).double(), torch.randn(offsets, 2).double()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_equals_full_attention_with_a_mask(grid: Grid, window: Grid, shifted: bool) -> None:
    attention, (x, table) = _Attention(grid, window, shifted), _inputs(grid)
    heads = x.unflatten(2, (2, 3)).transpose(1, 2)
    scores = heads @ heads.transpose(2, 3) / 3**0.5 + _full_bias(table, attention.windows.usual)
    expected = (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, table), expected)
    with record(attention, "*") as seen:
        torch.testing.assert_close(attention(x, table), expected)
    weights = seen["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    torch.testing.assert_close(expanded(attention.windows.usual, weights), scores.softmax(-1))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_nothing_leaks_across_borders(grid: Grid, window: Grid, shifted: bool) -> None:
    attention, (x, table) = _Attention(grid, window, shifted), _inputs(grid)

    def sums(tokens: Tensor) -> Tensor:
        return attention(tokens[None], table)[0].sum(-1)

    sees = _together(attention.windows.usual)
    fused = torch.autograd.functional.jacobian(sums, x[0])
    with record(attention, "weights"):
        explicit = torch.autograd.functional.jacobian(sums, x[0])
    for gradient in (fused, explicit):
        assert torch.equal(gradient.abs().sum(-1) > 0, sees)  # not small elsewhere: exactly 0


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_is_not_attended_to(shifted: bool) -> None:
    attention, (x, table) = _Attention((7, 10), (4, 4), shifted), _inputs((7, 10))
    assert attention.windows.usual.padded == (8, 12)
    torch.testing.assert_close(attention(x, table), attention(x, table, padding=50.0))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_partition_then_reverse_is_the_identity(grid: Grid, window: Grid, shifted: bool) -> None:
    partition, (x, _) = WindowPartition(grid, window, shifted), _inputs(grid)
    layout = partition.usual
    parts = partition(grid).partition(x)
    (rows, columns), (high, wide) = layout.num_windows, layout.window
    assert parts.shape == (3 * rows * columns, high * wide, 6)
    assert torch.equal(partition(grid).reverse(parts), x)
    # The published way: pad, roll, cut.
    maps = x.unflatten(1, grid)
    maps = F.pad(maps, (0, 0, 0, layout.padded[1] - grid[1], 0, layout.padded[0] - grid[0]))
    maps = maps.roll((-layout.shift[0], -layout.shift[1]), dims=(1, 2))
    cut = maps.reshape(3, rows, high, columns, wide, 6).transpose(2, 3).reshape(parts.shape)
    assert torch.equal(parts, cut)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_other_grids_than_the_usual(grid: Grid, window: Grid, shifted: bool) -> None:
    usual, other = WindowPartition(grid, window, shifted), WindowPartition((16, 12), window, shifted)
    a, b = usual(grid), other(grid)
    assert a.layout == b.layout
    assert torch.equal(a.order, b.order)
    assert torch.equal(a.inverse, b.inverse)
    assert (a.mask is None) == (b.mask is None)
    assert a.mask is None or torch.equal(a.mask, b.mask)
    assert not usual.state_dict()


def test_layouts() -> None:
    windows = WindowPartition((8, 8), (4, 4), shifted=True)
    assert windows.layout((8, 8)) == WindowLayout((8, 8), (4, 4), (2, 2))
    assert windows.layout((4, 9)) == WindowLayout((4, 9), (4, 4), (0, 2))
    assert windows.layout((3, 9)) == WindowLayout((3, 9), (3, 4), (0, 2))
    assert windows.layout((4, 9)).num_windows == (1, 3)
    assert WindowPartition((6, 11), (3, 5), shifted=True).usual == WindowLayout((6, 11), (3, 5), (1, 2))
    assert windows.layout((4, 9)).padded == (4, 12)
    plain = WindowPartition((8, 8), (4, 4), shifted=False)
    assert plain.layout((5, 9)) == WindowLayout((5, 9), (4, 4), (0, 0))
    assert plain((8, 4)).mask is None
    assert plain((8, 5)).mask is not None


@pytest.mark.parametrize(("layout", "count"), [(((8, 8), (4, 4), (2, 2)), 4), (((8, 8), (4, 4), (0, 2)), 2)])
def test_the_mask_of_whole_shifted_windows(layout: tuple, count: int) -> None:
    mask = WindowLayout(*layout).mask()
    assert mask is not None
    assert mask.shape == (4, 16, 16)
    assert set(mask.unique().tolist()) == {0.0, float("-inf")}
    # The last window holds tokens of `count` borders, equally many of each.
    assert (mask[-1] == 0).sum().item() == 256 // count
    assert (mask[0] == 0).all()


def test_a_small_grid_is_a_full_window_with_masked_padding() -> None:
    x, table = _inputs((3, 5))
    shrunk, full = WindowLayout((3, 5), (3, 5), (0, 0)), WindowLayout((3, 5), (7, 7), (0, 0))
    heads = x.unflatten(2, (2, 3)).transpose(1, 2)
    bias = offset_bias(table, offset_index((3, 5), TABLE_WINDOW))
    weights = (heads @ heads.transpose(2, 3) + bias).softmax(-1)
    padded = F.pad(x.unflatten(1, (3, 5)), (0, 0, 0, 2, 0, 4)).flatten(1, 2)
    heads = padded.unflatten(2, (2, 3)).transpose(1, 2)
    mask = full.mask()
    assert mask is not None
    bias = offset_bias(table, offset_index((7, 7), TABLE_WINDOW)) + mask[:, None]
    torch.testing.assert_close(
        expanded(full, (heads @ heads.transpose(2, 3) + bias).softmax(-1)), expanded(shrunk, weights)
    )


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 1)])
def test_offsets_keep_their_rows(window: Grid) -> None:
    index = offset_index(window, TABLE_WINDOW)
    cells = [(r, c) for r in range(window[0]) for c in range(window[1])]
    expected = [[(a[0] - b[0] + 6) * 13 + a[1] - b[1] + 6 for b in cells] for a in cells]
    assert index.tolist() == expected
    table = torch.randn(169, 4)
    assert torch.equal(offset_bias(table, index), table[index].permute(2, 0, 1))


def test_large_windows_in_the_fused_kernel() -> None:
    # 576 keys, of which the kernel takes 512 at a time: for some queries the first 512 are all forbidden.
    torch.manual_seed(0)
    mask = WindowLayout((34, 25), (24, 24), (12, 12)).mask()
    assert mask is not None
    assert (mask[..., :512] == float("-inf")).all(-1).any()
    q, k, v = torch.randn(3, len(mask), 1, 576, 8)
    fused = attend(q, k, v, scores=Tap(), weights=Tap(), bias=mask[:, None])
    torch.testing.assert_close(fused, attention_scores(q, k, mask[:, None]).softmax(-1) @ v)


def test_a_learned_bias_has_the_gradients_of_attend() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    results = []
    for core in (attend, attend_with_learned_bias):
        bias = torch.linspace(-1, 1, 75).reshape(3, 5, 5).requires_grad_()
        query = q.clone().requires_grad_()
        out = core(query, k, v, scores=Tap(), weights=Tap(), bias=bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, bias))))
    torch.testing.assert_close(results[0], results[1])
    unlearned = bias.detach()
    assert torch.equal(
        attend_with_learned_bias(q, k, v, scores=Tap(), weights=Tap(), bias=unlearned),
        attend(q, k, v, scores=Tap(), weights=Tap(), bias=unlearned),
    )
    dropped = attend_with_learned_bias(
        q, k, torch.ones_like(v), scores=Tap(), weights=Tap(), bias=bias, dropout=0.5
    )
    assert not torch.allclose(dropped, torch.ones_like(dropped))
