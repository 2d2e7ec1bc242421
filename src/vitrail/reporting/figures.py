"""The charts of a run report: curves, learning rate, gradient flow, confusion and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from vitrail.evaluation.metrics import ClassificationMetrics
from vitrail.explain.draw import AMBER, BLUE, FAINT, INK, LIGHT_BLUE, RULE, WIDTH, label, styled

Rows = Sequence[dict[str, Any]]
"""Lines of metrics.jsonl, all of one kind."""

MOST_CLASSES_WITH_NAMES = 40
MOST_CLASSES_WITH_NUMBERS = 20


@styled
def curves(train: Rows, val: Rows, test: ClassificationMetrics | None) -> Figure:
    """Loss against epochs, and accuracy (of features that of their neighbours) where there is validation."""
    score = "accuracy" if any("accuracy" in row for row in val) else "knn_accuracy"
    figure = Figure(figsize=(WIDTH, 4.4 if val else 2.5))
    panels = figure.subplots(2 if val else 1, 1, sharex=True, squeeze=False)[:, 0]
    epochs, loss = _series(train, "loss")
    panels[0].plot(epochs, loss, color=BLUE, alpha=0.3, linewidth=0.9)
    panels[0].plot(epochs, _running_mean(loss), color=BLUE, marker=_marker(epochs), label="training")
    if val:
        if any("loss" in row for row in val):
            panels[0].plot(*_series(val, "loss"), color=AMBER, marker=".", label="validation")
        panels[1].plot(*_series(val, score), color=AMBER, marker=".", label="validation")
    if val and test is not None:
        panels[1].axhline(
            test.accuracy, color=INK, linestyle=(0, (4, 3)), linewidth=1, label="test, after training"
        )
        panels[1].axhspan(*test.accuracy_interval, color=INK, alpha=0.08, linewidth=0)
    panels[0].set_title("Loss")
    if val:
        panels[1].set_title("Accuracy" if score == "accuracy" else "Accuracy of the 20 nearest neighbours")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels:
        axes.legend()
        axes.margins(x=0.01)
    panels[-1].set_xlabel("epoch")
    return figure


USUAL = {"kind", "step", "epoch", "loss", "lr", "images_per_second", "grad_norm", "grad_norms"}
"""What every task logs; the rest is a task's own."""


def own_numbers(train: Rows, val: Rows) -> list[tuple[str, Rows]]:
    """Names of the numbers that a task logs beside the usual ones, with the rows that hold them."""
    found = [
        (name, train) for name in dict.fromkeys(key for row in train for key in row) if name not in USUAL
    ]
    return found + [
        (name, val) for name in ("feature_std", "effective_rank") if any(name in row for row in val)
    ]


@styled
def details(train: Rows, val: Rows) -> Figure:
    """The parts of the loss, and what says whether the features are healthy, a small panel each."""
    numbers = own_numbers(train, val)
    rows = -(-len(numbers) // 2)
    figure = Figure(figsize=(WIDTH, 0.3 + 1.35 * rows))
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    for axes, (name, lines) in zip(panels, numbers, strict=False):
        epochs, values = _series(lines, name)
        axes.plot(epochs, values, color=BLUE if lines is train else AMBER, marker=_marker(epochs))
        axes.set_title(name.replace("_", " "))
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for axes in panels[len(numbers) :]:
        axes.set_axis_off()
    for axes in panels[-2:]:
        axes.set_xlabel("epoch")
    return figure


@styled
def learning_rate(train: Rows) -> Figure:
    """Learning rate against epochs."""
    figure = Figure(figsize=(WIDTH, 2.3))
    axes = figure.add_subplot()
    epochs, rates = _series(train, "lr")
    axes.plot(epochs, rates, color=BLUE, marker=_marker(epochs))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


@styled
def gradients(train: Rows) -> Figure:
    """Gradient norm of each layer against epochs, and layer by layer at the start, middle and end."""
    rows = [row for row in train if row.get("grad_norms")]
    layers = list(rows[0]["grad_norms"])
    epochs = np.array([row["epoch"] for row in rows])
    # Norms of exactly zero (frozen layers) have no place on a logarithmic axis and are left blank.
    norms = np.array([[row["grad_norms"].get(name) or np.nan for name in layers] for row in rows])
    figure = Figure(figsize=(WIDTH, 6.4))
    over_time, by_layer = figure.subplots(2, 1)
    depth = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    named = set(np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int).tolist())
    for number, name in enumerate(layers):
        over_time.plot(
            epochs,
            norms[:, number],
            color=depth[number],
            linewidth=1.2,
            label=label(name) if number in named else None,
        )
    over_time.set_title("Gradient norm of each layer")
    over_time.set_xlabel("epoch")
    over_time.margins(x=0.01)
    over_time.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)

    thirds = np.array_split(norms, 3) if len(norms) >= 3 else [norms]
    names = ("first third", "middle", "last third") if len(thirds) == 3 else ("whole run",)
    places = np.arange(len(layers))
    for number, (part, name) in enumerate(zip(thirds, names, strict=True)):
        known = ~np.isnan(part).all(axis=0)
        heights = np.full(len(layers), np.nan)
        heights[known] = np.nanmean(part[:, known], axis=0)
        width = 0.8 / len(thirds)
        by_layer.bar(
            places + (number - (len(thirds) - 1) / 2) * width,
            heights,
            width,
            color=matplotlib.colormaps["Blues"]((number + 1) / len(thirds) * 0.75 + 0.1),
            label=name,
        )
    by_layer.set_title("Mean over each third of the run" if len(thirds) == 3 else "Mean over the run")
    by_layer.set_xticks(places, [label(name) for name in layers], rotation=45 if len(layers) < 12 else 90)
    if len(layers) < 12:
        for text in by_layer.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    by_layer.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
    _from_smallest(over_time, norms, bars=False)
    _from_smallest(by_layer, norms, bars=True)
    return figure


