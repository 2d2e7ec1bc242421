"""Less work for the same answers: token merging and early exit on a trained plain ViT, and what they gain."""

from vitrail.adaptive.curve import Curve, Point, adaptive_curve
from vitrail.adaptive.early_exit import EarlyExit, fit_early_exit
from vitrail.adaptive.merging import MergedViT, merge_similar

__all__ = [
    "Curve",
    "EarlyExit",
    "MergedViT",
    "Point",
    "adaptive_curve",
    "fit_early_exit",
    "merge_similar",
]
