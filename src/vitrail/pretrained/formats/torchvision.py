"""torchvision's ViT, Swin and Swin V2: names of their parameters, and which variant each model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.models.swin import SwinConfig
from vitrail.models.swin_v2 import SwinV2Config
from vitrail.models.vit import ViTConfig
from vitrail.pretrained.names import Rule, renamed, translate

VARIANTS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
"""torchvision's names of the models that we have."""

IGNORED = {
    "*.relative_position_index": "computed from the window's size",
    "*.relative_coords_table": "computed from the window's size",
}
MARKS = ("encoder.pos_embedding", "features.0.0.weight")
"""Names that no other library has."""


_PLAIN_VIT = {
    "attention": "full",
    "mlp": "gelu",
    "patch_embed": "conv",
    "position": "learned",
    "prefix_position": True,
    "class_token": True,
    "distillation": False,
    "registers": 0,
    "pool": "cls",
    "fc_norm": False,
    "head": "linear",
    "qkv_bias": True,
    "qk_norm": False,
    "layer_scale": None,
}


def rules(config: Any) -> list[Rule]:
    """Rules for the family of a config.

    Raises:
        ValueError: torchvision has no such model.
    """
    if isinstance(config, SwinConfig):
        return _swin(config)
    if isinstance(config, ViTConfig):
        return _VIT
    raise ValueError(f"torchvision has no {type(config).__name__.removesuffix('Config')}")


def build(config: Any) -> nn.Module:
    """torchvision's model of a config, freshly initialised.

    Raises:
        ValueError: torchvision has no such model.
    """
    # Imported here: torchvision takes a second, and only this function needs it.
    import vitrail.torchvision_ops  # noqa: F401, I001  (before torchvision)
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
    from torchvision.models.vision_transformer import VisionTransformer

    kind = type(config).__name__.removesuffix("Config")
    fixed: dict[str, Any] = {"in_chans": 3}
    if isinstance(config, ViTConfig):
        fixed |= _PLAIN_VIT
    elif isinstance(config, SwinV2Config):
        fixed |= {"qkv_bias": True, "pretrained_window_sizes": None}
    elif isinstance(config, SwinConfig):
        fixed |= {"qkv_bias": True}
    else:
        raise ValueError(f"torchvision has no {kind}")
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"torchvision has no {kind} with {name} {getattr(config, name)!r}")
    if isinstance(config, ViTConfig):
        rows, columns = config.image_shape
        if rows != columns:
            raise ValueError(f"torchvision has no ViT for {rows} x {columns} pixels, only square ones")
        return VisionTransformer(
            rows,
            config.patch_size,
            config.depth,
            config.num_heads,
            config.embed_dim,
            int(config.embed_dim * config.mlp_ratio),
            num_classes=config.num_classes,
        )
    second: dict[str, Any] = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer(
        [config.patch_size] * 2,
        config.embed_dim,
        list(config.depths),
        list(config.num_heads),
        [config.window_size] * 2,
        config.mlp_ratio,
        num_classes=config.num_classes,
        **(second if isinstance(config, SwinV2Config) else {}),
    )


def write(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """torchvision's state dictionary of a model of ours, with the tables that it stores and we compute.

    Raises:
        ValueError: torchvision has no such model.
    """
    own = build(config).state_dict()
    written = translate(state, rules(config), to_ours=False)
    return {name: written.get(name, own[name]) for name in own} | written


_LAYER = "encoder.layers.encoder_layer_{n}"
_VIT = [
    renamed("cls_token", "class_token"),
    renamed("pos_embed", "encoder.pos_embedding"),
    renamed("patch_embed.proj.{p}", "conv_proj.{p}"),
    renamed("blocks.{n}.norm1.{p}", f"{_LAYER}.ln_1.{{p}}"),
    renamed("blocks.{n}.attn.qkv.{p}", f"{_LAYER}.self_attention.in_proj_{{p}}"),
    renamed("blocks.{n}.attn.proj.{p}", f"{_LAYER}.self_attention.out_proj.{{p}}"),
    renamed("blocks.{n}.norm2.{p}", f"{_LAYER}.ln_2.{{p}}"),
    renamed("blocks.{n}.mlp.fc1.{p}", f"{_LAYER}.mlp.0.{{p}}"),
    renamed("blocks.{n}.mlp.fc2.{p}", f"{_LAYER}.mlp.3.{{p}}"),
    # The files that torchvision published are older than its present names.
    renamed("blocks.{n}.mlp.fc1.{p}", f"{_LAYER}.mlp.linear_1.{{p}}"),
    renamed("blocks.{n}.mlp.fc2.{p}", f"{_LAYER}.mlp.linear_2.{{p}}"),
    renamed("norm.{p}", "encoder.ln.{p}"),
    renamed("head.{p}", "heads.head.{p}"),
]


def _swin(config: SwinConfig) -> list[Rule]:
    found = [
        renamed("patch_embed.proj.{p}", "features.0.0.{p}"),
        renamed("patch_embed.norm.{p}", "features.0.2.{p}"),
        renamed("head.fc.{p}", "head.{p}"),
    ]
    for stage in range(len(config.depths)):
        ours, theirs = f"layers.{stage}.blocks.{{n}}", f"features.{2 * stage + 1}.{{n}}"
        if isinstance(config, SwinV2Config):
            found.append(
                Rule(
                    (f"{ours}.attn.q_bias", f"{ours}.attn.v_bias"),
                    (f"{theirs}.attn.qkv.bias",),
                    to_ours=_without_key_bias,
                    to_theirs=_with_key_bias,
                )
            )
        found += [
            renamed(f"{ours}.mlp.fc1.{{p}}", f"{theirs}.mlp.0.{{p}}"),
            renamed(f"{ours}.mlp.fc2.{{p}}", f"{theirs}.mlp.3.{{p}}"),
            renamed(f"{ours}.{{rest}}", f"{theirs}.{{rest}}"),
            renamed(f"layers.{stage}.downsample.{{rest}}", f"features.{2 * stage}.{{rest}}"),
        ]
    return found


def _without_key_bias(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The bias of the keys is there, and set to zero in every pass."""
    query, _, value = tensors[0].chunk(3)
    return [query, value]


def _with_key_bias(tensors: Sequence[Tensor]) -> list[Tensor]:
    query, value = tensors
    return [torch.cat([query, torch.zeros_like(query), value])]
