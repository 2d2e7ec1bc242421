"""Parquet files decoded once into uint8 arrays that later loads only map into memory.

The arrays lie in a cache folder named by the content of the files, so a changed file is decoded anew and an
unchanged one never again. They are written to a folder of another name first and renamed, so that a killed
process leaves nothing that looks complete, and two processes may do the same work at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.datasets.images import content_hash
from vitrail.datasets.transforms import decode_image

_FORMAT = 1
_LEFTOVER_AGE_S = 24 * 3600


@dataclass(frozen=True, eq=False, kw_only=True)
class Resident:
    """Decoded images of one split."""

    images: np.ndarray
    """uint8 [N, C, H, W], a read-only memory map."""
    labels: np.ndarray
    """int64 [N]."""
    fingerprint: str
    """`content_hash` of both, as found when they were decoded."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a parquet file has to hold."""

    image: str
    """Column of encoded images, a struct with the field `bytes`."""
    label: str
    """Column of class numbers."""
    shape: tuple[int, int, int]
    """Channels, height and width of every image."""
    num_classes: int
    """Labels are 0 to this minus one."""


def load_resident(files: Sequence[Path], columns: Columns, *, name: str, split: str) -> Resident:
    """Give the decoded content of parquet files, from the cache or decoded now.

    Args:
        files: The parts of one split, in order.
        columns: What they hold.
        name: Name of the data set, for the cache.
        split: Name of the split, for the cache.

    Raises:
        ValueError: A file is damaged or holds something else (the message names file and row), or the cache
            folder cannot be written.
    """
    home = Path(os.environ.get("VITRAIL_CACHE") or Path.home() / ".cache" / "vitrail") / "datasets"
    folder = home / f"{name}-{split}-{_hash(files)}-v{_FORMAT}"
    found = _open(folder)
    if found is None:
        try:
            found = _build(folder, files, columns)
        except OSError as error:
            raise ValueError(
                f"cannot write decoded images to {home} ({error.strerror or error}): make room or set "
                "VITRAIL_CACHE to another folder"
            ) from None
    return found


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def _open(folder: Path) -> Resident | None:
    """Map what is in the cache; None where there is nothing, or something that was damaged since."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # As a plain array: every index into numpy's memmap class costs its own bookkeeping.
        images = np.asarray(np.load(folder / "images.npy", mmap_mode="r"))
        labels = np.load(folder / "labels.npy")
        if list(images.shape) != meta["shape"] or len(labels) != len(images):
            return None
        return Resident(images=images, labels=labels, fingerprint=meta["fingerprint"])
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _build(folder: Path, files: Sequence[Path], columns: Columns) -> Resident:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    beside = folder.with_name(f"{folder.name}.{secrets.token_hex(6)}.tmp")
    beside.mkdir()
    try:
        _decode(beside, files, columns)
        if folder.exists() and _open(folder) is None:
            shutil.rmtree(folder)
        try:
            beside.rename(folder)
        except OSError:
            # Another process was first: its arrays are the same.
            if _open(folder) is None:
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    found = _open(folder)
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


def _decode(folder: Path, files: Sequence[Path], columns: Columns) -> None:
    tables = [_open_parquet(path, columns) for path in files]
    total = sum(table.metadata.num_rows for table in tables)
    # Written through a memory map, so that a set needs no memory of its own while it is decoded.
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(total, *columns.shape)
    )
    labels = np.empty(total, dtype=np.int64)
    at = 0
    for path, table in zip(files, tables, strict=True):
        for row, (encoded, label) in enumerate(_rows(path, table, columns)):
            where = f"{path}, row {row}"
            if not isinstance(label, int) or not 0 <= label < columns.num_classes:
                raise ValueError(
                    f"{where}: expected a label from 0 to {columns.num_classes - 1} in column "
                    f"{columns.label}, got {label!r}"
                )
            if not encoded or not encoded.get("bytes"):
                raise ValueError(
                    f"{where}: expected the bytes of an image in column {columns.image}, got none"
                )
            array = decode_image(encoded["bytes"], where, columns.shape[0])
            if array.shape != columns.shape:
                raise ValueError(f"{where}: expected {_size(columns.shape)} pixels, got {_size(array.shape)}")
            images[at], labels[at] = array, label
            at += 1
    images.flush()
    np.save(folder / "labels.npy", labels)
    meta = {"fingerprint": content_hash(images, labels), "shape": list(images.shape)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _open_parquet(path: Path, columns: Columns) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_unreadable(path, error)) from None
    schema = table.schema_arrow
    if columns.image not in schema.names or columns.label not in schema.names:
        raise ValueError(
            f"{path}: expected the columns {columns.image} and {columns.label}, got {', '.join(schema.names)}"
        )
    kind = schema.field(columns.image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(f"{path}: expected column {columns.image} as a struct with bytes, got {kind}")
    return table


def _rows(path: Path, table: Any, columns: Columns) -> Iterator[tuple[dict[str, Any], Any]]:
    """Image struct and label of each row, a thousand rows in memory at a time."""
    import pyarrow as pa

    pieces = table.iter_batches(batch_size=1000, columns=[columns.image, columns.label])
    while True:
        try:
            piece = next(pieces, None)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(_unreadable(path, error)) from None
        if piece is None:
            return
        yield from zip(piece[columns.image].to_pylist(), piece[columns.label].to_pylist(), strict=True)


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: expected a whole parquet file ({' '.join(str(error).split())[:200]}); download it again"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape[1:])
