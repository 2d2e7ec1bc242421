"""How much of the answer comes from each patch, through all layers: rollout and relevance.

    B images, H heads, T tokens of a branch, A one layer's attention [T, T] with its heads fused, I identity

| method | a layer | source |
|---|---|---|
| rollout | A + I, each row divided by its sum | Abnar and Zuidema 2020, section 3 |
| gradient rollout | relu(G * A) + I, divided alike; G is the gradient of the target's score | both |
| relevance | relu(G * A) + I | Chefer et al. 2021, "Generic attention", equations 5 and 6 |
| attention flow | rows of rollout as capacities of pipes | Abnar and Zuidema 2020, section 3 |

The published form multiplies T x T matrices from the first layer to the last and reads one row of the
product. Here that row is pulled back from the last layer to the first, which gives the same numbers for a
T-th of the work and keeps attention as compact as the model has it: within windows, on reduced keys. Merging
spreads a cell's share evenly over what it was merged from, and what falls on padding is lost; class-attention
and CrossViT's exchange are rows like any other. So every architecture has a rollout, and no matrix over all
tokens is ever formed.

Weights with signs (differential attention, talking heads): rows of A + I are divided by one plus the sum of
A's absolute values, and signs are kept, so that a patch may count against. Without signs that is the usual
rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.flow import AttentionStep, Flow, Footprint, MergeStep, Tokens
from vitrail.components.tap import record
from vitrail.explain.attention import Point, by_image, draw, fuse_heads, watch
from vitrail.explain.target import Target, class_scores
from vitrail.models.encoder import Encoder

Fusion = Literal["mean", "max", "min"]

_MOST_NODES = 4_000
_SCALE = 2**20  # flows are computed in whole numbers


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How much of what the head reads, or of one patch's last state, comes from each patch."""

    values: Tensor
    """[B, rows, columns] on the grid of the first layer; of two branches, on the finer grid."""
    prefix: Tensor
    """What comes from prefix tokens, [B]."""
    cells: Footprint
    """The pixels that each patch stands for."""

    def in_pixels(self) -> Tensor:
        """Every pixel with the value of its patch: [B, height, width]."""
        return self.cells.paint(self.values)


@torch.no_grad()
def attention_rollout(
    model: Encoder,
    images: Tensor,
    *,
    heads: Fusion = "mean",
    discard: float = 0.0,
    point: Point | None = None,
) -> Rollout:
    """Attention followed through all layers, with the residual connections.

    Args:
        model: Any encoder, in evaluation mode.
        images: [B, C, height, width], normalised.
        heads: How the heads of a layer become one.
        discard: Share of the smallest weights (by size) of each layer and image that count as zero, 0 to
            below 1; rows are divided by their sums after it.
        point: A pixel; where its patch of the last layer comes from, instead of what the head reads.

    Returns:
        Values and `prefix`, which sum to one where no weight is negative and no square of patches was padded.

    Raises:
        ValueError: No such share or pixel.
    """
    if not 0.0 <= discard < 1.0:
        raise ValueError(f"discard: expected 0 to below 1, got {discard}")
    flow, fused, shares = _fused(model, images, heads, discard)
    return _pull_back(flow, fused, shares, point, divide=True)


