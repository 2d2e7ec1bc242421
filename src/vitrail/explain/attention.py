"""Where a model looks: the attention weights it really used, as maps over the image.

    B images, P prefix tokens, N patches on a grid, L = P + N, H heads

Attention of the class token over the patches is how Dosovitskiy et al. 2021 (figure 6) and Caron et al. 2021
(DINO, figure 1) look into a Vision Transformer. Nothing is recomputed or approximated: the weights are
recorded at the taps of the model while it answers.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from vitrail.components.tap import record, taps
from vitrail.models.encoder import Encoder, Features

Heads = Literal["mean", "max", "all"] | int


@torch.no_grad()
def class_attention(model: Encoder, images: Tensor, layer: int = -1, heads: Heads = "mean") -> Tensor:
    """How much the class token attends to each patch.

    Where no class token takes part (a model without one, or a layer that it joins later) nobody asks for the
    whole image; there it is how much each patch is attended to, averaged over the patches that ask. The
    weights are the model's own, not scaled: over one map they sum to at most one, and what is missing went to
    the prefix tokens. (Differential attention and talking heads may have negative weights and other sums.) In
    training mode dropout and DropPath take part; call `model.eval()` first.

    Args:
        model: A model with layers that attend among all tokens.
        images: [B, C, height, width], normalised.
        layer: Which of `attention_layers`; negative numbers count from the last.
        heads: "mean" or "max" over the heads, "all" of them, or the number of one.

    Returns:
        [B, rows, columns], with `heads="all"` [B, H, rows, columns].

    Raises:
        ValueError: The model has no such layers, or not this one, or no such head.
    """
    names = attention_layers(model, (images.shape[2], images.shape[3]))
    if not names:
        height, width = images.shape[2:]
        others = sum(name.endswith("attn.weights") for name in taps(model))
        raise ValueError(
            f"{type(model).__name__} has no attention among all tokens at {height}x{width} pixels: its "
            f"{others} attention layers look into windows or at reduced keys, of which no map is drawn here; "
            "record(model, '*attn.weights') gives their weights"
        )
    if not -len(names) <= layer < len(names):
        raise ValueError(f"no layer {layer}: expected {-len(names)} to {len(names) - 1}")
    with record(model, names[layer]) as seen:
        features = model.forward_features(images)
    weights = seen[names[layer]]  # [B, H, Q, K]
    prefix = weights.shape[3] - features.grid[0] * features.grid[1]
    if prefix and getattr(model.config, "class_token", True):
        attention = weights[:, :, 0, prefix:]  # [B, H, N]
    else:
        attention = weights[:, :, prefix:, prefix:].mean(dim=2)
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


@torch.no_grad()
def attention_layers(model: Encoder, img_size: tuple[int, int] | None = None) -> list[str]:
    """The taps on weights of attention among all tokens of the model's grid, in the order of the pass.

    All architectures call these taps `...attn.weights`. Which of them see the whole grid tells their shape:
    an image without numbers passes for it (on the meta device). Left out are attention within windows, to
    reduced keys, and to the tokens of another grid than `Features.grid` (the fine branch of CrossViT).

    Args:
        model: Any encoder; it stays as it is.
        img_size: Height and width of the image; the model's own when not given.
    """
    names = [name for name in taps(model) if name.endswith("attn.weights")]
    shown = copy.deepcopy(model).to("meta").eval()
    height, width = model.config.image_shape if img_size is None else img_size
    with record(shown, *names) as seen:
        features = shown.forward_features(torch.empty(1, model.config.in_chans, height, width, device="meta"))
    return [name for name, weights in seen.items() if _among_all(weights, features)]


def _among_all(weights: Tensor, features: Features) -> bool:
    """Whether weights [B, H, Q, K] are those of all tokens, or of one class token, over the whole grid."""
    B, _, Q, K = weights.shape
    prefix = K - features.grid[0] * features.grid[1]
    return (
        len(features.patches) == B
        and 0 <= prefix <= features.prefix.shape[1]
        and (Q == K or Q == prefix == 1)
    )
