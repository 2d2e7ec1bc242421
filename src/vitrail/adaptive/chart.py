"""The picture of `vitrail adaptive`: what accuracy costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from vitrail.adaptive.curve import BATCHES, Curve, Point
from vitrail.explain.draw import AMBER, BLUE, INK, WIDTH, styled

_COLOURS = {"merging": BLUE, "early exit": AMBER}


@styled
def curve_chart(curve: Curve) -> Figure:
    """Accuracy against multiply-adds, and against milliseconds an image at each batch size."""
    figure = Figure(figsize=(WIDTH, 2.6))
    whole = curve.points[0]
    panels = figure.subplots(1, 1 + len(BATCHES), sharey=True)
    costs: dict[str, Callable[[Point], float]] = {"MMACs an image": lambda point: point.macs / 1e6}
    for batch in BATCHES:
        costs[f"ms an image, batch {batch}"] = partial(_milliseconds, batch)
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        axes.set_xlabel(name)
        axes.plot(cost(whole), 100 * whole.accuracy, "o", color=INK, label="as it is", zorder=3)
        for method, colour in _COLOURS.items():
            own = [point for point in curve.points if point.method == method]
            accuracies = [100 * point.accuracy for point in own]
            axes.plot(
                [cost(point) for point in own], accuracies, "o-", color=colour, markersize=4, label=method
            )
            for point, accuracy in zip(own, accuracies, strict=True):
                text = f"{point.setting:g}"
                axes.annotate(
                    text, (cost(point), accuracy), textcoords="offset points", xytext=(4, -8), size=6
                )
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(loc="lower right")  # where accuracy falls with the cost, nothing lies there
    return figure


def _milliseconds(batch: int, point: Point) -> float:
    return point.milliseconds[batch]
