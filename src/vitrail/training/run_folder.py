"""The run folder: it is refused when it holds something else, and one run at a time writes into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitrail.config import TrainSection
from vitrail.processes import barrier, is_main

_LOCK = ".lock"


def check_free(folder: Path, section: TrainSection) -> None:
    """Refuse a run folder that holds something, before anything is built.

    Raises:
        ValueError: It is a file, holds something else, or there is nothing to resume.
    """
    if not is_main():
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another run folder with --train.output")
    if section.resume:
        if not folder.is_dir():
            raise ValueError(f"no run folder {folder} to resume; leave --resume out to start the run")
        return
    if not folder.is_dir() or not _entries(folder):
        return
    if not section.overwrite:
        raise ValueError(
            f"run folder {folder} is not empty: go on with --resume, replace it with --overwrite, "
            "or choose another with --output"
        )
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is not a run folder (no config.yaml): it is not replaced")


@contextmanager
def claimed(folder: Path, section: TrainSection) -> Iterator[None]:
    """Make the run folder, empty unless the run resumes, and keep other runs out of it for the while.

    Raises:
        ValueError: It cannot be made, or another run is writing there.
    """
    if not is_main():
        barrier()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is writing into {folder}; wait for its end or choose another folder with --output"
        ) from None
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be made: {error.strerror}") from None
    try:
        if not section.resume:
            for entry in _entries(folder):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        barrier()
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name != _LOCK]
