"""Signs that a transformer has collapsed: attention on everything or on one token, tokens all alike.

Sources: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse"; Dong
et al. 2021, "Attention is not all you need: pure attention loses rank doubly exponentially with depth"
(tokens that become all alike; others call it oversmoothing); Roy and Vetterli 2007, "The effective rank".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.tap import edit, taps
from vitrail.models.encoder import Encoder

LOW_ENTROPY = 0.05
"""Attention this near to single tokens has collapsed. Measured: trained digits and CIFAR-10 models have 0.6
to 0.9 in every block, a learning rate ten times too high leads to 0.02 and below in the first."""
HIGH_ENTROPY = 0.995
"""Attention this near to uniform, in every block: so do models with small initial weights start, but none
should stay there; it counts after `STUCK_SHARE` of the run."""
LOW_RANK = 0.05
"""Effective rank of the tokens, as a share of the largest possible; trained models have 0.5 and more."""
HIGH_SIMILARITY = 0.99
"""Mean cosine similarity of an image's tokens; fresh models have up to 0.96, trained ones 0.5 to 0.7."""

CollapseReport = dict[str, dict[str, float]]
"""Block -> what was found of "entropy", "rank" and "similarity", each 0 to 1, in the order of the blocks."""


@torch.no_grad()
def attention_collapse(model: Encoder, images: Tensor) -> CollapseReport:
    """Measure how concentrated the attention of each block is, and how alike its tokens are.

    - entropy: of the attention rows, over the logarithm of the number of keys, mean over images, heads and
      queries. 0: each query looks at one token; 1: at all alike. Negative weights (differential attention)
      count with their size, and rows are normalised. Forbidden pairs count as keys.
    - rank: effective rank of the centred tokens of all images (Roy and Vetterli 2007), over the largest
      possible one.
    - similarity: cosine similarity of the tokens of one image, mean over all pairs and images.

    Args:
        model: Any encoder; it is put into evaluation mode for the while and back afterwards.
        images: [B, C, H, W], normalised, on the model's device; 16 to 32 are enough.

    Returns:
        The blocks with taps `<block>.<attention>.weights` or `<block>.out`; what does not apply is left out
        (entropy with a single key, similarity with a single token).
    """
    found: CollapseReport = {}

    def measure(name: str) -> Callable[[Tensor], Tensor]:
        attention = name.endswith(".weights")
        block = name.rsplit(".", 2 if attention else 1)[0]
        measured = _attention if attention else _alikeness

        def look(values: Tensor) -> Tensor:
            found.setdefault(block, {}).update(measured(values.float()))
            return values

        return look

    names = [name for name in taps(model) if name.endswith((".weights", ".out"))]
    if not names:
        return found
    was_training = model.training
    model.eval()
    # `edit` and not `record`: each tensor is measured when it passes; the weights of all blocks of a large
    # model together would not fit.
    with edit(model, {name: measure(name) for name in names}):
        model(images)  # the whole forward pass, which a sharded model needs
    model.train(was_training)
    return found


def _attention(weights: Tensor) -> dict[str, float]:
    """Weights [B, H, L, S] -> entropy."""
    keys = weights.shape[-1]
    if keys == 1:
        return {}
    shares = weights.abs()
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return {"entropy": float(torch.special.entr(shares).sum(dim=-1).mean()) / math.log(keys)}


def _alikeness(tokens: Tensor) -> dict[str, float]:
    """Tokens [B, ..., D] -> rank and similarity."""
    tokens = tokens.flatten(1, -2)  # [B, N, D]
    N = tokens.shape[1]
    found = {"rank": effective_rank(tokens.flatten(0, 1))}
    if N > 1:
        # The sum of all pairs' cosines is the squared length of the sum of the directions.
        directions = F.normalize(tokens, dim=-1).sum(dim=1).square().sum(dim=-1)  # [B]
        found["similarity"] = float(((directions - N) / (N * (N - 1))).mean())
    return found


def finding(measured: Mapping[str, float]) -> str | None:
    """What is wrong with one block of a `CollapseReport`; None where nothing is."""
    if measured.get("entropy", 0.5) < LOW_ENTROPY:
        return "attention has collapsed onto single tokens: lower the learning rate, or try qk_norm"
    if measured.get("entropy", 0.5) > HIGH_ENTROPY:
        return "attention is uniform, the block mixes all tokens alike: train longer, or try init xavier"
    if measured.get("rank", 1.0) < LOW_RANK or measured.get("similarity", 0.0) > HIGH_SIMILARITY:
        return "the tokens are nearly all alike: check initialisation and normalisation, lower drop_path"
    return None


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the normalised singular values) / largest possible rank, of centred vectors [M, D]."""
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) / len(values)
