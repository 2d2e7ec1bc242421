"""Pictures of images and maps, in one style; every function returns a matplotlib figure.

Figures are objects, nothing passes through pyplot, so drawing needs no display and leaves no state. All are
`WIDTH` inches wide: shown at half a desktop page or on the whole of a telephone, their text stays legible.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from math import ceil
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

WIDTH = 5.6
DPI = 200

INK, FAINT, RULE = "#1f2328", "#6b7280", "#d4d7dc"
BLUE, LIGHT_BLUE, RED, AMBER = "#2f5d9b", "#8fb0d8", "#b8352a", "#c98a16"

styled = matplotlib.rc_context(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures are the same everywhere
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.labelsize": 9,
        "axes.labelcolor": FAINT,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#eceef1",
        "grid.linewidth": 0.8,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": FAINT,
        "ytick.labelcolor": FAINT,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": INK,
        "text.color": INK,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "auto",
        "figure.constrained_layout.use": True,
    }
)
"""Decorator (and context) in which every figure of the project is drawn."""


def label(text: object, length: int = 18) -> str:
    """A name from outside as text for a picture: one line, at most `length` characters, no mathematics."""
    line = " ".join(str(text).split())
    short = line if len(line) <= length else line[: length - 1] + "…"
    return short.replace("$", r"\$")  # a pair of dollars would start a formula


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file, with `DPI` dots an inch."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; that is no reason to stop a run.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


@styled
def image_grid(
    images: Tensor,
    captions: Sequence[str],
    *,
    columns: int,
    colours: Sequence[str] | None = None,
    heat: Sequence[Tensor | None] | None = None,
) -> Figure:
    """Images in rows of `columns`, each with its caption above, and a heat map over it where one is given.

    A heat map is stretched over its image patch by patch, without smoothing, and scaled to its own maximum;
    the image below turns grey.

    Args:
        images: uint8 [N, C, H, W], C is 1 or 3.
        captions: N texts; pass names from outside through `label`.
        columns: Images a row.
        colours: N colours of the captions.
        heat: N maps [rows, columns] of non-negative numbers, None where an image has none.
    """
    lines = 1 + max(caption.count("\n") for caption in captions)
    side, gap, above = WIDTH / columns, 0.07, 0.15 * lines + 0.14  # all in inches
    width = side - gap
    height = width * images.shape[2] / images.shape[3]
    figure = Figure(figsize=(WIDTH, ceil(len(images) / columns) * (above + height) + gap))
    figure.set_layout_engine("none")
    # One pair of axes with inches as its unit: one pair an image takes seconds to lay out.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    axes.set_axis_off()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = number % columns * side + gap / 2
        top = number // columns * (above + height) + above
        own_heat = None if heat is None else heat[number]
        _draw_image(axes, image, own_heat, extent=(left, left + width, top + height, top))
        axes.text(
            left + width / 2,
            top - 0.05,
            caption,
            ha="center",
            va="bottom",
            fontsize=8,
            linespacing=1.2,
            color=INK if colours is None else colours[number],
        )
    return figure


@styled
def explanation_figure(image: Tensor, values: Tensor, *, signed: bool) -> Figure:
    """An image, and the same in grey below a map, with the scale of the map.

    Args:
        image: uint8 [C, H, W].
        values: [rows, columns], of patches or pixels; shown without smoothing.
        signed: Values below zero count against: blue against, red for. Else from zero up.
    """
    height = 0.46 * WIDTH * min(max(image.shape[1] / image.shape[2], 0.4), 2.0)
    figure = Figure(figsize=(WIDTH, height + 0.25))
    left, right = figure.subplots(1, 2)
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
    left.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
    right.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    numbers = values.float().numpy()
    top = max(float(np.abs(numbers).max() if signed else numbers.max()), 1e-12)
    picture = right.imshow(
        numbers,
        cmap="RdBu_r" if signed else "inferno",
        vmin=-top if signed else 0.0,
        vmax=top,
        alpha=0.65,
        interpolation="nearest",
        extent=(-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5),
    )
    for axes in (left, right):
        axes.set_axis_off()
    # Without the map's transparency, so that colours are those of the legend on white ground.
    scale = ScalarMappable(picture.norm, picture.cmap)
    bar = figure.colorbar(scale, ax=right, shrink=0.85, aspect=25, pad=0.03, ticks=MaxNLocator(4))
    bar.outline.set_visible(False)
    return figure


def _draw_image(
    axes: Axes, image: Tensor, heat: Tensor | None, extent: tuple[float, float, float, float]
) -> None:
    pixels = image.permute(1, 2, 0).cpu().numpy()  # [H, W, C]
    place: dict[str, Any] = {"extent": extent, "aspect": "auto"}
    if heat is None and pixels.shape[2] == 3:
        axes.imshow(pixels, **place)
    else:
        axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255, **place)
    if heat is not None:
        values = heat.detach().float().cpu().numpy()
        top = max(float(values.max()), 1e-12)
        axes.imshow(values, cmap="inferno", vmin=0, vmax=top, alpha=0.6, interpolation="nearest", **place)


@styled
def similarity_grid(similarity: Tensor, most: int = 8) -> Figure:
    """A map for each patch: how similar the position of every patch is to its own.

    Args:
        similarity: [rows, columns, rows, columns], -1 to 1, from `Positions.similarity`.
        most: Patches to draw maps for along each side; larger grids are sampled evenly.
    """
    rows, columns = similarity.shape[:2]
    chosen_rows, chosen_columns = _evenly(rows, most), _evenly(columns, most)
    gap = max(1, round(max(rows, columns) / 7))
    # One image with gaps instead of a figure of many axes, which takes seconds to lay out.
    canvas = np.full(
        (len(chosen_rows) * (rows + gap) - gap, len(chosen_columns) * (columns + gap) - gap), np.nan
    )
    for i, row in enumerate(chosen_rows):
        for j, column in enumerate(chosen_columns):
            top, left = i * (rows + gap), j * (columns + gap)
            canvas[top : top + rows, left : left + columns] = similarity[row, column].cpu().numpy()
    figure = Figure(figsize=(WIDTH, 0.9 * WIDTH * canvas.shape[0] / canvas.shape[1]))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    picture = axes.imshow(canvas, cmap="viridis", vmin=min(0.0, float(similarity.min())), vmax=1)
    axes.set_xticks(
        _centres(len(chosen_columns), columns, gap), [str(one + 1) for one in chosen_columns], color=FAINT
    )
    axes.set_yticks(_centres(len(chosen_rows), rows, gap), [str(one + 1) for one in chosen_rows], color=FAINT)
    axes.tick_params(length=0)
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    bar = figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.7, aspect=30)
    bar.outline.set_visible(False)
    return figure


def _evenly(size: int, most: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def _centres(number: int, size: int, gap: int) -> list[float]:
    return [place * (size + gap) + (size - 1) / 2 for place in range(number)]
