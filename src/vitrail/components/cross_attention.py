"""Attention of one sequence over another: between branches, between a decoder and an image, text and image.

    B batch, H heads, L tokens that ask, S tokens that are asked, D width, C context width, d = D / H

Papers: Vaswani et al. 2017, "Attention Is All You Need" (encoder-decoder attention, section 3.2.3); Chen et
al. 2021, "CrossViT" (the class token of one branch asks the patches of the other). Parameter names are those
of timm's CrossViT; elsewhere the projections are called `q_proj`, `k_proj`, `v_proj`, `out_proj`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.components.attention import attend, split_heads
from vitrail.components.tap import Tap


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values come from a context.

    Taps: `query` [B, H, L, d], `key`, `value` [B, H, S, d], `scores`, `weights` [B, H, L, S], `mixed`
    [B, L, D]. Where a single token asks, keys and values are formed only if somebody watches: the same result
    takes a fifth of the time without them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        context_dim = dim if context_dim is None else context_dim
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """Every token of `x` asks all tokens of `context`.

        Args:
            x: [B, L, D].
            context: [B, S, C].
            bias: Added to the scores, broadcastable to [B, H, L, S]; -inf hides a token of the context. A row
                that hides all of them is 0/0.

        Returns:
            [B, L, D].
        """
        query = self.query(split_heads(self.wq(x), self.num_heads))
        dropout = self.attn_drop if self.training else 0.0
        watched = any(tap.watched for tap in (self.key, self.value, self.scores, self.weights))
        if x.shape[1] == 1 and bias is None and not (dropout or watched):
            mixed = self._ask_once(query[:, :, 0], context)[:, :, None]
        else:
            mixed = attend(
                query,
                self.key(split_heads(self.wk(context), self.num_heads)),
                self.value(split_heads(self.wv(context), self.num_heads)),
                scores=self.scores,
                weights=self.weights,
                bias=bias,
                dropout=dropout,
            )
        mixed = self.mixed(mixed.transpose(1, 2).flatten(2))  # [B, L, D]
        return self.proj_drop(self.proj(mixed))

    def _ask_once(self, query: Tensor, context: Tensor) -> Tensor:
        """One token asks: q (x Wk)^T = (q Wk^T) x^T, so keys and values need not be formed.

        Args:
            query: [B, H, d].
            context: [B, S, C].

        Returns:
            [B, H, d].
        """
        heads = (self.num_heads, -1)
        asked = torch.einsum("bhd,hdc->bhc", query, self.wk.weight.unflatten(0, heads))
        scores = asked @ context.transpose(1, 2)  # [B, H, S]
        if self.wk.bias is not None:
            scores = scores + (query * self.wk.bias.unflatten(0, heads)).sum(dim=2, keepdim=True)
        shares = (scores * query.shape[2] ** -0.5).softmax(dim=2)
        mixed = torch.einsum("bhc,hdc->bhd", shares @ context, self.wv.weight.unflatten(0, heads))
        return mixed if self.wv.bias is None else mixed + self.wv.bias.unflatten(0, heads)
