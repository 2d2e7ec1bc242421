"""The pictures of `vitrail analyze`; every function returns a matplotlib figure.

Classes have a colour and a marker each, and their names stand at their places, so that nobody needs to tell
colours apart; the colours follow Paul Tol's "muted" scheme, made for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from torch.nn import functional as F

from vitrail.explain.draw import AMBER, BLUE, FAINT, INK, RED, RULE, WIDTH, image_grid, label, styled
from vitrail.explain.embedding import Embedding
from vitrail.explain.positions import Positions
from vitrail.reporting.analysis import Analysis, Comparison, Head

COLOURS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#882255",
    "#ddaa33",
    "#44aa99",
    "#aa4499",
    "#777733",
    "#555555",
)
MARKERS = "osD^vPX"
NAMED_CLASSES = 20
"""Of more classes the others are drawn in grey, without names."""
NUMBERED_CELLS = 64
"""Matrices with more cells show colours only."""
THUMBNAILS, THUMBNAIL_PIXELS = 18, 40
"""Thumbnails along the longer side of the map, and the size of each."""
HALO: list[AbstractPathEffect] = [withStroke(linewidth=2.8, foreground="white")]


@styled
def plane(embedding: Embedding, classes: Sequence[str]) -> Figure:
    """Features of the images as points, with the names of the classes at their middles."""
    points = embedding.points
    size = np.ptp(points, axis=0)
    # One scale for both directions, or distances would lie.
    figure = Figure(figsize=(WIDTH, WIDTH * float(np.clip(size[1] / max(size[0], 1e-12), 0.5, 1.0))))
    axes = _bare(figure)
    axes.set_aspect("equal", adjustable="datalim")
    present, counts = np.unique(embedding.labels, return_counts=True)
    named = np.sort(present[np.argsort(-counts, kind="stable")][:NAMED_CLASSES])
    rest = ~np.isin(embedding.labels, named)
    axes.scatter(points[rest, 0], points[rest, 1], s=7, color=RULE, linewidths=0)
    dot = 16 if len(points) <= 1500 else 7
    for place, number in enumerate(named):
        own = points[embedding.labels == number]
        colour, marker = _look(place)
        axes.scatter(own[:, 0], own[:, 1], s=dot, color=colour, marker=marker, alpha=0.75, linewidths=0)
    middles = np.stack([np.median(points[embedding.labels == number], axis=0) for number in named])
    for place, (x, y) in enumerate(spread_names(middles, size)):
        name = label(classes[named[place]], 14)
        text = axes.text(x, y, name, ha="center", va="center", fontsize=9.5, fontweight="bold")
        text.set_path_effects(HALO)
    return figure


@styled
def mosaic(found: Analysis) -> Figure:
    """The same map with the images themselves: in each cell the one nearest to its middle."""
    points = found.tsne.points
    low, high = points.min(axis=0), points.max(axis=0)
    cell = float((high - low).max()) / THUMBNAILS
    columns, rows = (int(size) for size in np.maximum(np.ceil((high - low) / cell), 1))
    places = np.minimum((points - low) / cell, [columns - 1e-3, rows - 1e-3])
    off = np.abs(places % 1 - 0.5).max(axis=1)
    side = THUMBNAIL_PIXELS
    beside = max(rows - columns, 0) // 2  # a map that is higher than wide stands in the middle of a square
    canvas = np.full((rows * side, (columns + 2 * beside) * side, 3), 255, dtype=np.uint8)
    small = _thumbnails(found.pixels, side - 2)
    taken: set[tuple[int, int]] = set()
    for number in np.argsort(off, kind="stable").tolist():
        column, row = int(places[number, 0]), rows - 1 - int(places[number, 1])  # the vertical axis points up
        if (row, column) in taken:
            continue
        taken.add((row, column))
        top, left = row * side + 1, (column + beside) * side + 1
        canvas[top : top + side - 2, left : left + side - 2] = small[number]
    figure = Figure(figsize=(WIDTH, WIDTH * canvas.shape[0] / canvas.shape[1]))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    return figure


@styled
def depth(found: Analysis) -> Figure:
    """Accuracy by layer: of the neighbours, of the class token's neighbours, of the model's own head."""
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.add_subplot()
    numbers = np.arange(1, len(found.layers) + 1)
    axes.axhline(found.chance, color=FAINT, linestyle=(0, (4, 3)), linewidth=1, label="chance")
    axes.axhline(found.pixel_knn, color=FAINT, linestyle=(0, (1, 2)), label="neighbours, pixels")
    axes.plot(
        numbers, [own.patches for own in found.layers], "o-", color=BLUE, label="neighbours, mean of patches"
    )
    token = [np.nan if own.token is None else own.token for own in found.layers]
    if not np.isnan(token).all():
        axes.plot(numbers, token, "s-", color=RED, label="neighbours, class token")
    lens = [np.nan if own.lens is None else own.lens for own in found.layers]
    if not np.isnan(lens).all():
        axes.plot(numbers, lens, "D-", color=AMBER, label="the model's own head")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0.7, len(found.layers) + 0.3)
    _layers_below(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def layer_matrix(values: Tensor, down: str, across: str) -> Figure:
    """CKA between layers, [L, M]; the first layer stands below on the left."""
    rows, columns = values.shape
    figure = Figure(figsize=(WIDTH, min(max(0.5 * rows + 0.9, 1.9), 4.4)))
    figure.set_layout_engine("compressed")  # keeps the scale beside a matrix narrower than the figure
    axes = figure.add_subplot()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    picture = axes.imshow(
        values.numpy(), cmap="viridis", vmin=0, vmax=1, origin="lower", interpolation="nearest"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        axis.set_major_formatter(lambda place, _: f"{place + 1:.0f}")
    axes.tick_params(length=0)
    if rows * columns <= NUMBERED_CELLS:
        for (row, column), value in np.ndenumerate(values.numpy()):
            colour = "white" if value < 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_ylabel(down)
    axes.set_xlabel(across)
    bar = figure.colorbar(picture, ax=axes, label="CKA", shrink=0.8, aspect=30)
    bar.outline.set_visible(False)
    return figure


@styled
def head_distances(found: Analysis) -> Figure:
    """Mean attention distance of every head, layer by layer, beside that of even attention."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_subplot()
    heads = [own for own in found.heads if np.isfinite(own.distance)]
    within = _spread(heads)
    layers = sorted({(own.layer, own.module) for own in heads})
    axes.add_collection(
        LineCollection(
            [[(at + 0.62, found.even[name]), (at + 1.38, found.even[name])] for at, name in layers],
            colors=FAINT,
            linestyles=(0, (3, 2)),
            linewidths=1.2,
            label="attention to all alike",
        )
    )
    dots = axes.scatter(
        [own.layer + 1 + shift for own, shift in zip(heads, within, strict=True)],
        [own.distance for own in heads],
        s=44 if len(heads) <= 48 else 18,
        facecolors=BLUE,
        edgecolors=INK,
        linewidths=0.6,
        label="a head",
        zorder=3,
    )
    lost = [own.lost_log_probability for own in heads if own.lost_log_probability is not None]
    if lost:
        dots.set_array(np.maximum(lost, 0.0))
        dots.set(cmap="YlGnBu", clim=(0.0, max(*lost, 1e-3)))
        bar = figure.colorbar(dots, ax=axes, label="loss without the head (nats)", shrink=0.9, aspect=30)
        bar.outline.set_visible(False)
    axes.set_xlim(0.5, 1.5 + max(own.layer for own in found.heads))
    top = max([own.distance for own in heads] + [found.even[name] for _, name in layers], default=1.0)
    axes.set_ylim(0, 1.08 * top)
    _layers_below(axes)
    axes.set_ylabel("mean attention distance (pixels)")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def head_matrices(found: Analysis) -> Figure:
    """A cell for each head: how sharply it looks, whether by place, and what is lost without it."""
    depth_, most = 1 + max(own.layer for own in found.heads), 1 + max(own.number for own in found.heads)
    panels = [
        ("Entropy", [own.entropy for own in found.heads], "viridis", (0.0, 1.0)),
        ("By place, not content", [own.position for own in found.heads], "viridis", (0.0, 1.0)),
    ]
    lost = [own.lost_accuracy for own in found.heads if own.lost_accuracy is not None]
    if lost:
        points = [100 * value for value in lost]
        top = float(np.ceil(max(map(abs, points))) or 1.0)
        panels.append(("Points lost without it", points, "RdBu_r", (-top, top)))
    figure = Figure(figsize=(WIDTH, min(max(0.24 * depth_ + 1.0, 1.9), 6.0)))
    for number, (axes, (title, values, colours, (low, high))) in enumerate(
        zip(figure.subplots(1, len(panels)), panels, strict=True)
    ):
        cells = np.full((depth_, most), np.nan)
        for own, value in zip(found.heads, values, strict=True):
            cells[own.layer, own.number] = value
        picture = axes.imshow(
            cells, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="nearest"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title)
        axes.set_xlabel("head")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            axis.set_major_formatter(lambda place, _: f"{place + 1:.0f}")
        if number == 0:
            axes.set_ylabel("layer")
        else:
            axes.set_yticklabels([])
        bar = figure.colorbar(
            picture, ax=axes, location="bottom", aspect=18, ticks=(low, (low + high) / 2, high)
        )
        bar.outline.set_visible(False)
    return figure


