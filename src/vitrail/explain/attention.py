"""Where a model looks: the attention weights it really used, as maps over the image.

    B images, H heads, P prefix tokens, N patches on a grid, T = P + N, R rows (vectors over tokens)

Attention of the class token over the patches is how Dosovitskiy et al. 2021 (figure 6) and Caron et al. 2021
(DINO, figure 1) look into a Vision Transformer. Here any layer of any architecture can be asked, for the
class token or for a patch: weights within windows are put back to their place, those of reduced keys are
spread over the cells that each key stands for. Nothing is recomputed or approximated: the weights are
recorded at the taps of the model while it answers, reduced at once, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.flow import AttentionStep, Flow, Footprint, squares
from vitrail.components.tap import edit, taps
from vitrail.models.encoder import Encoder

Heads = Literal["mean", "max", "min", "all"] | int
MapTap = Literal["weights", "weights1", "weights2"]
Point = tuple[int, int]
"""Row and column of a pixel."""


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """How much of a token's attention each patch gets, in one layer.

    Over one map values sum to what did not go to prefix tokens, so for one softmax to at most one.
    Differential attention and talking heads may have negative values and other sums.
    """

    layer: str
    """The attention module: `blocks.3.attn`."""
    values: Tensor
    """[B, rows, columns], with `heads="all"` [B, H, rows, columns]."""
    prefix: Tensor
    """What went to prefix tokens, [B] or [B, H]."""
    cells: Footprint
    """The pixels that each patch stands for."""
    asks: str
    """Whose attention it is: "class token", "mean of the patches", or "patch"."""

    def in_pixels(self) -> Tensor:
        """Every pixel with the value of its patch: [..., height, width]."""
        return self.cells.paint(self.values)


@torch.no_grad()
def attention_maps(
    model: Encoder,
    images: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: Heads = "mean",
    point: Point | None = None,
    tap: MapTap = "weights",
) -> list[AttentionMap]:
    """How much a token attends to each patch, layer by layer.

    Without a point it is the class token that asks; where none takes part (a model that classifies by the
    patches, or a layer that the class token joins later) it is the mean over all patches that ask. In
    training mode dropout and DropPath take part; call `model.eval()` first.

    Args:
        model: Any encoder.
        images: [B, C, height, width], normalised.
        layers: Numbers of `attention_layers`, negative ones from the last; None: all that fit.
        heads: "mean", "max" or "min" over the heads, "all" of them, or the number of one.
        point: A pixel; the patch there asks, instead of the class token.
        tap: "weights1" and "weights2" are the two softmax maps of differential attention.

    Returns:
        One map a layer. Where patches do not ask (class-attention), `point` leaves a layer out.

    Raises:
        ValueError: No such layer, head or pixel; a named layer in which patches do not ask; no such tap.
    """
    flow = model.flow((images.shape[-2], images.shape[-1]))
    steps = _chosen(flow, layers, asking_patches=point is not None)
    found: dict[str, AttentionMap] = {}

    def see(step: AttentionStep, weights: Tensor) -> None:
        rows, asks = _asking(flow, step, weights, point)
        drawn = draw(step, by_image(step, weights), rows)
        branch, tokens = (step.branch, step.tokens) if step.asked is None else step.asked
        patches = drawn[branch][:, :, 0, tokens.prefix :]  # [B, H, N]
        values = fuse_heads(patches, heads)
        everything = sum(of_branch[:, :, 0].sum(dim=2) for of_branch in drawn.values())  # [B, H]
        found[step.name] = AttentionMap(
            layer=step.name,
            values=values.unflatten(-1, tokens.grid),
            prefix=fuse_heads(everything - patches.sum(dim=2), heads),
            cells=tokens.cells,
            asks=asks,
        )

    watch(model, images, steps, see, tap=tap)
    return [found[step.name] for step in steps]


@dataclass(frozen=True, kw_only=True)
class PatchAttention:
    """What every patch of one layer attends to, in blocks of patches where the grid is large."""

    layer: str
    """The attention module: `blocks.3.attn`."""
    values: Tensor
    """[H, R, rows, columns]: what the R asking blocks give to each block; they ask in row-major order. Over a
    map values sum to what did not go to prefix tokens."""
    class_token: Tensor | None
    """The same for the class token, [H, rows, columns]; None where it takes no part."""
    asking: tuple[int, int]
    """Rows and columns of the blocks that ask; (0, 0) where only the class token does."""


@torch.no_grad()
def patch_attention(
    model: Encoder, image: Tensor, most: int = 16, tap: MapTap = "weights"
) -> list[PatchAttention]:
    """The attention of every patch in every layer and head, for one image.

    Grids with more than `most` rows or columns are put together in square blocks: the mean over the patches
    that ask, the sum over those that are asked.

    Args:
        model: Any encoder, in evaluation mode.
        image: [1, C, height, width], normalised.
        most: Largest number of rows and columns.
        tap: "weights1" and "weights2" are the two softmax maps of differential attention; layers that have
            none are left out.
    """
    flow = model.flow((image.shape[-2], image.shape[-1]))
    known = taps(model)
    steps = [step for step in flow.attentions if f"{step.name}.{tap}" in known]
    found: dict[str, PatchAttention] = {}

    def see(step: AttentionStep, weights: Tensor) -> None:
        tokens = step.tokens
        branch, asked = (step.branch, step.tokens) if step.asked is None else step.asked
        blocks, asked_blocks = (squares(own.grid, -(-max(own.grid) // most)) for own in (tokens, asked))
        asks = class_token_asks(flow, step)
        rows = []
        if asks:
            rows.append(F.one_hot(torch.tensor([0]), tokens.count).float())
        if not step.class_only:
            each = blocks.spread(torch.eye(blocks.grid[0] * blocks.grid[1]))
            rows.append(F.pad(each, (tokens.prefix, 0)))
        drawn = draw(step, by_image(step, weights), torch.cat(rows).to(weights))[branch][0]  # [H, R, T]
        values = asked_blocks.collect(drawn[..., asked.prefix :].unflatten(-1, asked.grid))
        found[step.name] = PatchAttention(
            layer=step.name,
            values=values[:, int(asks) :],
            class_token=values[:, 0] if asks else None,
            asking=(0, 0) if step.class_only else blocks.grid,
        )

    watch(model, image, steps, see, tap=tap)
    return [found[step.name] for step in steps]


def attention_layers(model: Encoder, image_shape: tuple[int, int] | None = None) -> list[str]:
    """Names of the attention modules in the order of the pass; each has a tap `<name>.weights`.

    Args:
        model: Any encoder.
        image_shape: Height and width; the model's own when not given.
    """
    flow = model.flow(model.config.image_shape if image_shape is None else image_shape)
    return [step.name for step in flow.attentions]


def keep_mass(values: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold a share of the map's mass (Caron et al. 2021, figure 1, has 60 %).

    Args:
        values: [..., rows, columns], not negative.
        mass: Above 0 to 1.

    Returns:
        Booleans of the same shape; true for the patches that are kept.
    """
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"mass: expected above 0 to 1, got {mass}")
    falling, order = values.flatten(-2).sort(dim=-1, descending=True)
    before = falling.cumsum(dim=-1) - falling
    kept = before < mass * falling.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, values.shape[-2:])


