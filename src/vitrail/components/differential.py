"""Differential attention: the difference of two softmax maps, in which what both look at cancels out.

    B batch, H heads, N tokens, L of them ask, D width, d = D / H / 2 width of one map, 2 d of a value

Paper: Ye et al. 2024, "Differential Transformer" (arXiv 2410.05258), equations 1 to 3:

    (softmax(q1 k1^T / sqrt(d)) - lambda softmax(q2 k2^T / sqrt(d))) v

normalised head by head (RMSNorm) and scaled by 1 - lambda_init, with

    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
    lambda_init = 0.8 - 0.6 exp(-0.3 layer), layers counted from 0

The heads of a layer share lambda. H is half of the heads that a baseline with maps of the same width has, so
both have about as many parameters. Parameter names are those of timm's `DiffAttention`.

What differs: nothing is causal, and queries, keys and values may have a bias (`qkv_bias`), because the
baseline's have one. As in the authors' code, the output projection has none. Dropout, which they do not have,
drops from the difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import attend, attention_scores, project_qkv, split_heads
from vitrail.components.position import rotate
from vitrail.components.tap import Tap


class DifferentialAttention(nn.Module):
    """Multi-head differential self-attention.

    Taps: `query`, `key` [B, 2 H, N, d] (head h has the maps 2 h and 2 h + 1), `value` [B, H, N, 2 d];
    `scores1`, `scores2` and their softmax `weights1`, `weights2` [B, H, L, N], rows sum to one; `lambda`, one
    number; `weights` = weights1 - lambda weights2, signed, rows sum to 1 - lambda; `mixed` [B, L, D], after
    the norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(
                f"embed_dim {dim} is not divisible by 2 x num_heads {num_heads} "
                "(a head of differential attention has two maps)"
            )
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        d = dim // num_heads // 2
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(d, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(d, eps=1e-6) if qk_norm else nn.Identity()
        self.lambda_q1 = nn.Parameter(torch.empty(d).normal_(std=0.1))
        self.lambda_k1 = nn.Parameter(torch.empty(d).normal_(std=0.1))
        self.lambda_q2 = nn.Parameter(torch.empty(d).normal_(std=0.1))
        self.lambda_k2 = nn.Parameter(torch.empty(d).normal_(std=0.1))
        self.sub_norm = nn.RMSNorm(2 * d, eps=1e-5)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.proj_drop = nn.Dropout(drop)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores1, self.scores2 = Tap(), Tap()
        self.weights1, self.weights2 = Tap(), Tap()
        self.add_module("lambda", Tap())  # a word of Python, so no attribute can be written
        self.weights, self.mixed = Tap(), Tap()

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Attend among all tokens; arguments and result are those of `Attention`.

        Args:
            x: [B, N, D].
            bias: Added to the scores of both maps, broadcastable to [B, H, N, N].
            rotary: Cosines and sines that rotate queries and keys, broadcastable to [B, 2 H, N, d].
            queries: How many tokens, from the first on, ask; None: all N.

        Returns:
            [B, N, D], or [B, queries, D].
        """
        q, k, v = project_qkv(self.qkv, x, queries)
        q, k = (
            self.q_norm(split_heads(q, 2 * self.num_heads)),
            self.k_norm(split_heads(k, 2 * self.num_heads)),
        )
        if rotary is not None:
            cosine, sine = rotary
            q = rotate(q, cosine[..., :queries, :], sine[..., :queries, :])
            k = rotate(k, cosine, sine)
        q, k, v = self.query(q), self.key(k), self.value(split_heads(v, self.num_heads))
        mixed = self._mix(q, k, v, None if bias is None else bias[..., :queries, :])
        mixed = self.sub_norm(mixed) * (1 - self.lambda_init)  # [B, H, L, 2 d]
        mixed = self.mixed(mixed.transpose(1, 2).flatten(2))  # [B, L, D]
        return self.proj_drop(self.proj(mixed))

    def lambda_now(self) -> Tensor:
        """The learned weight of the second map (equation 2), a scalar; it starts near `lambda_init`."""
        first, second = self.lambda_q1 @ self.lambda_k1, self.lambda_q2 @ self.lambda_k2
        return first.exp() - second.exp() + self.lambda_init

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Queries [B, 2 H, L, d], keys [B, 2 H, N, d], values [B, H, N, 2 d] -> [B, H, L, 2 d]."""
        q1, q2 = q.unflatten(1, (self.num_heads, 2)).unbind(2)  # [B, H, L, d] each
        k1, k2 = k.unflatten(1, (self.num_heads, 2)).unbind(2)
        share = getattr(self, "lambda")(self.lambda_now()).to(v.dtype)
        dropout = self.attn_drop if self.training else 0.0
        # The CPU's fused kernel takes no values wider than the queries, and its detour is slower than this.
        if v.is_cpu or dropout or self.weights.watched:
            first = self.weights1(self.scores1(attention_scores(q1, k1, bias)).softmax(dim=-1))
            second = self.weights2(self.scores2(attention_scores(q2, k2, bias)).softmax(dim=-1))
            return F.dropout(self.weights(first - share * second), dropout) @ v
        first = attend(q1, k1, v, scores=self.scores1, weights=self.weights1, bias=bias)
        return first - share * attend(q2, k2, v, scores=self.scores2, weights=self.weights2, bias=bias)