@styled
def position_plane(positions: Positions) -> Figure:
    """The places in the plane in which their vectors vary most, neighbours joined by lines."""
    coordinates, shares = positions.principal_components()
    places = coordinates.cpu().numpy()
    rows, columns = positions.grid
    figure = Figure(figsize=(WIDTH, WIDTH * 0.8))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    down = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, rows))
    for row in range(rows):
        axes.plot(*places[row].T, color=down[row], linewidth=0.8, alpha=0.7)
    for column in range(columns):
        axes.plot(*places[:, column].T, color=RULE, linewidth=0.8, zorder=1)
    dots = axes.scatter(
        places[..., 0].ravel(),
        places[..., 1].ravel(),
        c=np.repeat(np.arange(1, rows + 1), columns),
        cmap="viridis",
        s=16,
        vmax=rows / 0.9,
    )
    axes.set_xlabel(f"first direction ({100 * float(shares[0]):.0f} % of the variance)")
    axes.set_ylabel(f"second ({100 * float(shares[1]):.0f} %)")
    bar = figure.colorbar(
        dots, ax=axes, label="row of the patch", shrink=0.8, aspect=30, boundaries=np.arange(rows + 1) + 0.5
    )
    bar.locator = MaxNLocator(8, integer=True)
    bar.update_ticks()
    bar.outline.set_visible(False)
    return figure