def watch(
    model: Encoder,
    images: Tensor,
    steps: Sequence[AttentionStep],
    see: Callable[[AttentionStep, Tensor], None],
    tap: str = "weights",
) -> None:
    """Run a model and show the weights of some of its attentions, one after the other, as they come.

    `edit` and not `record`: what is seen can be reduced and forgotten. The weights of all layers of a large
    model together would not fit.
    """

    def looking(step: AttentionStep) -> Callable[[Tensor], Tensor]:
        def look(weights: Tensor) -> Tensor:
            see(step, weights)
            return weights

        return look

    with edit(model, {f"{step.name}.{tap}": looking(step) for step in steps}):
        model(images)


def by_image(step: AttentionStep, weights: Tensor) -> Tensor:
    """What passes a tap, with the images first: [B, H, Q, K]; of windows [B, H, W, n, n]."""
    if step.windows is None:
        return weights
    rows, columns = step.windows.num_windows
    return weights.unflatten(0, (-1, rows * columns)).transpose(1, 2)


def draw(step: AttentionStep, weights: Tensor, rows: Tensor) -> dict[int, Tensor]:
    """What vectors over the asking tokens draw from each token: the product rows @ weights, on all tokens.

    Args:
        step: Whose weights they are.
        weights: [..., Q, K], of windows [..., W, n, n]; see `by_image`.
        rows: [..., R, T] over the tokens of the branch that asks; the leading dimensions broadcast.

    Returns:
        Branch -> [..., R, T] over its tokens.
    """
    first, tokens = step.skipped, step.tokens
    if step.windows is not None:
        return {step.branch: _draw_within_windows(step, weights, rows)}
    mixed = rows[..., first : first + weights.shape[-2]] @ weights  # [..., R, K]
    if step.asked is not None:
        other, theirs = step.asked
        own = F.pad(mixed[..., :1], (0, tokens.count - 1))
        return {step.branch: own, other: F.pad(mixed[..., 1:], (theirs.prefix, 0))}
    if step.keys is not None:
        mixed = step.keys.spread(mixed)
    return {step.branch: F.pad(mixed, (first, 0))}


