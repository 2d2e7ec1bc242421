"""google-research's ViT: .npz files of JAX arrays.

    D width, H heads, d head width, p patch size, C channels, M hidden width, K classes

Paper: Dosovitskiy et al. 2021; the files are those of Steiner et al. 2022, "How to train your ViT?", too.
Kernels lie input first, attention's are split by heads: [D, H, d] to make queries, [H, d, D] on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.models.vit import ViTConfig
from vitrail.pretrained.names import Rule, renamed

IGNORED = {"pre_logits/*": "the hidden layer of a head for pre-training"}
MARKS = ("Transformer/encoder_norm/scale",)
"""Names that no other library has."""


def rules(config: Any) -> list[Rule]:
    """Rules for a ViT.

    Raises:
        ValueError: google-research publishes no such model in this form.
    """
    if not isinstance(config, ViTConfig) or config.distillation:
        raise ValueError(f"google-research has no {type(config).__name__.removesuffix('Config')} as .npz")
    block, attention = (
        "Transformer/encoderblock_{n}",
        "Transformer/encoderblock_{n}/MultiHeadDotProductAttention_1",
    )
    found = [
        renamed("cls_token", "cls"),
        renamed("pos_embed", "Transformer/posembed_input/pos_embedding"),
        Rule(("patch_embed.proj.weight",), ("embedding/kernel",), to_ours=_convolution),
        renamed("patch_embed.proj.bias", "embedding/bias"),
        *_norm("norm", "Transformer/encoder_norm"),
        *_norm("blocks.{n}.norm1", f"{block}/LayerNorm_0"),
        *_norm("blocks.{n}.norm2", f"{block}/LayerNorm_2"),
        *_linear("blocks.{n}.mlp.fc1", f"{block}/MlpBlock_3/Dense_0"),
        *_linear("blocks.{n}.mlp.fc2", f"{block}/MlpBlock_3/Dense_1"),
        *_linear("head", "head"),
        Rule(("blocks.{n}.attn.proj.weight",), (f"{attention}/out/kernel",), to_ours=_out),
        renamed("blocks.{n}.attn.proj.bias", f"{attention}/out/bias"),
    ]
    for kind, change in (("kernel", _queries_keys_values), ("bias", _queries_keys_values_bias)):
        found.append(
            Rule(
                (f"blocks.{{n}}.attn.qkv.{'weight' if kind == 'kernel' else 'bias'}",),
                tuple(f"{attention}/{part}/{kind}" for part in ("query", "key", "value")),
                to_ours=change,
            )
        )
    return found


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [renamed(f"{ours}.weight", f"{theirs}/scale"), renamed(f"{ours}.bias", f"{theirs}/bias")]


def _linear(ours: str, theirs: str) -> list[Rule]:
    weight = Rule((f"{ours}.weight",), (f"{theirs}/kernel",), to_ours=lambda kernels: [kernels[0].t()])
    return [weight, renamed(f"{ours}.bias", f"{theirs}/bias")]


def _convolution(kernels: Sequence[Tensor]) -> list[Tensor]:
    return [kernels[0].permute(3, 2, 0, 1)]  # [p, p, C, D] -> [D, C, p, p]


def _queries_keys_values(kernels: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([kernel.flatten(1).t() for kernel in kernels])]  # 3 x [D, H, d] -> [3 D, D]


def _queries_keys_values_bias(biases: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([bias.flatten() for bias in biases])]  # 3 x [H, d] -> [3 D]


def _out(kernels: Sequence[Tensor]) -> list[Tensor]:
    return [kernels[0].flatten(0, 1).t()]  # [H, d, D] -> [D, D]