def colours(found: Analysis) -> Figure:
    """Some images, and their patches' features as colours, layer by layer."""
    height, width = found.pixels.shape[2:]
    tiles, captions = [], []
    for image in range(len(next(iter(found.colours.values())))):
        tiles.append(_rgb(found.pixels[image]))
        captions.append(label(found.classes[found.labels[image]], 12))
        for layer, own in found.colours.items():
            patches = (own[image].permute(2, 0, 1) * 255).round()
            tiles.append(
                F.interpolate(patches[None], (height, width), mode="nearest-exact")[0].to(torch.uint8)
            )
            captions.append(f"layer {layer + 1}")
    return image_grid(torch.stack(tiles), captions, columns=1 + len(found.colours))


@styled
def nearest(found: Analysis) -> Figure:
    """A row for each patch that was looked for: its image, then those with the nearest patches."""
    tiles, captions, tints, marks = [], [], [], []
    for query in found.queries:
        truth = found.labels[query.image]
        shown = [(query.image, query.row, query.column, "")]
        shown += [(own.image, own.row, own.column, f"\n{own.similarity:.2f}") for own in query.matches]
        for image, row, column, more in shown:
            tiles.append(_rgb(found.pixels[image]))
            captions.append(label(found.classes[found.labels[image]], 11) + (more or "\nlooked for"))
            tints.append(INK if found.labels[image] == truth else RED)
            marks.append((row, column))
    columns = 1 + len(found.queries[0].matches)
    figure = image_grid(torch.stack(tiles), captions, columns=columns, colours=tints)
    (axes,) = figure.axes
    for picture, (row, column) in zip(axes.images, marks, strict=True):
        left, right, bottom, top = picture.get_extent()
        wide, high = (right - left) / found.grid[1], (bottom - top) / found.grid[0]
        corner = (left + column * wide, top + row * high)
        for colour, thickness in (("black", 1.8), ("white", 0.8)):
            axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=thickness))
    return figure


@styled
def depths(found: Comparison) -> Figure:
    """k-NN accuracy of two models against the share of their depth."""
    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.add_subplot()
    for own, colour, marker in ((found.first, BLUE, "o"), (found.second, RED, "s")):
        at = np.arange(1, len(own.layers) + 1) / len(own.layers)
        known = [layer.read for layer in own.layers]
        axes.plot(at, known, marker=marker, color=colour, label=label(own.title, 30))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the layers passed")
    axes.set_ylabel("neighbours of the own class")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _bare(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return axes


def _look(place: int) -> tuple[str, str]:
    """Colour and marker of a class; both together occur once among 70."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def spread_names(middles: npt.NDArray[np.float32], size: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Places of names, [K, 2], moved up and down until none lies on another."""
    places = middles.astype(np.float64)
    wide, high = 0.16 * size[0], 0.042 * size[1]
    for _ in range(200):
        moved = False
        for first in range(len(places)):
            for second in range(first):
                across, up = places[first] - places[second]
                if abs(across) < wide and abs(up) < high:
                    push = (high - abs(up)) / 2 + 1e-6 * high
                    places[first, 1] += push if up >= 0 else -push
                    places[second, 1] -= push if up >= 0 else -push
                    moved = True
        if not moved:
            break
    return places


def _thumbnails(pixels: Tensor, side: int) -> npt.NDArray[np.uint8]:
    """uint8 [N, C, H, W] -> [N, side, side, 3]."""
    small = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
    small = small.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    found: npt.NDArray[np.uint8] = small.permute(0, 2, 3, 1).numpy()
    return found


def _rgb(image: Tensor) -> Tensor:
    """uint8 [C, H, W], grey or in colours -> [3, H, W]."""
    return image.expand(3, -1, -1)


def _layers_below(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")


def _spread(heads: Sequence[Head]) -> list[float]:
    """How far beside the middle of its layer each head stands, in the order of their numbers."""
    most = 1 + max((own.number for own in heads), default=0)
    return [0.0 if most == 1 else 0.5 * (own.number / (most - 1) - 0.5) for own in heads]
