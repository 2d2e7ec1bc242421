from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vitrail.datasets import SOURCES, FileSet, from_dataset, list_datasets, load_dataset

PARQUET = [name for name, source in SOURCES.items() if source.hub_id]


def test_table_is_consistent() -> None:
    assert list_datasets() == sorted(
        [
            "digits",
            "mnist",
            "fashion_mnist",
            "cifar10",
            "cifar100",
            "cifar100_coarse",
            "imagenet",
            "moving_mnist",
            "shapes",
            "textures",
            "fractals",
        ]
    )
    assert {len(SOURCES[name].classes) for name in ("digits", "mnist", "fashion_mnist", "cifar10")} == {10}
    assert len(SOURCES["cifar100"].classes) == 100
    assert len(SOURCES["cifar100_coarse"].classes) == 20
    for name, source in SOURCES.items():
        assert source.name == name
        assert len(source.mean) == len(source.std) == source.shape[0]
        assert len(set(source.classes)) == len(source.classes)


class TestDigits:
    def test_sizes_and_values(self) -> None:
        from sklearn.datasets import load_digits

        whole, source = load_digits(), SOURCES["digits"]
        splits = load_dataset("digits", val_fraction=0.0)
        assert splits.val is None
        assert (len(splits.train), len(splits.test)) == (source.train_size, source.test_size)
        assert splits.train.images.shape == (1438, 1, 8, 8)
        assert splits.train.images.max() == 255
        assert_array_equal(splits.train.counts() + splits.test.counts(), np.bincount(whole.target))
        assert (abs(splits.test.counts() - np.bincount(whole.target) / 5) <= 1).all()
        scaled = splits.train.images / 255
        assert scaled.mean() == pytest.approx(source.mean[0], abs=2e-3)
        assert scaled.std() == pytest.approx(source.std[0], abs=2e-3)

    def test_splits_are_disjoint_stable_and_stratified(self) -> None:
        splits, again = load_dataset("digits"), load_dataset("digits")
        assert splits.val is not None
        assert again.val is not None
        for part, same in ((splits.train, again.train), (splits.val, again.val), (splits.test, again.test)):
            assert part.fingerprint == same.fingerprint
            assert_array_equal(part.rows, same.rows)
        assert [part.split for part in (splits.train, splits.val, splits.test)] == ["train", "val", "test"]
        rows = np.concatenate([splits.train.rows, splits.val.rows, splits.test.rows])
        assert_array_equal(np.sort(rows), np.arange(1797))
        assert (abs(splits.val.counts() - 0.1 * (splits.val.counts() + splits.train.counts())) <= 1).all()

    def test_split_seed_moves_the_validation_images_and_not_the_test_images(self) -> None:
        first, other = load_dataset("digits"), load_dataset("digits", split_seed=1)
        assert first.test.fingerprint == other.test.fingerprint
        assert first.train.fingerprint != other.train.fingerprint

    def test_train_fraction_is_stratified_and_nested(self) -> None:
        whole = load_dataset("digits")
        half, little = load_dataset("digits", train_fraction=0.5), load_dataset("digits", train_fraction=0.01)
        assert set(little.train.rows) < set(half.train.rows) < set(whole.train.rows)
        assert half.val.fingerprint == whole.val.fingerprint
        assert (abs(half.train.counts() - whole.train.counts() / 2) <= 1).all()
        assert (little.train.counts() >= 1).all()


@pytest.mark.parametrize("name", PARQUET)
def test_hub_layout(name, tmp_path, write_source) -> None:
    source = SOURCES[name]
    pixels = write_source(tmp_path / source.folder / "plain_text", name)
    splits = load_dataset(name, root=tmp_path, val_fraction=0.0)
    assert_array_equal(splits.train.images, pixels["train"])
    assert_array_equal(splits.test.images, pixels["test"])
    assert_array_equal(splits.train.labels, np.arange(40) % len(source.classes))
    assert splits.train.classes == source.classes
    assert (splits.train.mean, splits.train.std) == (source.mean, source.std)
    assert (splits.train.name, splits.train.split, splits.test.split) == (name, "train", "test")


def test_hub_object_gives_identical_images(tmp_path, write_source, monkeypatch) -> None:
    hub = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    for name, column in (("mnist", None), ("cifar100", "fine_label"), ("cifar100_coarse", "coarse_label")):
        source = SOURCES[name]
        write_source(tmp_path / source.folder, name)
        local = load_dataset(name, root=tmp_path, val_fraction=0.0).train
        files = str(tmp_path / source.folder / "train-*.parquet")
        dataset = hub.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
        images = from_dataset(dataset, label_column=column)
        assert images.fingerprint == local.fingerprint
        assert images.classes == local.classes


