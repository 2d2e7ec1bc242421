"""A labelled set of equally large images, kept as one array of bytes, and its stratified splits."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from vitrail.datasets.transforms import decode_image

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images and labels of one split.

    A subset shares `stored` with the set it was taken from and names its part in `rows`; everything else,
    `labels`, `images`, `batch` and `counts`, speaks of the set's own rows only.
    """

    stored: np.ndarray
    """uint8 [M, C, H, W], may be a read-only memory map."""
    rows: np.ndarray | None = None
    """Which of the stored images belong to the set, int64 [N]; None is all of them."""
    labels: np.ndarray
    """Class of each image of the set, int64 [N], 0 to K - 1."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    name: str
    """Name of the data set."""
    split: str
    """train, val or test."""
    fingerprint: str
    """SHA-256 (hex) of the content; changes with any pixel, label or choice of rows."""
    mean: tuple[float, ...]
    """Mean of pixel / 255 over the source's training images, a channel."""
    std: tuple[float, ...]
    """Standard deviation of the same."""

    def __post_init__(self) -> None:
        if self.stored.dtype != np.uint8 or self.stored.ndim != 4:
            raise ValueError(
                f"{self.name}: expected images as uint8 [N, C, H, W], got {self.stored.dtype} "
                f"{list(self.stored.shape)}"
            )
        n = len(self.stored) if self.rows is None else len(self.rows)
        if self.labels.dtype != np.int64 or self.labels.shape != (n,):
            raise ValueError(
                f"{self.name}: expected labels as int64 [{n}], got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        if n and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise ValueError(
                f"{self.name}: expected labels from 0 to {len(self.classes) - 1}, got "
                f"{self.labels.min()} to {self.labels.max()}"
            )

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: ArrayLike,
        *,
        classes: tuple[str, ...] | None = None,
        name: str = "images",
        split: str = "train",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Self:
        """Make a set of images that are in memory.

        Args:
            images: uint8 [N, C, H, W].
            labels: Class of each image, [N].
            classes: Names of the classes; "0", "1", ... when not given.
            name: Name of the data set.
            split: train, val or test.
            mean: A channel, of pixel / 255; computed from `images` when not given.
            std: As `mean`.

        Raises:
            ValueError: The arrays are of another kind or length, or a label has no class.
        """
        targets = np.asarray(labels, dtype=np.int64)
        if mean is None or std is None:
            found_mean, found_std = _statistics(images)
            mean, std = mean or found_mean, std or found_std
        return cls(
            stored=images,
            labels=targets,
            classes=classes or tuple(str(k) for k in range(int(targets.max(initial=-1)) + 1)),
            name=name,
            split=split,
            fingerprint=content_hash(images, targets),
            mean=mean,
            std=std,
        )

    @classmethod
    def from_hub(
        cls,
        dataset: Any,
        *,
        label_column: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Self:
        """Make a set from a `datasets.Dataset` of the Hugging Face library, decoded as `load_dataset` does.

        Args:
            dataset: One split; the columns are found by their feature types `Image` and `ClassLabel`.
            label_column: Needed only where there are several label columns (`fine_label`, `coarse_label`).
            mean: A channel, of pixel / 255; computed from the images when not given.
            std: As `mean`.

        Raises:
            ValueError: No or several image or label columns, an image that cannot be decoded, or images of
                unequal size.
        """
        features = getattr(dataset, "features", None)
        if not hasattr(dataset, "cast_column") or not features:
            raise ValueError(f"expected one split of a hub data set (datasets.Dataset), got {type(dataset)}")
        name, split = dataset.info.dataset_name or "hub", str(dataset.split or "train")
        image_column = _only_column(features, "Image", name)
        label_column = label_column or _only_column(features, "ClassLabel", name)
        # Undecoded, so that the bytes pass through the same decoder as those of a parquet file.
        raw = dataset.with_format(None).cast_column(image_column, type(features[image_column])(decode=False))
        arrays, labels = [], []
        for row, record in enumerate(raw.select_columns([image_column, label_column])):
            encoded = record[image_column]
            arrays.append(decode_image(encoded["bytes"] or encoded["path"], f"{name}/{split}, row {row}"))
            labels.append(record[label_column])
        in_chans = max((len(array) for array in arrays), default=1)
        for row, array in enumerate(arrays):
            if array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"{name}/{split}, row {row}: expected {_size(arrays[0])} pixels as in row 0, got "
                    f"{_size(array)}"
                )
            arrays[row] = np.broadcast_to(array, (in_chans, *array.shape[1:]))
        return cls.from_arrays(
            np.stack(arrays) if arrays else np.empty((0, 1, 1, 1), np.uint8),
            labels,
            classes=tuple(features[label_column].names),
            name=name,
            split=split,
            mean=mean,
            std=std,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> np.ndarray:
        """The images of the set, uint8 [N, C, H, W]; a copy where the set is a part of what is stored."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.stored.shape[2], self.stored.shape[3]

    @property
    def in_chans(self) -> int:
        """Number of channels."""
        return self.stored.shape[1]

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Read some images with one indexed read.

        Args:
            indices: Positions in the set, [B], in any order.

        Returns:
            Images, uint8 [B, C, H, W], and labels, int64 [B].
        """
        chosen = np.asarray(indices, dtype=np.int64)
        rows = chosen if self.rows is None else self.rows[chosen]
        return torch.from_numpy(self.stored.take(rows, axis=0)), torch.from_numpy(self.labels[chosen])

    def subset(self, indices: ArrayLike, *, split: str | None = None) -> ImageSet:
        """A set of some of the images, in the order given, that shares the stored pixels.

        Args:
            indices: Positions in this set, [N].
            split: Its name where that changes (val out of train).
        """
        chosen = np.asarray(indices, dtype=np.int64)
        labels = self.labels[chosen]
        return replace(
            self,
            rows=chosen if self.rows is None else self.rows[chosen],
            labels=labels,
            split=split or self.split,
            fingerprint=hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest(),
        )

    def counts(self) -> np.ndarray:
        """Number of images of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.classes))


def content_hash(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 (hex) of uint8 images [N, C, H, W] and int64 labels [N]."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def stratified_split(labels: ArrayLike, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the images, the same share of every class.

    Each class is within one image of its share. A class with two or more images is on both sides (unless the
    fraction is 0 or 1); a class with one image stays in the rest.
    For one seed, a smaller fraction holds out a part of what a larger one holds out.

    Args:
        labels: Class of each image, [N].
        fraction: Share to hold out, 0 to 1.
        seed: Not negative; decides which images.

    Returns:
        Positions of the rest and of the held-out images, both int64 and ascending.

    Raises:
        ValueError: The fraction is not from 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    targets = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    held = np.zeros(len(targets), dtype=bool)
    for label in np.unique(targets):
        own = shuffled[targets[shuffled] == label]
        # Each class is rounded on its own: sharing out the remainders would fit the whole better, but then
        # the number of a class could fall while the fraction rises.
        number = math.floor(round(len(own) * fraction, 9) + 0.5)
        if 0.0 < fraction < 1.0:
            number = min(max(number, 1), len(own) - 1)
        held[own[:number]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255, a channel."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        # A histogram is exact and needs no floating-point copy of the images.
        weights = np.bincount(images[:, channel].ravel(), minlength=256) / max(images[:, channel].size, 1)
        mean = float(weights @ values)
        means.append(mean)
        stds.append(float(np.sqrt(weights @ (values - mean) ** 2)))
    return tuple(means), tuple(stds)


def _only_column(features: Any, kind: str, name: str) -> str:
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected one column of type {kind}, got {len(found)} ({', '.join(found) or 'none'}) "
            f"among {', '.join(features)}"
            f"{'; choose with label_column' if kind == 'ClassLabel' and found else ''}"
        )
    return found[0]


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[2]}"
