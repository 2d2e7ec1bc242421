"""What the score of a class loses when parts of the image are hidden.

    B images, C channels, M ways to hide, R regions on a grid of rows x columns

Nothing is assumed about the model: it only answers, many times, so these methods are slow and can be trusted
where gradients cannot. Hidden pixels get the `baseline`; 0 is the mean colour after normalisation. Memory is
bounded by `batch_size`: so many images pass the model at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrail.explain.target import Target, baseline_of, class_scores, evaluating, scores_of
from vitrail.models.encoder import Encoder

Grid = tuple[int, int]

COARSE = 7
"""Rows, and columns, of the regions of Shapley values where none are asked for: 49 regions at most."""


@torch.no_grad()
def occlusion(
    model: Encoder,
    images: Tensor,
    target: Target = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> Tensor:
    """Occlusion (Zeiler and Fergus 2014): a window slides over the image and hides what is below it.

    A pixel's value is what the score loses, averaged over the windows that hide the pixel. The last windows
    of a row and column are cut at the image's border.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.
        window: Height and width of the window in pixels; None: a quarter of the shorter side.
        stride: Pixels from one window to the next, at most `window`; None: half the window.
        baseline: What the window shows: a number, a colour [C, 1, 1] or images.
        batch_size: Images a forward pass.

    Returns:
        [B, H, W], signed, in logits.

    Raises:
        ValueError: The model has no head; no such class; window, stride or baseline do not fit.
    """
    height, width = images.shape[2:]
    window = max(1, min(height, width) // 4) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window <= min(height, width):
        raise ValueError(
            f"expected 1 <= stride <= window <= {min(height, width)} (the shorter side), "
            f"got window {window} and stride {stride}"
        )
    rows, columns = (
        torch.arange(0, size - window + stride, stride, device=images.device) for size in (height, width)
    )
    corners = torch.cartesian_prod(rows, columns).reshape(-1, 2)
    y, x = (torch.arange(size, device=images.device) for size in (height, width))
    total = torch.zeros(len(images), height, width, device=images.device)
    times = torch.zeros(height, width, device=images.device)
    with evaluating(model):
        full, classes = class_scores(model, images, target)
        for top, left in (part.unbind(1) for part in corners.split(batch_size)):
            hidden = ((y >= top[:, None]) & (y < top[:, None] + window))[:, :, None] & (
                (x >= left[:, None]) & (x < left[:, None] + window)
            )[:, None]  # [m, H, W]
            losses = full[:, None] - scores_without(model, images, classes, hidden, baseline, batch_size)
            total += torch.einsum("bm,mhw->bhw", losses.float(), hidden.float())
            times += hidden.sum(dim=0)
    return total / times


@torch.no_grad()
def leave_one_patch_out(
    model: Encoder,
    images: Tensor,
    target: Target = None,
    *,
    removal: Literal["drop", "fill"] | None = None,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> Tensor:
    """What the score loses when one patch is missing, for each patch of the first stage.

    "drop" really leaves the token out (`keep=`), so that the model sees a smaller set of patches and no patch
    of a strange colour; where a convolutional stem or overlapping patches let neighbours see its pixels, they
    still do. "fill" paints the patch's pixels with the baseline, which any architecture takes.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.
        removal: See above; None: drop where the architecture can, else fill.
        baseline: What "fill" paints: a number, a colour [C, 1, 1] or images.
        batch_size: Images a forward pass.

    Returns:
        [B, rows, columns], signed, in logits.

    Raises:
        ValueError: The model has no head; no such class; "drop" where the architecture cannot.
    """
    grid = patch_grid_of(model, images)
    R = grid[0] * grid[1]
    with evaluating(model):
        full, classes = class_scores(model, images, target)
        if removal is None:
            removal = "drop" if _can_drop(model, images, R) else "fill"
        if removal == "fill":
            regions = region_numbers(model, images, grid)
            numbers = torch.arange(R, device=images.device)
            losses = [
                full[:, None]
                - scores_without(model, images, classes, regions == part[:, None, None], baseline, batch_size)
                for part in numbers.split(batch_size)
            ]
            return torch.cat(losses, dim=1).unflatten(1, grid)
        others = torch.arange(R - 1, device=images.device).repeat(R, 1)
        others = others + (others >= torch.arange(R, device=images.device)[:, None])  # [R, R - 1]
        scores = []
        for pairs in torch.arange(len(images) * R, device=images.device).split(batch_size):
            features = model.forward_features(images[pairs // R], keep=others[pairs % R])
            scores.append(scores_of(model, model.forward_head(features), classes[pairs // R])[0])
        return (full[:, None] - torch.cat(scores).unflatten(0, (-1, R))).unflatten(1, grid)


@dataclass(frozen=True, kw_only=True)
class ShapleyValues:
    """Estimated Shapley values, and how sure they are."""

    values: Tensor
    """[B, rows, columns], in logits; over an image they sum to `full - nothing`, up to rounding."""
    standard_errors: Tensor
    """[B, rows, columns], of `values`, from the spread over the pairs of orders."""
    full: Tensor
    """[B], score of the whole image."""
    nothing: Tensor
    """[B], score of the baseline."""


@torch.no_grad()
def shapley_values(
    model: Encoder,
    images: Tensor,
    target: Target = None,
    *,
    grid: Grid | None = None,
    pairs: int = 8,
    seed: int = 0,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> ShapleyValues:
    """Shapley values of regions by sampled orders (Castro et al. 2009, "Polynomial calculation").

    Regions appear one after another in a random order, and each is credited with what the score gains when
    it appears. The gains of one order sum to score(image) - score(baseline) whatever the order, so the
    estimate does too. Orders come in pairs, one the reverse of the other, which cancels much of the spread
    (Mitchell et al. 2022). The same orders serve all images. An image costs 2 x pairs x (R - 1) + 2 passes.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.
        grid: Rows and columns of regions; None: the patches of the first stage, at most 7 x 7 regions.
        pairs: Pairs of orders, at least 2 (the standard error needs a spread).
        seed: Of the orders.
        baseline: What stands where a region has not appeared: a number, a colour [C, 1, 1] or images.
        batch_size: Images a forward pass.

    Raises:
        ValueError: The model has no head; no such class; fewer than 2 pairs; more regions than pixels.
    """
    if pairs < 2:
        raise ValueError(f"pairs: expected at least 2, for a standard error, got {pairs}")
    if grid is None:
        rows, columns = patch_grid_of(model, images)
        grid = min(rows, COARSE), min(columns, COARSE)
    regions = region_numbers(model, images, grid)
    generator = torch.Generator().manual_seed(seed)
    R = grid[0] * grid[1]
    orders = [torch.randperm(R, generator=generator).to(images.device) for _ in range(pairs)]
    with evaluating(model):
        full, classes = class_scores(model, images, target)
        nothing, _ = class_scores(model, baseline_of(images, baseline), classes)

        def gains(order: Tensor) -> Tensor:
            return gains_in_order(model, images, classes, regions, order, full, nothing, baseline, batch_size)

        means = torch.stack([(gains(order) + gains(order.flip(0))) / 2 for order in orders])  # [pairs, B, R]
    return ShapleyValues(
        values=means.mean(dim=0).unflatten(1, grid),
        standard_errors=(means.std(dim=0) / pairs**0.5).unflatten(1, grid),
        full=full,
        nothing=nothing,
    )


def gains_in_order(
    model: Encoder,
    images: Tensor,
    classes: Tensor,
    regions: Tensor,
    order: Tensor,
    full: Tensor,
    nothing: Tensor,
    baseline: Tensor | float,
    batch_size: int,
) -> Tensor:
    """What the score gains with each region when regions appear in an order.

    Args:
        model: In evaluation mode.
        images: [B, C, H, W].
        classes: [B].
        regions: [H, W], the number of each pixel's region.
        order: [R], the numbers of the regions.
        full: [B], score of the images.
        nothing: [B], score of the baseline.
        baseline: See `baseline_of`.
        batch_size: Images a forward pass.

    Returns:
        [B, R], by the regions' numbers.
    """
    R = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(R, device=order.device)
    steps = [nothing[:, None]]
    for shown in torch.arange(1, R, device=order.device).split(batch_size):
        hidden = place[regions] >= shown[:, None, None]  # [m, H, W]
        steps.append(scores_without(model, images, classes, hidden, baseline, batch_size))
    scores = torch.cat([*steps, full[:, None]], dim=1)  # [B, R + 1]
    return scores.diff(dim=1)[:, place]


@torch.no_grad()
def scores_without(
    model: Encoder,
    images: Tensor,
    classes: Tensor,
    hidden: Tensor,
    baseline: Tensor | float,
    batch_size: int,
    *,
    probability: bool = False,
) -> Tensor:
    """Scores of images of which parts are hidden.

    Args:
        model: In evaluation mode.
        images: [B, C, H, W].
        classes: [B].
        hidden: [M, H, W], or [B, M, H, W] where it differs between images; true where hidden.
        baseline: What stands there; see `baseline_of`.
        batch_size: Images a forward pass.
        probability: The probability of the class instead of its logit.

    Returns:
        [B, M].
    """
    B, M = len(images), hidden.shape[-3]
    instead = baseline_of(images, baseline)
    scores = []
    for pairs in torch.arange(B * M, device=images.device).split(batch_size):
        image, number = pairs // M, pairs % M
        away = hidden[number] if hidden.ndim == 3 else hidden[image, number]
        logits = model(torch.where(away[:, None], instead[image], images[image]))
        if probability:
            logits = logits.float().softmax(dim=1)
        scores.append(logits.gather(1, classes[image, None])[:, 0])
    return torch.cat(scores).unflatten(0, (B, M))


def patch_grid_of(model: Encoder, images: Tensor) -> Grid:
    """Rows and columns of the patches of the first stage, for images [B, C, H, W]."""
    stride = model.stages[0].stride
    return -(-images.shape[2] // stride), -(-images.shape[3] // stride)


def region_numbers(model: Encoder, images: Tensor, grid: Grid) -> Tensor:
    """Cut images into regions of nearly equal size.

    Args:
        model: Regions end where patches of its first stage end, unless there are more regions than patches.
        images: [B, C, H, W].
        grid: Rows and columns of regions.

    Returns:
        [H, W]: the number of each pixel's region, row-major.

    Raises:
        ValueError: More regions than pixels, or none.
    """
    stride = model.stages[0].stride
    axes = []
    for size, parts in zip(images.shape[2:], grid, strict=True):
        if not 1 <= parts <= size:
            raise ValueError(
                f"expected 1 to {images.shape[2]} x {images.shape[3]} regions for these images, "
                f"got {grid[0]} x {grid[1]}"
            )
        pixels = torch.arange(size, device=images.device)
        patches = -(-size // stride)
        axes.append(pixels // stride * parts // patches if parts <= patches else pixels * parts // size)
    return axes[0][:, None] * grid[1] + axes[1]


def _can_drop(model: Encoder, images: Tensor, patches: int) -> bool:
    """Whether the architecture takes `keep=`; those that cannot drop patches refuse it."""
    everything = torch.arange(patches, device=images.device)[None]
    try:
        model.forward_features(images[:1], keep=everything)
    except ValueError:  # the only one left: the images themselves passed the model before
        return False
    return True
