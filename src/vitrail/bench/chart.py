"""The plots of `vitrail bench`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitrail.bench.measure import Measurement
from vitrail.bench.peers import OURS
from vitrail.explain.draw import AMBER, BLUE, INK, LIGHT_BLUE, RULE, WIDTH, label, png, styled
from vitrail.files import write_whole

if TYPE_CHECKING:
    from vitrail.bench.scaling import Growth


@styled
def contest_chart(found: Sequence[Measurement], mode: str) -> Figure:
    """Images a second of each model, library and batch; the line through a bar spans the quartiles.

    Args:
        found: At least one.
        mode: What was timed, in words.
    """
    bars = [(own, timing) for own in found for timing in own.timings]
    figure = Figure(figsize=(WIDTH, 0.8 + 0.26 * len(bars)))
    axes = figure.add_subplot()
    for place, (_, timing) in enumerate(bars):
        row = timing.to_dict()
        slow, fast = (1000 * timing.batch / quartile for quartile in reversed(row["ms_per_batch_quartiles"]))
        axes.barh(
            place, row["images_per_second"], color=BLUE if timing.library == OURS else LIGHT_BLUE, height=0.7
        )
        axes.plot((slow, fast), (place, place), color=INK, linewidth=1)
    named = len(found) > 1
    names = [
        f"{label(own.model, 28) + '  ' if named else ''}{timing.library}, batch {timing.batch}"
        for own, timing in bars
    ]
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("images a second")
    axes.set_title(mode if named else f"{label(found[0].model, 40)}, {mode}")
    return figure


@styled
def scaling_chart(found: Sequence[Growth]) -> Figure:
    """Milliseconds of a batch against what was varied, both logarithmic, with the fitted power laws."""
    figure = Figure(figsize=(WIDTH, 2.5 * -(-len(found) // 2)))
    panels = figure.subplots(-(-len(found) // 2), 2, squeeze=False).ravel()
    for axes, growth in zip(panels, found, strict=True):
        values, times = np.array(growth.values), 1000 * np.array(growth.seconds)
        middle = np.exp(np.log(times).mean()) * (values / np.exp(np.log(values).mean())) ** growth.exponent
        axes.plot(values, middle, color=RULE, zorder=1)
        axes.plot(values, times, "o", color=AMBER, markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"time ~ {growth.what} ^ {growth.exponent:.2f}")
        axes.set_xlabel(growth.what)
        axes.set_ylabel("ms a batch")
    return figure


def write_charts(folder: Path, name: str, figure: Figure) -> Path:
    """A figure as NAME.png and NAME.svg; gives the path of the first."""
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same numbers give the same file
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_whole(folder / f"{name}.svg", drawn.getvalue())
    picture = folder / f"{name}.png"
    write_whole(picture, png(figure))
    return picture
