"""The encoded images of a set in one memory-mapped file, so that they can be read in any order.

A parquet file can only be read a group of rows at a time, a hundred images for one. Where images are decoded
when they are read, their bytes are therefore copied once, as they are, into one file in the cache; that takes
as much room on the disk as the parquet files do. (The `datasets` library does the same with its Arrow files.)
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.datasets.cache import cached, digest
from vitrail.datasets.items import Items
from vitrail.datasets.transforms import BrokenImageError

_FORMAT = 1


class PackedItems(Items):
    """Items whose encoded images lie in one file of the cache. `pack` makes them.

    Args:
        items: Where they come from; gives labels and names.
        folder: Where the file lies.
    """

    def __init__(self, items: Items, folder: Path) -> None:
        self.name, self.split, self.classes = items.name, items.split, items.classes
        self._items, self._folder = items, folder
        self._ends = np.load(folder / "ends.npy")  # int64 [N + 1]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be sent with its content; a worker maps the file by itself.
        return {name: value for name, value in self.__dict__.items() if name != "_bytes"}

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(np.memmap(self._folder / "encoded.bin", dtype=np.uint8, mode="r"))

    @property
    def _count(self) -> int:
        return len(self._ends) - 1

    @cached_property
    def _labels(self) -> np.ndarray:
        return self._items.labels

    @property
    def _key(self) -> str | None:
        return self._items.key

    def _read(self, row: int) -> bytes:
        start, end = self._ends[row : row + 2].tolist()
        if start == end:
            raise BrokenImageError(self._source(row), "there are no bytes of an image")
        return self._bytes[start:end].tobytes()

    def _source(self, row: int) -> str:
        return self._items.source(row)


def pack(items: Items) -> PackedItems:
    """Copy the encoded images into one file in the cache, or find the copy made earlier.

    Args:
        items: Items that give bytes, and have a key.

    Raises:
        ValueError: The source is damaged, or the cache cannot be written.
    """
    assert items.key is not None
    name = f"{items.name}-{items.split}-{digest(items.key)}-packed{_FORMAT}"
    folder = cached(name, lambda folder: _write(folder, items), _whole)
    return PackedItems(items, folder)


def _write(folder: Path, items: Items) -> None:
    lengths = np.zeros(len(items) + 1, dtype=np.int64)
    with (folder / "encoded.bin").open("wb") as file:
        for index in range(len(items)):
            try:
                encoded = items.read(index)
            except BrokenImageError:
                continue  # no bytes: told when it is read
            assert isinstance(encoded, bytes)
            lengths[index + 1] = file.write(encoded)
    np.save(folder / "ends.npy", np.cumsum(lengths))


def _whole(folder: Path) -> Path | None:
    try:
        end = int(np.load(folder / "ends.npy", mmap_mode="r")[-1])
        return folder if (folder / "encoded.bin").stat().st_size == end else None
    except (OSError, ValueError, EOFError):
        return None