@styled
def confusion(metrics: ClassificationMetrics) -> Figure:
    """The confusion matrix; with names up to 40 classes, with numbers up to 20."""
    counts = metrics.confusion
    K = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(WIDTH, WIDTH))
    axes = figure.add_subplot()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    # The square root makes rare confusions visible beside a full diagonal.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.tick_params(length=0)
    if K <= MOST_CLASSES_WITH_NAMES:
        names = [label(score.name, 14) for score in metrics.per_class]
        size = 8 if K <= 12 else 6.5 if K <= MOST_CLASSES_WITH_NUMBERS else 5
        upright = max(len(name) for name in names) <= 2
        axes.set_xticks(range(K), names, fontsize=size, color=FAINT, rotation=0 if upright else 90)
        axes.set_yticks(range(K), names, fontsize=size, color=FAINT)
    if K <= MOST_CLASSES_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.35 else INK
                size = 8 if K <= 12 else 5.5
                axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)
    else:
        bar = figure.colorbar(
            picture,
            ax=axes,
            label="share of the class's images",
            shrink=0.6,
            aspect=30,
            format=PercentFormatter(1.0),
        )
        bar.outline.set_visible(False)
    axes.set_xlabel("answer" if K <= MOST_CLASSES_WITH_NAMES else "answer (number of the class)")
    axes.set_ylabel("truth" if K <= MOST_CLASSES_WITH_NAMES else "truth (number of the class)")
    return figure


@styled
def calibration(metrics: ClassificationMetrics) -> Figure:
    """Accuracy against confidence, over the number of images at each confidence."""
    bins = metrics.calibration
    width = bins[0].high - bins[0].low
    centres = [(one.low + one.high) / 2 for one in bins]
    filled = [one for one in bins if one.count]
    figure = Figure(figsize=(WIDTH, 4.9))
    reliability, amounts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    reliability.bar(centres, [one.accuracy for one in bins], width * 0.92, color=LIGHT_BLUE, label="accuracy")
    reliability.plot(
        [0, 1], [0, 1], color=INK, linestyle=(0, (4, 3)), linewidth=1, label="accuracy = confidence"
    )
    reliability.plot(
        [one.confidence for one in filled],
        [one.accuracy for one in filled],
        "o",
        color=AMBER,
        markersize=4,
        label="mean confidence of the bin",
    )
    reliability.set_title("Accuracy at each confidence")
    reliability.set_xlim(0, 1)
    reliability.set_ylim(0, 1.02)
    reliability.legend(loc="upper left")
    amounts.bar(centres, [one.count for one in bins], width * 0.92, color=RULE)
    amounts.set_title("Images at each confidence")
    amounts.set_xlabel("confidence (probability of the answer)")
    amounts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in (reliability, amounts):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    reliability.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the rows that have the key."""
    known = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _marker(epochs: Sequence[float]) -> str | None:
    """A single point has no line, and few are seen better as points."""
    return "." if len(epochs) <= 20 else None


def _running_mean(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Mean over a window of a twentieth of the run around each point."""
    half = len(values) // 40
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _from_smallest(axes: Axes, values: npt.NDArray[np.float64], *, bars: bool) -> None:
    """A vertical axis on which the smallest value can be read: logarithmic where they differ much."""
    if not np.isfinite(values).any():
        return
    low, high = np.nanmin(values), np.nanmax(values)
    if high < 10 * low:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if bars:
        # From a round number, not from wherever the shortest bar ends.
        axes.set_ylim(bottom=10 ** np.floor(np.log10(low)))
