"""Attention against independent references, and the equality of its two paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitrail.components.attention import Attention, attend
from vitrail.components.tap import Tap, record


def _listened() -> Tap:
    """A tap that somebody watches, so that the explicit path runs."""
    tap = Tap()
    tap.register_forward_hook(lambda *_: None)
    return tap


def _qkv(queries: int = 5, keys: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)


@pytest.mark.parametrize("weights", [Tap(), _listened()], ids=["fused", "explicit"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attend_equals_the_definition(weights: Tap, with_bias: bool) -> None:
    q, k, v = _qkv()
    bias = (
        torch.randn(1, 3, 5, 7).masked_fill(torch.rand(1, 3, 5, 7) < 0.3, -torch.inf) if with_bias else None
    )
    expected = torch.empty(2, 3, 5, 8)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                scores = torch.stack([q[b, h, i] @ k[b, h, j] / 8**0.5 for j in range(7)])
                if bias is not None:
                    scores = scores + bias[0, h, i]
                shares = scores.exp() / scores.exp().sum()
                expected[b, h, i] = sum(shares[j] * v[b, h, j] for j in range(7))
    torch.testing.assert_close(
        attend(q, k, v, scores=Tap(), weights=weights, bias=bias), expected, atol=1e-5, rtol=0
    )


def test_both_paths_give_the_same_gradients() -> None:
    grads = []
    for weights in (Tap(), _listened()):
        q, k, v = (x.requires_grad_() for x in _qkv())
        attend(q, k, v, scores=Tap(), weights=weights).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_attention_equals_torch_multihead() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias.normal_())
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(3, 11, 32)
    with record(ours, "weights") as seen:
        explicit = ours(x)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(explicit, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["weights"], weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("watched", [False, True])
def test_dropout_only_while_training(watched: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, attn_drop=0.9)
    x = torch.randn(2, 6, 16)

    def run() -> torch.Tensor:
        if not watched:
            return attention(x)
        with record(attention, "weights") as seen:
            y = attention(x)
        torch.testing.assert_close(seen["weights"].sum(-1), torch.ones(2, 2, 6))
        return y

    attention.eval()
    assert torch.equal(run(), run())
    attention.train()
    assert not torch.equal(run(), run())


def test_qk_norm_bounds_the_scores() -> None:
    attention = Attention(16, 2, qk_norm=True)
    with record(attention, "scores") as seen:
        attention(1e4 * torch.randn(2, 6, 16))
    assert seen["scores"].abs().max() <= 8**0.5 + 1e-3


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="embed_dim 10 is not divisible by num_heads 3"):
        Attention(10, 3)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_two_threads")
def test_torch_sdpa_is_what_runs_unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    attention = Attention(16, 2)
    x = torch.randn(1, 4, 16)
    with torch.no_grad():
        plain = attention(x)
        assert len(calls) == 1
        with record(attention, "weights"):
            attention(x)
        assert len(calls) == 1
    # On several threads of a CPU few tokens go without it where gradients are wanted; more do not.
    torch.testing.assert_close(attention(x), plain, atol=1e-6, rtol=1e-5)
    attention(torch.randn(1, 128, 16))
    assert len(calls) == 1
    attention(torch.randn(1, 129, 16))
    assert len(calls) == 2
    torch.set_num_threads(1)
    attention(x)
    assert len(calls) == 3


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("with_bias", [False, True])
def test_few_tokens_have_the_gradients_of_the_fused_kernel(with_bias: bool) -> None:
    def inputs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 3, 9, 8)] * 3 + [(1, 3, 9, 9)] * with_bias
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    ours, theirs = inputs(), inputs()
    attended = attend(*ours[:3], scores=Tap(), weights=Tap(), bias=ours[3] if with_bias else None)
    attended.square().sum().backward()
    fused = F.scaled_dot_product_attention(*theirs[:3], attn_mask=theirs[3] if with_bias else None)
    fused.square().sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-5)
