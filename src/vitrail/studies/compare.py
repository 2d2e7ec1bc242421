"""Finished runs side by side: what differs between them, what they cost, what they reach, how sure that is.

Runs that differ in their seed only are one row, with the mean over the seeds.

    <folder>/
      compare.md     the tables
      compare.csv    one line a run, all numbers
      compare.png    validation score over the epochs, mean and standard deviation over the seeds
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitrail.evaluation.timing import summary
from vitrail.explain.draw import WIDTH, label, png, styled
from vitrail.files import write_whole
from vitrail.studies.intervals import Estimate, joined
from vitrail.studies.latency import latencies
from vitrail.studies.runs import FinishedRun, Score, read_run, settings

NAMES: dict[Score, str] = {"accuracy": "accuracy", "knn_accuracy": "k-NN accuracy"}

INTERVALS = (
    "In brackets 95 % intervals: with several seeds of their mean (Student's t), with one of the share of "
    "right answers on these images (Wilson)."
)
_BESIDE = 3
"""So many settings that differ stand in the table of the numbers; more have a table of their own."""
_LONGEST = 28


@dataclass(frozen=True, kw_only=True)
class Row:
    """One config, over its seeds."""

    name: str
    runs: tuple[FinishedRun, ...]
    latency: tuple[float, ...] | None = None
    """Seconds of each timed pass of one image through the model of the first run; None: it was not timed."""

    @property
    def score(self) -> Score:
        """What its runs are judged by."""
        return self.runs[0].score

    @property
    def test(self) -> Estimate | None:
        """Test score; None where there are no test images."""
        return _joined([run.test for run in self.runs])

    @property
    def val(self) -> Estimate | None:
        """Validation score of the weights that were kept; None where no images were held out."""
        return _joined([run.val for run in self.runs])

    @property
    def seconds(self) -> float:
        """Training time of a run, mean over the seeds."""
        return fmean(run.seconds for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        first = self.runs[0]
        return {
            "name": self.name,
            "folders": [str(run.folder) for run in self.runs],
            "seeds": [run.seed for run in self.runs],
            "score": self.score,
            "parameters": first.parameters,
            "macs_per_image": first.macs_per_image,
            "images_seen": first.images_seen,
            "petaflop": first.petaflop,
            "seconds": self.seconds,
            "latency": None if self.latency is None else summary(self.latency),
            "val": None if self.val is None else self.val.to_dict(),
            "test": None if self.test is None else self.test.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows and columns; the first column holds names."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, its columns aligned so that it is legible as it is."""
        widths = [max(len(line[i]) for line in (self.header, *self.rows)) for i in range(len(self.header))]
        rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

        def line(cells: Sequence[str]) -> str:
            first = cells[0].ljust(widths[0])
            others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
            return f"| {' | '.join((first, *others))} |"

        return "\n".join(line(cells) for cells in (self.header, rule, *self.rows)) + "\n"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side."""

    rows: tuple[Row, ...]
    timed_on: str | None = None
    """Device and threads; None: nothing was timed."""

    def text(self) -> str:
        """The tables in Markdown, and what has to be said about them."""
        differing = differing_settings(self.rows)
        main = numbers(self.rows, differing if len(differing) <= _BESIDE else {})
        parts = [main.markdown()]
        if len(differing) > _BESIDE:
            names = tuple(row.name for row in self.rows)
            lines = tuple((key, *values) for key, values in differing.items())
            parts.append(Table(header=("setting", *names), rows=lines).markdown())
        parts.append(INTERVALS + "\n")
        if self.timed_on is not None:
            parts.append(
                f"ms an image: one image at a time, median of passes taken in turns, on {self.timed_on}.\n"
            )
        if (other := _tested_apart(self.rows)) is not None:
            parts.append(other + "\n")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "settings": differing_settings(self.rows),
            "timed_on": self.timed_on,
        }


def compare(folders: Sequence[Path]) -> Comparison:
    """Put finished runs side by side.

    Raises:
        ValueError: One is no run folder or not finished, or is given twice.
    """
    seen: set[Path] = set()
    groups: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder} is given twice")
        seen.add(folder.resolve())
        run = read_run(folder)
        groups.setdefault(tuple(sorted(settings(run.config).items())), []).append(run)
    runs = list(groups.values())
    names = _names(runs)
    return Comparison(
        rows=tuple(Row(name=name, runs=tuple(own)) for name, own in zip(names, runs, strict=True))
    )


def with_latency(found: Comparison) -> Comparison:
    """The same with the time of one image: the models of the rows in turns, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = latencies([row.runs[0].folder for row in found.rows], device)
    rows = tuple(replace(row, latency=own) for row, own in zip(found.rows, seconds, strict=True))
    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return replace(found, rows=rows, timed_on=where)


