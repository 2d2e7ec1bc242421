"""Differential attention against the paper's formula, timm's module, and its own two ways."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import DiffAttention
from torch import nn

from vitrail.components.differential import DifferentialAttention
from vitrail.components.tap import edit, record

TAPS = ("query", "key", "value", "scores1", "scores2", "weights1", "weights2", "lambda", "weights", "mixed")


def _random(attention: DifferentialAttention) -> DifferentialAttention:
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.exp() / scores.exp().sum()


@torch.no_grad()
def _as_in_the_paper(attention: DifferentialAttention, x: torch.Tensor, layer: int) -> torch.Tensor:
    """Equations 1 to 3 and the pseudo-code, number by number: x [N, D] -> [N, D]."""
    N, D = x.shape
    H = attention.num_heads
    d = D // H // 2
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    share = (
        math.exp(sum(float(a * b) for a, b in zip(attention.lambda_q1, attention.lambda_k1, strict=True)))
        - math.exp(sum(float(a * b) for a, b in zip(attention.lambda_q2, attention.lambda_k2, strict=True)))
        + lambda_init
    )
    q, k, v = attention.qkv(x).split(D, dim=1)
    heads = []
    for h in range(H):
        first, second = (slice(2 * d * h + d * m, 2 * d * h + d * (m + 1)) for m in (0, 1))
        value = v[:, 2 * d * h : 2 * d * (h + 1)]
        rows = []
        for i in range(N):
            map1 = _softmax(torch.stack([q[i, first] @ k[j, first] / d**0.5 for j in range(N)]))
            map2 = _softmax(torch.stack([q[i, second] @ k[j, second] / d**0.5 for j in range(N)]))
            row = sum((map1[j] - share * map2[j]) * value[j] for j in range(N))
            row = row / (row.square().mean() + 1e-5).sqrt() * attention.sub_norm.weight
            rows.append((1 - lambda_init) * row)
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ attention.proj.weight.T


@pytest.mark.parametrize("layer", [0, 1, 11])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_the_paper(layer: int, qkv_bias: bool) -> None:
    torch.manual_seed(0)
    attention = _random(DifferentialAttention(12, 2, layer=layer, qkv_bias=qkv_bias))
    x = torch.randn(2, 5, 12)
    expected = torch.stack([_as_in_the_paper(attention, image, layer) for image in x])
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)
    with record(attention, "weights"):
        torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 5])
def test_equals_timm(layer: int) -> None:
    torch.manual_seed(0)
    theirs = DiffAttention(64, 4, qkv_bias=True, proj_bias=False, depth=layer).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = DifferentialAttention(64, 4, layer=layer)
    ours.load_state_dict(theirs.state_dict())  # strictly: the names are timm's
    x = torch.randn(3, 17, 64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_lambda_starts_near_its_initial_value() -> None:
    for layer, expected in ((0, 0.2), (1, 0.8 - 0.6 * 0.740818), (100, 0.8)):
        attention = DifferentialAttention(64, 2, layer=layer)
        assert attention.lambda_init == pytest.approx(expected, abs=1e-6)
        assert attention.lambda_now().item() == pytest.approx(expected, abs=0.3)
    vectors = torch.cat([DifferentialAttention(512, 1, layer=0).lambda_q1 for _ in range(20)])
    assert vectors.std().item() == pytest.approx(0.1, rel=0.05)
    assert not (attention.sub_norm.weight != 1).any()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("queries", [None, 1])
def test_the_fused_kernel_gives_the_same_result_and_gradients(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, queries: int | None
) -> None:
    """On a CPU the maps are explicit; here the way of the other devices runs on it."""
    torch.manual_seed(0)
    attention = _random(DifferentialAttention(24, 2, layer=2, qk_norm=True))
    x = torch.randn(2, 7, 24)
    bias = torch.randn(1, 2, 7, 7) if with_bias else None
    results = []
    for on_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu)
        attention.zero_grad()
        mixed = attention(x, bias=bias, queries=queries)
        mixed.square().sum().backward()
        results.append((mixed.detach(), [parameter.grad.clone() for parameter in attention.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_taps_show_both_maps_and_their_signed_difference() -> None:
    torch.manual_seed(0)
    attention = _random(DifferentialAttention(16, 2, layer=3))
    x = torch.randn(2, 5, 16)
    with record(attention, "*") as seen:
        attention(x)
    share = attention.lambda_now()
    assert set(TAPS) == set(seen)
    assert seen["query"].shape == seen["key"].shape == (2, 4, 5, 4)
    assert seen["value"].shape == (2, 2, 5, 8)
    torch.testing.assert_close(seen["lambda"], share)
    for name in ("weights1", "weights2"):
        assert seen[name].shape == (2, 2, 5, 5)
        torch.testing.assert_close(seen[name].sum(-1), torch.ones(2, 2, 5))
        torch.testing.assert_close(seen[name], seen[name.replace("weights", "scores")].softmax(-1))
    torch.testing.assert_close(seen["weights"], seen["weights1"] - share * seen["weights2"])
    torch.testing.assert_close(seen["weights"].sum(-1), (1 - share).expand(2, 2, 5))
    assert (seen["weights"] < 0).any()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_edit_counts(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu)
    attention = _random(DifferentialAttention(16, 2, layer=3))
    x = torch.randn(2, 5, 16)
    plain = attention(x)
    for name in TAPS:
        with edit(attention, {name: lambda values: values.flip(-1) * 2 if values.ndim else values * 2}):
            assert not torch.allclose(attention(x), plain), name


def test_what_both_maps_see_alike_cancels() -> None:
    """With equal maps and lambda 1 nothing is left: the noise-cancelling of the paper's title picture."""
    torch.manual_seed(0)
    attention = _random(DifferentialAttention(16, 2, layer=0))
    twins = {"query": lambda q: q[:, [0, 0, 2, 2]], "key": lambda k: k[:, [0, 0, 2, 2]]}
    with edit(attention, twins | {"lambda": torch.ones_like}), record(attention, "weights") as seen:
        mixed = attention(torch.randn(1, 5, 16))
    assert seen["weights"].abs().max() < 1e-7
    assert mixed.abs().max() < 1e-3


def test_dropout_drops_from_the_difference_only_while_training() -> None:
    torch.manual_seed(0)
    attention = DifferentialAttention(16, 2, layer=0, attn_drop=0.5)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_width_must_hold_two_maps_a_head() -> None:
    with pytest.raises(ValueError, match="embed_dim 12 is not divisible by 2 x num_heads 4"):
        DifferentialAttention(12, 4, layer=0)
