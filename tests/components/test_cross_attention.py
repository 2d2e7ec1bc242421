"""Cross-attention against independent references, and its way for a single query."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.components.cross_attention import CrossAttention
from vitrail.components.tap import edit, record


def _random(attention: CrossAttention) -> CrossAttention:
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_the_definition(queries: int, qkv_bias: bool) -> None:
    torch.manual_seed(0)
    attention = _random(CrossAttention(8, 2, context_dim=6, qkv_bias=qkv_bias))
    x, context = torch.randn(2, queries, 8), torch.randn(2, 5, 6)
    expected = torch.empty(2, queries, 8)
    for b in range(2):
        for i in range(queries):
            for h in range(2):
                rows = slice(4 * h, 4 * h + 4)
                q = attention.wq(x[b, i])[rows]
                exponentials = [(q @ attention.wk(c)[rows] / 4**0.5).exp() for c in context[b]]
                values = [attention.wv(c)[rows] for c in context[b]]
                shares = [e / sum(exponentials) for e in exponentials]
                expected[b, i, rows] = sum(s * v for s, v in zip(shares, values, strict=True))
    torch.testing.assert_close(attention(x, context), attention.proj(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [1, 4])
def test_equals_torch_multihead(queries: int) -> None:
    torch.manual_seed(0)
    ours = _random(CrossAttention(32, 4, context_dim=20))
    theirs = nn.MultiheadAttention(32, 4, kdim=20, vdim=20, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.wq.weight)
        theirs.k_proj_weight.copy_(ours.wk.weight)
        theirs.v_proj_weight.copy_(ours.wv.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.wq.bias, ours.wk.bias, ours.wv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(3, queries, 32), torch.randn(3, 11, 20)
    hidden = torch.rand(3, 11) < 0.3
    expected, weights = theirs(x, context, context, average_attn_weights=False)
    torch.testing.assert_close(ours(x, context), expected, atol=1e-5, rtol=0)
    with record(ours, "weights") as seen:
        torch.testing.assert_close(ours(x, context), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["weights"], weights, atol=1e-5, rtol=0)
    bias = torch.zeros(3, 1, 1, 11).masked_fill(hidden[:, None, None], -torch.inf)
    expected, _ = theirs(x, context, context, key_padding_mask=hidden)
    torch.testing.assert_close(ours(x, context, bias), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_single_query_gets_the_same_result_and_gradients_however_it_is_computed(qkv_bias: bool) -> None:
    torch.manual_seed(0)
    attention = _random(CrossAttention(12, 3, context_dim=7, qkv_bias=qkv_bias))
    results = []
    for watched in (False, True):
        x, context = torch.ones(2, 1, 12).requires_grad_(), torch.linspace(-1, 1, 2 * 9 * 7).view(2, 9, 7)
        context.requires_grad_()
        attention.zero_grad()
        if watched:
            with record(attention, "key"):
                mixed = attention(x, context)
        else:
            mixed = attention(x, context)
        mixed.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in attention.parameters()]
        results.append((mixed.detach(), x.grad, context.grad, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 2])
def test_gradients_are_right(queries: int) -> None:
    torch.manual_seed(0)
    attention = CrossAttention(4, 2, context_dim=3).double()
    x = torch.randn(1, queries, 4, dtype=torch.double, requires_grad=True)
    context = torch.randn(1, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x, context))


@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_seen_is_what_is_used(queries: int) -> None:
    torch.manual_seed(0)
    attention = _random(CrossAttention(8, 2))
    x, context = torch.randn(2, queries, 8), torch.randn(2, 5, 8)
    names = ("query", "key", "value", "scores", "weights", "mixed")
    with record(attention, "*") as seen:
        attention(x, context)
    assert {name: tuple(seen[name].shape) for name in names} == {
        "query": (2, 2, queries, 4), "key": (2, 2, 5, 4), "value": (2, 2, 5, 4),
        "scores": (2, 2, queries, 5), "weights": (2, 2, queries, 5), "mixed": (2, queries, 8),
    }  # fmt: skip
    torch.testing.assert_close(seen["weights"].sum(-1), torch.ones(2, 2, queries))
    plain = attention(x, context)
    for name in names:
        with edit(attention, {name: lambda values: values.roll(1, -1) * 2}):
            assert not torch.allclose(attention(x, context), plain), name


@pytest.mark.parametrize("queries", [1, 3])
def test_dropout_only_while_training(queries: int) -> None:
    torch.manual_seed(0)
    attention = _random(CrossAttention(8, 2, attn_drop=0.5))
    x, context = torch.randn(2, queries, 8), torch.randn(2, 5, 8)
    assert not torch.equal(attention(x, context), attention(x, context))
    attention.eval()
    assert torch.equal(attention(x, context), attention(x, context))


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        CrossAttention(10, 3)
