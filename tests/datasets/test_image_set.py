from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from vitrail.datasets import ImageSet, stratified_split


def make(n: int = 12, in_chans: int = 3) -> ImageSet:
    images = np.random.default_rng(1).integers(0, 256, (n, in_chans, 4, 5), dtype=np.uint8)
    return ImageSet.from_arrays(images, np.arange(n) % 3, classes=("a", "b", "c"), name="made")


def test_shape_counts_and_statistics() -> None:
    images = make()
    assert len(images) == 12
    assert images.img_size == (4, 5)
    assert images.in_chans == 3
    assert_array_equal(images.counts(), [4, 4, 4])
    scaled = images.images.astype(np.float64) / 255
    np.testing.assert_allclose(images.mean, scaled.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(images.std, scaled.std(axis=(0, 2, 3)))


def test_batch_reads_the_rows_asked_for_and_owns_them() -> None:
    images = make()
    pixels, labels = images.batch([5, 0, 5])
    assert pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert_array_equal(pixels.numpy(), images.images[[5, 0, 5]])
    assert labels.tolist() == [2, 0, 2]
    pixels.zero_()
    assert images.images.any()


def test_subsets_share_pixels_and_speak_of_their_own_rows() -> None:
    images = make()
    part = images.subset([7, 3, 1]).subset(np.array([2, 0]), split="val")
    assert part.stored is images.stored
    assert part.split == "val"
    assert len(part) == 2
    assert_array_equal(part.images, images.images[[1, 7]])
    assert_array_equal(part.labels, images.labels[[1, 7]])
    pixels, labels = part.batch([1])
    assert_array_equal(pixels.numpy(), images.images[[7]])
    assert labels.tolist() == [images.labels[7]]
    assert_array_equal(part.counts(), [0, 2, 0])


def test_fingerprint_changes_with_every_pixel_label_and_choice() -> None:
    images = make()
    pixels, labels = images.images.copy(), images.labels.copy()
    assert ImageSet.from_arrays(pixels, labels).fingerprint == images.fingerprint
    pixels[-1, -1, -1, -1] ^= 1
    labels[-1] = 0
    found = {
        images.fingerprint,
        ImageSet.from_arrays(pixels, images.labels).fingerprint,
        ImageSet.from_arrays(images.images, labels).fingerprint,
        images.subset([0, 1]).fingerprint,
        images.subset([1, 0]).fingerprint,
    }
    assert len(found) == 5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), [0, 1], "expected images as uint8"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], r"got uint8 \[2, 4, 4\]"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0], r"expected labels as int64 \[2\]"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, 2], "expected labels from 0 to 1, got 0 to 2"),
        (np.zeros((2, 1, 4, 4), np.uint8), [-1, 1], "got -1 to 1"),
    ],
)
def test_arrays_that_do_not_fit(images: np.ndarray, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet.from_arrays(images, labels, classes=("a", "b"), mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.2, 0.5, 0.77, 0.99, 1.0])
def test_each_class_is_within_one_image_of_its_share(fraction: float) -> None:
    counts = np.array([1, 2, 3, 10, 57, 500])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts))
    rest, held = stratified_split(labels, fraction, seed=3)
    assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert_array_equal(rest, np.sort(rest))
    assert_array_equal(held, np.sort(held))
    held_counts = np.bincount(labels[held], minlength=6)
    assert (abs(held_counts - counts * fraction) <= 1).all()
    if 0 < fraction < 1:
        assert (held_counts[1:] > 0).all()
        assert (held_counts < counts).all()


def test_split_depends_on_the_seed_only_and_nests() -> None:
    labels = np.arange(300) % 7
    first, again = stratified_split(labels, 0.3, 5), stratified_split(labels, 0.3, 5)
    assert_array_equal(first[0], again[0])
    assert_array_equal(first[1], again[1])
    assert set(first[1]) != set(stratified_split(labels, 0.3, 6)[1])
    smaller = np.array([], dtype=np.int64)
    for fraction in np.linspace(0, 1, 41):
        held = stratified_split(labels, fraction, 5)[1]
        assert set(smaller) <= set(held)
        smaller = held


def test_split_of_nothing_and_bad_fraction() -> None:
    rest, held = stratified_split([], 0.5, 0)
    assert len(rest) == len(held) == 0
    with pytest.raises(ValueError, match=r"fraction: expected 0 to 1, got 1\.5"):
        stratified_split([0, 1], 1.5, 0)
