"""Where a model looks: the attention weights it really used, as maps over the image.

    B images, P prefix tokens, N patches on a grid, L = P + N, H heads

Attention of the class token over the patches is how Dosovitskiy et al. 2021 (figure 6) and Caron et al. 2021
(DINO, figure 1) look into a Vision Transformer. Nothing is recomputed or approximated: the weights are
recorded at the taps of the model while it answers.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from vitrail.components.tap import record, taps
from vitrail.models.encoder import Encoder

_WEIGHTS = re.compile(r"blocks\.\d+\.attn\.weights")

Heads = Literal["mean", "max", "all"] | int


@torch.no_grad()
def class_attention(model: Encoder, images: Tensor, layer: int = -1, heads: Heads = "mean") -> Tensor:
    """How much the class token attends to each patch.

    A model without class token has nobody who asks for the whole image; there it is how much each patch is
    attended to, averaged over the patches that ask. The weights are the model's own, not scaled: over one
    map they sum to at most one, and what is missing went to the prefix tokens. In training mode dropout and
    DropPath take part; call `model.eval()` first.

    Args:
        model: A model whose blocks attend among all tokens (`blocks.*.attn.weights` are its taps).
        images: [B, C, height, width], normalised.
        layer: Which block; negative numbers count from the last.
        heads: "mean" or "max" over the heads, "all" of them, or the number of one.

    Returns:
        [B, rows, columns], with `heads="all"` [B, H, rows, columns]; values in 0 to 1.

    Raises:
        ValueError: The model has no such taps, or no such layer or head.
    """
    names = attention_layers(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention among all tokens (no tap blocks.*.attn.weights)"
        )
    if not -len(names) <= layer < len(names):
        raise ValueError(f"no layer {layer}: expected {-len(names)} to {len(names) - 1}")
    with record(model, names[layer]) as seen:
        features = model.forward_features(images)
    weights = seen[names[layer]]  # [B, H, L, L]
    P = features.prefix.shape[1]
    if getattr(model.config, "class_token", P > 0):
        attention = weights[:, :, 0, P:]  # [B, H, N]
    else:
        attention = weights[:, :, P:, P:].mean(dim=2)
    maps = attention.unflatten(2, features.grid)
    if heads == "mean":
        return maps.mean(dim=1)
    if heads == "max":
        return maps.amax(dim=1)
    if heads == "all":
        return maps
    H = maps.shape[1]
    if isinstance(heads, str) or not -H <= heads < H:
        raise ValueError(f"heads: expected 'mean', 'max', 'all' or {-H} to {H - 1}, got {heads!r}")
    return maps[:, heads]


def attention_layers(model: Encoder) -> list[str]:
    """The taps on weights of attention among all tokens, in the order of the blocks; may be empty."""
    return [name for name in taps(model) if _WEIGHTS.fullmatch(name)]
