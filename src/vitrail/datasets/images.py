"""A labelled set of equally large images or clips, kept as one array of bytes, and its stratified splits."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_BLOCK = 65_536


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images and labels of one split, or clips: then what is said of an image holds for [T, C, H, W].

    A subset shares `stored` with the set it was taken from and names its part in `rows`; everything else,
    `labels`, `images`, `batch` and `counts`, speaks of the set's own rows only.
    """

    stored: np.ndarray
    """uint8 [M, C, H, W], or clips [M, T, C, H, W]; may be a read-only memory map."""
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
        if self.stored.dtype != np.uint8 or self.stored.ndim not in (4, 5):
            raise ValueError(
                f"{self.name}: expected images as uint8 [N, C, H, W] or clips as uint8 [N, T, C, H, W], got "
                f"{self.stored.dtype} {list(self.stored.shape)}"
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
            images: uint8 [N, C, H, W], or clips [N, T, C, H, W].
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
            found_mean, found_std = channel_statistics(images)
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

    def __len__(self) -> int:
        return len(self.stored if self.rows is None else self.rows)

    @property
    def images(self) -> np.ndarray:
        """The images of the set, uint8 [N, C, H, W]; a copy where the set is a part of what is stored."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.stored.shape[-2], self.stored.shape[-1]

    @property
    def in_chans(self) -> int:
        """Number of channels."""
        return self.stored.shape[-3]

    @property
    def frames(self) -> int | None:
        """Number of frames of each clip; None for images."""
        return self.stored.shape[1] if self.stored.ndim == 5 else None

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Read some images with one indexed read.

        Args:
            indices: Positions in the set, [B], in any order.

        Returns:
            Images, uint8 [B, C, H, W], and labels, int64 [B].
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return self.pixels(chosen), torch.from_numpy(self.labels[chosen])

    def pixels(self, indices: ArrayLike) -> Tensor:
        """`batch` without labels, which are not touched: uint8 [B, C, H, W]."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = chosen if self.rows is None else self.rows[chosen]
        return torch.from_numpy(self.stored.take(rows, axis=0))

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


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255, a channel, of uint8 images [N, C, H, W] or clips."""
    images = images.reshape(-1, *images.shape[-3:])
    N, C, H, W = images.shape
    count = max(N * H * W, 1)
    # A block that fits into the processor's cache is several times as fast as all at once.
    block = max(1, _BLOCK // max(H * W, 1))
    means, stds = [], []
    for channel in range(C):
        total = squares = 0.0  # whole numbers, exact up to 2^53
        for start in range(0, N, block):
            values = images[start : start + block, channel].astype(np.float64).ravel()
            total += float(values.sum())
            squares += float(values @ values)
        mean = total / count
        means.append(mean / 255)
        stds.append(math.sqrt(max(squares / count - mean**2, 0.0)) / 255)
    return tuple(means), tuple(stds)
