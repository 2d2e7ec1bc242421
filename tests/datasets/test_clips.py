"""Clips of folders: the right frames in the right order, one class a clip, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from vitrail.datasets import ImageSet, load_dataset, side_by_side
from vitrail.datasets.clips import Frames, find_videos, with_shuffled_frames


def _video(folder: Path, values: list[int], size: tuple[int, int] = (4, 6)) -> None:
    """A frame of one brightness each, lossless, with numbers of unequal length in the names."""
    folder.mkdir(parents=True)
    for number, value in enumerate(values, start=1):
        Image.fromarray(np.full(size, value, dtype=np.uint8)).save(folder / f"frame_{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; brightness = 100 for class b + 10 * clip + frame."""
    place = tmp_path / "films"
    for split, clips in (("train", 4), ("test", 2)):
        for k, label in enumerate("ab"):
            for clip in range(clips):
                values = [100 * k + 10 * clip + frame for frame in range(12)]
                _video(place / split / label / f"clip{clip}", values)
    return place


def test_clips_hold_the_middle_frames_in_the_order_of_their_numbers(folder: Path) -> None:
    found = load_dataset(folder, frames=3, frame_stride=4, val_fraction=0)
    assert found.train.stored.shape == (8, 3, 1, 4, 6)
    assert found.train.frames == 3
    assert found.train.img_size == (4, 6)
    assert found.train.in_chans == 1
    assert_array_equal(found.train.labels, [0] * 4 + [1] * 4)
    # 12 frames, of which 9 lie from the first to the last one taken: 1, 5 and 9
    expected = [[100 * k + 10 * clip + frame for frame in (1, 5, 9)] for k in range(2) for clip in range(4)]
    assert_array_equal(found.train.images[:, :, 0, 0, 0], expected)
    pixels, labels = found.test.batch([3, 0])
    assert pixels.shape == (2, 3, 1, 4, 6)
    assert pixels[:, :, 0, 2, 3].tolist() == [[111, 115, 119], [1, 5, 9]]
    assert labels.tolist() == [1, 0]
    assert found.test.mean == found.train.mean
    assert found.test.classes == ("a", "b")


def test_consecutive_frames_and_single_ones(folder: Path) -> None:
    assert load_dataset(folder, frames=3).train.images[0, :, 0, 0, 0].tolist() == [4, 5, 6]
    assert load_dataset(folder, frames=12).train.images[0, :, 0, 0, 0].tolist() == list(range(12))
    alone = load_dataset(folder, frames=1, val_fraction=0).train.images[:, :, 0, 0, 0]
    assert_array_equal(alone, [[100 * k + 10 * clip + 5] for k in range(2) for clip in range(4)])


def test_validation_clips_are_whole_and_apart(folder: Path) -> None:
    found = load_dataset(folder, frames=2, val_fraction=0.25)
    assert found.val is not None
    assert (len(found.train), len(found.val), len(found.test)) == (6, 2, 4)
    firsts = {int(own.images[i, 0, 0, 0, 0]) for own in (found.train, found.val) for i in range(len(own))}
    assert len(firsts) == 8


def test_without_a_test_folder_a_fifth_is_held_out(folder: Path) -> None:
    found = load_dataset(folder / "train", frames=2, val_fraction=0)
    assert found.test.counts().tolist() == [1, 1]
    assert found.train.counts().tolist() == [3, 3]


def test_without_frames_the_same_folder_is_one_of_images(folder: Path) -> None:
    found = load_dataset(folder, val_fraction=0)
    assert found.train.stored.shape == (8 * 12, 1, 4, 6)
    assert found.train.frames is None


def test_frames_are_fitted_to_a_size_and_kept_in_the_cache(folder: Path) -> None:
    first = load_dataset(folder, frames=3, img_size=8, in_chans=3)
    assert first.train.stored.shape[1:] == (3, 3, 8, 8)
    again = load_dataset(folder, frames=3, img_size=8, in_chans=3)
    assert again.train.fingerprint == first.train.fingerprint
    assert_array_equal(again.train.images, first.train.images)
    assert (
        load_dataset(folder, frames=3, frame_stride=2, img_size=8).train.fingerprint
        != first.train.fingerprint
    )


def test_shuffled_frames_are_a_permutation_that_is_always_the_same(folder: Path) -> None:
    plain = load_dataset(folder, frames=8, val_fraction=0).train
    shuffled = load_dataset(folder, frames=8, val_fraction=0, shuffle_frames=True).train
    again = load_dataset(folder, frames=8, val_fraction=0, shuffle_frames=True).train
    assert_array_equal(np.sort(shuffled.images, axis=1), np.sort(plain.images, axis=1))
    assert not np.array_equal(shuffled.images, plain.images)
    assert_array_equal(again.images, shuffled.images)
    assert again.fingerprint == shuffled.fingerprint != plain.fingerprint
    assert_array_equal(shuffled.labels, plain.labels)
    orders = {tuple(np.argsort(clip[:, 0, 0, 0])) for clip in shuffled.images}
    assert len(orders) > 4  # each clip its own


