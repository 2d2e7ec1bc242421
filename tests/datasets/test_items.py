from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vitrail.datasets.items import FileItems, Items
from vitrail.datasets.objects import object_items
from vitrail.datasets.packed import pack
from vitrail.datasets.parquet import ParquetItems
from vitrail.datasets.transforms import BrokenImageError

N = 23


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 3, 4, 5), dtype=np.uint8)


@pytest.fixture
def contents(pixels, png) -> list[bytes]:
    return [png(image) for image in pixels]


def files(tmp_path: Path, contents: list[bytes]) -> FileItems:
    paths = [tmp_path / f"ä {k}.png" for k in range(N)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return FileItems(paths, np.arange(N) % 3, classes=("a", "b", "c"), name="made", split="train")


def parquet(tmp_path: Path, contents: list[bytes], write_parquet) -> ParquetItems:
    parts = [tmp_path / "train-00000-of-00002.parquet", tmp_path / "train-00001-of-00002.parquet"]
    labels = [k % 3 for k in range(N)]
    write_parquet(parts[0], {"image": contents[:9], "label": labels[:9]}, rows_a_group=4)
    write_parquet(parts[1], {"image": contents[9:], "label": labels[9:]}, rows_a_group=5)
    return ParquetItems(
        parts, image_column="image", label_column="label", classes=("a", "b", "c"), name="made", split="train"
    )


@pytest.fixture(params=["files", "parquet", "packed"])
def items(request, tmp_path, contents, write_parquet) -> Items:
    if request.param == "files":
        return files(tmp_path, contents)
    made = parquet(tmp_path, contents, write_parquet)
    return pack(made) if request.param == "packed" else made


def test_gives_the_bytes_and_labels_in_any_order(items, contents) -> None:
    assert len(items) == N
    assert_array_equal(items.labels, np.arange(N) % 3)
    assert items.labels.dtype == np.int64
    for index in [*range(N), *np.random.default_rng(1).permutation(N)]:
        assert items.read(index) == contents[index]


def test_subsets_of_subsets(items, contents) -> None:
    part = items.subset([20, 3, 8, 9]).subset(np.array([3, 0, 0]), split="val")
    assert (part.split, items.split, len(part)) == ("val", "train", 3)
    assert [part.read(k) for k in range(3)] == [contents[k] for k in (9, 20, 20)]
    assert_array_equal(part.labels, items.labels[[9, 20, 20]])
    assert [part.source(k) for k in range(3)] == [items.source(k) for k in (9, 20, 20)]


def test_workers_can_have_them(items, contents) -> None:
    items.read(0)  # opens what there is to open
    sent = pickle.dumps(items.subset([4, 2]))
    assert len(sent) < 10_000
    part = pickle.loads(sent)
    assert [part.read(0), part.read(1)] == [contents[4], contents[2]]
    assert_array_equal(part.labels, [1, 2])
    assert part.key == items.subset([4, 2]).key


def test_the_key_changes_with_files_labels_and_choice(tmp_path, contents) -> None:
    items = files(tmp_path, contents)
    paths = [items.path(k) for k in range(N)]

    def key(labels: np.ndarray) -> str | None:
        return FileItems(paths, labels, classes=("a", "b", "c"), name="made", split="train").key

    labels = np.arange(N) % 3
    keys = [key(labels), key(labels[::-1]), items.subset([1, 0]).key, items.subset([0, 1]).key]
    assert key(labels) == keys[0] == items.key
    os.utime(paths[3], ns=(1, 1))
    keys.append(key(labels))
    paths[3].write_bytes(contents[3] + b"x")
    os.utime(paths[3], ns=(1, 1))
    keys.append(key(labels))
    assert None not in keys
    assert len(set(keys)) == 6


def test_the_key_of_parquet_files_is_of_their_content(tmp_path, contents, write_parquet) -> None:
    (tmp_path / "other").mkdir()
    first, copy = (
        parquet(tmp_path, contents, write_parquet),
        parquet(tmp_path / "other", contents, write_parquet),
    )
    assert first.key == copy.key
    changed = parquet(tmp_path / "other", [*contents[:-1], contents[0]], write_parquet)
    assert changed.key != first.key


def test_sources_name_file_and_row(tmp_path, contents, write_parquet) -> None:
    items = parquet(tmp_path, contents, write_parquet)
    assert items.source(8) == f"{tmp_path}/train-00000-of-00002.parquet, row 8"
    assert items.source(9) == f"{tmp_path}/train-00001-of-00002.parquet, row 0"
    assert pack(items).source(10) == f"{tmp_path}/train-00001-of-00002.parquet, row 1"
    assert files(tmp_path, contents).source(1) == f"{tmp_path}/ä 1.png"


def test_nothing_to_read_is_a_broken_image(tmp_path, contents, write_parquet) -> None:
    missing = FileItems([tmp_path / "none.png"], [0], classes=("a",), name="made", split="train")
    with pytest.raises(BrokenImageError, match=r"none\.png: no such image file"):
        missing.read(0)
    assert missing.key is not None
    items = parquet(tmp_path, [*contents[:-1], None], write_parquet)
    for some in (items, pack(items)):
        assert some.read(0) == contents[0]
        with pytest.raises(BrokenImageError, match=r"00001-of-00002\.parquet, row 13: .*bytes of an image"):
            some.read(N - 1)


def test_packed_once_and_made_again_when_damaged(tmp_path, contents, write_parquet, monkeypatch) -> None:
    items = parquet(tmp_path, contents, write_parquet)
    pack(items)
    (file,) = (tmp_path / "cache" / "datasets").glob("*/encoded.bin")
    assert file.read_bytes() == b"".join(contents)
    stamp = file.stat().st_mtime_ns
    pack(items)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(b"short")
    assert pack(items).read(N - 1) == contents[-1]


def test_labels_by_value(tmp_path, contents, write_parquet) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(path, {"image": contents[:3], "label": [7, 5, 7]})
    options = {"image_column": "image", "label_column": "label", "classes": ("5", "7"), "name": "made"}
    items = ParquetItems([path], values=(5, 7), split="train", **options)
    assert items.labels.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="row 0: expected a known class in column label, got 7"):
        ParquetItems([path], values=(5,), split="train", **options).labels  # noqa: B018


class TestObjects:
    def test_pairs_are_read_when_asked_for(self, pixels) -> None:
        from PIL import Image

        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]
        items = object_items(
            [(picture, k % 2) for k, picture in enumerate(pictures)], name="mine", split="test"
        )
        assert items.read(5) is pictures[5]
        assert items.subset([4, 5]).read(1) is pictures[5]
        assert items.labels.tolist() == [k % 2 for k in range(N)]
        assert items.classes == ("0", "1")
        assert (items.name, items.split, items.key) == ("mine", "test", None)
        assert items.source(3) == "mine/test, row 3"

    def test_classes_keep_their_names_when_renumbered(self) -> None:
        image = np.zeros((2, 2), np.uint8)
        items = object_items([(image, 0), (image, 2)], classes=("dog", "cow", "cat"), split="test")
        found = items.renumbered(("cat", "dog"))
        assert found.labels.tolist() == [1, 0]
        assert found.subset([1]).labels.tolist() == [0]
        assert items.labels.tolist() == [0, 2]
        with pytest.raises(ValueError, match=r"class 'cat' of test is not among the 1 of train \(dog\)"):
            items.renumbered(("dog",))
