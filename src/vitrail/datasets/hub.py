"""Data sets of the Hugging Face hub: parquet files in a folder, in the hub's local cache, or on the hub.

The files of a split are called `train-00000-of-00002.parquet` and so on, at any depth of one folder; the
splits are train, test and validation (or val, valid). Which column is the image and which the label, and what
the classes are called, stands in the files' own metadata, where the hub's library writes it.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.datasets.items import Items
from vitrail.datasets.parquet import ParquetItems, check_image_column, open_parquet, read_column
from vitrail.datasets.tables import LABEL_COLUMNS, SPLIT_NAMES

Files = dict[str, list[Path]]
"""The parquet files of each split, in order."""

_CONNECT_TIMEOUT_S = 10.0
_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(-.*)?\.parquet")
_PATTERNS = [f"*{split}-*.parquet" for split in ("train", "test", "validation")]


def parquet_files(
    folder: Path, splits: Sequence[str] = (), *, places: Sequence[str] = ("**",)
) -> Files | None:
    """The parquet files of each split under a folder, or None where there is none.

    Args:
        folder: The folder.
        splits: Splits that must be there; where they are given, others are not looked for.
        places: Patterns of the folders to look in, below that folder.

    Raises:
        ValueError: There are some, but not all, or the same split lies in two folders.
    """
    found: Files = {split: [] for split in splits}
    for path in sorted(path for place in places for path in folder.glob(f"{place}/*.parquet")):
        match = _FILE.fullmatch(path.name)
        split = SPLIT_NAMES[match[1]] if match else ""
        if split and (not splits or split in splits):
            found.setdefault(split, []).append(path)
    if not any(found.values()):
        return None
    for split, files in found.items():
        places = sorted({str(path.parent) for path in files})
        if len(places) != 1:
            raise ValueError(
                f"{folder}: expected {split}-*.parquet in one folder, got {' and '.join(places) or 'none'}"
            )
        # Parts are numbered train-00000-of-00002: a missing one would otherwise go unnoticed.
        part = re.search(r"-of-(\d+)", files[0].name)
        if part and int(part[1]) != len(files):
            raise ValueError(
                f"{places[0]}: expected {int(part[1])} files {split}-*.parquet, got {len(files)}"
            )
    return found


def hub_files(hub_id: str, splits: Sequence[str] = ()) -> tuple[Files | None, str]:
    """The files in the hub's local cache, else downloaded; or the reason why there are none."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def snapshot(local_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, repo_type="dataset", allow_patterns=_PATTERNS, local_files_only=local_only
            )
        )

    try:
        # An interrupted download leaves a part, which the hub then completes.
        if found := parquet_files(snapshot(True), splits):
            return found, ""
    except (LocalEntryNotFoundError, ValueError):
        pass
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return None, "HF_HUB_OFFLINE forbids the hub"
    try:
        # One short question first: the download itself waits long and tries often where nothing answers.
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=_CONNECT_TIMEOUT_S)
    except RepositoryNotFoundError:
        return None, "the hub has no public data set of that name"
    except HfHubHTTPError as error:
        return None, _refused(error)
    except Exception:
        # The library lets errors of its HTTP client through, whose kind changed from version to version.
        return None, "the hub cannot be reached"
    try:
        downloaded = snapshot(False)
    except Exception as error:
        return None, _refused(error)
    return parquet_files(downloaded, splits), "the hub has no such files"


def _refused(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"the hub did not give it ({textwrap.shorten(first, 120, placeholder=' ...')})"


def parquet_items(files: Files, name: str, *, label_column: str | None = None) -> dict[str, Items]:
    """Items of parquet files whose columns and classes are not known beforehand.

    A test or validation split without labels (all of them -1, as in the hub's ImageNet) is left out.

    Args:
        files: The files of each split; train must be among them.
        name: Name of the data set.
        label_column: Column of the label, where there are several.

    Raises:
        ValueError: No or several image or label columns, or a file is damaged.
    """
    if "train" not in files:
        raise ValueError(f"{name}: expected train-*.parquet beside {' and '.join(files)}, got none")
    first = files["train"][0]
    schema = open_parquet(first, []).schema_arrow
    features = _features(schema)
    image_column = _image_column(first, schema, features)
    label_column = label_column or _label_column(first, schema, features)
    if label_column not in schema.names:
        raise ValueError(f"{first}: expected a column {label_column}, got {', '.join(schema.names)}")
    names = features.get(label_column, {}).get("names")
    labels = {
        split: [value for path in paths for value in read_column(path, label_column)]
        for split, paths in files.items()
    }
    values = None if names else tuple(sorted(set(labels["train"]) - {None}))
    parts: dict[str, Items] = {}
    for split, paths in files.items():
        if split != "train" and set(labels[split]) <= {-1, None}:
            continue
        parts[split] = ParquetItems(
            paths,
            image_column=image_column,
            label_column=label_column,
            classes=tuple(names or map(str, values or ())),
            name=name,
            split=split,
            values=values,
        )
    return parts


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the hub's library wrote about the columns; nothing where something else wrote the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image_column(path: Path, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    import pyarrow as pa

    found = [name for name, kind in features.items() if kind.get("_type") == "Image"] or [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    column = _only(path, found, schema.names, "image column (a struct with bytes)")
    check_image_column(path, schema, column)
    return column


def _label_column(path: Path, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    found = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"] or [
        name for name in schema.names if name.lower() in LABEL_COLUMNS
    ]
    return _only(path, found, schema.names, "label column", "; choose with --data.label_column")


def _only(path: Path, found: list[str], names: list[str], what: str, todo: str = "") -> str:
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected one {what}, got {len(found)} ({', '.join(found) or 'none'}) among "
            f"{', '.join(names)}{todo}"
        )
    return found[0]