@torch.no_grad()
def attention_flow(
    model: Encoder, images: Tensor, *, heads: Fusion = "mean", point: Point | None = None
) -> Rollout:
    """The largest flow from what the head reads to each patch, through pipes as wide as rollout's rows.

    For small cases: one maximum flow is computed for each patch and image.

    Args:
        model: Any encoder without negative weights, in evaluation mode.
        images: [B, C, height, width], normalised.
        heads: How the heads of a layer become one.
        point: As in `attention_rollout`.

    Returns:
        Values 0 to 1, exact to about 1e-5; they share pipes and do not sum to one. `prefix` is zero.

    Raises:
        ValueError: Over 4,000 tokens in all layers together, negative weights, or two branches.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    flow, fused, shares = _fused(model, images, heads, discard=0.0)
    if len(flow.start) > 1:
        raise ValueError("attention flow is for one branch of tokens; take attention_rollout")
    counts = [flow.start[0].count, *(_after(step).count for step in flow.steps)]
    if sum(counts) > _MOST_NODES:
        raise ValueError(
            f"attention flow is for at most {_MOST_NODES:,} tokens in all layers together, "
            f"got {sum(counts):,}; take attention_rollout"
        )
    if any((weights < 0).any() for weights in fused.values()):
        raise ValueError("attention flow knows no negative weights; take attention_rollout")
    first = [sum(counts[:number]) for number in range(len(counts) + 1)]
    source, start = first[-1], flow.start[0]
    (reading,) = _read(flow, shares, point, next(iter(fused.values())).new_zeros(len(images)))
    values = torch.zeros(len(images), start.count - start.prefix)
    for image in range(len(images)):
        tails, heads_, widths = [], [], []
        pipes = [_rows_of(step, fused, image) for step in flow.steps] + [reading[image]]
        for number, matrix in enumerate(pipes):
            asks, asked = matrix.nonzero(as_tuple=True)
            tails.append(asks + first[number + 1])
            heads_.append(asked + first[number])
            widths.append((matrix[asks, asked] * _SCALE).round())
        links = (torch.cat(tails).numpy(), torch.cat(heads_).numpy())
        graph = coo_array((torch.cat(widths).int().numpy(), links), shape=(source + 1, source + 1)).tocsr()
        for patch in range(values.shape[1]):
            found = maximum_flow(graph, source, start.prefix + patch).flow_value
            values[image, patch] = found / _SCALE
    return Rollout(
        values=values.unflatten(1, start.grid), prefix=values.new_zeros(len(values)), cells=start.cells
    )


def gradient_rollout(
    model: Encoder, images: Tensor, target: Target = None, *, point: Point | None = None
) -> Rollout:
    """Rollout in which a weight counts as far as the target's score grows with it.

    Args:
        model: Any encoder with a head, in evaluation mode.
        images: [B, C, height, width], normalised.
        target: The class that is explained, for all images or [B]; None: the predicted one.
        point: As in `attention_rollout`.
    """
    flow, fused, shares = _weighted(model, images, target)
    return _pull_back(flow, fused, shares, point, divide=True)


def relevance(
    model: Encoder, images: Tensor, target: Target = None, *, point: Point | None = None
) -> Rollout:
    """Relevance of each patch to a class by gradients and attention (Chefer et al. 2021).

    Arguments as in `gradient_rollout`. Nothing is divided: values grow with the score's gradient and compare
    within an image, not between images.
    """
    flow, fused, shares = _weighted(model, images, target)
    return _pull_back(flow, fused, shares, point, divide=False)


def _fused(
    model: Encoder, images: Tensor, heads: Fusion, discard: float
) -> tuple[Flow, dict[str, Tensor], dict[str, Tensor]]:
    """The attention of every layer with its heads fused; and the shares of sequence pooling."""
    if heads not in get_args(Fusion):
        raise ValueError(f"heads: expected 'mean', 'max' or 'min', got {heads!r}")
    flow = model.flow((images.shape[-2], images.shape[-1]))
    fused: dict[str, Tensor] = {}

    def see(step: AttentionStep, weights: Tensor) -> None:
        fused[step.name] = _discard(fuse_heads(by_image(step, weights), heads), discard)

    with record(model, *_shares(flow)) as shares:
        watch(model, images, flow.attentions, see)
    return flow, fused, shares


def _weighted(
    model: Encoder, images: Tensor, target: Target
) -> tuple[Flow, dict[str, Tensor], dict[str, Tensor]]:
    """relu(gradient * weights), mean over the heads, of every layer; and the shares of sequence pooling."""
    flow = model.flow((images.shape[-2], images.shape[-1]))
    names = [f"{step.name}.weights" for step in flow.attentions]
    with torch.enable_grad(), record(model, *names, *_shares(flow)) as seen:
        # With a gradient to the image, frozen models have one to their weights too.
        scores, _ = class_scores(model, images.detach().requires_grad_(), target)
    gradients = torch.autograd.grad(scores.sum(), [seen[name] for name in names])
    fused = {}
    for step, name, gradient in zip(flow.attentions, names, gradients, strict=True):
        weighted = (gradient * seen[name].detach()).clamp(min=0)
        fused[step.name] = fuse_heads(by_image(step, weighted), "mean")
    return flow, fused, {name: seen[name].detach() for name in _shares(flow)}


def _pull_back(
    flow: Flow,
    fused: Mapping[str, Tensor],
    shares: Mapping[str, Tensor],
    point: Point | None,
    *,
    divide: bool,
) -> Rollout:
    """From the head back to the first layer.

    Args:
        flow: Of the model at the images' size.
        fused: Attention of each layer, [B, Q, K], of windows [B, W, n, n].
        shares: What passed the taps of sequence pooling, [B, N, 1].
        point: A pixel, or None: what the head reads.
        divide: Divide the rows of A + I by one plus the sums of A's absolute values.
    """
    some = next(iter(fused.values()))
    B = some.shape[0]
    rows = _read(flow, shares, point, some.new_zeros(B))
    lost = some.new_zeros(B)
    for step in reversed(flow.steps):
        row = rows[step.branch]
        if isinstance(step, MergeStep):
            new = slice(step.before.prefix, step.after.prefix)  # prefix tokens that join here
            lost = lost + row[:, 0, new].sum(dim=1)
            patches = step.cells.spread(row[..., step.after.prefix :])
            rows[step.branch] = torch.cat([row[..., : step.before.prefix], patches], dim=2)
            continue
        weights = fused[step.name]
        if divide:
            row = row / (1.0 + _row_sizes(step, weights))[:, None]
        rows[step.branch] = row
        for branch, drawn in draw(step, weights, row).items():
            rows[branch] = rows[branch] + drawn
    finest = max(flow.start, key=lambda tokens: tokens.count)
    values = some.new_zeros(B, finest.count - finest.prefix)
    for tokens, row in zip(flow.start, rows, strict=True):
        lost = lost + row[:, 0, : tokens.prefix].sum(dim=1)
        patches = row[:, 0, tokens.prefix :]
        if tokens is not finest:
            height, width = tokens.cells.rows[-1][1], tokens.cells.columns[-1][1]
            pixels = tokens.cells.spread(patches).unflatten(1, (height, width))
            patches = finest.cells.collect(pixels).flatten(1)
        values = values + patches
    return Rollout(values=values.unflatten(1, finest.grid), prefix=lost, cells=finest.cells)


def _read(flow: Flow, shares: Mapping[str, Tensor], point: Point | None, like: Tensor) -> list[Tensor]:
    """Which tokens of each branch's last state are followed, as shares of them: [B, 1, T] a branch."""
    last = list(flow.start)
    for step in flow.steps:
        last[step.branch] = _after(step)
    rows = [like.new_zeros(len(like), 1, tokens.count) for tokens in last]
    if point is not None:
        for tokens, row in zip(last, rows, strict=True):
            place = tokens.cells.find(*point)
            row[:, 0, tokens.prefix + place[0] * tokens.grid[1] + place[1]] = 1.0 / len(rows)
        return rows
    for head in flow.reads:
        tokens, row = last[head.branch], rows[head.branch]
        if head.prefix:
            row[:, 0, : head.prefix] += 1.0 / head.prefix / len(flow.reads)
        elif head.shares is not None:
            row[:, 0, tokens.prefix :] += shares[head.shares][:, :, 0] / len(flow.reads)
        else:
            row[:, 0, tokens.prefix :] += 1.0 / (tokens.count - tokens.prefix) / len(flow.reads)
    return rows


