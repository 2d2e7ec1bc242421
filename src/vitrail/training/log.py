"""What a run says while it runs: `metrics.jsonl` for machines, a progress bar or plain lines for people."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vitrail.files import write_whole
from vitrail.processes import is_main


class RunLog:
    """Appends records to `metrics.jsonl` and shows where the run stands.

    On a terminal there is one progress bar; elsewhere a line at most every ten seconds and one for every
    evaluation, so that a log file stays short. Of several processes only the first one writes and speaks.
    """

    def __init__(self, path: Path, *, total: int, start: int) -> None:
        self.total = total
        self._console = Console(stderr=True, highlight=False, quiet=not is_main())
        self._began, self._start, self._last_line = time.monotonic(), start, 0.0
        self._loss = ""
        self._progress: Progress | None = None
        self._file: TextIO | None = None
        if not is_main():
            return
        if start:
            # A killed run had logged more than it saved, and the resumed one logs it again.
            kept = "".join(json.dumps(record) + "\n" for record in records_until(path, start))
            write_whole(path, kept)
        self._file = path.open("a" if start else "w")
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("step {task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._bar = self._progress.add_task("training", total=total, completed=start, numbers="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()

    def step(self, step: int) -> None:
        """Say how many steps are done."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record ("train" or "val") and show its main numbers."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if record["kind"] == "val":
            if "accuracy" in record:
                found = f"val loss {record['loss']:.4f}  val accuracy {100 * record['accuracy']:.2f} %"
            else:
                found = (
                    f"k-NN accuracy {100 * record['knn_accuracy']:.2f} %  rank {record['effective_rank']:.1f}"
                )
            text = f"{self._loss}{found}"
        else:
            self._loss = f"loss {record['loss']:.4f}  "
            text = f"{self._loss}{record['images_per_second']:.0f} images/s"
        if self._progress is not None:
            if record["kind"] == "val":
                self._console.print(f"epoch {record['epoch']:5.1f}  {text}")
            else:
                self._progress.update(self._bar, numbers=text)
            return
        now = time.monotonic()
        # The line of an evaluation has the training loss too.
        if record["kind"] == "val" or now - self._last_line > 10:
            self._last_line = now
            done = record["step"] - self._start
            left = (now - self._began) / max(done, 1) * (self.total - record["step"])
            self._console.print(
                f"epoch {record['epoch']:5.1f}  step {record['step']}/{self.total}  {text}  "
                f"left {int(left) // 60}:{int(left) % 60:02d}",
                soft_wrap=True,
            )


def records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` up to a step; what a killed run left half-written is ignored."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
        if record["step"] <= step:
            records.append(record)
    return records
