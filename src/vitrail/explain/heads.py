"""What each attention head does: how far it looks, how sharply, whether by place or by content, and whether
it is needed.

    B images, H heads, Q tokens that ask, K keys, N patches

Sources: Dosovitskiy et al. 2021, figure 7, and Raghu et al. 2021, "Do Vision Transformers See Like
Convolutional Neural Networks?" (mean attention distance); Michel et al. 2019, "Are Sixteen Heads Really
Better than One?" (switching heads off). Everything is reduced layer by layer while the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.flow import AttentionStep
from vitrail.components.tap import edit
from vitrail.explain.attention import by_image, watch
from vitrail.models.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class LayerHeads:
    """The heads of one layer, over a set of images; weights with signs count with their size."""

    layer: str
    """The attention module: `blocks.3.attn`."""
    distance: Tensor
    """Mean distance from a patch to the patches it attends to, in pixels, [H]; nan where no patch asks."""
    entropy: Tensor
    """Of a row of weights, over the logarithm of the number of keys, [H]; 0: one key, 1: all alike."""
    position: Tensor
    """Share of the variation of the weights that is the same in every image, 0 to 1, [H]; 1: the head looks
    at places, 0: at contents. nan for a single image or key."""
    prefix: Tensor
    """Share of attention on prefix tokens, [H]."""


@torch.no_grad()
def head_statistics(model: Encoder, batches: Iterable[Tensor]) -> list[LayerHeads]:
    """Measure all heads of all layers.

    Args:
        model: Any encoder, in evaluation mode.
        batches: Images [B, C, height, width] of one size, normalised.

    Returns:
        One entry a layer, in the order of the pass.

    Raises:
        ValueError: There are no images, or their sizes differ.
    """
    sums: dict[str, _Sums] = {}
    shape: tuple[int, int] | None = None

    def see(step: AttentionStep, weights: Tensor) -> None:
        if step.name not in sums:
            sums[step.name] = _Sums(step, weights.device)
        sums[step.name].add(by_image(step, weights).float())

    for images in batches:
        size = (images.shape[-2], images.shape[-1])
        if shape not in (None, size):
            raise ValueError(f"images of one size are needed, got {shape} and {size}")
        shape = size
        watch(model, images, model.flow(size).attentions, see)
    if not sums:
        raise ValueError("expected at least one batch of images, got none")
    return [own.result() for own in sums.values()]


class _Sums:
    """What is added up for one layer; `...` stands for Q, of windows for W, n."""

    def __init__(self, step: AttentionStep, device: torch.device) -> None:
        self.step = step
        self.distance, self.asks, self.is_patch = (own.to(device) for own in _geometry(step))
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, weights: Tensor) -> None:
        """Add images: [B, H, ..., K]."""
        sizes = weights.abs()
        shares = sizes / sizes.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        on_patches = shares * self.is_patch
        mass = on_patches.sum(dim=-1)  # [B, H, ...]
        far = (on_patches * self.distance).sum(dim=-1) / mass.clamp(min=1e-12)
        entropy = torch.special.entr(shares).sum(dim=-1) / math.log(max(weights.shape[-1], 2))
        queries = tuple(range(2, mass.ndim))
        found = {
            "far": (far * (self.asks > 1)).sum(dim=(0, *queries)),
            "entropy": (entropy * (self.asks > 0)).sum(dim=(0, *queries)),
            "prefix": ((1.0 - mass) * (self.asks > 0)).sum(dim=(0, *queries)),
            "mean": weights.sum(dim=0),
            "variation": (weights - weights.mean(dim=-1, keepdim=True)).square().sum(dim=(0, *queries, -1)),
        }
        self.images += len(weights)
        self.sums = {name: self.sums.get(name, 0.0) + own for name, own in found.items()}

    def result(self) -> LayerHeads:
        B, sums = self.images, self.sums
        mean = sums["mean"] / B  # [H, ..., K]
        common = (mean - mean.mean(dim=-1, keepdim=True)).square().flatten(1).sum(dim=1)
        whole = sums["variation"] / B
        # Of B images without anything in common, the mean still has a B-th of the variation.
        position = ((B * common / whole.clamp(min=1e-20)) - 1.0) / max(B - 1, 1)
        patches, tokens = (self.asks > 1).sum(), (self.asks > 0).sum()
        return LayerHeads(
            layer=self.step.name,
            distance=(sums["far"] / (B * patches)).cpu(),  # 0 / 0 is nan
            entropy=(sums["entropy"] / (B * tokens)).cpu(),
            position=(position.clamp(0.0, 1.0) if B > 1 else torch.full_like(position, math.nan)).cpu(),
            prefix=(sums["prefix"] / (B * tokens)).cpu(),
        )


def _geometry(step: AttentionStep) -> tuple[Tensor, Tensor, Tensor]:
    """Distances in pixels, who asks, and which keys are patches, in the shape of the weights.

    Returns:
        [..., K], 0 at prefix tokens and padding; [...], 2 for a patch, 1 for a prefix token, 0 for padding;
        [K] or [..., K], 1 for a patch, for padded keys the part that is patches.
    """
    tokens = step.tokens
    centres = tokens.cells.centres()  # [N, 2]
    if step.windows is not None:
        layout, n = step.windows, step.windows.window[0] * step.windows.window[1]
        (rows, columns), (_, wide) = layout.grid, layout.padded
        places = layout.order().unflatten(0, (-1, n))  # [W, n]
        row, column = places // wide, places % wide
        real = (row < rows) & (column < columns)
        own = centres[(row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1))]  # [W, n, 2]
        return torch.cdist(own, own), real * 2, real[:, None].expand(-1, n, -1).float()
    prefix = tokens.prefix - step.skipped
    asks = torch.cat([torch.ones(prefix), torch.full((len(centres),), 2.0)])[: 1 if step.class_only else None]
    if step.asked is not None:
        keys, before = step.asked[1].cells.centres(), 1
    else:
        keys, before = centres, prefix
    distance = torch.cdist(centres, keys)  # [N, keys]
    if step.keys is not None:  # from a patch to a key: the mean over the cells that the key stands for
        cells = torch.eye(step.keys.grid[0] * step.keys.grid[1])
        cells, before = step.keys.spread(cells), 0
        real = cells.sum(dim=1)  # less than one where a part of the key is padding
        distance = distance @ cells.T / real
    else:
        real = torch.ones(distance.shape[1])
    is_patch = F.pad(real, (before, 0))
    distance = F.pad(distance, (before, 0, prefix, 0))[: len(asks)]
    return distance, asks, is_patch


def even_distance(model: Encoder, image_shape: tuple[int, int]) -> dict[str, float]:
    """The mean distance of heads that attend to all patches within their reach alike, in pixels.

    What `LayerHeads.distance` is to be compared with: heads below it look near, heads above it far. Windows
    and reduced keys are taken into account, patterns of sparse attention are not.

    Args:
        model: Any encoder.
        image_shape: Height and width.

    Returns:
        Layer -> pixels; nan where no patch asks.
    """
    found = {}
    for step in model.flow(image_shape).attentions:
        distance, asks, is_patch = _geometry(step)
        allowed = is_patch.expand_as(distance)
        mask = None if step.windows is None else step.windows.mask()
        if mask is not None:
            allowed = allowed * (mask == 0)
        far = (distance * allowed).sum(dim=-1) / allowed.sum(dim=-1).clamp(min=1)
        found[step.name] = float(far[asks > 1].mean())
    return found


@torch.no_grad()
def head_importance(
    model: Encoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    layers: Iterable[int] | None = None,
) -> dict[str, Tensor]:
    """What is lost when one head is switched off: its part of the mixed values becomes zero.

    Args:
        model: Any encoder with a head for classes, in evaluation mode.
        batches: Images [B, C, height, width], normalised, and labels [B]; they are kept.
        layers: Numbers of the attention layers; None: all.

    Returns:
        Layer -> [H, 2]: how much accuracy falls (0 to 1; below zero: it rises), and by how much the mean
        log-probability of the right class falls.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("expected at least one batch of images, got none")
    shape = (kept[0][0].shape[2], kept[0][0].shape[3])
    steps = model.flow(shape).attentions
    chosen = steps if layers is None else [steps[layer] for layer in layers]
    whole = _quality(model, kept)
    found = {}
    for step in chosen:
        H = model.get_submodule(step.name).num_heads
        assert isinstance(H, int)
        losses = []
        for head in range(H):
            with edit(model, {f"{step.name}.mixed": _without(head, H)}):
                losses.append(whole - _quality(model, kept))
        found[step.name] = torch.stack(losses)
    return found


def _without(head: int, H: int) -> Callable[[Tensor], Tensor]:
    """Zero the part of one head in mixed values [B, Q, D], where heads lie side by side."""

    def switch_off(mixed: Tensor) -> Tensor:
        parts = mixed.unflatten(-1, (H, -1)).clone()
        parts[..., head, :] = 0.0
        return parts.flatten(-2)

    return switch_off


def _quality(model: Encoder, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Accuracy and mean log-probability of the right class, [2]."""
    sums, images = torch.zeros(2), 0
    for pixels, labels in batches:
        logits = model(pixels).float()
        right = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([right.float(), -F.cross_entropy(logits, labels, reduction="sum")]).cpu()
        images += len(labels)
    return sums / images