def test_hub_ids_are_names_and_folders(tmp_path, write_source) -> None:
    write_source(tmp_path / "ylecun" / "mnist" / "mnist", "mnist")
    splits = load_dataset("ylecun/mnist", root=tmp_path)
    assert splits.train.name == "mnist"
    assert splits.train.fingerprint == load_dataset("mnist", root=tmp_path).train.fingerprint


def test_root_goes_before_the_environment_and_that_before_the_hubs_cache(
    tmp_path, write_source, monkeypatch
) -> None:
    asked = []

    def snapshot(hub_id, *, local_files_only, **_):
        asked.append((hub_id, local_files_only))
        if local_files_only:
            return str(tmp_path / "snapshot")
        raise AssertionError("the hub was asked for what its cache has")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    write_source(tmp_path / "snapshot" / "mnist", "mnist", train=30)
    write_source(tmp_path / "environment" / "mnist", "mnist", train=40)
    write_source(tmp_path / "root" / "mnist", "mnist", train=50)
    (tmp_path / "empty").mkdir()

    def size(**options) -> int:
        return len(load_dataset("mnist", val_fraction=0.0, **options).train)

    assert size() == 30
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "environment"))
    assert size() == 40
    assert size(root=tmp_path / "root") == 50
    assert size(root=tmp_path / "empty") == 40
    assert asked == [("ylecun/mnist", True)]


def test_the_hub_is_asked_last_and_completes_a_part(tmp_path, write_source, monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = tmp_path / "snapshot"
    write_source(folder, "mnist")
    (folder / "test-00000-of-00001.parquet").rename(tmp_path / "later")

    def snapshot(hub_id, *, repo_type, allow_patterns, local_files_only):
        assert (hub_id, repo_type) == ("ylecun/mnist", "dataset")
        if not local_files_only:
            (tmp_path / "later").rename(folder / "test-00000-of-00001.parquet")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, hub_id, timeout: None)
    assert len(load_dataset("mnist").test) == 20


def one_line(name: str, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare the text)
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_absent_and_offline_by_choice(tmp_path, monkeypatch) -> None:
    def no_socket(*_, **__):
        raise AssertionError("offline, and yet something was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    assert one_line("mnist") == (
        "data set mnist not found: looked in no folder (no root or VITRAIL_DATA given) and the hub's "
        "local cache, and HF_HUB_OFFLINE forbids the hub; put train-*.parquet and test-*.parquet of "
        "ylecun/mnist into <folder>/mnist/ and set VITRAIL_DATA=<folder>"
    )
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "data"))
    message = one_line("cifar100_coarse")
    assert f"looked in {tmp_path}/data/cifar100, {tmp_path}/data/uoft-cs/cifar100 and" in message
    assert f"into {tmp_path}/data/cifar100/ and try again" in message


def test_light_import_then_absent_and_no_network(tmp_path) -> None:
    # In a process of its own: the hub's library reads its settings when it is imported.
    code = """if True:
        import sys
        import vitrail.datasets
        heavy = {"torchvision", "datasets", "sklearn", "pyarrow", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
        try:
            vitrail.datasets.load_dataset("mnist")
        except ValueError as error:
            print(error)
    """
    # Nothing listens on port 9.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    del environment["HF_HUB_OFFLINE"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert "and the hub cannot be reached; put train" in done.stdout
    assert done.stdout.count("\n") == 1


def test_names_that_nobody_knows(tmp_path) -> None:
    assert one_line("cifar-10").startswith("no folder and no data set 'cifar-10'; did you mean cifar10")
    assert "ylecun/mnist" in one_line("lecun/mnist")
    assert one_line("mnist", root=tmp_path / "none") == f"data root: no folder {tmp_path / 'none'}"


def test_fractions_out_of_range() -> None:
    assert one_line("digits", val_fraction=1.0) == "val_fraction: expected 0 to below 1, got 1.0"
    assert one_line("digits", train_fraction=0.0) == "train_fraction: expected above 0 to 1, got 0.0"


