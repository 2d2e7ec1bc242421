"""Clips: some frames of each video, decoded once and kept as one array [N, T, C, H, W].

| layout | classes |
|---|---|
| `train/<class>/<clip>/*.jpg`, and `val/` and `test/` likewise | names of the class folders of train |
| `<class>/<clip>/*.jpg` | names of the class folders |

Frames are read in the order of the numbers in their names (frame_2 before frame_10), and of each video those
around its middle are taken. Films (mp4, avi) are not read: `ffmpeg -i x.mp4 x/%04d.jpg` makes frames of them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vitrail.datasets.folder import class_folders, images_in, split_folders
from vitrail.datasets.images import ImageSet, content_hash
from vitrail.datasets.items import FileItems, not_a_class
from vitrail.datasets.resident import Broken, Geometry, Resident, Skipped, load_resident

_SHUFFLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Which frames of a video make a clip."""

    count: int = 3
    """T."""
    stride: int = 1
    """Every how many frames one is taken; 1: consecutive ones."""
    shuffled: bool = False
    """Each clip's frames in a random order: a control that takes the motion's direction away."""

    def __post_init__(self) -> None:
        for name, value in (("frames", self.count), ("frame_stride", self.stride)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")

    @property
    def span(self) -> int:
        """Frames from the first to the last one taken, both included."""
        return (self.count - 1) * self.stride + 1

    def choose(self, available: int, source: str) -> list[int]:
        """The numbers of the frames around the middle of a video.

        Args:
            available: How many frames it has.
            source: What to call it in an error.

        Raises:
            ValueError: It has too few.
        """
        if available < self.span:
            raise ValueError(
                f"{source}: {self.count} frames at stride {self.stride} need {self.span}, got {available}; "
                "take fewer with data.frames or data.frame_stride"
            )
        first = (available - self.span) // 2
        return list(range(first, first + self.span, self.stride))


class Video(NamedTuple):
    """One video: its frames, and its class."""

    source: str
    """Its folder."""
    frames: tuple[str, ...]
    """The file of each frame."""
    label: str


def find_videos(folder: Path) -> tuple[dict[str, list[Video]], tuple[str, ...]]:
    """The videos of each split of a folder, and the names of the classes.

    Raises:
        ValueError: No layout fits, or a class of val or test is not in train.
    """
    splits = split_folders(folder) or {"train": folder}
    if "train" not in splits:
        raise ValueError(f"{folder}: expected a split train beside {' and '.join(splits)}, got none")
    classes = class_folders(splits["train"])
    parts: dict[str, list[Video]] = {}
    for split, place in splits.items():
        parts[split] = []
        for label in class_folders(place):
            if label not in classes:
                raise ValueError(not_a_class(str(folder), label, split, classes))
            parts[split] += _videos(place / label, label)
    if not parts["train"]:
        raise ValueError(
            f"{splits['train']}: expected class folders with a folder of frames for each clip, got none; "
            "make frames of films with ffmpeg, or leave data.frames out to read images"
        )
    return parts, classes


def load_clips(
    folder: Path, frames: Frames, geometry: Geometry, broken: Broken
) -> tuple[dict[str, ImageSet], Skipped]:
    """Clips of each split of a folder; channels and statistics are those of train.

    Args:
        folder: In one of the layouts above.
        frames: Which frames make a clip.
        geometry: Size and channels of the frames.
        broken: Refuse clips with frames that cannot be decoded, or skip them.

    Returns:
        The sets, and the sources of the broken frames with the reasons.

    Raises:
        ValueError: As `find_videos` and `load_resident`, or a video has too few frames.
    """
    parts, classes = find_videos(folder)
    sets: dict[str, ImageSet] = {}
    skipped: Skipped = ()
    for split, videos in parts.items():
        made, left_out = _clips(videos, classes, folder.resolve().name, split, frames, geometry, broken)
        if sets:
            made = replace(made, mean=sets["train"].mean, std=sets["train"].std)
        geometry = replace(geometry, in_chans=made.in_chans)
        sets[split], skipped = made, skipped + left_out
    return sets, skipped


def side_by_side(images: Tensor) -> Tensor:
    """Clips [B, T, C, H, W] as pictures to look at, [B, C, H, T * W]; images [B, C, H, W] as they are."""
    return images if images.ndim == 4 else images.permute(0, 2, 3, 1, 4).flatten(3)


def with_shuffled_frames(clips: ImageSet) -> ImageSet:
    """The same clips with the frames of each in a random order, which is always the same."""
    generator = np.random.default_rng([_SHUFFLE_SEED, len(clips)])
    stored = clips.images
    order = generator.permuted(np.tile(np.arange(stored.shape[1]), (len(stored), 1)), axis=1)  # [N, T]
    stored = np.take_along_axis(stored, order[:, :, None, None, None], axis=1)
    return replace(clips, stored=stored, rows=None, fingerprint=content_hash(stored, clips.labels))


def _clips(
    videos: Sequence[Video],
    classes: tuple[str, ...],
    name: str,
    split: str,
    frames: Frames,
    geometry: Geometry,
    broken: Broken,
) -> tuple[ImageSet, Skipped]:
    """The clips of one split, without those of which a frame is broken where these are to be skipped."""
    chosen = [[own.frames[place] for place in frames.choose(len(own.frames), own.source)] for own in videos]
    labels = [classes.index(own.label) for own in videos]

    def load(which: Sequence[int]) -> Resident:
        items = FileItems(
            [frame for number in which for frame in chosen[number]],
            np.repeat([labels[number] for number in which], frames.count),
            classes=classes,
            name=name,
            split=split,
        )
        return load_resident(items, geometry, broken=broken)

    kept = list(range(len(videos)))
    found = load(kept)
    skipped = found.skipped
    if skipped:
        damaged = {source for source, _ in skipped}
        kept = [number for number in kept if damaged.isdisjoint(chosen[number])]
        found = load(kept)
    made = ImageSet(
        stored=found.images.reshape(-1, frames.count, *found.images.shape[1:]),
        labels=found.labels[:: frames.count],
        classes=classes,
        name=name,
        split=split,
        fingerprint=found.fingerprint,
        mean=found.mean,
        std=found.std,
    )
    return made, skipped


def _videos(folder: Path, label: str) -> list[Video]:
    """The videos in a class folder, in the order of their names."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: _by_numbers(entry.name)):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        names = sorted(images_in(Path(entry.path), Counter()), key=_by_numbers)
        if names:
            found.append(Video(entry.path, tuple(os.path.join(entry.path, name) for name in names), label))
    return found


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Order in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
