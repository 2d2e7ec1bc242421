"""Class-activation maps of every architecture, at the place where they mean something.

    B images, D channels, h x w cells of a map, P prefix tokens, N = h * w patches

A class-activation map weighs the channels of a map inside the model by what they do to the score of a class.
For convolutional networks that is the last map. In a transformer two things go wrong there:

- Behind a class token, what patches become in the last block is read by nobody: their gradient is zero.
- Before a layer norm the gradient is perpendicular to the activation, because the norm undoes any scaling of
  a token. Gradient x activation (`hires_cam`) is then zero up to rounding and the norm's epsilon.

So the map is the last one that the score still depends on, as its reader receives it, behind the norm. Which
one that is follows from the gradients and the shapes at the taps; no architecture is named here:

- patches pooled (mean, sequence pooling; Swin, PVT v2, CCT): the normalised patches that are pooled; in a
  pyramid those of the coarsest stage,
- class token (ViT, DeiT, registers, PVT): the values that the last block's attention offers to it,
- CaiT: the values that each class-attention block reads from the last patches; their maps are added,
- CrossViT: the values that each class token reads from the other branch's last patches. What a cell of the
  coarser map contributes is spread over the finer cells that it covers, and the two maps are added.

`layer` takes the residual stream behind another block instead (the taps `<block>.out`), counted as by
`forward_features(layers=)`; in a pyramid an earlier stage gives a finer map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.tap import record
from vitrail.explain.target import Target, evaluating, scores_of
from vitrail.models.encoder import Encoder, Features

Weigh = Callable[[Tensor, Tensor], Tensor]
"""A map [B, D, h, w] and the gradient of the score with respect to it -> [B, h, w]."""


def grad_cam(model: Encoder, images: Tensor, target: Target = None, *, layer: int | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2).

    Each channel is weighted by the mean of its gradient over the cells; what speaks against the class is cut
    off. Because of that mean it may show cells that the score does not depend on; see `hires_cam`.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.
        layer: Block whose output is taken, as in `forward_features(layers=)`; None: see above.

    Returns:
        [B, rows, columns], 0 or more, in logits.

    Raises:
        ValueError: The model has no head; there is no such class or layer; the patches of that layer do not
            influence the score.
    """

    def weigh(activations: Tensor, gradients: Tensor) -> Tensor:
        return (gradients.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1)

    return _activation(model, images, target, layer, weigh).relu()


