from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from vitrail.datasets import FileSet, ImageSet, load_dataset, stratified_split
from vitrail.datasets.folder import find_folder

CLASSES = ("Zebra", "ant", "bee 2", "bee 10")  # capital letters sort first, and 1 before 2


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of its own: the cache of a test lies in tmp_path too."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write_image(path: Path, value: int, size: tuple[int, int] = (6, 5)) -> None:
    """One colour that tells the image: its red is the value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (value, 255 - value, value // 2)).save(path)


def write_classes(folder: Path, count: int = 10, start: int = 0, classes: tuple[str, ...] = CLASSES) -> None:
    for number, name in enumerate(classes):
        for k in range(count):
            write_image(folder / name / f"{k:02}.png", start + number * count + k)


def values(images: ImageSet | FileSet) -> list[int]:
    """The red of each image, which tells which one it is."""
    pixels, _ = images.batch(np.arange(len(images)))
    return pixels[:, 0, 0, 0].tolist()


def one_line(name: Path | str, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare the text)
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def oracle(folder: Path):
    """torchvision's reading of the same folder."""
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(folder))


class TestClassFolders:
    def test_with_splits(self, home) -> None:
        for split, start in (("train", 0), ("val", 100), ("test", 200)):
            write_classes(home / "mine" / split, count=3, start=start)
        splits = load_dataset(home / "mine")
        assert splits.val is not None
        assert splits.train.classes == tuple(sorted(CLASSES)) == splits.test.classes
        for part, start in ((splits.train, 0), (splits.val, 100), (splits.test, 200)):
            assert len(part) == 12
            for value, label in zip(values(part), part.labels, strict=True):
                assert part.classes[label] == CLASSES[(value - start) // 3]
        assert (splits.train.name, splits.train.split, splits.val.split, splits.test.split) == (
            "mine",
            "train",
            "val",
            "test",
        )

    def test_order_and_numbers_are_torchvisions(self, home) -> None:
        write_classes(home, count=3)
        for inner in ("ant/a-b/1.png", "ant/a/z.png", "ant/a/c/1.PNG", "ant/B.bmp"):
            write_image(home / "train" / inner, 99)
        for name in CLASSES:
            os.rename(home / name, home / "train" / name) if name != "ant" else None
        write_classes(home / "train", count=3, classes=("ant",))
        write_classes(home / "test", count=1)
        splits, expected = load_dataset(home, val_fraction=0.0), oracle(home / "train")
        assert dict(zip(splits.train.classes, range(4), strict=True)) == expected.class_to_idx
        assert_array_equal(splits.train.labels, expected.targets)
        pixels, _ = splits.train.batch(np.arange(len(splits.train)))
        assert len(splits.train) == len(expected) == 16
        for k, (picture, _) in enumerate(expected):
            assert_array_equal(pixels[k].permute(1, 2, 0), np.asarray(picture))

    def test_without_splits(self, home) -> None:
        write_classes(home)
        splits = load_dataset(home)
        other = load_dataset(home, split_seed=1)
        assert splits.val is not None
        assert other.val is not None
        assert [len(splits.train), len(splits.val), len(splits.test)] == [28, 4, 8]
        assert_array_equal(splits.test.counts(), [2] * 4)
        assert_array_equal(splits.val.counts(), [1] * 4)
        assert sorted(values(splits.train) + values(splits.val) + values(splits.test)) == list(range(40))
        assert values(other.test) == values(splits.test)
        assert values(other.val) != values(splits.val)
        _, held_out = stratified_split(np.repeat(np.arange(4), 10), 0.2, 0)
        assert sorted(values(splits.test)) == sorted(by_class(held_out))

    def test_mean_and_std_are_of_the_training_images(self, home) -> None:
        write_classes(home)
        splits = load_dataset(home, val_fraction=0.0)
        scaled = splits.train.images / 255
        np.testing.assert_allclose(splits.train.mean, scaled.mean(axis=(0, 2, 3)))
        np.testing.assert_allclose(splits.train.std, scaled.std(axis=(0, 2, 3)))
        assert splits.test.mean == splits.train.mean

    def test_validation_images_are_the_test_where_there_is_no_other(self, home) -> None:
        write_classes(home / "Training")
        write_classes(home / "valid", count=2, start=100)
        splits = load_dataset(home, val_fraction=0.2)
        assert splits.val is not None
        assert [len(splits.train), len(splits.val), len(splits.test)] == [32, 8, 8]
        assert min(values(splits.test)) == 100
        assert max(values(splits.val)) < 40
        assert (splits.test.split, splits.val.split) == ("test", "val")

    def test_what_is_not_an_image_is_counted(self, home) -> None:
        write_classes(home / "train", count=2)
        write_classes(home / "test", count=2)
        for name in ("notes.txt", "train/list.TXT", "train/ant/x.xml", "train/ant/README"):
            (home / name).touch()
        for name in ("train/.DS_Store", "train/ant/._00.png", "test/ant/.hidden/1.png", "train/.git/x.png"):
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).touch()
        (home / "train" / "stray.png").touch()
        splits = load_dataset(home, val_fraction=0.0)
        assert len(splits.train) == len(splits.test) == 8
        assert splits.ignored == {".txt": 1, ".xml": 1, "no extension": 1, "hidden": 2, ".png": 1}

    def test_images_without_class_folders_are_one_class(self, home) -> None:
        for number in range(10):
            write_image(home / "flat" / f"{number}.png", 10 * number)
        (home / "flat" / "notes.txt").touch()
        splits = load_dataset(home / "flat", val_fraction=0.0)
        assert splits.train.classes == ("flat",)
        assert sorted(values(splits.train) + values(splits.test)) == [10 * number for number in range(10)]
        assert splits.ignored == {".txt": 1}
        for split, number in (("train", 1), ("train", 2), ("test", 3)):
            write_image(home / "split" / split / f"{number}.png", number)
        splits = load_dataset(home / "split", val_fraction=0.0)
        assert splits.train.classes == splits.test.classes == ("split",)
        assert (values(splits.train), values(splits.test)) == ([1, 2], [3])

    def test_links_are_followed_and_circles_are_not(self, home) -> None:
        write_classes(home / "store", count=2)
        (home / "data" / "ant").mkdir(parents=True)
        (home / "data" / "Zebra").symlink_to(home / "store" / "Zebra", target_is_directory=True)
        (home / "data" / "ant" / "0.png").symlink_to(home / "store" / "ant" / "00.png")
        write_image(home / "data" / "ant" / "1.png", 50)
        (home / "data" / "ant" / "again").symlink_to(home / "data" / "ant", target_is_directory=True)
        splits = load_dataset(home / "data", val_fraction=0.0)
        assert sorted(values(splits.train) + values(splits.test)) == [0, 1, 2, 50]

    def test_a_class_may_be_missing_in_test_but_not_new(self, home) -> None:
        write_classes(home / "train", count=2)
        write_classes(home / "test", count=2, classes=("ant", "Zebra"))
        (home / "test" / "empty").mkdir()
        assert load_dataset(home).test.counts().tolist() == [2, 2, 0, 0]
        write_image(home / "test" / "cow" / "1.png", 0)
        assert one_line(home) == (
            f"{home}/test/cow/1.png: class 'cow' of test is not among the 4 of train "
            "(Zebra, ant, bee 10, ...)"
        )

    def test_folders_that_do_not_fit(self, home) -> None:
        (home / "empty").mkdir()
        assert one_line(home / "empty").startswith(f"{home}/empty: expected class folders with images, ")
        assert one_line(home / "empty").endswith("got nothing")
        write_image(home / "stray" / "1.png", 0)
        (home / "stray" / "cow").mkdir()
        assert one_line(home / "stray").endswith("got 1 .png")
        write_classes(home / "half" / "test")
        assert one_line(home / "half") == f"{home}/half: expected a split train beside test, got none"
        write_classes(home / "hollow", count=1)
        (home / "hollow" / "cow").mkdir()
        assert one_line(home / "hollow") == (
            f"{home}/hollow/cow: expected images in this class folder, got none; add some, or remove it"
        )
        found = find_folder(home / "hollow")
        assert found.empty == (home / "hollow" / "cow",)
        assert np.bincount(found.parts["train"].labels, minlength=5).tolist() == [1, 1, 1, 1, 0]
        (home / "run" / "checkpoints").mkdir(parents=True)
        (home / "run" / "config.yaml").write_text("data: {name: digits}")
        assert one_line(home / "run").startswith(f"{home}/run is a run folder, not a folder of images")
        write_classes(home / "twice" / "val", count=1)
        write_classes(home / "twice" / "valid", count=1)
        assert one_line(home / "twice").endswith("expected one folder of val, got val and valid")

    def test_a_folder_below_a_root(self, home, monkeypatch) -> None:
        write_classes(home / "root" / "mine", count=5)
        assert load_dataset("mine", root=home / "root").train.name == "mine"
        monkeypatch.setenv("VITRAIL_DATA", str(home / "root"))
        assert load_dataset("mine").train.name == "mine"
        monkeypatch.chdir(home / "root" / "mine")
        assert load_dataset(".").train.name == "mine"


