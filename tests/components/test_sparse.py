"""Sparse attention: exactly the pairs that were promised, and the result of masked full attention."""

from __future__ import annotations

import pytest
import torch

from vitrail.components.attention import attend
from vitrail.components.sparse import (
    SparsePattern,
    attend_top_k,
    axial_pattern,
    local_pattern,
    top_k_density,
)
from vitrail.components.tap import Tap


def _seen(pattern: torch.Tensor, i: int, j: int, num_prefix: int) -> bool:
    return bool(pattern[num_prefix + i, num_prefix + j])


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_patterns_equal_their_definition(grid: tuple[int, int], num_prefix: int) -> None:
    rows, columns = grid
    local, axial = local_pattern(grid, num_prefix, reach=1), axial_pattern(grid, num_prefix)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, across = abs(i // columns - j // columns), abs(i % columns - j % columns)
            assert _seen(local, i, j, num_prefix) == (down <= 1 and across <= 1)
            assert _seen(axial, i, j, num_prefix) == (down == 0 or across == 0)
    for pattern in (local, axial):
        assert pattern.shape == (num_prefix + rows * columns,) * 2
        assert pattern[:num_prefix].all()
        assert pattern[:, :num_prefix].all()


def test_density_is_the_share_of_pairs() -> None:
    axial = SparsePattern("axial", (4, 6), 1, reach=0)
    # 24 patches see 4 + 6 - 1 patches and the class token, which sees all 25.
    assert axial.density((4, 6)) == pytest.approx((24 * 10 + 25) / 25**2)
    local = SparsePattern("local", (8, 8), 0, reach=1)
    # 36 patches inside see 9, 24 at an edge 6, 4 in a corner 4.
    assert local.density((8, 8)) == pytest.approx((36 * 9 + 24 * 6 + 4 * 4) / 64**2)
    assert SparsePattern("local", (8, 8), 1, reach=7).density((8, 8)) == 1.0
    assert top_k_density((4, 6), 1, 5) == pytest.approx((24 * 6 + 25) / 25**2)
    assert top_k_density((4, 6), 1, 99) == 1.0


def test_the_bias_of_another_grid_is_made_anew() -> None:
    pattern = SparsePattern("local", (4, 4), 1, reach=1)
    assert pattern((4, 4)) is pattern.bias
    assert not pattern.state_dict()
    bias = pattern((3, 5))
    assert bias.shape == (1, 1, 16, 16)
    assert torch.equal(bias[0, 0] == 0, local_pattern((3, 5), 1, 1))
    assert torch.isneginf(bias[bias != 0]).all()


def _qkv(tokens: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, tokens, width), torch.randn(2, 3, tokens, width), torch.randn(2, 3, tokens, 4)


def _top_k(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, num_prefix: int, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, seen = Tap(), []
    weights.register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    mixed = attend_top_k(
        q, k, v, scores=Tap(), weights=weights, count=count, num_prefix=num_prefix, **options
    )
    return mixed, seen[0]


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_top_k_equals_the_definition(count: int, num_prefix: int) -> None:
    q, k, v = _qkv(7)
    mixed, weights = _top_k(q, k, v, count, num_prefix)
    expected = torch.empty_like(mixed)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                scores = [float(q[b, h, i] @ k[b, h, j]) / 8**0.5 for j in range(7)]
                best = sorted(range(num_prefix, 7), key=lambda j: -scores[j])[:count]
                used = range(7) if i < num_prefix else [*range(num_prefix), *best]
                total = sum(torch.tensor(scores[j]).exp() for j in used)
                expected[b, h, i] = sum(torch.tensor(scores[j]).exp() / total * v[b, h, j] for j in used)
                assert set(weights[b, h, i].nonzero()[:, 0].tolist()) == set(used)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_top_k_keeps_exactly_k_among_equal_scores() -> None:
    q = k = torch.zeros(1, 1, 9, 4)
    _, weights = _top_k(q, k, torch.randn(1, 1, 9, 4), 3, 1)
    assert ((weights[0, 0, 1:] != 0).sum(-1) == 4).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 9))


def test_top_k_of_all_is_full_attention() -> None:
    q, k, v = _qkv(7)
    full = attend(q, k, v, scores=Tap(), weights=Tap())
    torch.testing.assert_close(_top_k(q, k, v, 99, 1)[0], full, atol=1e-5, rtol=0)


def test_top_k_counts_the_bias_and_takes_fewer_queries() -> None:
    q, k, v = _qkv(7)
    bias = torch.full((1, 1, 7, 7), -100.0)
    bias[..., [2, 5]] = 100.0
    _, weights = _top_k(q, k, v, 2, 0, bias=bias)
    assert (weights.nonzero()[:, 3].reshape(-1, 2) == torch.tensor([2, 5])).all()
    all_rows, one_row = _top_k(q, k, v, 2, 2)[0], _top_k(q[:, :, :1], k, v, 2, 2)[0]
    torch.testing.assert_close(one_row, all_rows[:, :, :1])


def test_top_k_gives_gradients_to_what_was_kept_only() -> None:
    q, k, v = _qkv(7)
    k.requires_grad_(), v.requires_grad_()
    mixed, weights = _top_k(q, k, v, 2, 0)
    mixed[0, 0, 3].sum().backward()
    kept = weights[0, 0, 3] != 0
    assert torch.equal(v.grad[0, 0].any(-1), kept)
    assert not k.grad[0, 0][~kept].any()
    assert not v.grad[1].any()


def test_top_k_drops_weights_with_the_given_probability() -> None:
    q, k, v = _qkv(7)
    assert torch.equal(_top_k(q, k, v, 3, 1)[0], _top_k(q, k, v, 3, 1)[0])
    assert not torch.equal(_top_k(q, k, v, 3, 1, dropout=0.5)[0], _top_k(q, k, v, 3, 1)[0])
