"""The picture and the file of a learning rate range test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitrail.explain.draw import AMBER, BLUE, FAINT, WIDTH, png, styled
from vitrail.files import write_whole


@styled
def lr_curve(found: Mapping[str, Any]) -> Figure:
    """Loss against the learning rate, and the rates that were found.

    Args:
        found: What `LrRange.to_dict` gives.
    """
    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.add_subplot()
    axes.plot(found["rates"], found["losses"], color=BLUE, alpha=0.3, linewidth=0.9, label="loss of a step")
    axes.plot(found["rates"], found["smoothed"], color=BLUE, label="smoothed")
    for name, key, colour, line in (
        ("suggested", "suggestion", AMBER, "solid"),
        ("cautious", "cautious", AMBER, (0, (4, 3))),
        ("recipe", "configured", FAINT, (0, (1, 2))),
    ):
        axes.axvline(
            found[key], color=colour, linestyle=line, linewidth=1.2, label=f"{name} {found[key]:.1e}"
        )
    axes.set_xscale("log")
    # The explosion at the end would press everything else to the bottom.
    axes.set_ylim(top=1.1 * max(found["smoothed"][: found["rates"].index(found["suggestion"]) + 1]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def write_lr_range(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write `lr_range.json` and `lr_range.png` into a folder, which is made where it is missing.

    Args:
        folder: Where to.
        found: What `LrRange.to_dict` gives.

    Returns:
        The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "lr_range.json", json.dumps(found, indent=2) + "\n")
    picture = folder / "lr_range.png"
    write_whole(picture, png(lr_curve(found)))
    return picture
