"""Predictions of many files as a table on the disk, written as they come; an interrupted one is gone on with.

A row a file, in the order of the files, also for those that cannot be read:

| file | columns |
|---|---|
| `.jsonl` | source, classes, probabilities, model; of a broken file source, error, model |
| `.csv` | source, class_1, probability_1, class_2, ..., error, model; empty where there is nothing |
| `.parquet` | as `.csv`; nulls where there is nothing |

`model` is the model's fingerprint, so that a table never holds rows of two models unnoticed. JSON lines and
CSV grow a batch at a time. Parquet cannot be read before it is closed, so its rows are kept as CSV in
FILE.parquet.csv, which becomes the parquet file at the end.

Going on drops a half-written row, and the rows of a batch that is not whole: the batches are then those of a
run that was not interrupted, and so is every bit of the table. Files that the table has already are left
out, files that were added since come behind.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vitrail.datasets import BrokenImageError
from vitrail.files import write_whole
from vitrail.serving.pipeline import check_numbers, predict_files
from vitrail.serving.predictor import Prediction, Predictor

_SUFFIXES = (".jsonl", ".csv", ".parquet")
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the files."""

    output: Path
    """The table."""
    count: int
    """Files that were read now; those that the table had before are not counted."""
    before: int
    """Files that the table had before."""
    seconds: float
    """Time for `count` files."""
    broken: tuple[str, ...]
    """Files in the table that cannot be read, each with the reason."""

    def text(self) -> str:
        """One line: images, time, speed, what is broken."""
        speed = f", {self.count / self.seconds:.1f} images a second" if self.count else ""
        before = f", {self.before:,} were there before" if self.before else ""
        return (
            f"{self.count:,} images in {self.seconds:.1f} s{speed}{before}, {len(self.broken):,} broken: "
            f"{self.output}"
        )

    def broken_text(self) -> str:
        """One line that names the first broken files and says where all are."""
        more = f"; and {len(self.broken) - _NAMED:,} more" if len(self.broken) > _NAMED else ""
        return f"{'; '.join(self.broken[:_NAMED])}{more}; {self.output} has the reason of each under error"


def predict_to(
    predictor: Predictor, files: Sequence[Path], output: str | Path, *, top: int = 5, batch_size: int = 8
) -> Outcome:
    """Predict files and write a table, or go on with one; on a terminal with a progress bar.

    Args:
        predictor: The model.
        files: Image files; one that comes twice is taken once.
        output: The table, whose name ends in .jsonl, .csv or .parquet; its folder must exist.
        top: How many classes to name.
        batch_size: Files a batch.

    Raises:
        ValueError: The name ends otherwise, a number is below 1, or there is a file of that name that is
            something else, of another model, or with another number of classes.
    """
    check_numbers(top, batch_size)
    table = _Table(Path(output), predictor.fingerprint, min(top, len(predictor.classes)))
    began = time.perf_counter()
    named = {_one_line(os.fsencode(path).decode(errors="backslashreplace")): path for path in files}
    table.cut(batch_size, complete=named.keys() <= set(table.sources))
    before = len(table.sources)
    have = set(table.sources)
    missing = [path for name, path in named.items() if name not in have]
    found = predict_files(predictor, missing, top=top, batch_size=batch_size)
    with table.path.open("ab") as file:
        for results in _watched(found, len(missing)):
            # One write a batch, at once, so that whoever looks finds whole rows.
            file.write("".join(map(table.add, results)).encode())
            file.flush()
    table.finish()
    return Outcome(
        output=table.output,
        count=len(missing),
        before=before,
        seconds=time.perf_counter() - began,
        broken=tuple(f"{name}: {reason}" for name, reason in table.broken.items()),
    )


