"""The report of a study: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitrail.explain.draw import BLUE, INK, WIDTH, label, png, styled
from vitrail.files import write_whole
from vitrail.studies.compare import INTERVALS, NAMES, Table, curves, numbers
from vitrail.studies.intervals import Estimate
from vitrail.studies.measure import unit_of
from vitrail.studies.study import PartResult, StudyResult, write_numbers


def write_study(folder: Path, found: StudyResult) -> Path:
    """Write `report.html`, `study.json` and `study.csv` into the folder of a study.

    Args:
        folder: Where its run folders lie.
        found: What `run_study` gave.

    Returns:
        The path of the report.
    """
    rows = found.rows
    sections = [
        {
            "title": part.plan.title,
            "about": " ".join(part.plan.about.split()),
            "costs": numbers(part.rows),
            "measures": measure_table(part) if part.numbers else None,
            "values": _embedded(dots(part)) if _shown(part) else None,
            "curves": _embedded(curves(part.rows)) if any(row.runs[0].curve for row in part.rows) else None,
        }
        for part in found.parts
    ]
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("vitrail.studies", ""), PackageLoader("vitrail.reporting", "")]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    hours = sum(run.seconds for row in rows for run in row.runs) / 3600
    page = environment.get_template("study.html.jinja").render(
        study=found.study,
        command=found.command,
        answers=found.answers,
        sections=sections,
        intervals=INTERVALS,
        runs=sum(len(row.runs) for row in rows),
        data=", ".join(dict.fromkeys(row.runs[0].config.data.name for row in rows)),
        time=f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min",
        petaflop=f"{sum(run.petaflop for row in rows for run in row.runs):.3g}",
        folders=[(row.name, [str(run.folder) for run in row.runs]) for row in rows],
    )
    write_numbers(folder, found)
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def measure_table(part: PartResult) -> Table:
    """What was measured on the runs of a part, with intervals."""
    header = ("run", *(_title(name) for name in part.numbers))
    lines = [
        (row.name, *(_text(name, found.get(name)) for name in part.numbers))
        for row, found in zip(part.rows, part.measured, strict=True)
    ]
    return Table(header=header, rows=tuple(lines))


@styled
def dots(part: PartResult) -> Figure:
    """A panel for each number, a dot and its interval for each run."""
    shown = _shown(part)
    columns = min(len(shown), 2)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, lines * (0.7 + 0.24 * len(part.rows))))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    names = [label(row.name, 26) for row in part.rows]
    for axes, (title, unit, values) in zip(panels, shown, strict=False):
        factor = 100 if unit == "%" else 1
        for place, own in enumerate(values):
            if own is None:
                continue
            axes.plot(
                [factor * own.low, factor * own.high],
                [place, place],
                color=BLUE,
                linewidth=2,
                alpha=0.45,
                solid_capstyle="butt",
            )
            axes.plot(factor * own.value, place, "o", color=BLUE, markersize=4.5)
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(textwrap.fill(label(f"{title}, {unit}" if unit else title, 56), 28))
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure


def _shown(part: PartResult) -> list[tuple[str, str, Sequence[Estimate | None]]]:
    """Title, unit and value a run of everything that can be drawn."""
    found: list[tuple[str, str, Sequence[Estimate | None]]] = []
    for score, name in NAMES.items():
        values = [row.test if row.score == score else None for row in part.rows]
        if any(own is not None for own in values):
            found.append((f"Test {name}", "%", values))
    for name in part.numbers:
        unit = unit_of(name)
        title = unit.name[0].upper() + unit.name[1:]
        values = [own.get(name) for own in part.measured]
        found.append((title, "%" if unit.percent else unit.unit, values))
    return found


def _title(number: str) -> str:
    unit = unit_of(number)
    sign = "%" if unit.percent else unit.unit
    return f"{unit.name}, {sign}" if sign else unit.name


def _text(number: str, found: Estimate | None) -> str:
    """A value with its interval, in the unit that the header names."""
    if found is None:
        return "-"
    unit = unit_of(number)
    value, low, high = (unit.number(own) for own in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def _embedded(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()
