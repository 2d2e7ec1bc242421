"""Looking into a model: what it attends to, what it learnt about positions, and how to draw it."""

from vitrail.explain.attention import attention_layers, class_attention
from vitrail.explain.health import attention_collapse
from vitrail.explain.positions import position_similarity

__all__ = ["attention_collapse", "attention_layers", "class_attention", "position_similarity"]
