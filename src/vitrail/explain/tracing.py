"""Causal tracing: which token, in which layer, carries what the answer depends on.

    N patches, P prefix tokens, L = P + N tokens of a layer, D width

Meng et al. 2022, "Locating and editing factual associations in GPT", section 2.1, for images: the model sees
a damaged image, and one token of one layer is given back the state that it had with the whole image. Where
the answer comes back, that token carried what was missing. It is an intervention (`vitrail.edit`) and no
correlation. What differs: a part of the image is damaged instead of noise on word embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.components.tap import edit, record, taps
from vitrail.explain.target import Target, class_scores, evaluating
from vitrail.models.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class TracedLayer:
    """What restoring single tokens of one layer gives back."""

    block: str
    """`blocks.3`."""
    patches: Tensor
    """[rows, columns]: by how much the class's probability rises above that of the damaged image when this
    patch alone is restored."""
    prefix: Tensor
    """[P]: the same of the class token and registers."""


@dataclass(frozen=True, kw_only=True)
class CausalTrace:
    """Probabilities of a class, and what each token of each layer gives back of them."""

    target: int
    """The class."""
    whole: float
    """Its probability for the whole image."""
    damaged: float
    """For the damaged one."""
    layers: tuple[TracedLayer, ...]


@torch.no_grad()
def causal_trace(
    model: Encoder, image: Tensor, damaged: Tensor, target: Target = None, *, batch_size: int = 64
) -> CausalTrace:
    """Restore one token of one layer at a time, and see how much of the answer comes back.

    Args:
        model: An encoder with a head whose blocks pass on one sequence of tokens (all but CrossViT).
        image: [1, C, height, width], normalised.
        damaged: The same image with a part changed, for instance hidden.
        target: The class; None: the one that the model predicts for the whole image.
        batch_size: Tokens that are tried at a time.

    Raises:
        ValueError: No single images of the same shape; no head; no such class; blocks with several sequences.
    """
    if image.shape != damaged.shape or image.ndim != 4 or len(image) != 1:
        raise ValueError(
            "expected one image and its damaged copy, [1, C, height, width] each, got "
            f"{list(image.shape)} and {list(damaged.shape)}"
        )
    streams = [f"{block}.out" for block in model.block_names()]
    if missing := [name for name in streams if name not in taps(model)]:
        raise ValueError(
            f"{type(model).__name__} has no tap {missing[0]}: its blocks pass on several sequences"
        )
    with evaluating(model):
        with record(model, *streams) as states:
            shapes = model.forward_features(image, layers=range(len(streams))).layers
        whole_states = dict(states)
        number = int(class_scores(model, image, target)[1])

        def probability(pixels: Tensor) -> Tensor:
            return model(pixels).softmax(dim=1)[:, number]

        whole, broken = float(probability(image)), float(probability(damaged))
        layers = []
        for layer, name in enumerate(streams):
            state, grid = whole_states[name], shapes[layer].grid
            found = []
            for places in torch.arange(state.shape[1], device=image.device).split(batch_size):
                with edit(model, {name: _restored(state, places)}):
                    found.append(probability(damaged.expand(len(places), -1, -1, -1)))
            gains = torch.cat(found).cpu() - broken
            alone = state.shape[1] == 1 and grid != (1, 1)  # a block of the class token (CaiT)
            prefix = 1 if alone else state.shape[1] - grid[0] * grid[1]
            patches = torch.zeros(grid) if alone else gains[prefix:].unflatten(0, grid)
            layers.append(
                TracedLayer(block=name.removesuffix(".out"), patches=patches, prefix=gains[:prefix])
            )
    return CausalTrace(target=number, whole=whole, damaged=broken, layers=tuple(layers))


def _restored(state: Tensor, places: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit of [B, L, D] that gives the b-th image back its token at the b-th place."""

    def restore(tokens: Tensor) -> Tensor:
        rows = torch.arange(len(places), device=tokens.device)
        tokens = tokens.clone()
        tokens[rows, places] = state[0, places]
        return tokens

    return restore
