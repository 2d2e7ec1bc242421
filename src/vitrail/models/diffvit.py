"""Diff-ViT: Vision Transformers with differential attention, each matched to a plain one.

Paper: Ye et al. 2024, "Differential Transformer" (arXiv 2410.05258), there for language. The attention is
`vitrail.components.differential`; all else is `vitrail.models.vit`, with all its switches.

Each variant has the embedding, width, depth and MLP of its baseline (`BASELINES` says whose) and half as many
heads of two maps each, so maps as wide as the baseline's. The parameters are as many within 0.1 per cent:
what the norm and the lambdas add to a layer, 6 x the width of a map, the missing bias of the output
projection takes away. The three heads of ViT-Ti cannot be halved: `diffvit_tiny_patch16_224` keeps three,
with maps half as wide.
"""

from __future__ import annotations

from dataclasses import replace

from vitrail.models.vit import VARIANTS as VIT_VARIANTS
from vitrail.models.vit import ViTConfig


def _differential(baseline: str, num_heads: int) -> ViTConfig:
    return replace(VIT_VARIANTS[baseline], attention="differential", num_heads=num_heads)


BASELINES = {
    "diffvit_tiny_patch16_224": "vit_tiny_patch16_224",
    "diffvit_small_patch16_224": "vit_small_patch16_224",
    "diffvit_base_patch16_224": "vit_base_patch16_224",
    "diffvit_cifar": "vit_cifar",
    "diffvit_cifar_plain": "vit_cifar_plain",
}
"""The plain ViT that each variant is compared with."""

VARIANTS: dict[str, ViTConfig] = {
    "diffvit_tiny_patch16_224": _differential("vit_tiny_patch16_224", num_heads=3),
    "diffvit_small_patch16_224": _differential("vit_small_patch16_224", num_heads=3),
    "diffvit_base_patch16_224": _differential("vit_base_patch16_224", num_heads=6),
    "diffvit_cifar": _differential("vit_cifar", num_heads=2),
    "diffvit_cifar_plain": _differential("vit_cifar_plain", num_heads=2),
}
