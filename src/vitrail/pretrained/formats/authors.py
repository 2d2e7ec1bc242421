"""Files of the papers' authors: where their names differ from ours, which are mostly theirs or timm's.

| files | what differs |
|---|---|
| DeiT, DeiT III, CaiT, PVT v1, CCT/CVT | nothing |
| MAE, DINO, DINOv2 | decoder, mask token or projection head beside the encoder; registers, SwiGLU |
| Swin v1 and v2 | a stage's merging stands at the end of the stage before it; tables that can be computed |
| PVT v2 | stages are counted in the names, from 1 |
| CrossViT | tokens and positions as lists |
"""

from __future__ import annotations

from typing import Any

from vitrail.models.crossvit import CrossViTConfig
from vitrail.models.pvt_v2 import PVTv2Config
from vitrail.models.swin import SwinConfig
from vitrail.models.vit import ViTConfig
from vitrail.pretrained.names import Rule, renamed

IGNORED = {
    "*.relative_position_index": "computed from the window's size",
    "*.relative_coords_table": "computed from the window's size",
    "*.attn_mask": "computed from the image's size",
    "decoder_*": "the decoder of masked pre-training",
    "decoder.*": "the decoder of masked pre-training",
    "mask_token": "stands for hidden patches in pre-training",
    "head.mlp.*": "the projection head of self-distillation",
    "head.last_layer.*": "the projection head of self-distillation",
}
MARKS = (
    "layers.0.downsample.reduction.weight",
    "patch_embed1.proj.weight",
    "pos_embed.0",
    "register_tokens",
    "mask_token",
    "blocks.0.mlp.w12.weight",
    "classifier.blocks.0.self_attn.qkv.weight",
)
"""Names that timm does not have."""


def rules(config: Any) -> list[Rule]:
    """Rules for the family of a config; none where the names are the same."""
    if isinstance(config, SwinConfig):
        return [
            *(
                renamed(f"layers.{stage}.downsample.{{rest}}", f"layers.{stage - 1}.downsample.{{rest}}")
                for stage in range(1, len(config.depths))
            ),
            renamed("head.fc.{p}", "head.{p}"),
        ]
    if isinstance(config, PVTv2Config):
        return _pvt_v2(config)
    if isinstance(config, CrossViTConfig):
        return [renamed(f"{kind}_{{n}}", f"{kind}.{{n}}") for kind in ("cls_token", "pos_embed")]
    if isinstance(config, ViTConfig):
        return [
            renamed("reg_token", "register_tokens"),
            renamed("blocks.{n}.mlp.fc1.{p}", "blocks.{n}.mlp.w12.{p}"),
            renamed("blocks.{n}.mlp.fc2.{p}", "blocks.{n}.mlp.w3.{p}"),
        ]
    return []


def _pvt_v2(config: PVTv2Config) -> list[Rule]:
    found = [renamed("patch_embed.{rest}", "patch_embed1.{rest}")]
    for stage in range(len(config.depths)):
        ours, theirs = f"stages.{stage}", f"{stage + 1}"
        found += [
            renamed(f"{ours}.blocks.{{n}}.mlp.dwconv.{{p}}", f"block{theirs}.{{n}}.mlp.dwconv.dwconv.{{p}}"),
            renamed(f"{ours}.blocks.{{n}}.{{rest}}", f"block{theirs}.{{n}}.{{rest}}"),
            renamed(f"{ours}.norm.{{p}}", f"norm{theirs}.{{p}}"),
            renamed(f"{ours}.downsample.{{rest}}", f"patch_embed{theirs}.{{rest}}"),
        ]
    return found
