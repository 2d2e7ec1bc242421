"""One look at every image of a set: its size, whether it is grey, and whether it can be decoded at all.

A set that is decoded when it is read needs that beforehand: a broken file must not stop a training after an
hour. Each image is decoded once, JPEGs at an eighth of their size, and the result is kept in the cache.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vitrail.datasets.cache import cached, digest
from vitrail.datasets.items import Items
from vitrail.datasets.transforms import (
    BrokenImageError,
    convert,
    is_grey,
    open_header,
    open_upright,
    upright_size,
)

_FORMAT = 1
_SILENT_BELOW = 2_000
_AT_A_TIME = 16
_R = TypeVar("_R")


@dataclass(frozen=True, eq=False, kw_only=True)
class Scan:
    """What was found in the images of a set."""

    sizes: np.ndarray
    """Height and width of each image, upright, int64 [N, 2]; 0 where it is broken."""
    grey: np.ndarray
    """Whether each image is stored without colours, bool [N]."""
    broken: tuple[tuple[int, str], ...]
    """Position of each image that cannot be decoded, and the reason."""

    @property
    def whole(self) -> np.ndarray:
        """Positions of the images that can be decoded, int64, ascending."""
        return np.setdiff1d(np.arange(len(self.grey)), [index for index, _ in self.broken])


def scan(items: Items) -> Scan:
    """Look at every image, or give what an earlier look found.

    Raises:
        ValueError: The source itself cannot be read (a damaged parquet file), or the cache not be written.
    """
    if items.key is None:
        return _scan(items)
    name = f"{items.name}-{items.split}-{digest(items.key)}-scan{_FORMAT}"
    return cached(name, lambda folder: _write(folder, _scan(items)), lambda folder: _read(folder, len(items)))


def decoded(
    items: Items, function: Callable[[bytes | Image.Image, str], _R]
) -> Iterator[_R | BrokenImageError]:
    """Apply a function to every image, in threads (Pillow's decoders let several run at once).

    Of more than 2,000 images a line on stderr tells how many are done.

    Args:
        items: The images. They are read in this thread, in order.
        function: Takes what `items.read` gives and the name of its source.

    Yields:
        What the function gives, in the order of the images; the error in the place of a broken image.
    """

    def attempt(encoded: bytes | Image.Image | BrokenImageError, source: str) -> _R | BrokenImageError:
        if isinstance(encoded, BrokenImageError):
            return encoded
        try:
            return function(encoded, source)
        except BrokenImageError as error:
            return error

    def read(index: int) -> tuple[bytes | Image.Image | BrokenImageError, str]:
        source = items.source(index)
        try:
            return items.read(index), source
        except BrokenImageError as error:
            return error, source

    def submit(indices: tuple[int, ...]) -> Future[list[_R | BrokenImageError]]:
        some = [read(index) for index in indices]
        return pool.submit(lambda: [attempt(*each) for each in some])

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        # Several at a time, as small images are decoded faster than they are handed over.
        told = _told(range(len(items)), len(items), f"{items.name} {items.split}")
        groups = iter(lambda: tuple(itertools.islice(told, _AT_A_TIME)), ())
        # A few ahead of those waited for: enough for all threads, few enough for the memory.
        waiting = deque(submit(group) for group in itertools.islice(groups, 2 * workers))
        while waiting:
            results = waiting.popleft().result()
            waiting.extend(submit(group) for group in itertools.islice(groups, 1))
            yield from results


def _told(values: Iterable[int], total: int, what: str) -> Iterator[int]:
    """Pass values on, and say on stderr how many have passed."""
    terminal = sys.stderr.isatty()
    told = time.monotonic()
    for done, value in enumerate(values):
        if total > _SILENT_BELOW and time.monotonic() - told > (0.5 if terminal else 30.0):
            told = time.monotonic()
            line = f"decoding {what}: {done:,} of {total:,}"
            print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)
        yield value
    if total > _SILENT_BELOW:
        print(f"decoding {what}: {total:,} of {total:,}", file=sys.stderr, flush=True)


def _look(encoded: bytes | Image.Image, source: str) -> tuple[int, int, bool]:
    """Height, width and greyness of an image, which is decoded for nothing but its wholeness."""
    picture = encoded if isinstance(encoded, Image.Image) else open_header(encoded, source)
    height, width = upright_size(picture)
    grey = is_grey(picture)
    picture.draft("L", (1, 1))
    convert(open_upright(picture, source), 1, source)
    return height, width, grey


def _scan(items: Items) -> Scan:
    sizes, grey = np.zeros((len(items), 2), dtype=np.int64), np.zeros(len(items), dtype=bool)
    broken = []
    for index, found in enumerate(decoded(items, _look)):
        if isinstance(found, BrokenImageError):
            broken.append((index, found.reason))
        else:
            sizes[index], grey[index] = found[:2], found[2]
    return Scan(sizes=sizes, grey=grey, broken=tuple(broken))


def _write(folder: Path, found: Scan) -> None:
    np.savez(
        folder / "scan.npz",
        sizes=found.sizes,
        grey=found.grey,
        broken=np.array([index for index, _ in found.broken], dtype=np.int64),
        reasons=np.array([reason for _, reason in found.broken], dtype=str),
    )


def _read(folder: Path, count: int) -> Scan | None:
    try:
        # Opened here, as np.load leaves the file of a damaged archive open.
        with (folder / "scan.npz").open("rb") as file, np.load(file) as stored:
            pairs = zip(stored["broken"].tolist(), stored["reasons"].tolist(), strict=True)
            found = Scan(sizes=stored["sizes"], grey=stored["grey"], broken=tuple(pairs))
    # A damaged archive is answered with errors of many kinds (zipfile, zlib, EOF).
    except Exception:
        return None
    return found if len(found.sizes) == len(found.grey) == count else None
