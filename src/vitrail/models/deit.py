"""DeiT: Vision Transformers for those who have ImageNet only, and their successors.

Papers: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention"
(DeiT); Touvron et al. 2022, "DeiT III: Revenge of the ViT". Names of models and parameters are timm's.

What DeiT brings is a recipe, and for the distilled models a token: beside the class token a distillation
token attends to the patches, and a second head on it learns from a teacher. Both are a switch of
`vitrail.models.vit` (`distillation`), so a DeiT is a ViT with other values. `model.forward_heads(features)`
gives the logits of both heads, for the loss; `model(images)` gives their mean, the model's answer (DeiT,
section 4).

DeiT III adds LayerScale (from 1e-6 on) and no positions to the class token.
"""

from __future__ import annotations

from dataclasses import replace

from vitrail.models.vit import VARIANTS as VIT_VARIANTS
from vitrail.models.vit import ViTConfig


def _deit(size: str, img_size: int, distillation: bool = False) -> ViTConfig:
    plain = VIT_VARIANTS[f"vit_{size}_patch16_{img_size}"]
    return replace(plain, init="trunc_normal", distillation=distillation)


def _deit3(embed_dim: int, depth: int, num_heads: int, patch_size: int, img_size: int) -> ViTConfig:
    return ViTConfig(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        prefix_position=False,
        layer_scale=1e-6,
        init="trunc_normal",
    )


VARIANTS: dict[str, ViTConfig] = {
    "deit_tiny_patch16_224": _deit("tiny", 224),
    "deit_small_patch16_224": _deit("small", 224),
    "deit_base_patch16_224": _deit("base", 224),
    "deit_base_patch16_384": _deit("base", 384),
    "deit_tiny_distilled_patch16_224": _deit("tiny", 224, distillation=True),
    "deit_small_distilled_patch16_224": _deit("small", 224, distillation=True),
    "deit_base_distilled_patch16_224": _deit("base", 224, distillation=True),
    "deit_base_distilled_patch16_384": _deit("base", 384, distillation=True),
    "deit3_small_patch16_224": _deit3(384, 12, 6, 16, 224),
    "deit3_small_patch16_384": _deit3(384, 12, 6, 16, 384),
    "deit3_medium_patch16_224": _deit3(512, 12, 8, 16, 224),
    "deit3_base_patch16_224": _deit3(768, 12, 12, 16, 224),
    "deit3_base_patch16_384": _deit3(768, 12, 12, 16, 384),
    "deit3_large_patch16_224": _deit3(1024, 24, 16, 16, 224),
    "deit3_large_patch16_384": _deit3(1024, 24, 16, 16, 384),
    "deit3_huge_patch14_224": _deit3(1280, 32, 16, 14, 224),
    # For 32 pixels (CIFAR): `vit_cifar_plain` with a distillation token.
    "deit_cifar": replace(VIT_VARIANTS["vit_cifar_plain"], init="trunc_normal", distillation=True),
}
