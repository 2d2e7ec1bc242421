"""What is made once from a data set and kept: folders that are whole or absent.

The cache lies in the folder VITRAIL_CACHE, else ~/.cache/vitrail. A folder is written under another name
first and renamed, so that a killed process leaves nothing that looks complete, and two processes may do the
same work at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_LEFTOVER_AGE_S = 24 * 3600


def digest(*parts: object) -> str:
    """Short hex digest of some values, for the name of a folder."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def cached(name: str, make: Callable[[Path], None], read: Callable[[Path], _T | None]) -> _T:
    """Give what a folder of the cache holds, making the folder where it is absent or damaged.

    Args:
        name: Name of the folder (signs that have no place in one are replaced); it must change whenever the
            content would.
        make: Writes the content into the folder given.
        read: Gives the content of the folder given; None where it is absent or damaged.

    Raises:
        ValueError: The cache cannot be written, or what `make` raises.
    """
    home = Path(os.environ.get("VITRAIL_CACHE") or Path.home() / ".cache" / "vitrail") / "datasets"
    folder = home / re.sub(r"[^\w.-]", "_", name)
    found = read(folder)
    if found is not None:
        return found
    try:
        return _build(folder, make, read)
    except OSError as error:
        raise ValueError(
            f"cannot write decoded images to {home} ({error.strerror or error}): make room or set "
            "VITRAIL_CACHE to another folder"
        ) from None


def _build(folder: Path, make: Callable[[Path], None], read: Callable[[Path], _T | None]) -> _T:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    beside = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.tmp")
    beside.mkdir()
    try:
        make(beside)
        if folder.exists() and read(folder) is None:
            shutil.rmtree(folder)
        try:
            beside.rename(folder)
        except OSError:
            # Another process was first: what it made is the same.
            if read(folder) is None:
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    found = read(folder)
    if found is None:
        raise OSError(f"{folder} changed while it was written")
    return found


def _remove_leftovers(home: Path) -> None:
    """Remove what killed processes left; what is younger may be another process at work."""
    for leftover in home.glob("*.tmp"):
        # Another process may remove it first.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)