def by_class(positions: np.ndarray) -> list[int]:
    """Values of `write_classes` at positions of the sorted classes."""
    order = [CLASSES.index(name) for name in sorted(CLASSES)]
    return [order[position // 10] * 10 + position % 10 for position in positions.tolist()]


class TestSizes:
    def test_unequal_sizes_need_one(self, home) -> None:
        write_classes(home / "train", count=1)
        write_image(home / "train" / "ant" / "01.png", 9, size=(8, 12))
        write_classes(home / "test", count=1)
        for storage in ("memory", "files"):
            assert one_line(home, storage=storage) == (
                f"{home}/train/ant/01.png: expected 6x5 pixels as in "
                f"{home}/train/Zebra/00.png, got 8x12; give one size to all with --model.img_size"
            )
        for size in (4, (4, 6), 20):
            splits = load_dataset(home, img_size=size)
            assert (
                splits.train.img_size
                == splits.test.img_size
                == (size if isinstance(size, tuple) else (size, size))
            )

    def test_test_images_of_another_size(self, home) -> None:
        write_classes(home / "train", count=1)
        write_classes(home / "test", count=1, classes=("ant",))
        write_image(home / "test" / "ant" / "00.png", 9, size=(8, 12))
        for storage in ("memory", "files"):
            message = one_line(home, storage=storage)
            assert "got 8x12" in message
            assert message.endswith("give one size to all with --model.img_size")

    def test_fitting_is_that_of_the_preprocessing(self, home) -> None:
        from vitrail.datasets import Preprocessing

        rng = np.random.default_rng(0)
        for name, size in (("a", (30, 41)), ("b", (17, 12))):
            (home / name).mkdir()
            for k in range(5):
                picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
                picture.save(home / name / f"{k}.png")
        made = Preprocessing((16, 14), 3, (0.0,) * 3, (1.0,) * 3)
        splits = load_dataset(home, img_size=(16, 14), val_fraction=0.0)
        files = sorted(home.glob("[ab]/*.png"))
        rest, _ = stratified_split([0] * 5 + [1] * 5, 0.2, 0)
        for image, position in zip(splits.train.images, rest, strict=True):
            expected = (made.open_image(files[position]) * 255).round().byte()
            assert_array_equal(image, expected)

    def test_grey_and_colour(self, home) -> None:
        for name in ("a", "b"):
            (home / name).mkdir()
            for k in range(5):
                Image.new("L", (4, 4), 40 * k).save(home / name / f"{k}.png")
        assert load_dataset(home).train.in_chans == 1
        colour = load_dataset(home, in_chans=3).train
        assert colour.images.shape[1] == 3
        assert_array_equal(colour.images[:, 0], colour.images[:, 2])
        write_image(home / "b" / "9.png", 0, size=(4, 4))
        assert load_dataset(home).train.in_chans == 3
        assert load_dataset(home).test.in_chans == 3
        assert load_dataset(home, in_chans=1).train.in_chans == 1

    def test_options_out_of_range(self, home) -> None:
        write_classes(home, count=1)
        assert one_line(home, img_size=0) == "img_size: expected a height and a width above 0, got 0"
        assert one_line(home, in_chans=2) == "in_chans: expected 1 or 3, got 2"
        assert one_line(home, storage="disk") == "storage: expected auto or memory or files, got 'disk'"
        assert one_line(home, broken="fix") == "broken: expected refuse or skip, got 'fix'"


class TestStorage:
    def test_both_kinds_hold_the_same(self, home) -> None:
        write_classes(home)
        memory, files = (load_dataset(home, storage=kind) for kind in ("memory", "files"))
        for split in ("train", "val", "test"):
            one, other = getattr(memory, split), getattr(files, split)
            assert isinstance(one, ImageSet)
            assert isinstance(other, FileSet)
            assert values(one) == values(other)
            assert_array_equal(one.labels, other.labels)
            assert (one.classes, one.name, one.split, one.img_size) == (
                other.classes,
                other.name,
                other.split,
                other.img_size,
            )
            np.testing.assert_allclose(one.mean, other.mean, atol=1e-6)
            np.testing.assert_allclose(one.std, other.std, atol=1e-6)

    def test_memory_decides(self, home, monkeypatch) -> None:
        write_classes(home)
        assert isinstance(load_dataset(home).train, ImageSet)
        needed = 40 * 3 * 6 * 5
        sizes = {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": needed}
        monkeypatch.setattr("os.sysconf", lambda name: sizes[name])
        assert isinstance(load_dataset(home).train, FileSet)
        sizes["SC_PHYS_PAGES"] += 1
        assert isinstance(load_dataset(home).train, ImageSet)
        assert isinstance(load_dataset(home, img_size=8).train, FileSet)


class TestBroken:
    @pytest.fixture(params=["memory", "files"])
    def storage(self, request) -> str:
        return request.param

    def test_refused_or_left_out(self, home, storage) -> None:
        write_classes(home / "train")
        write_classes(home / "test")
        (home / "train" / "ant" / "03.png").write_bytes(b"text")
        (home / "train" / "bee 2" / "04.png").write_bytes(b"")
        cut = home / "test" / "ant" / "05.png"
        cut.write_bytes(cut.read_bytes()[:45])
        assert one_line(home, storage=storage) == (
            f"{home}/train/ant/03.png: expected an image, got a file of another kind; 2 of 40 "
            "images are broken; repair or remove them, or leave them out with --data.broken skip"
        )
        splits = load_dataset(home, storage=storage, broken="skip", val_fraction=0.0)
        assert [Path(source).name for source, _ in splits.skipped] == ["03.png", "04.png", "05.png"]
        assert splits.skipped[2][0] == str(cut)
        assert splits.skipped[2][1].startswith("the image cannot be decoded (")
        assert splits.train.counts().tolist() == [10, 9, 10, 9]
        assert splits.test.counts().tolist() == [10, 9, 10, 10]
        assert set(range(40)) - set(values(splits.train)) == {13, 24}

    def test_the_first_image_may_be_the_broken_one(self, home, storage) -> None:
        write_classes(home)
        (home / "Zebra" / "00.png").write_bytes(b"")
        splits = load_dataset(home, storage=storage, broken="skip")
        assert splits.train.img_size == (6, 5)
        assert len(splits.skipped) == 1


def write_table(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        return
    lines = [delimiter.join(rows[0])] + [delimiter.join(str(value) for value in row.values()) for row in rows]
    # As spreadsheets write it, with a mark at the beginning.
    path.write_text("\n".join(lines), encoding="utf-8-sig")


class TestTables:
    @pytest.mark.parametrize("name", ["labels.csv", "metadata.csv", "metadata.jsonl", "labels.jsonl"])
    @pytest.mark.parametrize(
        ("file", "label"),
        [("file_name", "label"), ("filename", "class"), ("image", "target"), ("Path", "Category")],
    )
    def test_flat_folder(self, home, name, file, label) -> None:
        for k in range(20):
            write_image(home / f"{k}.png", k)
        rows = [{"id": k, file: f"{k}.png", label: "no" if k % 2 else "ja, ö"} for k in range(20)]
        if name.endswith("csv"):
            rows = [row | {label: f'"{row[label]}"'} for row in rows]
        write_table(home / name, rows)
        splits = load_dataset(home, val_fraction=0.0)
        assert splits.train.classes == ("ja, ö", "no")
        assert splits.train.labels.tolist() == [value % 2 for value in values(splits.train)]
        assert sorted(values(splits.train) + values(splits.test)) == list(range(20))
        assert len(splits.test) == 4

    def test_whole_numbers_are_sorted_as_numbers(self, home) -> None:
        for k in range(12):
            write_image(home / f"{k}.png", k)
        write_table(
            home / "labels.csv",
            [{"path": f"{k}.png", "label": k + 1, "split": "train"} for k in range(12)],
        )
        write_table(home / "test.csv", [{"path": "3.png", "label": "4"}])
        write_table(home / "train.csv", [{"path": f"{k}.png", "label": k + 1} for k in range(12)])
        splits = load_dataset(home, val_fraction=0.0)
        assert splits.train.classes == tuple(str(k + 1) for k in range(12))
        assert splits.train.labels.tolist() == list(range(12))
        assert values(splits.test) == splits.test.labels.tolist() == [3]

    def test_split_column(self, home) -> None:
        for k in range(6):
            write_image(home / "images" / f"{k}.png", k)
        names = ("train", "TRAIN", "valid", "test", "train", "dev")
        rows = [{"image": f"{k}.png", "label": "x", "split": names[k]} for k in range(6)]
        write_table(home / "metadata.csv", rows, delimiter=";")
        splits = load_dataset(home)
        assert splits.val is not None
        assert [values(splits.train), values(splits.val), values(splits.test)] == [[0, 1, 4], [2, 5], [3]]

    def test_the_hubs_layout_of_split_folders(self, home) -> None:
        for split, start in (("train", 0), ("test", 100)):
            rows = []
            for k in range(6):
                write_image(home / split / f"{k}.png", start + k)
                rows.append({"file_name": f"{k}.png", "label": "even" if k % 2 == 0 else "odd"})
            write_table(home / split / "metadata.jsonl", rows)
        splits = load_dataset(home, val_fraction=0.0)
        assert splits.train.classes == ("even", "odd")
        assert values(splits.test) == [100 + k for k in range(6)]

    def test_paths_that_begin_with_the_split(self, home) -> None:
        rows = []
        for k in range(6):
            name = f"{'test' if k > 3 else 'train'}/{k}.png"
            write_image(home / name, k)
            rows.append({"file_name": name, "label": k % 2})
        write_table(home / "metadata.csv", rows)
        splits = load_dataset(home, val_fraction=0.0)
        assert [values(splits.train), values(splits.test)] == [[0, 1, 2, 3], [4, 5]]

    def test_tables_beside_split_folders(self, home) -> None:
        for split, start in (("train", 0), ("val", 50)):
            for k in range(4):
                write_image(home / split / f"{k}.png", start + k)
            write_table(home / f"{split}.csv", [{"image": f"{k}.png", "class": k % 2} for k in range(4)])
        splits = load_dataset(home, val_fraction=0.0)
        assert [values(splits.train), values(splits.test)] == [[0, 1, 2, 3], [50, 51, 52, 53]]

    def test_a_label_column_of_another_name(self, home) -> None:
        for k in range(4):
            write_image(home / f"{k}.png", k)
        rows = [{"file_name": f"{k}.png", "vendor": "ab"[k % 2], "Group": "x"} for k in range(4)]
        write_table(home / "metadata.jsonl", rows)
        assert load_dataset(home, label_column="vendor").train.classes == ("a", "b")
        assert load_dataset(home, label_column="group").train.classes == ("x",)
        assert one_line(home) == (
            f"{home}/metadata.jsonl: expected a column label or class or target or category for the "
            "label, got file_name, vendor, group; name it with --data.label_column"
        )
        assert one_line(home, label_column="vndor") == (
            f"{home}/metadata.jsonl: expected a column vndor for the label, got file_name, vendor, group; "
            "did you mean vendor?"
        )

    def test_a_file_that_is_not_there_is_a_broken_image(self, home) -> None:
        for k in range(10):
            write_image(home / f"{k}.png", k)
        (home / "folder.png").mkdir()
        names = [*(f"{k}.png" for k in range(10)), "none.png", "folder.png"]
        rows = [
            {"image": name, "label": "x", "split": "test" if name in "12.png" else "train"} for name in names
        ]
        write_table(home / "labels.csv", rows)
        assert "/none.png: no such image file; 2 of 11 images are broken" in one_line(home)
        skipped = load_dataset(home, broken="skip").skipped
        assert [reason for _, reason in skipped] == [
            "no such image file",
            "expected an image file, got a folder",
        ]

    def test_tables_that_are_damaged(self, home) -> None:
        path = home / "labels.csv"
        for text, message in (
            ("", "expected rows of images and labels, got none"),
            ("image,label\n", "expected rows of images and labels, got none"),
            (
                "name,label\n1.png,a\n",
                "expected a column file_name or filename or image or path for the file, got",
            ),
            ("image,label\n1.png,\n", "line 2: expected a value in column label, got ''"),
            ("image,label\n1.png,a\n2.png\n", "line 3: expected a value in column label, got None"),
            ("image,label,split\n1.png,a,all\n", "line 2: expected train, val or test as split, got 'all'"),
            ('image,label\n"1.png,a\n', "not a table that can be read ("),
        ):
            path.write_text(text)
            assert message in one_line(home), text
        path.write_bytes(b"image,label\n\xff\xfe.png,a\n")
        assert "not a table that can be read ('utf-8' codec" in one_line(home)
        path.rename(home / "labels.jsonl")
        path = home / "labels.jsonl"
        for text, message in (
            ('{"image": "1.png"', "not a table that can be read ("),
            ("[1, 2]", "not a table that can be read (expected names with values, got list)"),
            ('{"image": "1.png", "label": [1]}', "line 1: expected a value in column label, got [1]"),
        ):
            path.write_text(text)
            assert message in one_line(home), text
        (home / "labels.csv").write_text("image,label\n1.png,a\n")
        assert one_line(home).endswith("expected one table, got labels.csv and labels.jsonl")


class TestParquet:
    FEATURES: ClassVar = {
        "picture": {"_type": "Image"},
        "kind": {"_type": "ClassLabel", "names": ["cat", "dog", "cow"]},
    }

    def write(
        self, path: Path, png, labels: list[object], start: int = 0, features=None, column: str = "kind"
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path.parent.mkdir(parents=True, exist_ok=True)
        images = [
            {"bytes": png(np.full((3, 4, 4), start + k, np.uint8)), "path": None} for k in range(len(labels))
        ]
        table = pa.table({"n": list(range(len(labels))), "picture": images, column: labels})
        if features:
            table = table.replace_schema_metadata(
                {"huggingface": json.dumps({"info": {"features": features}})}
            )
        pq.write_table(table, path)

    def test_names_from_the_hubs_metadata(self, home, png) -> None:
        self.write(home / "data" / "train-00000-of-00001.parquet", png, [2, 0, 2, 0], features=self.FEATURES)
        self.write(home / "data" / "test-00000-of-00001.parquet", png, [1], 50, features=self.FEATURES)
        splits = load_dataset(home, val_fraction=0.0)
        assert splits.train.classes == ("cat", "dog", "cow")
        assert splits.train.labels.tolist() == [2, 0, 2, 0]
        assert [values(splits.train), values(splits.test)] == [[0, 1, 2, 3], [50]]

    @pytest.mark.parametrize(
        ("labels", "classes"), [(["x", "a", "x", "b"], ("a", "b", "x")), ([30, 4, 30, 11], ("4", "11", "30"))]
    )
    def test_plain_files(self, home, png, labels, classes) -> None:
        self.write(home / "train-0.parquet", png, labels, column="Label")
        self.write(home / "validation-0.parquet", png, labels[:1], 50, column="Label")
        for storage in ("memory", "files"):
            splits = load_dataset(home, val_fraction=0.0, storage=storage)
            assert splits.train.classes == classes
            assert splits.train.labels.tolist() == [2, 0, 2, 1]
            assert [values(splits.train), values(splits.test)] == [[0, 1, 2, 3], [50]]

    def test_a_test_split_without_labels_is_left_out(self, home, png) -> None:
        for split, labels in (("train", [0, 1, 2, 0]), ("validation", [1]), ("test", [-1, -1])):
            self.write(home / f"{split}-0.parquet", png, labels, features=self.FEATURES)
        assert load_dataset(home).test.labels.tolist() == [1]

    def test_columns_that_do_not_tell(self, home, png) -> None:
        path = home / "train-0.parquet"
        self.write(path, png, [0, 1], column="kind")
        assert one_line(home) == (
            f"{path}: expected one label column, got 0 (none) among n, picture, kind; "
            "choose with --data.label_column"
        )
        assert load_dataset(home, label_column="kind").train.classes == ("0", "1")
        assert one_line(home, label_column="sort") == f"{path}: expected a column sort, got n, picture, kind"
        path.rename(home / "test-0.parquet")
        assert one_line(home).endswith("expected train-*.parquet beside test, got none")

    def test_an_unknown_hub_id(self, home, png, monkeypatch) -> None:
        import huggingface_hub

        asked = []

        def snapshot(hub_id, *, local_files_only, **_):
            asked.append((hub_id, local_files_only))
            return str(home / "snapshot")

        assert one_line("some/pets") == (
            "data set some/pets not found: no folder of that name here, not in the hub's local cache, and "
            "HF_HUB_OFFLINE forbids the hub"
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        self.write(home / "snapshot" / "data" / "train-0.parquet", png, [0, 1] * 5, features=self.FEATURES)
        splits = load_dataset("some/pets", val_fraction=0.0)
        assert asked == [("some/pets", True)]
        assert splits.train.name == "some/pets"
        assert sorted(values(splits.train) + values(splits.test)) == list(range(10))
