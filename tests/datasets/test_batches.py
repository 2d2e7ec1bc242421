from __future__ import annotations

import numpy as np
import pytest

from vitrail.datasets import ImageSet, batches, steps_per_epoch
from vitrail.datasets.loading import BatchReader


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


def test_a_reader_reads_epoch_after_epoch(images) -> None:
    reader = BatchReader(images, 4, seed=3, workers=2)  # of which an image set needs none
    for epoch in (0, 1, 0):
        found = [pixels.flatten().tolist() for pixels, _ in reader.epoch(epoch)]
        assert found == read(images, seed=3, epoch=epoch)
    assert [pixels.flatten().tolist() for pixels, _ in reader.epoch(1, start=2)] == read(
        images, seed=3, epoch=1
    )[2:]


class TestShards:
    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("start", [0, 2])
    def test_are_contiguous_parts_of_every_batch(self, images, world, start) -> None:
        shares = [read(images, shard=(rank, world), start=start) for rank in range(world)]
        assert {len(part) for share in shares for part in share} == {4 // world}
        joined = [[number for part in parts for number in part] for parts in zip(*shares, strict=True)]
        assert joined == read(images, start=start)

    def test_share_the_last_batch_as_evenly_as_it_goes(self, images) -> None:
        # 23 images: the last batch of 10 has 3, and of 6 processes half get one.
        options = {"size": 10, "drop_last": False, "shuffle": False}
        shares = [read(images, shard=(rank, 6), **options) for rank in range(6)]
        assert [[len(part) for part in share] for share in shares] == [[2, 2, 1]] * 3 + [[2, 2]] + [
            [1, 1]
        ] * 2
        assert sorted(number for share in shares for part in share for number in part) == list(range(23))

    def test_share_a_set_smaller_than_a_batch(self, images) -> None:
        assert [read(images, size=40, shard=(rank, 4), shuffle=False) for rank in range(4)] == [
            [[*range(6)]],
            [[*range(6, 12)]],
            [[*range(12, 18)]],
            [[*range(18, 23)]],
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shard": (2, 2)}, r"shard: expected a process from 0 and how many there are, got \(2, 2\)"),
            ({"shard": (-1, 2)}, r"shard: expected"),
            ({"shard": (0, 3)}, "batch_size: expected a multiple of the 3 processes, got 4"),
            ({"shard": (0, 24), "size": 48}, "images: 23 images are not enough for 24 processes"),
            ({"resized_crop": 0.1}, "resized_crop: images is kept resized in memory"),
        ],
    )
    def test_that_do_not_fit(self, images, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            read(images, **options)