def grad_cam_plus_plus(
    model: Encoder, images: Tensor, target: Target = None, *, layer: int | None = None
) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018, equations 5 and 19).

    The weight of a channel is the sum of its positive gradients, each with a share alpha that makes up for
    how often the channel is active, so that several objects of a class count alike. The second and third
    derivatives of the paper are powers of the first because the class score passes an exponential.

    The paper's activations come from a ReLU. Those of a transformer may be negative, and then alpha has a
    pole where the sum of activation x gradient over a channel's cells is near -2: single channels may take
    over the map. Where it disagrees with the others, trust the others. (pytorch-grad-cam adds 1e-6 to the
    denominator, which beside squared gradients is not small: its maps differ.)

    Arguments, result and errors as in `grad_cam`.
    """

    def weigh(activations: Tensor, gradients: Tensor) -> Tensor:
        # Equation 19 divided by the squared gradient: the same number, and no 0 / 0 where that underflows.
        sums = activations.sum(dim=(2, 3), keepdim=True)
        shares = 1 / (2 + sums * gradients)
        weights = (shares * gradients.relu()).sum(dim=(2, 3), keepdim=True)
        return (weights * activations).sum(dim=1)

    return _activation(model, images, target, layer, weigh).relu()


def hires_cam(model: Encoder, images: Tensor, target: Target = None, *, layer: int | None = None) -> Tensor:
    """HiResCAM (Draelos and Carin 2020): gradient x activation in each cell, summed over channels.

    Others call it element-wise or layer gradient x activation. Every cell shows what its own values do to the
    score, first order, with their sign: where nothing but a mean and a linear layer follow, the map sums to
    the logit without its bias. Directly before a norm (`layer` with nothing but pooling behind it) it is zero
    up to rounding.

    Arguments and errors as in `grad_cam`.

    Returns:
        [B, rows, columns], signed, in logits.
    """

    def weigh(activations: Tensor, gradients: Tensor) -> Tensor:
        return (gradients * activations).sum(dim=1)

    return _activation(model, images, target, layer, weigh)


def eigen_cam(model: Encoder, images: Tensor, target: Target = None, *, layer: int | None = None) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin 2020): cells along the first right singular vector.

    It shows what dominates the layer, whatever the class: the class only decides at which layer. A singular
    vector has no sign; here the map sums to something positive. (pytorch-grad-cam centres the cells first and
    leaves the sign to chance.)

    Arguments and errors as in `grad_cam`.

    Returns:
        [B, rows, columns], signed, in the units of the activations.
    """

    def weigh(activations: Tensor, _gradients: Tensor) -> Tensor:
        cells = activations.flatten(2).transpose(1, 2)  # [B, N, D]
        direction = torch.linalg.svd(cells, full_matrices=False).Vh[:, 0]  # [B, D]
        projected = (cells @ direction[:, :, None])[:, :, 0]  # [B, N]
        sign = torch.where(projected.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
        return (sign * projected).unflatten(1, activations.shape[2:])

    return _activation(model, images, target, layer, weigh)


def _activation(model: Encoder, images: Tensor, target: Target, layer: int | None, weigh: Weigh) -> Tensor:
    """Weigh the maps of a layer, and bring them together at the resolution of the finest."""
    found = [
        weigh(activations.float(), gradients.float())
        for activations, gradients in _last_maps(model, images, target, layer)
    ]
    finest = max((maps.shape[1:] for maps in found), key=lambda size: size.numel())
    total = torch.zeros_like(found[0][:, :1, :1])
    for maps in found:
        if maps.shape[1:] != finest:
            share = maps.shape[1:].numel() / finest.numel()
            maps = F.interpolate(maps[:, None], size=finest, mode="bilinear")[:, 0] * share
        total = total + maps
    return total


Pair = tuple[Tensor, Tensor]
"""A map [B, D, h, w], and the gradient of the score with respect to it."""


def _last_maps(model: Encoder, images: Tensor, target: Target, layer: int | None) -> list[Pair]:
    """What a score depends on last, or behind a layer; several maps where there are branches or readers."""
    names = model.block_names()
    asked = range(len(names)) if layer is None else (layer,)
    # The image asks for gradients, so that there are some where all parameters are frozen.
    with evaluating(model), torch.enable_grad(), record(model, "embed", "*.out", "*.value") as seen:
        features = model.forward_features(images.detach().requires_grad_(), layers=asked)
        scores, _ = scores_of(model, model.forward_head(features), target)
        total = scores.sum()  # images do not influence each other: the gradient of each is that of its score
        if asked[-1] in (-1, len(names) - 1):
            (pooled,) = torch.autograd.grad(total, features.patches, retain_graph=True, allow_unused=True)
            if pooled is not None:
                return [(features.map().detach(), replace(features, patches=pooled).map())]
        for number in reversed(asked):
            streams = _streams(seen, names[number] + ".", features.layers[number])
            found = _with_influence(total, streams.values())
            if found and layer is None:
                readers = _readers(seen, streams, features.prefix.shape[1])
                return _with_influence(total, readers) or found
            if found:
                return found
        if layer is not None:
            raise ValueError(
                f"layer {layer} ({names[layer]}): no patches that come out of it influence the score, which "
                "reads the class token alone from there on; take an earlier layer, or None for the last map "
                "that does"
            )
        streams = _streams(seen, "embed", features.layers[0])
        found = _with_influence(total, _readers(seen, streams, features.prefix.shape[1]))
    if not found:
        raise ValueError("the score does not depend on the image at all; is the head all zeros?")
    return found


Place = tuple[Tensor, tuple[int, int]]
"""What passed a tap, [B, L, D] or by heads [B, H, L, d], and the grid that its last tokens fill."""


def _streams(seen: dict[str, Tensor], start: str, shape: Features) -> dict[str, Place]:
    """The taps whose names start so, and that hold all tokens of a map of `shape`: the last one of each map.

    The blocks within a multi-scale block are alike one after another. Blocks of the class token alone (CaiT,
    the exchange in CrossViT) give no patches, and are passed over.
    """
    found = {}
    for example in shape.stages or (shape.map(),):
        B, D, h, w = example.shape
        whole = (B, shape.prefix.shape[1] + h * w, D)
        names = [name for name, x in seen.items() if name.startswith(start) and x.shape == whole]
        if names:
            found[names[-1]] = seen[names[-1]], (h, w)
    return found


def _readers(seen: dict[str, Tensor], streams: dict[str, Place], prefix: int) -> list[Place]:
    """The values of the attentions that come after streams and read all their patches, beside the prefix."""
    found = []
    names = list(seen)
    for stream, (tokens, grid) in streams.items():
        for name in names[names.index(stream) + 1 :]:
            if name.endswith(".value"):
                _, H, L, d = seen[name].shape
                if (L - prefix, H * d) == (grid[0] * grid[1], tokens.shape[2]):
                    found.append((seen[name], grid))
    return found


def _with_influence(total: Tensor, places: Iterable[Place]) -> list[Pair]:
    """Of the patches at some places, those that influence the total score."""
    found = []
    for tokens, grid in places:
        (gradients,) = torch.autograd.grad(total, tokens, retain_graph=True)
        pair = _patch_map(tokens.detach(), grid), _patch_map(gradients, grid)
        if pair[1].any():
            found.append(pair)
    return found


def _patch_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches among tokens [B, L, D] or [B, H, L, d] as a map [B, D, h, w]."""
    if tokens.ndim == 4:
        tokens = tokens.transpose(1, 2).flatten(2)
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
