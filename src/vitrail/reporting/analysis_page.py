"""The page of `vitrail analyze`: pictures and numbers of an analysis, in one file that needs nothing else."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from vitrail.explain.draw import label, png, similarity_grid
from vitrail.files import write_whole
from vitrail.reporting import analysis_figures as figures
from vitrail.reporting.analysis import Analysis, Comparison, Head, Subject, analyse, compare, percent, points

LISTED_HEADS = 6
"""How many of the most and of the least important heads are listed."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_analysis` made."""

    page: Path
    found: Analysis
    comparison: Comparison | None


def write_analysis(
    folder: str | Path, subject: Subject, against: Subject | None = None, *, images: int = 1000, seed: int = 0
) -> Written:
    """Write `analysis.html`, `analysis.json` and PNG files into a folder.

    Everything is computed and drawn before the first file is written; files of the same names are replaced.

    Args:
        folder: Made where it does not exist.
        subject: The model and its images.
        against: A second model, on the same images, to stand beside the first.
        images: How many images to use at most.
        seed: The same seed gives the same analysis on one machine.

    Raises:
        ValueError: As `analyse` and `compare`.
    """
    folder = Path(folder)
    comparison = None if against is None else compare(subject, against, images=images, seed=seed)
    found = analyse(subject, images=images, seed=seed) if comparison is None else comparison.first
    pictures = {name: png(figure) for name, figure in _drawn(found, comparison).items()}
    numbers = found.to_dict()
    if comparison is not None:
        numbers["against"] = comparison.to_dict() | comparison.second.to_dict()
    environment = Environment(
        loader=PackageLoader("vitrail.reporting", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"percent": percent, "points": points}
    page = environment.get_template("analysis.html.jinja").render(
        found=found,
        findings=found.findings(),
        comparison=comparison,
        pictures={name: _embedded(content) for name, content in pictures.items()},
        classes=sorted(found.found_classes, key=lambda own: own.apart)[: figures.NAMED_CLASSES],
        most=_ranked(found)[:LISTED_HEADS],
        least=_ranked(found)[LISTED_HEADS:][-LISTED_HEADS:],
        neighbours=found.tsne.neighbours,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_whole(folder / f"{name}.png", content)
    write_whole(folder / "analysis.json", json.dumps(numbers, indent=1) + "\n")
    write_whole(folder / "analysis.html", page)
    return Written(page=folder / "analysis.html", found=found, comparison=comparison)


def _drawn(found: Analysis, comparison: Comparison | None) -> dict[str, Figure]:
    drawn = {
        "tsne": figures.plane(found.tsne, found.classes),
        "pca": figures.plane(found.pca, found.classes),
        "images": figures.mosaic(found),
        "depth": figures.depth(found),
        "cka": figures.layer_matrix(found.cka, "layer", "layer"),
        "colours": figures.colours(found),
        "distances": figures.head_distances(found),
        "heads": figures.head_matrices(found),
        "nearest": figures.nearest(found),
    }
    if not isinstance(found.positions, str):
        drawn["positions"] = similarity_grid(found.positions.similarity.cpu())
        drawn["places"] = figures.position_plane(found.positions)
    if comparison is not None:
        first, second = comparison.first, comparison.second
        drawn["against_depth"] = figures.depths(comparison)
        drawn["against_cka"] = figures.layer_matrix(
            comparison.cka,
            f"layer of {label(first.title, 24)}",
            f"layer of {label(second.title, 24)}",
        )
    return drawn


def _ranked(found: Analysis) -> list[Head]:
    """The heads that were switched off, the most missed first."""
    missed = [(own.lost_log_probability, own) for own in found.heads if own.lost_log_probability is not None]
    return [own for _, own in sorted(missed, key=lambda pair: -pair[0])]


def _embedded(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
