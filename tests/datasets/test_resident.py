from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vitrail.datasets import ImageSet, cache, load_dataset, resident


@pytest.fixture
def root(tmp_path, write_source) -> Path:
    write_source(tmp_path / "mnist", "mnist")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The folders that were decoded into."""
    calls = []
    decode = resident._decode

    def counted(items, geometry, path):
        calls.append(path.parent)
        return decode(items, geometry, path)

    monkeypatch.setattr(resident, "_decode", counted)
    return calls


def load(root: Path) -> ImageSet:
    return load_dataset("mnist", root=root, val_fraction=0.0).train


def cached(root: Path) -> list[Path]:
    return sorted((root / "cache" / "datasets").glob("*"))


def test_decoded_once_and_mapped_afterwards(root, decoded) -> None:
    first = load(root)
    assert len(decoded) == 2
    second = load(root)
    assert len(decoded) == 2
    assert isinstance(second.stored.base, np.memmap)
    assert not second.stored.flags.writeable
    assert second.fingerprint == first.fingerprint
    assert second.fingerprint == ImageSet.from_arrays(second.images, second.labels).fingerprint
    assert len(cached(root)) == 2


def test_a_changed_file_is_decoded_anew(root, decoded, write_source) -> None:
    before = load(root).fingerprint
    write_source(root / "mnist", "mnist", train=41)
    assert load(root).fingerprint != before
    assert len(decoded) == 4


@pytest.mark.parametrize("victim", ["images.npy", "labels.npy", "meta.json"])
def test_a_damaged_cache_is_made_again(root, decoded, victim) -> None:
    before = load(root)
    folder = next(folder for folder in cached(root) if "-train-" in folder.name)
    content = (folder / victim).read_bytes()
    (folder / victim).unlink()
    (folder / victim).write_bytes(content[: len(content) // 2])
    after = load(root)
    assert after.fingerprint == before.fingerprint
    assert len(decoded) == 3


def test_a_killed_writer_leaves_nothing_that_counts(root, monkeypatch) -> None:
    decode = resident._decode

    def killed(items, geometry, path):
        decode(items, geometry, path)
        os.rename(path.parent, path.parent.with_name(path.parent.name.replace("-v2.", "-v2.dead")))
        raise KeyboardInterrupt

    monkeypatch.setattr(resident, "_decode", killed)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    (leftover,) = cached(root)
    assert leftover.name.endswith(".tmp")
    monkeypatch.setattr(resident, "_decode", decode)
    assert len(load(root)) == 40
    assert leftover in cached(root), "another process may still be writing it"
    for folder in cached(root):
        if folder != leftover:
            (folder / "meta.json").unlink()
    long_ago = time.time() - 2 * cache._LEFTOVER_AGE_S
    os.utime(leftover, (long_ago, long_ago))
    assert len(load(root)) == 40
    assert leftover not in cached(root)


def test_a_failed_decoding_leaves_nothing(root, monkeypatch) -> None:
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(resident, "_decode", fail)
    with pytest.raises(ValueError, match="no"):
        load(root)
    assert cached(root) == []


def test_several_writers_at_once(root) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, [root] * 4))
    assert len({images.fingerprint for images in found}) == 1
    assert_array_equal(found[0].images, found[3].images)
    assert len(cached(root)) == 2


def test_cache_folder_that_cannot_be_written(root, monkeypatch) -> None:
    (root / "file").touch()
    monkeypatch.setenv("VITRAIL_CACHE", str(root / "file"))
    with pytest.raises(
        ValueError, match=r"cannot write decoded images to .*/file/datasets .*set VITRAIL_CACHE"
    ):
        load(root)


def message(root: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare the text)
        load(root)
    assert "\n" not in str(caught.value)
    # What is decoded is kept only where whole images are left, which may be asked for next.
    assert len(cached(root)) == str(caught.value).endswith("leave them out with --data.broken skip")
    return str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated_parquet(root, part) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert message(root).startswith(f"{path}: expected a whole parquet file (")


def test_parquet_with_damaged_pages(root) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(bytes(content))
    assert message(root).startswith(f"{path}: expected a whole parquet file (")


def test_wrong_columns(root, write_parquet) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    write_parquet(path, {"img": [b""], "label": [0]})
    assert message(root) == f"{path}: expected the columns image and label, got img, label"


def test_image_column_of_another_type(root) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "mnist" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [1], "label": [0]}), path)
    assert message(root) == f"{path}: expected column image as a struct with bytes, got int64"


def test_rows_that_are_wrong(root, png, write_parquet) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    good, large = png(np.zeros((1, 28, 28), np.uint8)), png(np.zeros((1, 32, 30), np.uint8))
    for image, label, expected in (
        (b"nothing", 0, "expected an image, got a file of another kind"),
        (good[:-20], 0, "the image cannot be decoded ("),
        (None, 0, "expected the bytes of an image in column image, got none"),
        (large, 0, "expected 28x28 pixels, got 32x30"),
        (good, 10, "expected a label from 0 to 9 in column label, got 10"),
        (good, -1, "expected a label from 0 to 9 in column label, got -1"),
        (good, None, "expected a label from 0 to 9 in column label, got None"),
    ):
        write_parquet(path, {"image": [good, good, image], "label": [0, 1, label]})
        shutil.rmtree(root / "cache", ignore_errors=True)
        assert message(root).startswith(f"{path}, row 2: {expected}")


def test_meta_holds_the_shape(root) -> None:
    load(root)
    folder = next(folder for folder in cached(root) if "-train-" in folder.name)
    assert json.loads((folder / "meta.json").read_text())["shape"] == [40, 1, 28, 28]


def test_broken_images_are_counted_then_refused_or_left_out(root, png, write_parquet, decoded) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    good = [png(np.full((1, 28, 28), 20 * k, np.uint8)) for k in range(6)]
    write_parquet(
        path, {"image": [good[0], None, good[2], b"x", good[4], good[5]], "label": [0, 1, 2, 3, 4, 5]}
    )
    refused = (
        f"{path}, row 1: expected the bytes of an image in column image, got none; 2 of 6 images are broken; "
        "repair or remove them, or leave them out with --data.broken skip"
    )
    assert message(root) == refused
    splits = load_dataset("mnist", root=root, val_fraction=0.0, broken="skip")
    assert len(decoded) == 2  # train once for both, and test
    assert splits.train.labels.tolist() == [0, 2, 4, 5]
    assert_array_equal(splits.train.images[:, 0, 0, 0], [0, 40, 80, 100])
    assert splits.skipped == (
        (f"{path}, row 1", "expected the bytes of an image in column image, got none"),
        (f"{path}, row 3", "expected an image, got a file of another kind"),
    )
    whole = ImageSet.from_arrays(splits.train.images, splits.train.labels)
    assert splits.train.fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="2 of 6 images are broken"):
        load(root)
    assert load_dataset("mnist", root=root, broken="skip").skipped == splits.skipped
    assert len(decoded) == 2


def test_all_broken_is_refused_even_if_they_may_be_left_out(root, write_parquet) -> None:
    path = root / "mnist" / "train-00000-of-00001.parquet"
    write_parquet(path, {"image": [b"x", b"y"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"row 0: expected an image, .*; 2 of 2 images are broken$"):
        load_dataset("mnist", root=root, broken="skip")
