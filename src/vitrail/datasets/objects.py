"""Python objects as items: data sets of torchvision, torch and the Hugging Face hub, and lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.datasets.items import Items
from vitrail.datasets.tables import class_order
from vitrail.datasets.transforms import read_file


def object_items(
    dataset: Any,
    *,
    classes: Sequence[str] | None = None,
    label_column: str | None = None,
    name: str | None = None,
    split: str | None = None,
) -> Items:
    """Items of a Python object.

    Args:
        dataset: One split of a hub data set (`datasets.Dataset`), or anything that `DatasetItems` takes.
        classes: Names of the classes; the data set's own, else "0", "1", ... when not given.
        label_column: Name of the label, where items are mappings that have several.
        name: Name of the data set; the hub's or that of its type when not given.
        split: train, val or test; the hub's, else train, when not given.

    Raises:
        ValueError: It has no length or no items, or no or several columns to choose from.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise ValueError(f"expected one split of a data set, got {kind} with {', '.join(map(str, dataset))}")
    if not hasattr(type(dataset), "__len__"):
        raise ValueError(
            f"expected a data set with a length, got {kind}: take a part of a stream into memory, as "
            "list(stream.take(5000))"
        )
    if not hasattr(type(dataset), "__getitem__"):
        raise ValueError(f"expected a data set with items by number, got {kind}: give a loader's own dataset")
    make = HubItems if hasattr(dataset, "cast_column") else DatasetItems
    return make(dataset, classes=classes, label_column=label_column, name=name, split=split)


class HubItems(Items):
    """Rows of a `datasets.Dataset`, undecoded, so that they pass through the same decoder as files.

    The columns are found by their feature types `Image` and `ClassLabel`. A label column of another type
    counts its values as classes, sorted.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        classes: Sequence[str] | None,
        label_column: str | None,
        name: str | None,
        split: str | None,
    ) -> None:
        self.name = name or getattr(dataset.info, "dataset_name", None) or "hub"
        self.split = split or str(dataset.split or "train")
        features = dataset.features
        self._image_column = _only_column(features, "Image", self.name)
        self._label_column = label_column or _only_column(features, "ClassLabel", self.name)
        if self._label_column not in features:
            raise ValueError(f"{self.name}: expected a column {label_column}, got {', '.join(features)}")
        raw = type(features[self._image_column])(decode=False)
        dataset = dataset.with_format(None).select_columns([self._image_column, self._label_column])
        self._dataset = dataset.cast_column(self._image_column, raw)
        names = getattr(features[self._label_column], "names", None)
        self._values = None if names else class_order(str(value) for value in self._column)
        self.classes = tuple(classes or names or self._values or ())
        _check_labels(self)

    @property
    def _count(self) -> int:
        return len(self._dataset)

    @property
    def _column(self) -> list[Any]:
        values = list(self._dataset[self._label_column])
        if None in values:
            raise ValueError(f"{self._source(values.index(None))}: expected a class, got None")
        return values

    @cached_property
    def _labels(self) -> np.ndarray:
        values = self._column
        if self._values is not None:
            number = {value: k for k, value in enumerate(self._values)}
            values = [number[str(value)] for value in values]
        return np.array(values, dtype=np.int64)

    @property
    def _key(self) -> None:
        return None

    def _read(self, row: int) -> bytes:
        image = self._dataset[row][self._image_column]
        content: bytes | None = image["bytes"]
        return content or read_file(Path(image["path"] or ""), self._source(row))

    def _source(self, row: int) -> str:
        return f"{self.name}/{self.split}, row {row}"


class DatasetItems(Items):
    """The images of a Python object: a torchvision data set, a torch `Dataset`, a list.

    Each item is a pair (image, class number), or a mapping with one image and one class number among its
    values. An image is a PIL image, a uint8 array [H, W, C] or [H, W], a uint8 tensor [C, H, W] or [H, W], or
    one of these in floating point with values k / 255, which is what torchvision's `ToTensor` gives.

    The data set's own transforms run at every read.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        classes: Sequence[str] | None,
        label_column: str | None,
        name: str | None,
        split: str | None,
    ) -> None:
        self.name, self.split = name or _kind(dataset), split or "train"
        self._dataset = dataset
        self._image_column: Any = 0
        self._label_column: Any = 1
        if len(dataset) and isinstance(dataset[0], Mapping):
            self._image_column, self._label_column = _columns(dataset[0], label_column, self._source(0))
        given = classes or _attribute(dataset, "classes")
        self.classes = tuple(str(k) for k in given or range(int(self._labels.max(initial=-1)) + 1))
        _check_labels(self)

    @property
    def _count(self) -> int:
        return len(self._dataset)

    @cached_property
    def _labels(self) -> np.ndarray:
        if (known := self._known_labels()) is not None:
            return known
        # Every image is made for nothing here; most data sets of torchvision never get this far.
        return np.array([self._label(row) for row in range(self._count)], dtype=np.int64)

    def _known_labels(self) -> np.ndarray | None:
        """The attribute `targets` of torchvision's data sets, where its ends agree with the items."""
        targets = _attribute(self._dataset, "targets")
        if targets is None or len(targets) != self._count or not self._count:
            return None
        labels = np.asarray(targets)
        ends = (0, self._count - 1)
        if labels.dtype.kind not in "iu" or any(int(labels[row]) != self._label(row) for row in ends):
            return None
        return labels.astype(np.int64)

    @property
    def _key(self) -> None:
        return None

    def _pair(self, row: int) -> tuple[Any, Any]:
        item = self._dataset[row]
        try:
            return item[self._image_column], item[self._label_column]
        except (TypeError, IndexError, KeyError):
            raise ValueError(
                f"{self._source(row)}: expected an image and its class number, got {type(item).__name__}"
            ) from None

    def _label(self, row: int) -> int:
        label = self._pair(row)[1]
        try:
            if int(label) == label:
                return int(label)
        except (TypeError, ValueError):
            pass
        raise ValueError(f"{self._source(row)}: expected a class number, got {label!r}")

    def _read(self, row: int) -> Image.Image:
        return _picture(self._pair(row)[0], self._source(row))

    def _source(self, row: int) -> str:
        return f"{self.name}/{self.split}, row {row}"


