"""Whether a map shows what the model really uses: tests that any map has to pass, whoever made it.

    B images, M cells on a grid, S steps of a curve

- `deletion` and `insertion` (Petsiuk et al. 2018, RISE, section 3.3): hide the cells that a map calls most
  important first, or show only them, and watch the probability of the class.
- `curves`: both, for the maps of several methods.
- `randomisation` (Adebayo et al. 2018, "Sanity checks for saliency maps"): a map that stays the same when the
  weights are lost explains the image, not the model.
- `agreement`: rank correlations between maps of different methods.
- `trust`: all of it for one model and its images, best method first.

What differs from RISE: cells are the patches of the first stage unless `cells` says otherwise, because
single pixels taken from many patches are an attack rather than a question; and beside each curve stands that
of random orders *over the same cells*. Only the difference says something about the map: the area itself
depends on model, image, baseline and size of the cells.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.explain.perturbation import Grid, patch_grid_of, region_numbers, scores_without
from vitrail.explain.target import Target, class_scores, evaluating
from vitrail.models.encoder import Encoder

Method = Callable[[Encoder, Tensor, Target], Tensor]
"""model, images [B, C, H, W], target -> maps [B, rows, columns]."""

INSANE = 0.5
"""A map whose rank correlation with that of a model without its weights is larger says little about them."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Probability of the class while cells are hidden or shown in the order of a map."""

    kind: Literal["deletion", "insertion"]
    shares: Tensor
    """[S + 1], share of the cells that is hidden (deletion) or shown (insertion), 0 to 1."""
    probabilities: Tensor
    """[B, S + 1], in the order of the map."""
    random: Tensor
    """[B, S + 1], mean over random orders."""

    @property
    def area(self) -> Tensor:
        """[B], area under the curve, 0 to 1: small is good for deletion, large for insertion."""
        return torch.trapezoid(self.probabilities, self.shares)

    @property
    def random_area(self) -> Tensor:
        """[B], area under the curve of random orders."""
        return torch.trapezoid(self.random, self.shares)

    @property
    def gain(self) -> Tensor:
        """[B], how much better than random, in area: 0 is chance, negative is worse."""
        better = self.area - self.random_area
        return better if self.kind == "insertion" else -better