def test_incomplete_and_doubled_files(tmp_path, write_source) -> None:
    folder = tmp_path / "mnist"
    write_source(folder, "mnist")
    (folder / "test-00000-of-00001.parquet").rename(tmp_path / "away")
    assert one_line("mnist", root=tmp_path).endswith("expected test-*.parquet in one folder, got none")
    (tmp_path / "away").rename(folder / "test-00000-of-00002.parquet")
    assert one_line("mnist", root=tmp_path).endswith("expected 2 files test-*.parquet, got 1")
    (folder / "test-00000-of-00002.parquet").rename(folder / "test-00000-of-00001.parquet")
    write_source(folder / "copy", "mnist")
    assert "expected train-*.parquet in one folder, got" in one_line("mnist", root=tmp_path)


def test_several_parts_are_read_in_order(tmp_path, write_source) -> None:
    pixels = write_source(tmp_path / "mnist", "mnist")
    (tmp_path / "mnist" / "train-00000-of-00001.parquet").rename(
        tmp_path / "mnist" / "train-00001-of-00002.parquet"
    )
    write_source(tmp_path / "other", "mnist", train=10)
    (tmp_path / "other" / "train-00000-of-00001.parquet").rename(
        tmp_path / "mnist" / "train-00000-of-00002.parquet"
    )
    train = load_dataset("mnist", root=tmp_path, val_fraction=0.0).train
    assert len(train) == 50
    assert_array_equal(train.images[10:], pixels["train"])


def test_channels_on_request(tmp_path, write_source) -> None:
    pixels = write_source(tmp_path / "mnist", "mnist")["train"]
    source, colour = (
        SOURCES["mnist"],
        load_dataset("mnist", root=tmp_path, in_chans=3, val_fraction=0.0).train,
    )
    assert_array_equal(colour.images, np.repeat(pixels, 3, axis=1))
    assert (colour.mean, colour.std) == (source.mean * 3, source.std * 3)
    digits, grey = load_dataset("digits", in_chans=3).test, load_dataset("digits").test
    assert_array_equal(digits.images, np.repeat(grey.images, 3, axis=1))
    assert digits.mean == grey.mean * 3
    write_source(tmp_path / "cifar10", "cifar10")
    luminance = load_dataset("cifar10", root=tmp_path, in_chans=1, val_fraction=0.0).train
    assert luminance.images.shape == (40, 1, 32, 32)
    np.testing.assert_allclose(luminance.mean, (luminance.images / 255).mean())


def test_files_on_request(tmp_path, write_source) -> None:
    pixels = write_source(tmp_path / "cifar10", "cifar10")["train"]
    files = load_dataset("cifar10", root=tmp_path, storage="files", val_fraction=0.0).train
    assert isinstance(files, FileSet)
    order = np.random.default_rng(0).permutation(40)
    found, labels = files.batch(order)
    assert_array_equal(found, pixels[order])
    assert_array_equal(labels, order % 10)
    assert (files.mean, files.std) == (SOURCES["cifar10"].mean, SOURCES["cifar10"].std)


def test_a_known_set_keeps_its_size(tmp_path, write_source) -> None:
    write_source(tmp_path / "mnist", "mnist")
    assert load_dataset("mnist", root=tmp_path, img_size=224).train.img_size == (28, 28)


def test_folders_that_are_not_there(tmp_path, monkeypatch) -> None:
    assert one_line(str(tmp_path / "none")) == f"no folder {tmp_path}/none"
    assert one_line("./none/at/all") == "no folder ./none/at/all"
    assert one_line("") == one_line("   ").replace("'   '", "''")
    (tmp_path / "photos" / "holiday").mkdir(parents=True)
    (tmp_path / "photos.zip").touch()
    monkeypatch.chdir(tmp_path)
    assert one_line("photso") == "no folder and no data set 'photso'; did you mean photos?"
    assert one_line("photos/holidy") == (
        "data set photos/holidy not found: no folder of that name here, not in the hub's local cache, and "
        "HF_HUB_OFFLINE forbids the hub; did you mean photos/holiday?"
    )
    assert one_line(str(tmp_path / "photo")) == f"no folder {tmp_path}/photo; did you mean {tmp_path}/photos?"
    assert one_line("photos.zip").startswith("photos.zip is a file: expected a folder of images")
    missing = one_line("missing")
    assert missing.startswith("no folder and no data set 'missing'; the known ones are cifar10, cifar100, ")
    assert missing.endswith("fashion_mnist, fractals, imagenet, mnist, moving_mnist, shapes, textures")
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "photos"))
    assert one_line("holidays") == "no folder and no data set 'holidays'; did you mean holiday?"
