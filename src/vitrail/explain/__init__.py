"""Looking into a model: what it attends to, what its answer rests on, what its heads and features hold."""

from vitrail.explain.attention import AttentionMap, attention_layers, attention_maps, keep_mass
from vitrail.explain.heads import head_importance, head_statistics
from vitrail.explain.health import attention_collapse
from vitrail.explain.methods import METHODS
from vitrail.explain.positions import read_positions
from vitrail.explain.rollout import attention_flow, attention_rollout, gradient_rollout, relevance
from vitrail.explain.tracing import causal_trace

__all__ = [
    "METHODS",
    "AttentionMap",
    "attention_collapse",
    "attention_flow",
    "attention_layers",
    "attention_maps",
    "attention_rollout",
    "causal_trace",
    "gradient_rollout",
    "head_importance",
    "head_statistics",
    "keep_mass",
    "read_positions",
    "relevance",
]