def deletion(
    model: Encoder,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    cells: Grid | None = None,
    steps: int = 32,
    random_orders: int = 8,
    seed: int = 0,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> Curve:
    """Hide the cells of highest value first. A faithful map makes the probability fall at once.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        maps: [B, rows, columns] at any resolution; equal values are taken in random order.
        target: The class that the maps explain; None: the one that the model predicts.
        cells: Rows and columns of what is hidden at a time; None: the patches of the first stage; (H, W): the
            pixels, as in RISE.
        steps: Points of the curve after the first, at most one a cell.
        random_orders: How many random orders the curve beside is the mean of.
        seed: Of the random orders.
        baseline: What hidden cells show: a number, a colour [C, 1, 1] or images. RISE takes 0 here and for
            insertion the blurred images.
        batch_size: Images a forward pass.

    Raises:
        ValueError: The model has no head; no such class; maps or cells do not fit the images.
    """
    options = _Hiding("deletion", cells, steps, random_orders, seed, baseline, batch_size)
    return options.curve(model, images, maps, target)


def insertion(
    model: Encoder,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    cells: Grid | None = None,
    steps: int = 32,
    random_orders: int = 8,
    seed: int = 0,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> Curve:
    """Show the cells of highest value first, on the baseline.

    A faithful map makes the probability rise at once.

    Arguments and errors as in `deletion`.
    """
    options = _Hiding("insertion", cells, steps, random_orders, seed, baseline, batch_size)
    return options.curve(model, images, maps, target)


def curves(
    model: Encoder,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Target = None,
    *,
    cells: Grid | None = None,
    steps: int = 32,
    random_orders: int = 8,
    seed: int = 0,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> dict[str, tuple[Curve, Curve]]:
    """Deletion and insertion of several maps of the same answers; random orders are followed only once.

    Args:
        maps: Name -> maps [B, rows, columns]. Other arguments and errors as in `deletion`.

    Returns:
        Name -> the curves of deletion and insertion, as `deletion` and `insertion` give them.
    """
    hidings = [
        _Hiding(kind, cells, steps, random_orders, seed, baseline, batch_size)
        for kind in ("deletion", "insertion")
    ]
    hiding, showing = hidings
    found: dict[str, tuple[Curve, Curve]] = {}
    random: Tensor | None = None
    for name, own in maps.items():
        hidden = hiding.curve(model, images, own, target, random)
        random = hidden.random
        # What insertion shows first in its random orders, deletion hides last in its own: the same images.
        found[name] = hidden, showing.curve(model, images, own, target, random.flip(1))
    return found


@dataclass(frozen=True)
class _Hiding:
    """How cells are hidden: the options that `deletion`, `insertion` and `curves` share."""

    kind: Literal["deletion", "insertion"]
    cells: Grid | None
    steps: int
    random_orders: int
    seed: int
    baseline: Tensor | float
    batch_size: int

    def curve(
        self, model: Encoder, images: Tensor, maps: Tensor, target: Target, random: Tensor | None = None
    ) -> Curve:
        """The curve of some maps [B, rows, columns], and that of random orders beside, where not known."""
        grid = patch_grid_of(model, images) if self.cells is None else self.cells
        regions = region_numbers(model, images, grid)
        M = grid[0] * grid[1]
        values = cell_means(model, maps, regions, M)
        if len(values) != len(images):
            raise ValueError(f"maps: expected one for each of {len(images)} images, got {len(values)}")
        generator = torch.Generator().manual_seed(self.seed)
        orders = torch.stack([torch.randperm(M, generator=generator) for _ in range(self.random_orders + 1)])
        orders = orders.to(images.device)
        ties, random_orders = orders[0], orders[1:]
        if self.kind == "insertion":
            random_orders = random_orders.flip(1)
        # Stable, from a random order: a map with many zeros shall not begin with them at the top left.
        ranked = ties[values[:, ties].argsort(dim=1, descending=True, stable=True)]  # [B, M]
        with evaluating(model), torch.no_grad():
            _, classes = class_scores(model, images, target)
            found = self.follow(model, images, classes, regions, ranked)
            if random is None:
                random_orders = random_orders[:, None].expand(-1, len(images), -1)
                each = [self.follow(model, images, classes, regions, order) for order in random_orders]
                random = torch.stack(each).mean(dim=0)
        return Curve(
            kind=self.kind,
            shares=self.counts(M).to(images) / M,
            probabilities=found,
            random=random,
        )

    def counts(self, cells: int) -> Tensor:
        """How many cells are hidden, or shown, at each point: [S + 1], 0 to all."""
        counts = torch.linspace(0, cells, min(self.steps, cells) + 1).round().long()
        return counts if self.kind == "deletion" else cells - counts.flip(0)

    def follow(
        self, model: Encoder, images: Tensor, classes: Tensor, regions: Tensor, order: Tensor
    ) -> Tensor:
        """Probabilities [B, S + 1] while cells go, or come, in an order [B, M]."""
        M = order.shape[1]
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(M, device=order.device).expand_as(order)
        )
        place = place[:, regions]  # [B, H, W]: when the pixel's turn is
        found = []
        for counts in self.counts(M).to(order.device).split(self.batch_size):
            first = place[:, None] < counts[:, None, None]  # [B, s, H, W]
            hidden = first if self.kind == "deletion" else ~first
            found.append(
                scores_without(
                    model, images, classes, hidden, self.baseline, self.batch_size, probability=True
                )
            )
        return torch.cat(found, dim=1)


def cell_means(model: Encoder, maps: Tensor, regions: Tensor, cells: int) -> Tensor:
    """The mean of a map over each cell of an image.

    A coarser map is interpolated. Where the image does not fill the map's last row or column (patches at the
    border are padded), what lies beyond the image is left out.

    Args:
        model: The one whose maps they are: a map with as many rows as one of its stages has that stage's
            stride, others divide the image evenly.
        maps: [B, rows, columns].
        regions: [H, W], the number of each pixel's cell.
        cells: How many there are.

    Returns:
        [B, cells].

    Raises:
        ValueError: The maps have more rows or columns than the image has pixels, or are no maps.
    """
    height, width = regions.shape
    if maps.ndim != 3 or maps.shape[1] > height or maps.shape[2] > width:
        raise ValueError(
            f"maps: expected [B, rows, columns], at most {height} x {width}, got {list(maps.shape)}"
        )
    strides = [stage.stride for stage in model.stages]
    rows, columns = maps.shape[1:]
    whole = [
        count * next((stride for stride in strides if -(-size // stride) == count), -(-size // count))
        for size, count in ((height, rows), (width, columns))
    ]
    # Nearest where the map is at least as fine as the cells: equal grids keep their values.
    coarse = rows * columns < cells
    pixels = F.interpolate(maps.float()[:, None], size=whole, mode="bilinear" if coarse else "nearest-exact")
    pixels = pixels[:, 0, :height, :width].flatten(1)  # [B, H * W]
    sums = pixels.new_zeros(len(maps), cells).index_add_(1, regions.flatten(), pixels)
    return sums / regions.flatten().bincount(minlength=cells)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of maps [B, rows, columns] of the same shape: [B], -1 to 1.

    Equal values share their mean rank. NaN where a map is the same everywhere: it has no order.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected maps of one shape, got {list(first.shape)} and {list(second.shape)}")
    ranks = [rankdata(maps.detach().flatten(1).cpu().double().numpy(), axis=1) for maps in (first, second)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))


def agreement(maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Rank correlations between the maps of different methods, mean over the images.

    Args:
        maps: Name -> [B, rows, columns], signed as the methods give them. Finer maps are averaged down to the
            fewest rows and columns among them (all are taken to cover the same area, so padding at the border
            shifts them a little against each other).

    Returns:
        Name -> name -> -1 to 1; NaN where a map of every image is the same everywhere.
    """
    rows, columns = (min(found.shape[axis] for found in maps.values()) for axis in (1, 2))
    coarse = {name: F.adaptive_avg_pool2d(found.float(), (rows, columns)) for name, found in maps.items()}
    return {
        name: {other: float(rank_correlation(first, second).nanmean()) for other, second in coarse.items()}
        for name, first in coarse.items()
    }


def randomisation(
    model: Encoder, images: Tensor, method: Method, target: Target = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Lose the weights from the head downwards, and see whether the map changes (Adebayo et al. 2018).

    The entries of each parameter are shuffled: what was learnt is gone, their distribution stays, so that the
    activations keep their size (fresh weights would not do: LayerScale and the norms of Swin V2 start with
    branches that add nothing). A copy of the model is shuffled; the model itself stays as it is.

    Args:
        model: A model with a head.
        images: [B, C, H, W], normalised.
        method: Gives the maps.
        target: The class that is explained, in all steps; None: the one that the intact model predicts.
        seed: Of the shuffling.

    Returns:
        What was lost last ("head", "norm", the blocks from the last to the first, "embedding") -> rank
        correlation [B] of the map with the intact model's. Sound methods approach 0; NaN where a map has the
        same value everywhere.
    """
    classes = _predicted(model, images, target)
    intact = method(model, images, classes)
    found = {}
    for part, shuffled in _losing_weights(model, seed):
        found[part] = rank_correlation(intact, method(shuffled, images, classes))
    return found


@torch.no_grad()
def _predicted(model: Encoder, images: Tensor, target: Target) -> Tensor:
    with evaluating(model):
        return class_scores(model, images, target)[1]


def _losing_weights(model: Encoder, seed: int) -> Iterator[tuple[str, Encoder]]:
    """A copy of a model that loses one part after the other, yielded after each."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    blocks = model.block_names()
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in ("head", "norm", *blocks[::-1], "embedding")}
    for name, parameter in shuffled.named_parameters():
        layer = model.layer_of(name)
        if name.startswith(model.head_names):
            parts["head"].append(parameter)
        elif layer > len(blocks):
            parts["norm"].append(parameter)
        else:
            parts[blocks[layer - 1] if layer else "embedding"].append(parameter)
    for part, parameters in parts.items():
        if not parameters:
            continue
        with torch.no_grad():
            for parameter in parameters:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
        yield part, shuffled


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How far the maps of one method can be trusted; means over the images."""

    method: str
    deletion: float
    """Gain over random orders, in area; see `Curve.gain`."""
    insertion: float
    """The same for insertion."""
    without_weights: float
    """Rank correlation with the map of the model whose weights are shuffled; near 0 is good."""
    agreement: float
    """Mean rank correlation with the other methods; NaN where there is no other."""
    seconds: float
    """For the maps of all images."""

    @property
    def faithful(self) -> float:
        """Mean gain of deletion and insertion: methods are ranked by it."""
        return (self.deletion + self.insertion) / 2

    @property
    def sane(self) -> bool:
        """Whether the map follows the weights (`INSANE`)."""
        return not abs(self.without_weights) > INSANE


def trust(
    model: Encoder,
    images: Tensor,
    methods: Mapping[str, Method],
    target: Target = None,
    *,
    cells: Grid | None = None,
    steps: int = 32,
    random_orders: int = 8,
    seed: int = 0,
    baseline: Tensor | float = 0.0,
    batch_size: int = 64,
) -> list[Trust]:
    """Which method to believe, for this model and these images.

    Each method explains the model twice: as it is, and without its weights (the last step of
    `randomisation`). Other arguments and errors as in `deletion`.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised; 16 and more make the ranks steady.
        methods: Name -> method.
        target: The class that is explained; None: the one that the model predicts.

    Returns:
        The most faithful first; methods that do not follow the weights come after all that do.
    """
    classes = _predicted(model, images, target)
    *_, (_, without_weights) = _losing_weights(model, seed)
    maps: dict[str, Tensor] = {}
    measured: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        start = time.perf_counter()
        maps[name] = method(model, images, classes)
        measured[name] = {"seconds": time.perf_counter() - start}
        lost = method(without_weights, images, classes)
        measured[name]["without_weights"] = float(rank_correlation(maps[name], lost).nanmean())
    followed = curves(
        model,
        images,
        maps,
        classes,
        cells=cells,
        steps=steps,
        random_orders=random_orders,
        seed=seed,
        baseline=baseline,
        batch_size=batch_size,
    )
    for name, both in followed.items():
        measured[name] |= {curve.kind: float(curve.gain.mean()) for curve in both}
    correlations = agreement(maps)
    rows = []
    for name, values in measured.items():
        others = [
            correlation
            for other, correlation in correlations[name].items()
            if other != name and not math.isnan(correlation)
        ]
        rows.append(Trust(method=name, agreement=float(np.mean(others)) if others else math.nan, **values))
    return sorted(rows, key=lambda row: (row.sane, row.faithful), reverse=True)
