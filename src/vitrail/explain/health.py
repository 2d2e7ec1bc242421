"""Signs that a transformer has collapsed: attention on everything or on one token, features all alike.

Entropy collapse: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy
Collapse". Rank collapse: Dong et al. 2021, "Attention is not all you need: pure attention loses rank doubly
exponentially with depth". Effective rank: Roy and Vetterli 2007.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.components.tap import record, taps
from vitrail.models.encoder import Encoder

LOW_ENTROPY, HIGH_ENTROPY, LOW_RANK = 0.05, 0.995, 0.05


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One block."""

    layer: int
    """0 is the first."""
    entropy: float
    """Of the attention rows, mean over images, heads and queries, as a share of the largest possible: 0 is
    one token only, 1 is all tokens alike."""
    rank: float
    """Effective rank of the tokens of all images together, as a share of the largest possible, 0 to 1."""

    @property
    def warning(self) -> str | None:
        """What is wrong and what to try; None where nothing is."""
        if self.entropy < LOW_ENTROPY:
            return "attention has collapsed onto single tokens: lower the learning rate, or try qk_norm"
        if self.entropy > HIGH_ENTROPY:
            return "attention is uniform, the block mixes all tokens alike: train longer, or try init xavier"
        if self.rank < LOW_RANK:
            return "the tokens are nearly all alike: check initialisation and normalisation, lower drop_path"
        return None


@torch.no_grad()
def layer_health(model: Encoder, images: Tensor) -> list[LayerHealth]:
    """Attention entropy and feature rank of every block with attention among all tokens.

    Args:
        model: In evaluation mode.
        images: [B, C, H, W], normalised; some dozens are enough.

    Returns:
        One record a block, in their order; empty where the architecture has no `blocks.*.attn.weights`.
    """
    depth = sum(name.startswith("blocks.") and name.endswith(".attn.weights") for name in taps(model))
    health = []
    for layer in range(depth):  # one block at a time: the weights of all would not fit for large models
        names = f"blocks.{layer}.attn.weights", f"blocks.{layer}.out"
        with record(model, *names) as seen:
            model.forward_features(images)
        weights, tokens = (seen[name].float() for name in names)
        entropy = torch.special.entr(weights).sum(dim=-1).mean() / torch.tensor(weights.shape[-1]).log()
        health.append(
            LayerHealth(layer=layer, entropy=float(entropy), rank=effective_rank(tokens.flatten(0, 1)))
        )
    return health


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the normalised singular values) / largest possible rank, of centred vectors [M, D]."""
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp()) / len(values)
