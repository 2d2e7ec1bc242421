from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from vitrail.datasets import load_dataset
from vitrail.datasets.imagenet import MEAN, STD, synsets


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (value, value, value)).save(path, "PNG")


def test_the_list_is_complete_sorted_and_known() -> None:
    ids, names = list(synsets()), list(synsets().values())
    assert len(ids) == len(set(names)) == 1000
    assert ids == sorted(ids)
    for number, synset, name in (
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (134, "n02012849", "crane (n02012849)"),
        (207, "n02099601", "golden retriever"),
        (517, "n03126707", "crane (n03126707)"),
        (638, "n03710637", "maillot (n03710637)"),
        (999, "n15075141", "toilet tissue"),
    ):
        assert (ids[number], names[number]) == (synset, name)


def test_order_and_names_are_torchvisions() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES as CATEGORIES

    # torchvision has its own wording for a few, to make them unique.
    own = {134, 517, 638, 639}
    differ = {k for k, name in enumerate(synsets().values()) if name != CATEGORIES[k]}
    assert differ <= own


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes, of which two have validation images."""
    for k, synset in enumerate(("n02099601", "n01440764", "n15075141")):
        for number in range(4):
            write(tmp_path / "imagenet" / "train" / synset / f"{synset}_{number}.JPEG", 50 * k + number)
        if k:
            write(tmp_path / "imagenet" / "val" / synset / f"ILSVRC2012_val_{k:08}.JPEG", 200 + k)
    return tmp_path


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_folders_keep_the_numbers_of_all_thousand(root, storage) -> None:
    splits = load_dataset("imagenet", root=root, val_fraction=0.25, storage=storage)
    assert splits.val is not None
    assert len(splits.train.classes) == 1000
    assert [len(splits.train), len(splits.val), len(splits.test)] == [9, 3, 2]
    assert sorted(set(splits.train.labels.tolist())) == [0, 207, 999]
    assert splits.test.labels.tolist() == [0, 999]
    pixels, labels = splits.train.batch(np.arange(9))
    assert [{207: 0, 0: 1, 999: 2}[label] for label in labels.tolist()] == (pixels[:, 0, 0, 0] // 50).tolist()
    assert (splits.train.mean, splits.train.std) == (MEAN, STD)
    assert (splits.train.name, splits.test.split) == ("imagenet", "test")


def test_the_root_may_be_the_folder_itself(root, monkeypatch) -> None:
    expected = load_dataset("imagenet", root=root).test.fingerprint
    assert load_dataset("imagenet", root=root / "imagenet").test.fingerprint == expected
    monkeypatch.setenv("VITRAIL_DATA", str(root))
    assert load_dataset("imagenet").test.fingerprint == expected


def test_files_named_after_their_synset(tmp_path) -> None:
    for k, name in enumerate(("n15075141_toilet_tissue.JPEG", "n01440764_tench.JPEG", "LICENSE")):
        write(tmp_path / "sample" / name, k)
    splits = load_dataset("imagenet", root=tmp_path / "sample")
    assert (len(splits.train), splits.val is None or len(splits.val) == 0) == (0, True)
    assert splits.test.labels.tolist() == [0, 999]
    assert_array_equal(splits.test.images[:, 0, 0, 0], [1, 0])
    assert splits.ignored == {"no extension": 1}


def test_what_is_not_imagenet(tmp_path) -> None:
    def message(root: Path | None) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare the text)
            load_dataset("imagenet", root=root)
        return str(caught.value)

    assert message(None) == (
        "imagenet: expected imagenet/train/<synset>/ and imagenet/val/<synset>/ in a folder given as "
        "data.root or VITRAIL_DATA, got none"
    )
    (tmp_path / "none").mkdir()
    assert message(tmp_path / "none").endswith(f"in {tmp_path}/none, got none")
    write(tmp_path / "imagenet" / "val" / "n01440764" / "1.JPEG", 0)
    write(tmp_path / "imagenet" / "val" / "n01440765" / "1.JPEG", 0)
    assert message(tmp_path) == (
        f"{tmp_path}/imagenet/val/n01440765/1.JPEG: expected one of the 1,000 synsets of ImageNet, "
        "got 'n01440765'"
    )


def test_a_folder_of_that_content_is_otherwise_like_any_other(root) -> None:
    # Imagenette and the like are data sets of their own: classes are numbered as torchvision does.
    splits = load_dataset(root / "imagenet")
    assert splits.train.classes == ("n01440764", "n02099601", "n15075141")
