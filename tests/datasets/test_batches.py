from __future__ import annotations

import numpy as np
import pytest

from vitrail.datasets import ImageSet, batches, steps_per_epoch


@pytest.fixture
def images() -> ImageSet:
    # The pixel is the image's number, so that a batch tells which images it holds.
    numbers = np.arange(23, dtype=np.uint8)
    return ImageSet.from_arrays(numbers.reshape(-1, 1, 1, 1), numbers % 5)


def read(images: ImageSet, size: int = 4, **options) -> list[list[int]]:
    options = {"seed": 0, "epoch": 0} | options
    return [pixels.flatten().tolist() for pixels, _ in batches(images, size, **options)]


def test_order_is_a_function_of_seed_and_epoch(images) -> None:
    first = read(images)
    assert first == read(images)
    assert first != read(images, epoch=1)
    assert first != read(images, seed=1)
    assert len({number for batch in first for number in batch}) == 20


def test_every_image_once_with_its_label(images) -> None:
    seen = []
    for pixels, labels in batches(images, 4, seed=3, epoch=2, drop_last=False):
        numbers = pixels.flatten()
        assert labels.tolist() == (numbers % 5).tolist()
        seen += numbers.tolist()
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_start_skips_exactly_that_many(images, start, shuffle) -> None:
    assert read(images, shuffle=shuffle, start=start) == read(images, shuffle=shuffle)[start:]


def test_without_shuffling_the_order_is_that_of_the_set(images) -> None:
    part = images.subset([9, 2, 7])
    assert read(part, size=2, shuffle=False, drop_last=False) == [[9, 2], [7]]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [1, 4, 23, 24])
def test_steps_per_epoch_is_the_number_of_batches(images, size, drop_last) -> None:
    found = read(images, size=size, drop_last=drop_last)
    assert len(found) == steps_per_epoch(len(images), size, drop_last)
    if drop_last and size <= 23:
        assert {len(batch) for batch in found} == {size}


def test_a_set_smaller_than_a_batch_is_one_short_batch(images) -> None:
    assert sorted(read(images, size=100)[0]) == list(range(23))
    assert steps_per_epoch(23, 100) == 1
    assert steps_per_epoch(0, 100) == 0
    assert read(images.subset([])) == []


def test_batch_size_below_one(images) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        read(images, size=0)
