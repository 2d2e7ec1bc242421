"""Scaled dot-product attention behind one function, and multi-head self-attention.

    B batch, H heads, L query tokens, S key tokens, D width, d = D / H head width

Papers: Vaswani et al. 2017, "Attention Is All You Need"; Dosovitskiy et al. 2021 (ViT); Henry et al. 2020,
"Query-Key Normalization" (here with LayerNorm, as in ViT-22B).

Every attention of the package goes through `attend`. It runs the fused kernel; where somebody watches the
scores or the weights of a module, that module alone computes them explicitly, and so do several threads of a
CPU for few tokens, because it is faster there. There is no global switch, and both ways give the same result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.position import rotate
from vitrail.components.tap import Tap

_FEW_PAIRS = 128**2
"""Queries x keys up to which scores written out are faster than the fused kernel, as measured."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scores: Tap,
    weights: Tap,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017, equation 1).

    Args:
        query: [B, H, L, d].
        key: [B, H, S, d].
        value: [B, H, S, e].
        scores: Tap on q k^T / sqrt(d) + bias, [B, H, L, S]; watching it selects the explicit path.
        weights: Tap on the softmax of the scores, before dropout, rows sum to one; the same.
        bias: Added to the scores, broadcastable to [B, H, L, S]; -inf forbids a pair.
        dropout: Probability with which weights are dropped; the caller passes 0 outside training.

    Returns:
        [B, H, L, e].
    """
    if not (scores.watched or weights.watched or _explicit_is_faster(query, key, bias)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    shares = weights(scores(attention_scores(query, key, bias)).softmax(dim=-1))
    return F.dropout(shares, dropout) @ value


def _explicit_is_faster(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """Whether few tokens on a CPU with several threads ask for gradients, or with a bias.

    More threads gain PyTorch's fused kernel little there; with one thread it is the faster (RESULTS.md, "What
    helped"). A graph that is being captured keeps the one operator.
    """
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.shape[2] * key.shape[2] <= _FEW_PAIRS
        and (bias is not None or (torch.is_grad_enabled() and query.requires_grad))
        and torch.get_num_threads() > 1
    )


def attention_scores(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """The logits of the explicit path, q k^T / sqrt(d) + bias: [B, H, L, d], [B, H, S, d] -> [B, H, L, S]."""
    # The queries are scaled, not the products: fewer numbers, and a layout that the product needs anyway.
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return logits if bias is None else logits + bias


AttentionCore = Callable[..., Tensor]
"""A function with the arguments and the result of `attend`."""


def project_qkv(qkv: nn.Linear, x: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One packed projection -> queries [B, L, D], keys and values [B, N, D].

    Args:
        qkv: D -> 3 D; its rows make queries, then keys, then values.
        x: [B, N, D].
        queries: L, how many tokens ask, from the first on; None: all N.
    """
    D = x.shape[2]
    if queries is None:
        q, k, v = qkv(x).unflatten(2, (3, D)).unbind(2)
        return q, k, v
    to_q, to_kv = qkv.weight.split((D, 2 * D))
    bias_q, bias_kv = (None, None) if qkv.bias is None else qkv.bias.split((D, 2 * D))
    k, v = F.linear(x, to_kv, bias_kv).unflatten(2, (2, D)).unbind(2)
    return F.linear(x[:, :queries], to_q, bias_q), k, v


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, d]."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2); parameter names are timm's.

    `core` mixes the values: `attend`, or one of its sparse and linear relatives.

    Taps: `query`, `key`, `value` [B, H, N, d] (after QK-norm and rotation), `scores` and `weights`
    [B, H, N, N], `mixed` [B, N, D] (heads side by side, before the output projection).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        core: AttentionCore = attend,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.core = core
        self.attn_drop = attn_drop
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Attend among all tokens.

        Args:
            x: [B, N, D].
            bias: Added to the scores, broadcastable to [B, H, N, N].
            rotary: Cosines and sines that rotate queries and keys, broadcastable to [B, H, N, d].
            queries: How many tokens, from the first on, ask; None: all N. The others are only asked.

        Returns:
            [B, N, D], or [B, queries, D].
        """
        q, k, v = (split_heads(part, self.num_heads) for part in project_qkv(self.qkv, x, queries))
        if bias is not None:
            bias = bias[..., :queries, :]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cosine, sine = rotary
            q = rotate(q, cosine[..., :queries, :], sine[..., :queries, :])
            k = rotate(k, cosine, sine)
        mixed = self.core(
            self.query(q),
            self.key(k),
            self.value(v),
            scores=self.scores,
            weights=self.weights,
            bias=bias,
            dropout=self.attn_drop if self.training else 0.0,
        )
        mixed = self.mixed(mixed.transpose(1, 2).flatten(2))  # [B, N, D]
        return self.proj_drop(self.proj(mixed))