def test_all_orders_of_three_frames_are_equally_likely() -> None:
    clips = np.tile(np.arange(3, dtype=np.uint8)[None, :, None, None, None], (6000, 1, 1, 2, 2))
    shuffled = with_shuffled_frames(ImageSet.from_arrays(clips, np.zeros(6000)))
    _, counts = np.unique(shuffled.images[:, :, 0, 0, 0], axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 900
    assert counts.max() < 1100


def test_a_broken_frame_is_named_and_its_clip_left_out(folder: Path) -> None:
    damaged = folder / "train" / "a" / "clip1" / "frame_6.png"
    damaged.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"clip1/frame_6\.png: expected an image.*--data\.broken skip"):
        load_dataset(folder, frames=3)
    found = load_dataset(folder, frames=3, broken="skip", val_fraction=0)
    assert found.train.stored.shape == (7, 3, 1, 4, 6)
    assert found.train.counts().tolist() == [3, 4]
    assert [source for source, _ in found.skipped] == [str(damaged)]
    assert 14 not in found.train.images[:, 0, 0, 0, 0]
    # where the frame is not taken, nothing is missed
    assert len(load_dataset(folder, frames=2, frame_stride=11, val_fraction=0).train) == 8


def test_refusals_are_one_line(folder: Path, tmp_path: Path) -> None:
    cases = {
        r"clip0: 5 frames at stride 3 need 13, got 12; take fewer with data\.frames": (folder, (5, 3)),
        "frames: expected 1 or more, got 0": (folder, (0, 1)),
        "frame_stride: expected 1 or more, got -1": (folder, (3, -1)),
        "mnist has images, not clips; moving_mnist has clips": ("mnist", (3, 1)),
        "no folder of clips moving_mnits, neither here nor in .* VITRAIL_DATA; did you mean moving_mnist": (
            "moving_mnits",
            (3, 1),
        ),
    }
    (tmp_path / "flat" / "a").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "flat" / "a" / "x.png")
    cases["expected class folders with a folder of frames for each clip, got none"] = (
        tmp_path / "flat",
        (3, 1),
    )
    for message, (name, (count, stride)) in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_dataset(name, frames=count, frame_stride=stride)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"are for clips: say how many frames with data\.frames"):
        load_dataset(folder, shuffle_frames=True)
    _video(folder / "test" / "c" / "clip0", [1, 2, 3])
    with pytest.raises(ValueError, match="class 'c' of test is not among the 2 of train"):
        load_dataset(folder, frames=2)
    (folder / "train").rename(folder / "val")
    with pytest.raises(ValueError, match="expected a split train beside val and test, got none"):
        load_dataset(folder, frames=2)


def test_clips_of_unequal_size_need_one(folder: Path) -> None:
    _video(folder / "train" / "a" / "zz", list(range(12)), size=(5, 5))
    with pytest.raises(ValueError, match=r"expected 4x6 pixels .*--model\.img_size"):
        load_dataset(folder, frames=3)
    assert load_dataset(folder, frames=3, img_size=4, val_fraction=0).train.stored.shape == (9, 3, 1, 4, 4)


def test_files_and_hidden_folders_between_the_clips_are_passed_over(folder: Path) -> None:
    (folder / "train" / "a" / "notes.txt").write_text("x")
    (folder / "train" / "a" / "empty").mkdir()
    _video(folder / "train" / "a" / ".hidden", [1] * 12)
    parts, classes = find_videos(folder)
    assert classes == ("a", "b")
    assert [Path(own.source).name for own in parts["train"][:4]] == ["clip0", "clip1", "clip2", "clip3"]
    assert [Path(path).name for path in parts["train"][0].frames[8:11]] == [
        "frame_9.png", "frame_10.png", "frame_11.png",
    ]  # fmt: skip


def test_frames_beside_each_other() -> None:
    clips = torch.randint(0, 256, (2, 3, 1, 4, 5), dtype=torch.uint8)
    drawn = side_by_side(clips)
    assert drawn.shape == (2, 1, 4, 15)
    assert torch.equal(drawn[1, 0, :, 5:10], clips[1, 1, 0])
    assert side_by_side(drawn) is drawn


def test_choice_of_frames() -> None:
    assert Frames(count=3, stride=2).choose(9, "x") == [2, 4, 6]
    assert Frames(count=1, stride=7).choose(9, "x") == [4]
    assert Frames(count=4).choose(4, "x") == [0, 1, 2, 3]
    assert Frames(count=2).choose(5, "x") == [1, 2]


def test_the_real_clips(real_data: Path) -> None:
    found = load_dataset("video", root=real_data, frames=3, frame_stride=6, img_size=32, val_fraction=0)
    assert found.train.stored.shape == (84, 3, 3, 32, 32)
    assert found.train.classes == ("hand_shake", "hug", "kick", "point", "punch", "push")
    assert found.train.counts().tolist() == [14] * 6
    assert found.test.counts().tolist() == [6] * 6
    # frames of one clip are more alike than those of different ones
    pixels = found.train.images.astype(np.float64)
    within = np.abs(pixels[:, 0] - pixels[:, 1]).mean()
    assert within < 0.7 * np.abs(pixels[:-1, 0] - pixels[1:, 1]).mean()
