"""Attention to a reduced grid: against timm and a slow reference, and what each key stands for."""

from __future__ import annotations

import pytest
import timm.models.pvt_v2
import torch
from torch.nn import functional as F

from vitrail.components.reduction import (
    Footprint,
    PooledAttention,
    ReducedAttention,
    SpatialReductionAttention,
)
from vitrail.components.tap import record

GRIDS = ((8, 4), (7, 10), (3, 5), (1, 1))


def _attention(kind: str) -> ReducedAttention:
    torch.manual_seed(0)
    attention = PooledAttention(12, 3) if kind == "pooled" else SpatialReductionAttention(12, 3, int(kind))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("kind", ["1", "2", "4", "pooled"])
@pytest.mark.parametrize("grid", [(8, 12), (28, 4)])
def test_outputs_and_gradients_equal_timm(kind: str, grid: tuple[int, int]) -> None:
    ours = _attention(kind)
    ratio = 1 if kind == "pooled" else int(kind)
    theirs = timm.models.pvt_v2.Attention(12, 3, ratio, linear_attn=kind == "pooled")
    theirs.load_state_dict(ours.state_dict())  # strictly
    x = torch.randn(2, grid[0] * grid[1], 12)
    results = []
    for attention in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = attention(leaf, grid)
        out.square().sum().backward()
        results.append((out, leaf.grad, [parameter.grad for parameter in attention.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [2, 3, 8])
def test_rest_of_the_grid_is_padded_with_zeros(grid: tuple[int, int], ratio: int) -> None:
    attention = _attention(str(ratio))
    x = torch.randn(2, grid[0] * grid[1], 12)
    rows, columns = (-(-size // ratio) for size in grid)
    padded = torch.zeros(2, 12, rows * ratio, columns * ratio)
    padded[:, :, : grid[0], : grid[1]] = x.transpose(1, 2).reshape(2, 12, *grid)
    reduced = F.conv2d(padded, attention.sr.weight, attention.sr.bias, stride=ratio)
    expected = attention.norm(reduced.flatten(2).transpose(1, 2))
    torch.testing.assert_close(attention.reduce(x, grid), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["1", "2", "4", "pooled"])
def test_footprint_is_exactly_what_a_key_depends_on(kind: str, grid: tuple[int, int]) -> None:
    attention = _attention(kind)
    footprint = attention.footprint(grid)

    def first_channels(x: torch.Tensor) -> torch.Tensor:
        return attention.reduce(x[None], grid)[0, :, 0]

    slopes = torch.autograd.functional.jacobian(first_channels, torch.randn(grid[0] * grid[1], 12))
    touched = slopes.abs().sum(-1).unflatten(1, grid) > 0  # [S, rows, columns]
    expected = torch.zeros_like(touched)
    for number in range(len(touched)):
        top, bottom = footprint.rows[number // footprint.grid[1]]
        left, right = footprint.columns[number % footprint.grid[1]]
        expected[number, top:bottom, left:right] = True
    assert footprint.grid[0] * footprint.grid[1] == len(touched)
    assert torch.equal(touched, expected)
    assert expected.any(0).all()  # every cell counts somewhere


def test_footprints_in_numbers() -> None:
    assert SpatialReductionAttention(4, 1, 4).footprint((8, 6)) == Footprint(
        rows=((0, 4), (4, 8)), columns=((0, 4), (4, 6)), side=4
    )
    pooled = PooledAttention(4, 1).footprint((10, 7))
    assert pooled.rows == ((0, 2), (1, 3), (2, 5), (4, 6), (5, 8), (7, 9), (8, 10))
    assert pooled.columns == tuple((i, i + 1) for i in range(7))


@pytest.mark.parametrize("kind", ["1", "2", "pooled"])
def test_fused_equals_explicit_and_rows_sum_to_one(kind: str) -> None:
    attention, x = _attention(kind), torch.randn(2, 77, 12)
    with record(attention, "*") as seen:
        explicit = attention(x, (7, 11))
    torch.testing.assert_close(attention(x, (7, 11)), explicit, atol=1e-5, rtol=1e-5)
    S = {"1": 77, "2": 24, "pooled": 49}[kind]
    shapes = {name: tuple(tensor.shape) for name, tensor in seen.items()}
    assert shapes == {
        "query": (2, 3, 77, 4), "key": (2, 3, S, 4), "value": (2, 3, S, 4),
        "scores": (2, 3, 77, S), "weights": (2, 3, 77, S), "mixed": (2, 77, 12),
    }  # fmt: skip
    torch.testing.assert_close(seen["weights"].sum(-1), torch.ones(2, 3, 77))
    torch.testing.assert_close((seen["weights"] @ seen["value"]).transpose(1, 2).flatten(2), seen["mixed"])


@pytest.mark.parametrize("kind", ["1", "2", "pooled"])
def test_first_queries_alone_get_the_same_answer(kind: str) -> None:
    attention, x = _attention(kind), torch.randn(2, 48, 12)
    torch.testing.assert_close(attention(x, (6, 8), queries=5), attention(x, (6, 8))[:, :5])


def test_weights_of_pooled_attention_grow_linearly() -> None:
    attention = _attention("pooled")
    sizes = []
    for rows in (7, 14, 28):
        with record(attention, "weights") as seen:
            attention(torch.randn(1, rows * 7, 12), (rows, 7))
        sizes.append(seen["weights"].numel())
    assert sizes == [3 * 49 * 49, 3 * 98 * 49, 3 * 196 * 49]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by 3 heads"):
        SpatialReductionAttention(10, 3, 2)
