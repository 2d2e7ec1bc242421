"""Files that are whole or absent: written beside, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that whoever reads it, whenever, finds all of the old or all of the new content.

    Args:
        path: The file; its folder must exist.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file stays, nothing is left beside.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)  # a full disk must not stay full because of half a file
        error.filename, error.filename2 = str(path), None  # what the caller asked for
        raise