class _Table:
    """The rows that are there, and how a row is written."""

    def __init__(self, output: Path, model: str, top: int) -> None:
        if output.suffix not in _SUFFIXES:
            raise ValueError(f"--output {output}: expected a name that ends in {', '.join(_SUFFIXES)}")
        if not output.parent.is_dir():
            raise ValueError(f"--output {output}: no folder {output.parent}; make it first")
        self.output, self._model, self._top = output, model, top
        self._columns = ["source"]
        for rank in range(1, top + 1):
            self._columns += [f"class_{rank}", f"probability_{rank}"]
        self._columns += ["error", "model"]
        self.path = output.with_name(f"{output.name}.csv") if output.suffix == ".parquet" else output
        """What grows."""
        self.sources: list[str] = []
        """The files that it has, in the order of the rows."""
        self.broken: dict[str, str] = {}
        """Those of them that cannot be read, with the reason."""
        self._header = "" if self.path.suffix == ".jsonl" else _csv_line(self._columns)
        self._ends = [len(self._header)]
        if self.path.exists():
            with self.path.open("rb") as file:
                self._read(file)
        elif output.exists():
            content = self._unpacked()
            self._read(io.BytesIO(content))
            write_whole(self.path, content)
        if not self.sources:
            write_whole(self.path, self._header)

    def cut(self, batch_size: int, *, complete: bool) -> None:
        """Drop a half-written row, and unless all is there the rows of a batch that is not whole."""
        keep = len(self.sources) if complete else len(self.sources) // batch_size * batch_size
        for source in self.sources[keep:]:
            self.broken.pop(source, None)
        del self.sources[keep:]
        os.truncate(self.path, self._ends[keep])

    def add(self, found: Prediction | BrokenImageError) -> str:
        """The row of one file, with the end of its line."""
        source = _one_line(os.fsencode(found.source).decode(errors="backslashreplace"))
        self.sources.append(source)
        if isinstance(found, BrokenImageError):
            self.broken[source] = found.reason
        if self.path.suffix == ".jsonl":
            return _json_line(source, found, self._model)
        if isinstance(found, BrokenImageError):
            return _csv_line([source, *[""] * (2 * self._top), _one_line(found.reason), self._model])
        pairs = zip(found.classes, found.probabilities, strict=True)
        cells = [cell for name, share in pairs for cell in (_one_line(name), repr(share))]
        return _csv_line([source, *cells, "", self._model])

    def finish(self) -> None:
        """Make the parquet file of its rows."""
        if self.output == self.path:
            return
        from pyarrow import csv as arrow_csv
        from pyarrow import float64, parquet, string

        types = {name: float64() if name.startswith("probability_") else string() for name in self._columns}
        options = arrow_csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
        )
        buffer = io.BytesIO()
        parquet.write_table(arrow_csv.read_csv(self.path, convert_options=options), buffer)
        write_whole(self.output, buffer.getvalue())
        self.path.unlink()

    def _unpacked(self) -> bytes:
        """The rows of a parquet file that was finished, as CSV."""
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.read_table(self.output)
        except ArrowException:
            raise self._unusable("is not a parquet file") from None
        rows = [table.column_names, *([_cell(own) for own in row.values()] for row in table.to_pylist())]
        return "".join(map(_csv_line, rows)).encode()

    def _read(self, lines: BinaryIO) -> None:
        """Find the rows that are there, and check that they are of this model and number of classes."""
        if lines.read(len(self._header)).decode(errors="replace") != self._header:
            raise self._unusable(f"does not begin with the columns of --top {self._top}")
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                source, error, model = self._parse(line.decode())
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
                raise self._unusable(f"has no prediction of {self._top} classes in row {number:,}") from None
            if model != self._model:
                raise self._unusable(f"is of another model ({model}, not {self._model})")
            self.sources.append(source)
            self._ends.append(self._ends[-1] + len(line))
            if error:
                self.broken[source] = error

    def _parse(self, line: str) -> tuple[str, str, str]:
        """Source, error and model of a row."""
        if self.path.suffix != ".jsonl":
            (cells,) = csv.reader([line], strict=True)
            if len(cells) != len(self._columns):
                raise ValueError
            return cells[0], cells[-2], cells[-1]
        row = json.loads(line)
        if "error" not in row and not len(row["classes"]) == len(row["probabilities"]) == self._top:
            raise ValueError
        return row["source"], row.get("error", ""), row["model"]

    def _unusable(self, reason: str) -> ValueError:
        return ValueError(f"{self.output} {reason}; give another --output, or remove it")


def _json_line(source: str, found: Prediction | BrokenImageError, model: str) -> str:
    if isinstance(found, BrokenImageError):
        content: dict[str, object] = {"error": _one_line(found.reason)}
    else:
        content = {"classes": found.classes, "probabilities": found.probabilities}
    return json.dumps({"source": source, **content, "model": model}) + "\n"


def _csv_line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _cell(value: str | float | None) -> str:
    return "" if value is None else str(value)


def _one_line(text: str) -> str:
    """A row is a line, whatever a file is called."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _watched(
    found: Iterator[list[Prediction | BrokenImageError]], total: int
) -> Iterator[list[Prediction | BrokenImageError]]:
    """Pass batches on, with a progress bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from found
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    done, began = 0, time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        for results in found:
            done += len(results)
            speed = done / (time.perf_counter() - began)
            progress.update(task, completed=done, description=f"{speed:.1f} images a second")
            yield results
