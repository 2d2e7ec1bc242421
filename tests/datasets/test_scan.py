from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from odd_images import odd_images

from vitrail.datasets import scan as module
from vitrail.datasets.items import FileItems
from vitrail.datasets.scan import decoded, scan
from vitrail.datasets.transforms import BrokenImageError, decode_image

FILES = odd_images()


@pytest.fixture
def items(tmp_path) -> FileItems:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, odd in FILES.items():
        (folder / name).write_bytes(odd.content)
    paths = [folder / name for name in FILES]
    return FileItems(paths, np.zeros(len(paths)), classes=("odd",), name="odd", split="train")


def test_finds_sizes_greyness_and_damage(items) -> None:
    found = scan(items)
    broken = dict(found.broken)
    for index, (name, odd) in enumerate(FILES.items()):
        assert (index in broken) == (odd.pixels is None), name
        if odd.pixels is None:
            assert broken[index].startswith(odd.reason)
            assert found.sizes[index].tolist() == [0, 0]
        else:
            assert found.sizes[index].tolist() == list(odd.pixels.shape[:2]), name
            assert found.grey[index] == (len(decode_image(odd.content, name)) == 1), name
    whole = [index for index, odd in enumerate(FILES.values()) if odd.pixels is not None]
    assert_array_equal(found.whole, whole)


def test_looks_once(items, tmp_path, monkeypatch) -> None:
    looks = []
    look = module._scan
    monkeypatch.setattr(module, "_scan", lambda items: looks.append(1) or look(items))
    first, second = scan(items), scan(items)
    assert looks == [1]
    assert_array_equal(first.sizes, second.sizes)
    assert_array_equal(first.grey, second.grey)
    assert first.broken == second.broken
    scan(items.subset([0, 1]))
    assert looks == [1, 1]
    for file in (tmp_path / "cache").rglob("scan.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert scan(items).broken == first.broken
    assert looks == [1, 1, 1]
    items.path(0).write_bytes(b"now broken")
    again = FileItems(
        [items.path(k) for k in range(len(items))], items.labels, classes=("odd",), name="odd", split="train"
    )
    assert scan(again).broken[0][0] == 0


def test_results_come_in_order(items) -> None:
    many = items.subset(np.arange(2_000) % len(items))
    results = list(decoded(many, lambda encoded, source: (len(encoded), source)))
    assert results == [(len(many.read(k)), many.source(k)) for k in range(2_000)]


def test_other_errors_stop(items) -> None:
    def fail(encoded: object, source: str) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        list(decoded(items, fail))


def test_missing_files_are_in_their_place(items) -> None:
    items.path(3).unlink()
    results = list(decoded(items, lambda encoded, source: source))
    assert isinstance(results[3], BrokenImageError)
    assert results[3].reason == "no such image file"
    assert Path(str(results[4])) == items.path(4)


def test_many_images_tell_how_far(items, capsys, monkeypatch) -> None:
    list(decoded(items, lambda encoded, source: None))
    assert capsys.readouterr().err == ""
    many = items.subset(np.zeros(2_001, dtype=int))
    list(decoded(many, lambda encoded, source: None))
    assert capsys.readouterr().err == "decoding odd train: 2,001 of 2,001\n"
