"""Linear attention: the paper's formula, and time and memory that grow with the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.components.attention import Attention
from vitrail.components.linear_attention import attend_linear, positive_features
from vitrail.components.tap import Tap, edit, record


def _listened() -> Tap:
    tap = Tap()
    tap.register_forward_hook(lambda *_: None)
    return tap


def _qkv(queries: int = 5, keys: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 4)


@pytest.mark.parametrize("weights", [Tap(), _listened()], ids=["linear", "explicit"])
def test_equals_the_definition(weights: Tap) -> None:
    q, k, v = _qkv()
    expected = torch.empty(2, 3, 5, 4)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                phi = torch.where(q[b, h, i] > 0, q[b, h, i] + 1, q[b, h, i].exp())
                likeness = [
                    float(phi @ torch.where(k[b, h, j] > 0, k[b, h, j] + 1, k[b, h, j].exp()))
                    for j in range(7)
                ]
                expected[b, h, i] = sum(likeness[j] * v[b, h, j] for j in range(7)) / sum(likeness)
    torch.testing.assert_close(
        attend_linear(q, k, v, scores=Tap(), weights=weights), expected, atol=1e-5, rtol=0
    )


def test_both_ways_give_the_same_gradients() -> None:
    gradients = []
    for weights in (Tap(), _listened()):
        q, k, v = (x.requires_grad_() for x in _qkv())
        attend_linear(q, k, v, scores=Tap(), weights=weights).square().sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_weights_are_positive_and_sum_to_one() -> None:
    attention = Attention(16, 2, core=attend_linear)
    x = torch.randn(2, 6, 16)
    with record(attention, "scores", "weights") as seen:
        attention(x)
    assert seen["weights"].shape == (2, 2, 6, 6)
    assert (seen["weights"] > 0).all()
    torch.testing.assert_close(seen["weights"].sum(-1), torch.ones(2, 2, 6))
    torch.testing.assert_close(seen["weights"], seen["scores"] / seen["scores"].sum(-1, keepdim=True))
    plain = attention(x)
    for name in ("query", "key", "value", "scores", "weights", "mixed"):
        with edit(attention, {name: lambda values: values.roll(1, -1) * 2}):
            assert not torch.allclose(attention(x), plain), name


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor of a computation holds."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def _kept_bytes(attention: Attention, tokens: int) -> int:
    """What the forward pass keeps for the backward pass, besides its input and the weights."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in attention.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(torch.randn(1, tokens, 32)).sum()
    return sum(kept.values())


def test_memory_and_time_double_with_the_tokens() -> None:
    attention = Attention(32, 2, core=attend_linear)
    largest, products = [], []
    for tokens in (512, 1024):
        x = torch.randn(1, tokens, 32)
        with _Largest() as watch, FlopCounterMode(display=False) as counter:
            attention(x)
        largest.append(watch.numbers)
        products.append(counter.get_total_flops())
    assert largest == [512 * 96, 1024 * 96]  # queries, keys and values; never a matrix of 512 x 512
    assert products[1] == 2 * products[0]
    assert _kept_bytes(attention, 1024) <= 2.01 * _kept_bytes(attention, 512)


def test_full_attention_watched_quadruples() -> None:
    """The same measure shows the square where it is: the test above can fail."""
    attention = Attention(32, 2)
    with record(attention, "weights"):
        assert _kept_bytes(attention, 1024) > 3 * _kept_bytes(attention, 512)


def test_features_are_positive() -> None:
    x = torch.tensor([-200.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(positive_features(x), torch.tensor([0.0, 0.367879, 1.0, 2.0]))


@pytest.mark.parametrize("weights", [Tap(), _listened()], ids=["linear", "explicit"])
def test_tokens_without_any_feature_give_no_nan(weights: Tap) -> None:
    q, k, v = _qkv()
    mixed = attend_linear(q - 300, k, v, scores=Tap(), weights=weights)
    assert torch.equal(mixed, torch.zeros_like(mixed))


@pytest.mark.parametrize("options", [{"bias": torch.zeros(1, 1, 5, 7)}, {"dropout": 0.1}])
def test_what_needs_scores_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="takes no bias, mask or dropout"):
        attend_linear(*_qkv(), scores=Tap(), weights=Tap(), **options)
