"""Images decoded once into one uint8 array that later loads only map into memory.

The array lies in the cache under a name that changes with the images, their labels, and the size and number
of channels asked for: a changed set is decoded anew, and an unchanged one never again. Items without a key,
which are in memory anyway, are decoded into memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vitrail.datasets.cache import cached, digest
from vitrail.datasets.images import channel_statistics, content_hash
from vitrail.datasets.items import Items
from vitrail.datasets.scan import decoded
from vitrail.datasets.transforms import BrokenImageError, decode_image, is_grey, open_header, upright_size

_FORMAT = 2

ONE_SIZE = "give one size to all with --model.img_size"

Broken = Literal["refuse", "skip"]
Skipped = tuple[tuple[str, str], ...]
"""Sources of broken images with the reasons."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Resident:
    """Decoded images of one split."""

    images: np.ndarray
    """uint8 [N, C, H, W], a read-only memory map where it is cached."""
    labels: np.ndarray
    """int64 [N]."""
    fingerprint: str
    """`content_hash` of both, as found when they were decoded."""
    mean: tuple[float, ...]
    """Mean of pixel / 255, a channel."""
    std: tuple[float, ...]
    """Standard deviation of the same."""
    skipped: Skipped
    """The images left out because they are broken."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How the images are to come out."""

    img_size: tuple[int, int] | None = None
    """Height and width; that of the first image when not given."""
    resize: bool = False
    """Fit every image to `img_size`; without it, an image of another size is an error."""
    in_chans: int | None = None
    """1 or 3; when not given, 1 if every image is grey, else 3."""


def load_resident(items: Items, geometry: Geometry, *, broken: Broken = "refuse") -> Resident:
    """Give the decoded images of some items, from the cache or decoded now.

    Args:
        items: The images of one split.
        geometry: Their size and channels.
        broken: What to do with images that cannot be decoded: refuse all, or leave those out.

    Raises:
        ValueError: An image is broken and refused, has another size, or the source is damaged (the message
            names it), or the cache cannot be written.
    """
    if items.key is None:
        found = _decode(items, geometry, None)
    else:
        name = f"{items.name}-{items.split}-{digest(items.key, geometry)}-v{_FORMAT}"
        found = cached(name, lambda folder: _write(folder, items, geometry), _read)
    check_broken(found.skipped, len(found.labels) + len(found.skipped), broken)
    return found


def check_broken(found: Skipped, total: int, broken: Broken) -> None:
    """Refuse broken images unless they are to be left out.

    Args:
        found: Their sources with the reasons.
        total: Number of all images.
        broken: refuse or skip.

    Raises:
        ValueError: Some are broken and `broken` is refuse, or all are broken.
    """
    if not found or (broken == "skip" and len(found) < total):
        return
    source, reason = found[0]
    rest = f"{len(found):,} of {total:,} images {'is' if len(found) == 1 else 'are'} broken"
    todo = "" if broken == "skip" else "; repair or remove them, or leave them out with --data.broken skip"
    raise ValueError(f"{source}: {reason}; {rest}{todo}")


def _read(folder: Path) -> Resident | None:
    """Map what is in the cache; None where there is nothing, or something that was damaged since."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # As a plain array: every index into numpy's memmap class costs its own bookkeeping.
        images = np.asarray(np.load(folder / "images.npy", mmap_mode="r"))
        labels = np.load(folder / "labels.npy")
        if list(images.shape) != meta["shape"] or len(labels) != len(images):
            return None
        return Resident(
            images=images,
            labels=labels,
            fingerprint=meta["fingerprint"],
            mean=tuple(meta["mean"]),
            std=tuple(meta["std"]),
            skipped=tuple((source, reason) for source, reason in meta["skipped"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _write(folder: Path, items: Items, geometry: Geometry) -> None:
    made = _decode(items, geometry, folder / "images.npy")
    np.save(folder / "labels.npy", made.labels)
    meta = {
        "fingerprint": made.fingerprint,
        "shape": list(made.images.shape),
        "mean": made.mean,
        "std": made.std,
        "skipped": made.skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _decode(items: Items, geometry: Geometry, path: Path | None) -> Resident:
    """Decode into a file, or into memory where there is none."""
    labels = items.labels  # before the images: a wrong label is found in a moment
    first = None if geometry.img_size else first_size(items)
    height, width = first[1] if first else geometry.img_size or (1, 1)
    in_chans = geometry.in_chans or _channels(items)
    shape = (len(items), in_chans, height, width)
    # Written through a memory map, so that a set needs no memory of its own while it is decoded.
    images = (
        np.empty(shape, dtype=np.uint8)
        if path is None
        else np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    )
    resize = (height, width) if geometry.resize else None

    def decode(encoded: bytes | Image.Image, source: str) -> np.ndarray:
        return decode_image(encoded, source, in_chans, resize)

    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    for index, array in enumerate(decoded(items, decode)):
        if isinstance(array, BrokenImageError):
            skipped.append((array.source, array.reason))
            continue
        if array.shape[1:] != (height, width):
            raise ValueError(
                f"{items.source(index)}: expected {height}x{width} pixels"
                f"{f' as in {items.source(first[0])}' if first else ''}, got "
                f"{array.shape[1]}x{array.shape[2]}{f'; {ONE_SIZE}' if first else ''}"
            )
        images[len(kept)] = array
        kept.append(index)
    labels = labels[kept]
    if skipped:
        images = _shortened(images, len(kept), path)
    if isinstance(images, np.memmap):
        images.flush()
    mean, std = channel_statistics(images)
    return Resident(
        images=images,
        labels=labels,
        fingerprint=content_hash(images, labels),
        mean=mean,
        std=std,
        skipped=tuple(skipped),
    )


def _shortened(images: np.ndarray, count: int, path: Path | None) -> np.ndarray:
    """The first images only, written anew where they are in a file: its header states how many there are."""
    if path is None:
        return images[:count]
    beside = path.with_name("whole.npy")
    path.rename(beside)
    shorter = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, *images.shape[1:]))
    shorter[:] = images[:count]
    beside.unlink()
    return shorter


def first_size(items: Items) -> tuple[int, tuple[int, int]] | None:
    """Position, and height and width upright, of the first image with a whole header."""
    for index in range(len(items)):
        try:
            return index, upright_size(_header(items, index))
        except BrokenImageError:
            continue
    return None


def median_size(items: Items, most: int = 100) -> tuple[int, int] | None:
    """Median height and width, upright, of some images, evenly over all; None where no header is whole."""
    sizes = []
    for index in np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)):
        try:
            sizes.append(upright_size(_header(items, int(index))))
        except BrokenImageError:
            continue
    if not sizes:
        return None
    height, width = np.median(sizes, axis=0).tolist()
    return round(height), round(width)


def _channels(items: Items) -> int:
    """3 where an image has colours; only headers are read, and in most sets that of the first image."""
    for index in range(len(items)):
        try:
            if not is_grey(_header(items, index)):
                return 3
        except BrokenImageError:
            continue
    return 1


def _header(items: Items, index: int) -> Image.Image:
    encoded = items.read(index)
    return encoded if isinstance(encoded, Image.Image) else open_header(encoded, items.source(index))