def _check_labels(items: Items) -> None:
    labels = items.labels
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(items.classes)):
        raise ValueError(
            f"{items.name}: expected labels from 0 to {len(items.classes) - 1}, got {labels.min()} to "
            f"{labels.max()}"
        )


def _kind(dataset: Any) -> str:
    inner = getattr(dataset, "dataset", None)
    return type(dataset).__name__.lower() if inner is None else _kind(inner)


def _attribute(dataset: Any, name: str) -> Any:
    """An attribute of a data set, or of the one that a `torch.utils.data.Subset` is a part of."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        whole = _attribute(dataset.dataset, name)
        if name == "classes" or whole is None:
            return whole
        return np.asarray(whole)[np.asarray(dataset.indices, dtype=np.int64)]
    return getattr(dataset, name, None)


def _only_column(features: Any, kind: str, name: str) -> str:
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected one column of type {kind}, got {len(found)} ({', '.join(found) or 'none'}) "
            f"among {', '.join(features)}"
            f"{'; choose with label_column' if kind == 'ClassLabel' and found else ''}"
        )
    return found[0]


def _columns(record: Mapping[str, Any], label_column: str | None, where: str) -> tuple[str, str]:
    """Names of the image and of the class number in a record, found by the kinds of its values."""
    images = [
        key for key, value in record.items() if isinstance(value, Image.Image | torch.Tensor | np.ndarray)
    ]
    labels = [label_column] if label_column else [k for k, v in record.items() if type(v) is int]
    if len(images) != 1 or len(labels) != 1 or labels[0] not in record:
        raise ValueError(
            f"{where}: expected one image and one class number among {', '.join(map(str, record))}"
            f"{'; choose with label_column' if len(labels) > 1 else ''}"
        )
    return images[0], labels[0]


def _picture(image: Any, where: str) -> Image.Image:
    """A PIL image of what a data set gives for one."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array  # [C, H, W] -> [H, W, C]
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(f"{where}: expected a PIL image, an array or a tensor, got {type(image).__name__}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"{where}: expected an image of 1 to 4 channels, got shape {list(image.shape)}")
    if array.dtype.kind == "f":
        array = _bytes(array, where)
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: expected values as uint8 or floating point 0 to 1, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def _bytes(array: np.ndarray, where: str) -> np.ndarray:
    levels = array.astype(np.float64) * 255
    rounded = np.rint(levels)
    if not (np.isfinite(levels).all() and levels.min() >= -0.01 and levels.max() <= 255.01):
        raise ValueError(
            f"{where}: expected floating-point values from 0 to 1, got {array.min():.3g} to "
            f"{array.max():.3g}; leave the normalisation out of the transform: the model's preprocessing "
            "does it"
        )
    if np.abs(levels - rounded).max() > 0.01:
        raise ValueError(
            f"{where}: expected floating-point values k / 255 as ToTensor gives them, got values between; "
            "leave resizing after ToTensor out of the transform, or do it before"
        )
    return rounded.astype(np.uint8)
