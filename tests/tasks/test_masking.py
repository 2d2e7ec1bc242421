"""Masks are exact, patches go back where they came from, and nothing hidden stays in sight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitrail.tasks.masking import (
    block_masking,
    hide,
    patchify,
    pixels_of,
    random_masking,
    take,
    tube_masking,
    unpatchify,
)


@pytest.mark.parametrize(
    ("patches", "ratio", "hidden"),
    [(196, 0.75, 147), (16, 0.5, 8), (49, 0.75, 37), (10, 0.9, 9), (2, 0.01, 1), (5, 0.99, 4)],
)
def test_every_image_hides_as_many_patches_and_all_are_there(patches: int, ratio: float, hidden: int) -> None:
    masking = random_masking(32, patches, ratio)
    assert masking.masked.shape == (32, hidden)
    every = torch.cat([masking.keep, masking.masked], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(patches).expand(32, -1))
    assert len({tuple(row.sort().values.tolist()) for row in masking.masked}) > 1


def test_all_patches_are_hidden_equally_often() -> None:
    masked = random_masking(8000, 12, 0.75, generator=torch.Generator().manual_seed(0)).masked
    shares = masked.flatten().bincount(minlength=12) / 8000
    torch.testing.assert_close(shares, torch.full((12,), 0.75), atol=0.025, rtol=0)  # 5 deviations


@pytest.mark.parametrize("make", [random_masking, lambda b, _, r: tube_masking(b, (3, 4, 7), r)])
def test_inverse_shuffle_restores_the_order(make) -> None:  # type: ignore[no-untyped-def]
    tokens = torch.randn(5, 84, 6)
    masking = make(5, 84, 0.6)
    shuffled = torch.cat([take(tokens, masking.keep), take(tokens, masking.masked)], dim=1)
    assert not torch.equal(shuffled, tokens)
    assert torch.equal(take(shuffled, masking.restore), tokens)


def test_masks_follow_from_the_generator_alone() -> None:
    def drawn(seed: int) -> torch.Tensor:
        return random_masking(4, 50, 0.5, generator=torch.Generator().manual_seed(seed)).keep

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    torch.manual_seed(3)
    assert torch.equal(random_masking(4, 50, 0.5).keep, drawn(3))


def test_tubes_hide_the_same_places_in_each_frame() -> None:
    masking = tube_masking(6, (3, 4, 5), 0.9)
    assert masking.masked.shape == (6, 3 * 18)
    hidden = torch.zeros(6, 60, dtype=torch.bool).scatter(1, masking.masked, True).unflatten(1, (3, 20))
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    assert torch.equal(hidden.sum(dim=2), torch.full((6, 3), 18))


def test_too_few_patches() -> None:
    with pytest.raises(ValueError, match="masking needs at least 2 patches, got 1"):
        random_masking(4, 1, 0.5)
    with pytest.raises(ValueError, match="block masks need at least 2 patches, got 1"):
        block_masking(4, (1, 1))


def test_more_blocks_than_leave_a_context() -> None:
    with pytest.raises(ValueError, match="50 target blocks leave less than a quarter of 4 x 4 patches"):
        block_masking(2, (4, 4), 50)


@given(
    rows=st.integers(1, 15),
    columns=st.integers(2, 15),
    count=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_blocks_and_the_context_avoids_them(
    rows: int, columns: int, count: int, seed: int
) -> None:
    blocks = block_masking(6, (rows, columns), count, torch.Generator().manual_seed(seed))
    patches = rows * columns
    assert blocks.targets.shape[:2] == (6, count)
    assert blocks.context.shape[0] == 6
    assert blocks.context.shape[1] * 4 >= patches
    sizes = set()
    for image in range(6):
        context = blocks.context[image].tolist()
        assert len(set(context)) == len(context)
        assert min(context) >= 0
        assert max(context) < patches
        for block in blocks.targets[image].tolist():
            assert not set(block) & set(context)
            height = max(block) // columns - min(block) // columns + 1
            width = block[-1] % columns - block[0] % columns + 1
            first = block[0]
            assert block == [first + r * columns + c for r in range(height) for c in range(width)]
            sizes.add((height, width))
    assert len(sizes) == 1


def test_blocks_have_the_sizes_of_the_paper() -> None:
    """On a fine grid rounding matters little: areas 0.15 to 0.2, aspect ratios 0.75 to 1.5."""
    areas, aspects = [], []
    for seed in range(200):
        targets = block_masking(1, (100, 100), generator=torch.Generator().manual_seed(seed)).targets
        height = int(targets[0, 0, -1] // 100 - targets[0, 0, 0] // 100) + 1
        width = targets.shape[2] // height
        areas.append(height * width / 10_000)
        aspects.append(height / width)
    assert 0.145 < min(areas) < 0.16
    assert 0.19 < max(areas) < 0.205
    assert 0.73 < min(aspects) < 0.8
    assert 1.4 < max(aspects) < 1.53


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(28, 28), (32, 24), (13, 22)])
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (3, 5)])
def test_patches_by_hand_and_back(channels: int, shape: tuple[int, int], size: tuple[int, int]) -> None:
    images = torch.randn(2, channels, *shape)
    patches = patchify(images, size)
    rows, columns = -(-shape[0] // size[0]), -(-shape[1] // size[1])
    assert patches.shape == (2, rows * columns, channels * size[0] * size[1])
    padded = F.pad(images, (0, columns * size[1] - shape[1], 0, rows * size[0] - shape[0]))
    for number in range(rows * columns):
        top, left = number // columns * size[0], number % columns * size[1]
        cut = padded[:, :, top : top + size[0], left : left + size[1]].flatten(1)
        assert torch.equal(patches[:, number], cut)
    assert torch.equal(unpatchify(patches, size, shape), images)


def test_patches_of_clips() -> None:
    clips = torch.randn(2, 3, 1, 8, 12)
    patches = patchify(clips, (4, 4))
    assert patches.shape == (2, 3, 6, 16)
    assert torch.equal(patches[1, 2], patchify(clips[1, 2], (4, 4)))
    assert torch.equal(unpatchify(patches, (4, 4), (8, 12)), clips)


@pytest.mark.parametrize("shape", [(12, 8), (10, 7)])
def test_what_is_hidden_is_zero_and_the_rest_untouched(shape: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *shape)
    keep = torch.tensor([[0, 5], [2, 3]])  # of 3 x 2 patches of 4 x 4
    hidden = hide(images, keep, 4)
    patches, before = patchify(hidden, (4, 4)), patchify(images, (4, 4))
    for image in range(2):
        for number in range(6):
            expected = before[image, number] if number in keep[image] else torch.zeros(48)
            assert torch.equal(patches[image, number], expected)
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(images * pixels_of(mask, 4, shape), hidden)
