"""Image folders of any common layout: class folders, split folders, tables of files and labels.

| layout | classes |
|---|---|
| `train/<class>/**/x.jpg`, and `val/` and `test/` likewise | names of the class folders of train |
| `<class>/**/x.jpg` | names of the class folders |
| `labels.csv` or `metadata.csv` (or .jsonl) beside the images, or in each split folder | labels of train |
| `train.csv`, `val.csv`, `test.csv` (or .jsonl) beside the images or beside split folders | labels of train |
| `x.jpg`, perhaps in split folders | one, with the folder's name: for tasks that need no labels |

Classes are numbered in sorted order, capital letters first, as torchvision's `ImageFolder` and the hub's
`imagefolder` number them; in tables, labels that are all whole numbers are sorted as numbers. Split folders
may also be called training, valid, validation, dev and testing. Links are followed. Which files are images is
told by their extension; other and hidden files are counted, not read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitrail.datasets.items import FileItems, Items, not_a_class
from vitrail.datasets.tables import (
    LABEL_COLUMNS,
    SPLIT_NAMES,
    Labelled,
    class_order,
    find_tables,
    read_tables,
)

# fmt: off
EXTENSIONS = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
# fmt: on
"""What the names of images end with, in small letters."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found in a folder."""

    parts: dict[str, Items]
    """The items of each split: train, and perhaps val and test."""
    ignored: Counter[str]
    """Number of files not taken for images, by extension, and of hidden ones ("hidden")."""
    empty: tuple[Path, ...] = ()
    """The class folders of train without an image."""


def find_folder(folder: Path, *, label_column: str | None = None) -> Found:
    """Find the images and labels of a folder, in whichever of the layouts above.

    Args:
        folder: The folder.
        label_column: Column of the label in a table, where it is not called label, class, target or category.

    Raises:
        ValueError: No layout fits, a table is damaged, or a class of val or test is not in train.
    """
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is a run folder, not a folder of images; data.name in its config.yaml is what it was "
            "trained on"
        )
    name = folder.resolve().name or "images"
    ignored: Counter[str] = Counter()
    splits = split_folders(folder)
    tables = list(find_tables(folder).items())
    empty: tuple[Path, ...] = ()
    if not tables:
        inner = {split: find_tables(path) for split, path in splits.items()}
        tables = [(split, table) for split, found in inner.items() for table in found.values()]
        if tables and len(tables) != len(splits):
            raise ValueError(
                f"{folder}: expected one table in each of {', '.join(splits)}, got {len(tables)}"
            )
    if tables:
        rows = read_tables(tables, label_column)
        _check_train(folder, list(rows))
        classes = class_order(label for _, label in rows["train"])
    else:
        if splits:
            _check_train(folder, list(splits))
        places = splits or {"train": folder}
        classes = class_folders(places["train"])
        if classes:
            rows = {split: labelled_files(path, ignored) for split, path in places.items()}
        else:
            classes = (name,)
            rows = {split: _flat_files(path, name, ignored) for split, path in places.items()}
        if not rows["train"]:
            raise ValueError(_no_layout(places["train"], ignored))
        with_images = {label for _, label in rows["train"]}
        empty = tuple(places["train"] / label for label in classes if label not in with_images)
    return Found(parts=make_items(rows, classes, name), ignored=ignored, empty=empty)


def make_items(rows: dict[str, list[Labelled]], classes: tuple[str, ...], name: str) -> dict[str, Items]:
    """Items of the images of each split.

    Raises:
        ValueError: A label is not among the classes.
    """
    number = {label: k for k, label in enumerate(classes)}
    parts: dict[str, Items] = {}
    for split, some in rows.items():
        for path, label in some:
            if label not in number:
                raise ValueError(not_a_class(path, label, split, classes))
        paths, labels = [path for path, _ in some], [number[label] for _, label in some]
        parts[split] = FileItems(paths, labels, classes=classes, name=name, split=split)
    return parts


def split_folders(folder: Path) -> dict[str, Path]:
    """The split folders in a folder, train first.

    Raises:
        ValueError: Two of them are the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(path.name.lower())
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise ValueError(
                f"{folder}: expected one folder of {split}, got {found[split].name} and {path.name}"
            )
        found[split] = path
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)))


def labelled_files(folder: Path, ignored: Counter[str]) -> list[Labelled]:
    """The images of all class folders with the folder's name, in torchvision's order; others are counted."""
    _images([entry.name for entry in os.scandir(folder) if entry.is_file()], ignored, anywhere=False)
    found = []
    for name in class_folders(folder):
        files = [
            (place, file)
            for place, files in _walk(str(folder / name), ())
            for file in _images(files, ignored)
        ]
        found += [(os.path.join(place, file), name) for place, file in sorted(files)]
    return found


def _flat_files(folder: Path, label: str, ignored: Counter[str]) -> list[Labelled]:
    """The images directly in a folder, all of one class."""
    return [(os.path.join(folder, name), label) for name in images_in(folder, ignored)]


def images_in(folder: Path, ignored: Counter[str]) -> list[str]:
    """Names of the images directly in a folder, sorted; other files are counted."""
    return sorted(_images([entry.name for entry in os.scandir(folder) if entry.is_file()], ignored))


def image_files(path: Path) -> list[Path]:
    """A file by itself; of a folder the images directly in it, by extension, sorted."""
    return [path / name for name in images_in(path, Counter())] if path.is_dir() else [path]


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder below with the names of its files; a link back to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        listed = list(entries)
    yield folder, [entry.name for entry in listed if entry.is_file()]
    for entry in listed:
        if entry.is_dir() and not _hidden(entry.name):
            yield from _walk(entry.path, (*above, real))


def _images(names: list[str], ignored: Counter[str], *, anywhere: bool = True) -> list[str]:
    """Those of the names that are images; the others are counted (all, where no image belongs)."""
    found = []
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if _hidden(name):
            ignored["hidden"] += 1
        elif suffix in EXTENSIONS and anywhere:
            found.append(name)
        else:
            ignored[suffix or "no extension"] += 1
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _check_train(folder: Path, splits: list[str]) -> None:
    if "train" not in splits:
        raise ValueError(f"{folder}: expected a split train beside {' and '.join(splits)}, got none")


def _no_layout(folder: Path, ignored: Counter[str]) -> str:
    inside = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common(3))
    return (
        f"{folder}: expected class folders with images, images alone, folders train and test, "
        "train-*.parquet, or a table labels.csv or metadata.jsonl "
        f"(with a column {' or '.join(LABEL_COLUMNS)}), got "
        f"{inside or 'nothing'}"
    )
