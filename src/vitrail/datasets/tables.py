"""Tables of image files and labels: CSV and JSON lines, beside the images.

A table is called `labels` or `metadata`, or after its split (`train.csv`). Its columns are found by name: the
file is `file_name`, `filename`, `image` or `path`, the label is `label`, `class`, `target` or `category`, and
`split` may say which split a row belongs to. Without that column, rows whose files all lie in split folders
(`train/x.jpg`) belong to those.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What folders, tables and values of a split column are called, in small letters, with the split they are."""

LABEL_COLUMNS = ("label", "class", "target", "category")
FILE_COLUMNS = ("file_name", "filename", "image", "path")
_STEMS = ("labels", "metadata")
_SUFFIXES = (".csv", ".jsonl")

Labelled = tuple[str, str]
"""Path of an image, and its label."""


def find_tables(folder: Path) -> dict[str | None, Path]:
    """The tables of a folder: one of each split, or one of all (under None), or none at all.

    Raises:
        ValueError: There are several tables of the same images.
    """
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        stem = path.stem.lower()
        if path.suffix.lower() in _SUFFIXES and (stem in _STEMS or stem in SPLIT_NAMES) and path.is_file():
            found[SPLIT_NAMES.get(stem)].append(path)
    if len(found) > 1:
        # Beside tables of the splits, the one of all tells nothing new.
        found.pop(None, None)
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"{folder}: expected one table, got {' and '.join(path.name for path in paths)}")
    return {split: paths[0] for split, paths in found.items()}


def read_tables(
    tables: Iterable[tuple[str | None, Path]], label_column: str | None
) -> dict[str, list[Labelled]]:
    """Images and labels of each split.

    Args:
        tables: Tables with the split whose images they list; None where the table tells that itself.
        label_column: Name of the label's column, where it is not called as above.

    Returns:
        Paths with labels by split; `train` alone where nothing tells the split.

    Raises:
        ValueError: A table is damaged, lacks a column, or has a row without file or label, or with a split
            of another name.
    """
    found: dict[str, list[Labelled]] = defaultdict(list)
    for split, table in tables:
        for row_split, path, label in _rows(table, split, label_column):
            found[row_split].append((path, label))
    return found


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels, sorted; as numbers where all are whole numbers."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _rows(table: Path, split: str | None, label_column: str | None) -> Iterator[tuple[str, str, str]]:
    """Split, path and label of each row."""
    rows = list(_records(table))
    if not rows:
        raise ValueError(f"{table}: expected rows of images and labels, got none")
    columns = {str(name).strip().lower(): name for name in rows[0][1]}
    file_column = _column(table, columns, FILE_COLUMNS, "the file")
    wanted = (label_column.lower(),) if label_column else LABEL_COLUMNS
    label_at = _column(table, columns, wanted, "the label")
    split_at = columns.get("split")
    files = [_text(table, line, row, file_column) for line, row in rows]
    base = _base(table.parent, split, files[0])
    own = [SPLIT_NAMES.get(Path(file).parts[0].lower()) for file in files]
    from_paths = split is None and split_at is None and all(own)
    for (line, row), file, folder_split in zip(rows, files, own, strict=True):
        told = split
        if split_at is not None and split is None:
            value = _text(table, line, row, split_at)
            told = SPLIT_NAMES.get(value.lower())
            if told is None:
                raise ValueError(f"{table}, line {line}: expected train, val or test as split, got {value!r}")
        elif from_paths:
            told = folder_split
        yield told or "train", str(base / file), _text(table, line, row, label_at)


def _records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a table."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                header = file.readline()
                file.seek(0)
                # Spreadsheets of some countries write semicolons.
                reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
                for row in reader:
                    yield reader.line_num, row
                return
            for line, text in enumerate(file, start=1):
                if text.strip():
                    record = json.loads(text)
                    if not isinstance(record, dict):
                        raise ValueError(f"expected names with values, got {type(record).__name__}")
                    yield line, record
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{table}: not a table that can be read ({' '.join(str(error).split())})") from None


def _column(table: Path, columns: dict[str, str], names: tuple[str, ...], what: str) -> str:
    found = [columns[name] for name in names if name in columns]
    if not found:
        near = difflib.get_close_matches(names[0], columns, n=1) if len(names) == 1 else []
        todo = "; name it with --data.label_column" if what == "the label" else ""
        raise ValueError(
            f"{table}: expected a column {' or '.join(names)} for {what}, got {', '.join(columns)}"
            f"{f'; did you mean {near[0]}?' if near else todo}"
        )
    return found[0]


def _text(table: Path, line: int, row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    text = str(value).strip() if isinstance(value, str | int) else ""
    if not text:
        raise ValueError(f"{table}, line {line}: expected a value in column {column}, got {value!r}")
    return text


def _base(folder: Path, split: str | None, file: str) -> Path:
    """The folder that the table's paths start from: its own, or that of the split or of the images in it."""
    for place in (folder, *([folder / split] if split else []), folder / "images"):
        if (place / file).exists():
            return place
    return folder
