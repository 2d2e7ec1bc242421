"""Rows of parquet files as items."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.datasets.items import Items, file_stamp
from vitrail.datasets.transforms import BrokenImageError

_HASHED_BYTES = 1 << 30


class ParquetItems(Items):
    """Rows of parquet files in the layout of the Hugging Face hub.

    The files are opened when something is read. Reading is fast in the order of the rows, and slow in any
    other, because a parquet file can only be read a group of rows at a time; `pack` makes items that are read
    in any order.

    Args:
        files: The parts of one split, in order.
        image_column: Column of encoded images, a struct with the field `bytes`.
        label_column: Column of class numbers, or of the values in `values`.
        classes: Names of the classes.
        name: Name of the data set.
        split: train, val or test.
        values: What the label column holds for each class; None where it holds the class numbers.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        image_column: str,
        label_column: str,
        classes: tuple[str, ...],
        name: str,
        split: str,
        values: tuple[Any, ...] | None = None,
    ) -> None:
        self.name, self.split, self.classes = name, split, classes
        self.files = tuple(Path(file) for file in files)
        self.image_column, self.label_column, self.values = image_column, label_column, values
        self._group: tuple[int, int, list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and the rows at hand stay behind: a worker opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_tables"} | {"_group": None}

    @cached_property
    def _tables(self) -> list[Any]:
        return [open_parquet(file, (self.image_column, self.label_column)) for file in self.files]

    @cached_property
    def _groups(self) -> np.ndarray:
        """File, group in it, and first row of each group of rows, int64 [G, 3]."""
        found, row = [], 0
        for number, (file, table) in enumerate(zip(self.files, self._tables, strict=True)):
            check_image_column(file, table.schema_arrow, self.image_column)
            for group in range(table.metadata.num_row_groups):
                found.append((number, group, row))
                row += table.metadata.row_group(group).num_rows
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number of rows up to the end of each file, int64 [F]."""
        return np.cumsum([table.metadata.num_rows for table in self._tables], dtype=np.int64)

    @property
    def _count(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def _labels(self) -> np.ndarray:
        numbers = None if self.values is None else {value: k for k, value in enumerate(self.values)}
        labels: list[int] = []
        for file in self.files:
            for row, value in enumerate(read_column(file, self.label_column)):
                label = value if numbers is None else numbers.get(value)
                if not isinstance(label, int) or not 0 <= label < len(self.classes):
                    wanted = (
                        f"a label from 0 to {len(self.classes) - 1}" if numbers is None else "a known class"
                    )
                    raise ValueError(
                        f"{file}, row {row}: expected {wanted} in column {self.label_column}, got {value!r}"
                    )
                labels.append(label)
        return np.array(labels, dtype=np.int64)

    @cached_property
    def _key(self) -> str | None:
        digest = hashlib.sha256(repr((self.image_column, self.label_column, self.values)).encode())
        # By content where that is quick, so that copies of a set share one cache.
        small = sum(file.stat().st_size for file in self.files) <= _HASHED_BYTES
        for path in self.files:
            if small:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(file_stamp(os.fsencode(path)))
        return digest.hexdigest()

    def _read(self, row: int) -> bytes:
        number, group, first = self._groups[
            np.searchsorted(self._groups[:, 2], row, side="right") - 1
        ].tolist()
        at_hand = self._group
        if at_hand is None or at_hand[:2] != (number, group):
            at_hand = self._group = (number, group, self._read_group(number, group))
        encoded = at_hand[2][row - first]
        if not encoded or not encoded.get("bytes"):
            raise BrokenImageError(
                self._source(row), f"expected the bytes of an image in column {self.image_column}, got none"
            )
        content: bytes = encoded["bytes"]
        return content

    def _read_group(self, number: int, group: int) -> list[Any]:
        import pyarrow as pa

        try:
            table = self._tables[number].read_row_group(group, columns=[self.image_column])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(_unreadable(self.files[number], error)) from None
        rows: list[Any] = table.column(0).to_pylist()
        return rows

    def _source(self, row: int) -> str:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return f"{self.files[number]}, row {row - (int(self._ends[number - 1]) if number else 0)}"


def open_parquet(path: Path, columns: Sequence[str]) -> Any:
    """Open a parquet file that has some columns.

    Raises:
        ValueError: The file is damaged, or a column is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_unreadable(path, error)) from None
    names = table.schema_arrow.names
    if any(column not in names for column in columns):
        raise ValueError(f"{path}: expected the columns {' and '.join(columns)}, got {', '.join(names)}")
    return table


def read_column(path: Path, column: str) -> list[Any]:
    """The values of one column of a parquet file.

    Raises:
        ValueError: The file is damaged, or has no such column.
    """
    import pyarrow as pa

    try:
        values: list[Any] = open_parquet(path, [column]).read(columns=[column]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_unreadable(path, error)) from None
    return values


def check_image_column(path: Path, schema: Any, column: str) -> None:
    """Refuse a parquet file whose image column holds no encoded images."""
    import pyarrow as pa

    kind = schema.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise ValueError(f"{path}: expected column {column} as a struct with bytes, got {kind}")


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: expected a whole parquet file ({' '.join(str(error).split())[:200]}); download it again"
