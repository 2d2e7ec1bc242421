"""Attention that uses some of the pairs of tokens only: patterns on the grid, and the k best keys.

    P prefix tokens, N = rows * columns patches, L = P + N, B batch, H heads, d head width

Papers: Parmar et al. 2018, "Image Transformer", and Ramachandran et al. 2019 (local neighbourhoods); Child et
al. 2019, "Generating Long Sequences with Sparse Transformers" (their strided pattern with the row length as
stride, without the causal order, is the own row and column here; Ho et al. 2019 call it axial); Zhao et al.
2019, "Explicit Sparse Transformer", and Wang et al. 2022, "KVT" (the k largest scores of each query).

Prefix tokens are global everywhere: they ask all tokens and all ask them (Beltagy et al. 2020, Longformer).

A pattern is a mask for the fused kernel, so it decides what a token may see and saves no time; the k best
keys are found among all scores, which are therefore always formed. Attention that is cheaper because it looks
at less is windowed (Swin), pooled (PVT) or linear.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import attention_scores
from vitrail.components.position import Grid, coordinates
from vitrail.components.tap import Tap


def local_pattern(grid: Grid, num_prefix: int, reach: int) -> Tensor:
    """Patches see the square of (2 reach + 1) x (2 reach + 1) around them, cut at the border: bool [L, L]."""
    rows, columns = coordinates(grid)
    near = (rows[:, None] - rows).abs().maximum((columns[:, None] - columns).abs()) <= reach
    return _with_global(near, num_prefix)


def axial_pattern(grid: Grid, num_prefix: int) -> Tensor:
    """Patches see their own row and column: bool [L, L]."""
    rows, columns = coordinates(grid)
    return _with_global((rows[:, None] == rows) | (columns[:, None] == columns), num_prefix)


def _with_global(patches: Tensor, num_prefix: int) -> Tensor:
    """[N, N] -> [L, L]; the prefix comes first, sees all and is seen by all."""
    return F.pad(patches, (num_prefix, 0, num_prefix, 0), value=True)


class SparsePattern(nn.Module):
    """A fixed pattern as a bias of the scores, kept for the grid of the configuration, made for any other."""

    def __init__(self, kind: Literal["local", "axial"], grid: Grid, num_prefix: int, reach: int) -> None:
        super().__init__()
        self.kind, self.grid, self.num_prefix, self.reach = kind, grid, num_prefix, reach
        self.bias: Tensor
        self.register_buffer("bias", self._bias(grid), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """The bias [1, 1, L, L]: 0 where a pair is used, -inf elsewhere."""
        return self.bias if grid == self.grid else self._bias(grid).to(self.bias)

    def allowed(self, grid: Grid) -> Tensor:
        """Which pairs are used, bool [L, L]: rows ask, columns are asked."""
        if self.kind == "local":
            return local_pattern(grid, self.num_prefix, self.reach)
        return axial_pattern(grid, self.num_prefix)

    def density(self, grid: Grid) -> float:
        """Share of the L x L pairs that is used, in (0, 1]."""
        return self.allowed(grid).double().mean().item()

    def _bias(self, grid: Grid) -> Tensor:
        allowed = self.allowed(grid)
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]


def attend_top_k(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scores: Tap,
    weights: Tap,
    count: int,
    num_prefix: int,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax over the `count` patches with the largest scores and the prefix; all else as `attend`.

    Always explicit: the fused kernel shows no scores.

    Args:
        query: [B, H, L, d]; the prefix comes first.
        key: [B, H, S, d]; the same.
        value: [B, H, S, e].
        scores: Tap on the scores, [B, H, L, S], -inf at pairs that are not used.
        weights: Tap on their softmax, rows sum to one.
        count: How many patches each patch sees, at least 1; all where there are fewer.
        num_prefix: How many tokens, from the first on, see all and are seen by all.
        bias: Added to the scores before the best are chosen.
        dropout: Probability with which weights are dropped.

    Returns:
        [B, H, L, e].
    """
    logits = attention_scores(query, key, bias)
    patches = logits[..., num_prefix:]  # [B, H, L, N]
    best = patches.topk(min(count, patches.shape[-1]), sorted=False).indices
    used = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best + num_prefix, value=True)
    used[..., :num_prefix] = True
    used[..., :num_prefix, :] = True
    shares = weights(scores(logits.masked_fill(~used, -torch.inf)).softmax(dim=-1))
    return F.dropout(shares, dropout) @ value


def top_k_density(grid: Grid, num_prefix: int, count: int) -> float:
    """Share of the L x L pairs that `attend_top_k` uses, in (0, 1]."""
    N = grid[0] * grid[1]
    L = num_prefix + N
    return (num_prefix * L + N * (num_prefix + min(count, N))) / L**2
