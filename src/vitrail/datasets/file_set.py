"""A labelled set of images that are decoded when they are read: for what does not fit into memory.

It has the face of an `ImageSet`; what differs is that a read costs a decoding, so that training reads it with
worker processes (`loading`), and that a random crop can be taken from the original picture, with all its
pixels, where an `ImageSet` only has the resized one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.datasets.decode import Crop, decode_resized
from vitrail.datasets.images import ImageSet, channel_statistics
from vitrail.datasets.items import Items
from vitrail.datasets.scan import decoded

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_SAMPLE = 2_000


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSet:
    """Images and labels of one split, decoded when they are read. `from_items` makes it.

    It can be pickled, so that worker processes read by themselves.
    """

    items: Items
    """The encoded images."""
    img_size: tuple[int, int]
    """Height and width that every image comes out at."""
    in_chans: int
    """Number of channels that every image comes out with: 1 or 3."""
    mean: tuple[float, ...]
    """Mean of pixel / 255 over the source's training images, a channel."""
    std: tuple[float, ...]
    """Standard deviation of the same."""

    def __post_init__(self) -> None:
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"{self.name}: img_size: expected height and width, got {self.img_size}")
        if self.in_chans not in (1, 3):
            raise ValueError(f"{self.name}: in_chans: expected 1 or 3, got {self.in_chans}")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(
                f"{self.name}: expected a mean and a std for each of {self.in_chans} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )

    @classmethod
    def from_items(
        cls,
        items: Items,
        *,
        img_size: tuple[int, int],
        in_chans: int,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Self:
        """Make a set of encoded images.

        Args:
            items: The images and their labels.
            img_size: Height and width to resize to: the shorter side fits, the centre is taken.
            in_chans: 1 (luminance) or 3 (RGB); every image is converted.
            mean: A channel, of pixel / 255; when not given, measured on 2,000 images (all of a smaller set),
                which the number of images alone decides.
            std: As `mean`.

        Raises:
            ValueError: A size that does not exist, or an image that is measured is broken.
        """
        if mean is None or std is None:
            found_mean, found_std = _sample_statistics(items, img_size, in_chans)
            mean, std = mean or found_mean, std or found_std
        return cls(items=items, img_size=img_size, in_chans=in_chans, mean=mean, std=std)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.items.name

    @property
    def split(self) -> str:
        """train, val or test."""
        return self.items.split

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.items.classes

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 [N], 0 to K - 1."""
        return self.items.labels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the pixels, without reading them.

        That is the key of the items (for files: their paths, sizes, times of change and labels), the size and
        the channels. Unlike that of an `ImageSet` it changes when equal files are copied elsewhere. Items
        without a key are in memory: there it is made of the names of the sources and the labels.
        """
        digest = hashlib.sha256(f"{self.items.key} {self.img_size} {self.in_chans}".encode())
        if self.items.key is None:
            sources = "\n".join(self.items.source(index) for index in range(len(self)))
            digest.update(sources.encode(errors="surrogateescape") + self.labels.tobytes())
        return digest.hexdigest()

    def batch(self, indices: ArrayLike, crops: Sequence[Crop] | None = None) -> tuple[Tensor, Tensor]:
        """Read some images.

        Args:
            indices: Positions in the set, [B], in any order.
            crops: For each of them the part to take of the original picture; when not given, the whole is
                fitted to `img_size` and its centre taken.

        Returns:
            Images, uint8 [B, C, H, W], and labels, int64 [B].

        Raises:
            BrokenImageError: An image that cannot be decoded; the message names it.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return self.pixels(chosen, crops), torch.from_numpy(self.labels[chosen])

    def pixels(self, indices: ArrayLike, crops: Sequence[Crop] | None = None) -> Tensor:
        """`batch` without labels, which are not touched: uint8 [B, C, H, W]."""
        chosen = np.asarray(indices, dtype=np.int64)
        images = torch.empty((len(chosen), self.in_chans, *self.img_size), dtype=torch.uint8)
        for row, index in enumerate(chosen.tolist()):
            images[row] = decode_resized(
                self.items.read(index),
                self.items.source(index),
                self.img_size,
                self.in_chans,
                crop=None if crops is None else crops[row],
            )
        return images

    def subset(self, indices: ArrayLike, *, split: str | None = None) -> FileSet:
        """A set of some of the images, in the order given.

        Args:
            indices: Positions in this set, [N].
            split: Its name where that changes (val out of train).
        """
        return replace(self, items=self.items.subset(indices, split=split))

    def counts(self) -> np.ndarray:
        """Number of images of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.classes))


Images = ImageSet | FileSet
"""A split, however its images are kept."""


def _sample_statistics(
    items: Items, img_size: tuple[int, int], in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255, a channel, over some of the images."""
    # Ascending: parquet files are slow in any other order.
    chosen = np.sort(np.random.default_rng(0).permutation(len(items))[:_SAMPLE])

    def measure(encoded: bytes | Image.Image, source: str) -> np.ndarray:
        pixels = decode_resized(encoded, source, img_size, in_chans).numpy()
        mean, std = channel_statistics(pixels[None])
        return np.stack([mean, np.square(std) + np.square(mean)])  # [2, C]: mean, mean of squares

    found = []
    for measured in decoded(items.subset(chosen), measure):
        if isinstance(measured, ValueError):
            raise measured
        found.append(measured)
    mean, square = np.mean(found, axis=0) if found else np.zeros((2, in_chans))
    return tuple(mean.tolist()), tuple(np.sqrt((square - mean**2).clip(min=0.0)).tolist())
