"""Which models can compute adaptively: plain ViTs in which a token may stand anywhere among the others."""

from __future__ import annotations

from vitrail.models import Encoder
from vitrail.models.vit import ViT

_ADDED = ("none", "learned", "learned_2d", "sincos_1d", "sincos_2d")
"""Positions that belong to the token itself; the others need to know where both tokens of a pair lie."""


def plain_vit(model: Encoder) -> ViT:
    """The same model, as the type that the methods need.

    Raises:
        ValueError: Another architecture, position or attention, or no classifier.
    """
    needed = "token merging and early exit need a plain ViT with a classifier"
    if not isinstance(model, ViT):
        raise ValueError(f"{needed}, got {type(model).__name__}")
    if model.config.position not in _ADDED:
        raise ValueError(f"{needed} whose positions are added to the tokens, got {model.config.position!r}")
    if model.config.attention != "full":
        raise ValueError(f"{needed} with attention 'full', got {model.config.attention!r}")
    if not model.has_head:
        raise ValueError(f"{needed}; this one has none")
    return model