def write_comparison(folder: Path, found: Comparison) -> None:
    """Write `compare.md`, `compare.csv` and `compare.png` into a folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, "compare", found.rows, found.text())


def write_rows(folder: Path, name: str, rows: Sequence[Row], text: str) -> None:
    """Write `<name>.md` with a text, `<name>.csv` and `<name>.png` with the rows; the folder is there."""
    write_whole(folder / f"{name}.md", text)
    write_whole(folder / f"{name}.csv", runs_csv(rows))
    write_whole(folder / f"{name}.png", png(curves(rows)))


def numbers(rows: Sequence[Row], further: dict[str, list[str]] | None = None) -> Table:
    """The table of what runs cost and reach.

    Args:
        rows: One line each.
        further: Columns between the name and the numbers: header -> a text a row.
    """
    further = further or {}
    shown: list[tuple[str, list[str]]] = [
        ("run", [row.name for row in rows]),
        *further.items(),
        ("seeds", [str(len(row.runs)) for row in rows]),
        ("parameters", [f"{row.runs[0].parameters:,}" for row in rows]),
        ("MMACs", [f"{row.runs[0].macs_per_image / 1e6:,.2f}" for row in rows]),
        ("images seen", [f"{row.runs[0].images_seen:,}" for row in rows]),
        ("petaFLOP", [f"{row.runs[0].petaflop:.3g}" for row in rows]),
        ("seconds", [f"{row.seconds:,.0f}" for row in rows]),
    ]
    times = [row.latency for row in rows]
    if any(own is not None for own in times):
        shown.append(("ms an image", ["-" if own is None else f"{1000 * median(own):.3g}" for own in times]))
    for score, name in NAMES.items():
        if any(row.score == score for row in rows):
            for split in ("val", "test"):
                found = [getattr(row, split) if row.score == score else None for row in rows]
                if any(own is not None for own in found):
                    shown.append((f"{split} {name}, %", [percent(own) for own in found]))
    header, columns = zip(*shown, strict=True)
    return Table(header=header, rows=tuple(zip(*columns, strict=True)))


def percent(found: Estimate | None) -> str:
    """An accuracy and its interval in per cent, without the sign; "-" where there is none."""
    if found is None:
        return "-"
    return f"{100 * found.value:.2f} ({100 * found.low:.2f} to {100 * min(found.high, 1.0):.2f})"


def runs_csv(rows: Sequence[Row]) -> str:
    """One line a run, with all that differs between the rows."""
    differing = differing_settings(rows)
    lines: list[dict[str, Any]] = [
        {
            "run": row.name,
            "seed": run.seed,
            "folder": run.folder,
            **{key: values[number] for key, values in differing.items()},
            "parameters": run.parameters,
            "macs_per_image": run.macs_per_image,
            "images_seen": run.images_seen,
            "petaflop": run.petaflop,
            "seconds": run.seconds,
            **({} if row.latency is None else {"ms_per_image": 1000 * median(row.latency)}),
            "score": run.score,
            "val": None if run.val is None else run.val.value,
            "test": None if run.test is None else run.test.value,
        }
        for number, row in enumerate(rows)
        for run in row.runs
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def differing_settings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What differs between the configs of rows: short dotted key -> its value in each row, "-" for none."""
    own = [settings(row.runs[0].config) for row in rows]
    keys = [
        key
        for key in dict.fromkeys(key for one in own for key in one)
        if len({one.get(key) for one in own}) > 1
    ]
    ends = Counter(key.rpartition(".")[2] for key in {key for one in own for key in one})

    def short(key: str) -> str:
        end = key.rpartition(".")[2]
        return end if ends[end] == 1 and end.isidentifier() else key

    return {short(key): [_shortened(one.get(key, "-")) for one in own] for key in keys}


@styled
def curves(rows: Sequence[Row]) -> Figure:
    """Validation score over the epochs, a line a row: mean over the seeds and one standard deviation."""
    scores = [score for score in NAMES if any(row.score == score and row.runs[0].curve for row in rows)]
    figure = Figure(figsize=(WIDTH, 3.0 * max(len(scores), 1)))
    panels = figure.subplots(max(len(scores), 1), 1, squeeze=False)[:, 0]
    if not scores:
        panels[0].set_title("no validation images were held out")
    for axes, score in zip(panels, scores, strict=False):
        shown = [row for row in rows if row.score == score and row.runs[0].curve]
        colours = matplotlib.colormaps["viridis"]
        for number, row in enumerate(shown):
            points = list(zip(*(run.curve for run in row.runs), strict=False))  # to where the first stopped
            epochs = [point[0][0] for point in points]
            means = [fmean(score for _, score in point) for point in points]
            colour = colours(0.92 * number / max(len(shown) - 1, 1))
            line = ("solid", (0, (4, 2)), (0, (1, 1.5)))[number % 3]
            axes.plot(
                epochs,
                means,
                color=colour,
                linestyle=line,
                marker="." if len(epochs) <= 20 else None,
                label=label(row.name, 28),
            )
            if len(row.runs) > 1:
                spreads = [stdev([score for _, score in point]) for point in points]
                low, high = (
                    [mean + sign * own for mean, own in zip(means, spreads, strict=True)] for sign in (-1, 1)
                )
                axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(f"Validation {NAMES[score]}")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(x=0.02)
        if len(shown) > 5:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.legend()
    panels[-1].set_xlabel("epoch")
    return figure


def _joined(found: Sequence[Estimate | None]) -> Estimate | None:
    known = [own for own in found if own is not None]
    return joined(known) if known else None


def _tested_apart(rows: Sequence[Row]) -> str | None:
    """A sentence where not all rows were tested on the same images."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.runs[0].tested_on, []).append(row)
    if len(groups) == 1:
        return None
    parts = (
        f"{', '.join(row.name for row in own)} ({own[0].runs[0].config.data.name})" for own in groups.values()
    )
    return f"Not all were tested on the same images, so their accuracies do not compare: {'; '.join(parts)}."


def _names(groups: Sequence[Sequence[FinishedRun]]) -> list[str]:
    """A name for each group of seeds: of its folder, and of the folders above where that is not enough."""
    paths = []
    for runs in groups:
        folder = runs[0].folder.resolve()
        paths.append(folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder)
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(runs[0].folder) for runs in groups]


def _shortened(text: str) -> str:
    """The end of a long value, which tells paths apart."""
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]
