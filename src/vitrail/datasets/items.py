"""Encoded images with labels, wherever they come from: files, parquet files, or a Python object.

The lowest of the three layers of the data: an `Items` knows where each image lies and gives it as it is
stored, undecoded. An `ImageSet` keeps all of them decoded, a `FileSet` decodes them when they are read. All
kinds can be pickled, so that worker processes read by themselves.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from PIL import Image

from vitrail.datasets.transforms import read_file

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Items(ABC):
    """Images of one split, undecoded, with their labels.

    A subset shares everything with what it was taken from, and names its part in `rows`.
    """

    name: str
    """Name of the data set."""
    split: str
    """train, val or test."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    rows: np.ndarray | None = None
    """Which of the source's images belong here, int64 [N]; None is all of them."""
    _numbers: np.ndarray | None = None
    """Class number for each of the source's, where they were renumbered, int64."""

    def __len__(self) -> int:
        return self._count if self.rows is None else len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 [N], 0 to K - 1."""
        labels = self._labels if self.rows is None else self._labels[self.rows]
        return labels if self._numbers is None else self._numbers[labels]

    @property
    def key(self) -> str | None:
        """Hex digest that changes when an image or a label may have changed; None where none is known.

        It names what is kept in the cache. It need not be equal for equal content.
        """
        whole = self._key
        changes = [array.tobytes() for array in (self.rows, self._numbers) if array is not None]
        if whole is None or not changes:
            return whole
        return hashlib.sha256(b"|".join([whole.encode(), *changes])).hexdigest()

    def read(self, index: int) -> bytes | Image.Image:
        """Give one image: the bytes of an image file, or a PIL image where the source holds it decoded.

        Raises:
            BrokenImageError: There is nothing to decode; the message names the source.
        """
        return self._read(self._row(index))

    def source(self, index: int) -> str:
        """What messages call an image: its path, or its file and row."""
        return self._source(self._row(index))

    def subset(self, indices: ArrayLike, *, split: str | None = None) -> Self:
        """Some of the images, in the order given.

        Args:
            indices: Positions in these items, [N].
            split: Its name where that changes.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        part = copy.copy(self)
        part.rows = chosen if self.rows is None else self.rows[chosen]
        part.split = split or self.split
        return part

    def renumbered(self, classes: tuple[str, ...]) -> Self:
        """The same with the class numbers of another data set: a class keeps its name.

        Raises:
            ValueError: A class that occurs here is not among those.
        """
        present = [self.classes[k] for k in np.unique(self.labels)]
        if unknown := [name for name in present if name not in classes]:
            raise ValueError(not_a_class(self.name, unknown[0], self.split, classes))
        numbers = np.array([classes.index(name) if name in present else -1 for name in self.classes])
        part = copy.copy(self)
        part.classes = classes
        part._numbers = numbers if self._numbers is None else numbers[self._numbers]
        return part

    def _row(self, index: int) -> int:
        return int(index if self.rows is None else self.rows[index])

    @property
    @abstractmethod
    def _count(self) -> int:
        """Number of images of the source."""

    @property
    @abstractmethod
    def _labels(self) -> np.ndarray:
        """Class of each of the source's images, int64 [M]."""

    @property
    @abstractmethod
    def _key(self) -> str | None: ...

    @abstractmethod
    def _read(self, row: int) -> bytes | Image.Image: ...

    @abstractmethod
    def _source(self, row: int) -> str: ...


class FileItems(Items):
    """Image files with one label each.

    Args:
        paths: The files, [N].
        labels: Class of each file, [N].
        classes: Names of the classes.
        name: Name of the data set.
        split: train, val or test.

    The key is made of the paths, sizes and times of change: to read every file would cost as much as to
    decode it, and the same test serves make and git.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        labels: ArrayLike,
        *,
        classes: tuple[str, ...],
        name: str,
        split: str,
    ) -> None:
        self.name, self.split, self.classes = name, split, classes
        self._targets = np.asarray(labels, dtype=np.int64)
        # One buffer: a million strings would be copied into every worker as their reference counts change.
        encoded = [os.fsencode(path) for path in paths]
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([0, *(len(path) for path in encoded)])  # [N + 1]

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return Path(self._source(self._row(index)))

    @property
    def _count(self) -> int:
        return len(self._targets)

    @property
    def _labels(self) -> np.ndarray:
        return self._targets

    @cached_property
    def _key(self) -> str | None:
        digest = hashlib.sha256(self._targets.tobytes())
        ends = self._ends.tolist()
        for start, end in itertools.pairwise(ends):
            digest.update(file_stamp(self._paths[start:end]))
        return digest.hexdigest()

    def _read(self, row: int) -> bytes:
        path = self._source(row)
        return read_file(Path(path), path)

    def _source(self, row: int) -> str:
        return os.fsdecode(self._paths[self._ends[row] : self._ends[row + 1]])


def not_a_class(where: str, name: str, split: str, classes: tuple[str, ...]) -> str:
    """What to say of a class that the training images do not have."""
    return (
        f"{where}: class {name!r} of {split} is not among the {len(classes)} of train "
        f"({first_names(classes)})"
    )


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Names for a message, with dots where there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def file_stamp(path: bytes) -> bytes:
    """Path, size and time of change: what tells that a file is another; absent files have one too."""
    try:
        status = os.stat(path)
    except OSError:
        return b"%s absent\n" % path
    return b"%s %d %d\n" % (path, status.st_size, status.st_mtime_ns)