def _row_sizes(step: AttentionStep, weights: Tensor) -> Tensor:
    """Sum of the absolute weights of each token that asks, [B, T]; zero for the others."""
    sizes = weights.abs().sum(dim=-1)  # [B, Q] or [B, W, n]
    if step.windows is not None:
        places = step.windows.order().to(weights.device).argsort()
        rows, columns = step.windows.grid
        sizes = sizes.flatten(1)[:, places].unflatten(1, step.windows.padded)[:, :rows, :columns].flatten(1)
    return F.pad(sizes, (step.skipped, step.tokens.count - step.skipped - sizes.shape[1]))


def _after(step: AttentionStep | MergeStep) -> Tokens:
    return step.after if isinstance(step, MergeStep) else step.tokens


def _rows_of(step: AttentionStep | MergeStep, fused: Mapping[str, Tensor], image: int) -> Tensor:
    """What each token after a step draws from each before it, for one image: rows that sum to one."""
    if isinstance(step, MergeStep):
        cells = torch.eye(step.after.count - step.after.prefix)
        patches = step.cells.spread(cells)
        rows = patches.new_zeros(step.after.count, step.before.count)
        rows[: step.before.prefix, : step.before.prefix] = torch.eye(step.before.prefix)
        rows[step.after.prefix :, step.before.prefix :] = patches
        return rows
    weights = fused[step.name][image : image + 1]
    itself = torch.eye(step.tokens.count, device=weights.device)[None]
    mixed = draw(step, weights, itself)[step.branch] + itself
    return (mixed / (1.0 + _row_sizes(step, weights))[:, :, None])[0].cpu()


def _shares(flow: Flow) -> list[str]:
    return [head.shares for head in flow.reads if head.shares is not None]


def _discard(weights: Tensor, share: float) -> Tensor:
    """Set the smallest weights of each image to zero."""
    flat = weights.flatten(1)
    count = int(share * flat.shape[1])
    if not count:
        return weights
    smallest = flat.abs().topk(count, dim=1, largest=False).indices
    return flat.scatter(1, smallest, 0.0).unflatten(1, weights.shape[1:])