def _draw_within_windows(step: AttentionStep, weights: Tensor, rows: Tensor) -> Tensor:
    layout = step.windows
    assert layout is not None
    (height, width), (padded_height, padded_width) = layout.grid, layout.padded
    order = layout.order().to(rows.device)
    patches = rows.unflatten(-1, layout.grid)
    patches = F.pad(patches, (0, padded_width - width, 0, padded_height - height)).flatten(-2)
    parts = patches[..., order].unflatten(-1, (-1, weights.shape[-1]))  # [..., R, W, n]
    drawn = (parts.transpose(-3, -2) @ weights).transpose(-3, -2).flatten(-2)  # [..., R, W * n]
    return drawn[..., order.argsort()].unflatten(-1, layout.padded)[..., :height, :width].flatten(-2)


def fuse_heads(values: Tensor, heads: Heads) -> Tensor:
    """One map from those of all heads: [B, H, ...] -> [B, ...], for "all" unchanged.

    Raises:
        ValueError: There is no such head.
    """
    if heads == "mean":
        return values.mean(dim=1)
    if heads == "max":
        return values.amax(dim=1)
    if heads == "min":
        return values.amin(dim=1)
    if heads == "all":
        return values
    H = values.shape[1]
    if isinstance(heads, str) or not -H <= heads < H:
        raise ValueError(f"heads: expected 'mean', 'max', 'min', 'all' or {-H} to {H - 1}, got {heads!r}")
    return values[:, heads]


def class_token_asks(flow: Flow, step: AttentionStep) -> bool:
    """Whether the class token takes part, in a model whose head reads it."""
    read = any(head.prefix for head in flow.reads if head.branch == step.branch)
    return read and step.tokens.prefix > step.skipped


def _asking(flow: Flow, step: AttentionStep, weights: Tensor, point: Point | None) -> tuple[Tensor, str]:
    """Which tokens a map is of, as shares of them, [1, T], and in words."""
    tokens = step.tokens
    shares = torch.zeros(1, tokens.count, device=weights.device, dtype=weights.dtype)
    if point is not None:
        row, column = tokens.cells.find(*point)
        shares[0, tokens.prefix + row * tokens.grid[1] + column] = 1.0
        return shares, "patch"
    if class_token_asks(flow, step):
        shares[0, 0] = 1.0
        return shares, "class token"
    shares[0, tokens.prefix :] = 1 / (tokens.count - tokens.prefix)
    return shares, "mean of the patches"


def _chosen(flow: Flow, layers: Sequence[int] | None, asking_patches: bool) -> list[AttentionStep]:
    steps = flow.attentions
    if layers is None:
        return [step for step in steps if not (asking_patches and step.class_only)]
    for layer in layers:
        if not -len(steps) <= layer < len(steps):
            raise ValueError(f"no layer {layer}: expected {-len(steps)} to {len(steps) - 1}")
        if asking_patches and steps[layer].class_only:
            raise ValueError(f"in layer {layer} ({steps[layer].name}) only the class token asks: no point")
    return [steps[layer] for layer in layers]
