"""Looking into a model: what it attends to, what it learnt about positions, and how to draw it."""

from vitrail.explain.attention import AttentionMap, attention_layers, attention_maps, keep_mass
from vitrail.explain.health import attention_collapse
from vitrail.explain.positions import position_similarity

__all__ = [
    "AttentionMap",
    "attention_collapse",
    "attention_layers",
    "attention_maps",
    "keep_mass",
    "position_similarity",
]
