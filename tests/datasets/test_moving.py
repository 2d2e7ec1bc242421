"""Moving digits: the class is the motion and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vitrail.datasets import ImageSet, list_datasets, load_dataset
from vitrail.datasets.clips import Frames
from vitrail.datasets.moving import LENGTH, MOTIONS, SPEED, moving_digits


def _digits(n: int = 200, split: str = "train") -> ImageSet:
    """Bars off the middle, so that turning shows."""
    images = np.zeros((n, 1, 28, 28), dtype=np.uint8)
    images[:, :, 4:24, 6:12] = 255
    return ImageSet.from_arrays(images, np.zeros(n), split=split)


def _centres(clips: np.ndarray) -> np.ndarray:
    """Column and row of the centre of mass of each frame, [N, T, 2]."""
    mass = clips[:, :, 0].astype(np.float64)
    total = mass.sum(axis=(2, 3))
    places = np.arange(28)
    return np.stack([(mass.sum(2) @ places) / total, (mass.sum(3) @ places) / total], axis=2)


def test_directions_are_those_of_the_classes() -> None:
    clips = moving_digits(_digits(), Frames(count=3, stride=2))
    assert clips.stored.shape == (200, 3, 1, 28, 28)
    assert clips.classes == MOTIONS
    assert clips.counts().tolist() == [20] * 10
    centres = _centres(clips.images)
    angle = {"right": 0, "up": 90, "left": 180, "down": 270}
    for k, motion in enumerate(MOTIONS[:8]):
        moved = np.diff(centres[clips.labels == k], axis=1)  # [n, 2, 2]
        degrees = np.mean([angle[part] for part in motion.split()])
        degrees = 315 if motion == "down right" else degrees
        expected = 2 * SPEED * np.array([np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))])
        assert np.abs(moved - expected).max() < 0.05, motion


def test_turning_digits_turn_by_the_same_angle_to_the_two_sides() -> None:
    clips = moving_digits(_digits(), Frames(count=3, stride=3))
    for label, sign in (("counter-clockwise", 1), ("clockwise", -1)):
        own = clips.images[clips.labels == MOTIONS.index(label)][:, :, 0].astype(np.float64)
        place = np.arange(28) - _centres(own[:, :, None])[..., None]  # [n, T, 2, 28]
        x, y = place[:, :, 0, None, :], -place[:, :, 1, :, None]
        total = own.sum(axis=(2, 3))
        xx, yy, xy = ((own * product).sum(axis=(2, 3)) / total for product in (x * x, y * y, x * y))
        axis = 0.5 * np.degrees(np.arctan2(2 * xy, xx - yy))  # of the longer side, up to 180
        turned = (np.diff(axis, axis=1) + 90) % 180 - 90
        assert np.abs(turned - sign * 30).max() < 3


def test_the_middle_frame_tells_nothing_of_the_class() -> None:
    """It is what it would be with one frame only, which is drawn the same way for all classes."""
    digits = _digits(4000)
    clips = moving_digits(digits, Frames(count=3, stride=4))
    alone = moving_digits(digits, Frames(count=1))
    assert_array_equal(clips.images[:, 1], alone.images[:, 0])
    centres = _centres(alone.images)[:, 0]
    for k in range(10):
        offset = centres[alone.labels == k].mean(axis=0) - centres.mean(axis=0)
        assert np.abs(offset).max() < 0.4  # four standard errors of 400 uniform places


def test_nothing_leaves_the_canvas() -> None:
    clips = moving_digits(_digits(1000), Frames(count=LENGTH))
    mass = clips.images.astype(np.float64).sum(axis=(2, 3, 4))
    assert (np.abs(mass / mass.mean() - 1) < 0.05).all()


def test_the_same_digits_give_the_same_clips_and_splits_differ() -> None:
    first, again = (moving_digits(_digits(), Frames()) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert_array_equal(first.images, again.images)
    assert moving_digits(_digits(split="test"), Frames()).fingerprint != first.fingerprint


def test_it_is_a_known_data_set_with_three_frames(
    tmp_path: Path, write_source: Callable[..., dict[str, np.ndarray]]
) -> None:
    write_source(tmp_path / "mnist", "mnist", train=40, test=20)
    assert "moving_mnist" in list_datasets()
    found = load_dataset("moving_mnist", root=tmp_path, val_fraction=0.25)
    assert found.val is not None
    assert (len(found.train), len(found.val), len(found.test)) == (30, 10, 20)
    assert found.train.frames == 3
    assert found.train.in_chans == 1
    assert found.test.mean == found.train.mean
    few = load_dataset("moving_mnist", root=tmp_path, frames=5, frame_stride=2, train_fraction=0.5)
    assert few.train.stored.shape[1:] == (5, 1, 28, 28)
    shuffled = load_dataset("moving_mnist", root=tmp_path, shuffle_frames=True, val_fraction=0)
    plain = load_dataset("moving_mnist", root=tmp_path, val_fraction=0)
    for one, other in ((shuffled.train, plain.train), (shuffled.test, plain.test)):
        assert not np.array_equal(one.images, other.images)
        assert_array_equal(np.sort(one.images, axis=1), np.sort(other.images, axis=1))
    with pytest.raises(ValueError, match="moving_mnist: 6 frames at stride 2 need 11, got 9"):
        load_dataset("moving_mnist", root=tmp_path, frames=6, frame_stride=2)
