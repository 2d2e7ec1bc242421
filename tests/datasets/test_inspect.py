"""Looking at a data set: counts, sizes, statistics, doubles, broken files, a sheet of pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image, ImageEnhance

from vitrail.datasets.folder import find_folder
from vitrail.datasets.inspect import DatasetSummary, contact_sheet, inspect_dataset, same_pictures
from vitrail.datasets.items import FileItems
from vitrail.datasets.objects import object_items


def photo(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """Smooth blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, picture: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of unequal size, a broken file, other files, and doubles of every kind.

    | | ant | bee |
    |---|---|---|
    | train | 0 to 4, and 5 = 0 as a small dark JPEG | 0 = ant 1, 1 = test bee 0, 2 broken |
    | test | 0, 1 grey | 0 |
    """
    home = tmp_path / "insects"
    for k in range(5):
        write(home / f"train/ant/{k}.png", photo(k))
    dark = ImageEnhance.Brightness(photo(0).resize((48, 36))).enhance(0.6)
    write(home / "train/ant/5.jpg", dark, quality=70)
    write(home / "train/bee/0.png", photo(1))
    write(home / "train/bee/1.png", photo(20))
    (home / "train/bee/2.jpg").write_bytes(b"<html>404</html>")
    (home / "train/bee/notes.txt").write_text("bees")
    (home / "train/bee/.hidden").write_text("")
    write(home / "test/ant/0.png", photo(10))
    write(home / "test/ant/1.png", photo(11, 40, 30).convert("L"))
    write(home / "test/bee/0.jpg", photo(20), quality=90)
    return home


@pytest.fixture
def summary(folder) -> DatasetSummary:
    found = find_folder(folder)
    return inspect_dataset(found.parts, found.ignored)


class TestSummary:
    def test_numbers(self, summary) -> None:
        train, test = summary.splits
        assert (summary.name, summary.classes) == ("insects", ("ant", "bee"))
        assert (train.split, test.split) == ("train", "test")
        assert (train.images, test.images) == (9, 3)
        assert (train.counts, test.counts) == ((6, 3), (2, 1))
        assert (train.heights, train.widths, train.sizes) == ((36, 60.0, 60), (48, 80.0, 80), 2)
        assert (test.heights, test.widths, test.sizes) == ((40, 60.0, 60), (30, 80.0, 80), 2)
        assert (train.modes, test.modes) == ({"RGB": 8}, {"RGB": 2, "L": 1})
        assert summary.ignored == {".txt": 1, "hidden": 1}

    def test_mean_and_std_count_every_image_the_same(self, folder, summary) -> None:
        test = summary.splits[1]
        assert len(test.mean) == 3
        pixels = [
            np.asarray(Image.open(folder / "test" / name).convert("RGB")).reshape(-1, 3) / 255
            for name in ("ant/0.png", "ant/1.png", "bee/0.jpg")
        ]
        mean = np.mean([image.mean(axis=0) for image in pixels], axis=0)
        square = np.mean([(image**2).mean(axis=0) for image in pixels], axis=0)
        assert_allclose(test.mean, mean, atol=1e-9)
        assert_allclose(test.std, np.sqrt(square - mean**2), atol=1e-9)

    def test_grey_images_have_one_channel(self) -> None:
        pairs = [(np.full((4, 4), value, np.uint8), 0) for value in (0, 255)]
        (part,) = inspect_dataset({"train": object_items(pairs, name="grey")}).splits
        assert (part.mean, part.std, part.modes) == ((0.5,), (0.5,), {"L": 2})

    def test_broken_files(self, folder, summary) -> None:
        train, test = summary.splits
        assert train.broken == (
            (str(folder / "train/bee/2.jpg"), "expected an image, got a file of another kind"),
        )
        assert test.broken == ()

    def test_doubles(self, folder, summary) -> None:
        found = {
            tuple(str(Path(path).relative_to(folder)) for path in same.sources) for same in summary.doubles
        }
        assert found == {
            ("train/ant/0.png", "train/ant/5.jpg"),
            ("train/ant/1.png", "train/bee/0.png"),
            ("train/bee/1.png", "test/bee/0.jpg"),
        }
        (between,) = summary.doubles_between()
        assert (between.splits, between.classes) == (("train", "test"), ("bee", "bee"))
        assert len(summary.doubles_in("train")) == 2
        assert summary.doubles_in("test") == ()

    def test_problems(self, summary) -> None:
        assert summary.problems() == [
            "train: 1 image cannot be decoded",
            "train: fewer than 5 images of bee",
            "1 picture in more than one split",
            "1 picture with more than one class",
        ]

    def test_empty_classes_are_a_problem(self) -> None:
        pairs = [(np.asarray(photo(k)), k) for k in (0, 2)]
        parts = {
            split: object_items(pairs[:n], classes=("a", "b", "c"), name="x", split=split)
            for split, n in (("train", 2), ("test", 1))
        }
        assert inspect_dataset(parts).problems() == [
            "train: no images of b",
            "train: fewer than 5 images of a, c",
            "test: no images of b, c",
            "1 picture in more than one split",
        ]

    def test_nothing_to_mend(self) -> None:
        pairs = [(np.asarray(photo(k)), k % 2) for k in range(10)]
        summary = inspect_dataset({"train": object_items(pairs, name="x")})
        assert summary.problems() == []
        assert summary.doubles == ()
        assert summary.table().endswith("nothing to mend")

    def test_what_cannot_be_learnt(self) -> None:
        pairs = [(np.asarray(photo(0, 7, 9)), 0), (np.asarray(photo(1, 8, 8)), 0)] * 3
        summary = inspect_dataset({"train": object_items(pairs, classes=("a",), name="x")})
        assert summary.splits[0].small == 3
        assert summary.problems() == [
            "one class only (a): there is nothing to tell it from",
            "train: 3 images with a side below 8 pixels",
            "2 pictures there more than once, which may come into train and test",
        ]

    def test_splits_come_in_their_usual_order(self, folder) -> None:
        parts = find_folder(folder).parts
        summary = inspect_dataset({"test": parts["test"], "train": parts["train"]})
        assert [part.split for part in summary.splits] == ["train", "test"]

    def test_json(self, summary) -> None:
        found = json.loads(json.dumps(summary.to_dict()))
        assert found["splits"][0]["counts"] == [6, 3]
        assert found["doubles"][0]["splits"] == ["train", "train"]
        assert found["problems"] == summary.problems()

    def test_no_split(self) -> None:
        with pytest.raises(ValueError, match="expected at least one split, got none"):
            inspect_dataset({})

    def test_only_broken_images(self, tmp_path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"")
        items = FileItems([tmp_path / "a.jpg"], [0], classes=("a",), name="x", split="train")
        summary = inspect_dataset({"train": items})
        assert summary.splits[0].sizes == 0
        assert summary.splits[0].modes == {}
        assert "x: 1 image, 1 class\n" in summary.table()


class TestTable:
    def test_says_everything(self, folder, summary) -> None:
        table = summary.table()
        lines = table.splitlines()
        assert lines[0] == "insects: 12 images, 2 classes"
        rows = {line.split("  ")[0]: line.split() for line in lines}
        assert rows["images"] == ["images", "9", "3"]
        sizes = rows["height (min / median / max)"][6:]
        assert sizes == ["36", "/", "60", "/", "60", "40", "/", "60", "/", "60"]
        assert rows["broken"] == ["broken", "1", "0"]
        assert rows["ant"] == ["ant", "6", "2"]
        assert "train: ant (6) has 2.0 times the images of bee (3)" in lines
        assert f"  {folder}/train/bee/2.jpg: expected an image, got a file of another kind" in lines
        assert f"  {folder}/train/bee/1.png (train, bee)" in lines
        assert f"    = {folder}/test/bee/0.jpg (test, bee)" in lines
        assert "files that are not images, not read: 1 .txt, 1 hidden" in lines
        assert lines[lines.index("to mend:") :] == ["to mend:", *(f"  {line}" for line in summary.problems())]

    def test_says_how_training_will_divide_it(self) -> None:
        items = object_items([(np.asarray(photo(k)), k % 2) for k in range(10)], name="x")
        for splits, told in (
            (("train",), "20 % of each class are taken for test, and 10 % of train for validation"),
            (("train", "val"), "val is taken for test, and 10 % of train for validation"),
            (("train", "test"), "in training, 10 % of train for validation"),
            (("train", "val", "test"), ""),
        ):
            table = inspect_dataset(dict.fromkeys(splits, items)).table()
            assert told in table
            assert ("in training" in table) == bool(told)

    def test_tells_balance_from_imbalance(self) -> None:
        for larger, told in ((14, "train: classes are balanced (10 to 14 images)"), (15, "1.5 times the")):
            pairs = [(np.asarray(photo(0)), int(k < larger)) for k in range(10 + larger)]
            assert told in inspect_dataset({"train": object_items(pairs, name="x")}).table()

    def test_of_many_classes_shows_the_largest_and_the_smallest(self) -> None:
        pairs = [(np.full((1, 1), k, np.uint8), k) for k in range(100) for _ in range(k + 1)]
        items = object_items(pairs, classes=[f"class{k}" for k in range(100)], name="x")
        table = inspect_dataset({"train": items}).table()
        for name, shown in (("class99 ", True), ("class80 ", True), ("class79 ", False), ("class0 ", True)):
            assert (name in table) == shown
        assert "... 60 classes between" in table
        assert "and 89 more pictures" in table


class TestSamePictures:
    def thumbs(self, *pictures: Image.Image) -> list[bytes]:
        return [picture.convert("L").resize((32, 32), Image.Resampling.BOX).tobytes() for picture in pictures]

    def test_against_all_pairs(self) -> None:
        rng = np.random.default_rng(0)
        thumbs = []
        for k in range(60):
            base = np.frombuffer(self.thumbs(photo(k))[0], np.uint8).astype(float)
            for noise in (0.0, *rng.choice([2.0, 5.0, 8.0], size=2)):
                thumbs.append((base + rng.normal(0, noise, 1024)).clip(0, 255).astype(np.uint8).tobytes())
        vectors = np.array([np.frombuffer(thumb, np.uint8) for thumb in thumbs], dtype=float)
        alike = np.corrcoef(vectors) > 0.995
        # Whoever is alike to a member of the group belongs to it.
        for _ in range(10):
            alike = alike.astype(int) @ alike.astype(int) > 0
        expected = {tuple(np.flatnonzero(row)) for row in alike if row.sum() > 1}
        found = {tuple(group) for group in same_pictures(thumbs)}
        assert found == expected
        assert 20 < len(found) <= 60

    def test_in_order(self) -> None:
        a, b, c = self.thumbs(photo(1), photo(2), photo(3))
        assert [group.tolist() for group in same_pictures([a, b, c, b, a, b])] == [[0, 4], [1, 3, 5]]

    def test_empty_pictures_are_the_same_only_if_equal(self) -> None:
        white, black = self.thumbs(Image.new("L", (9, 9), 255), Image.new("L", (9, 9)))
        assert [group.tolist() for group in same_pictures([white, black, white])] == [[0, 2]]

    def test_none(self) -> None:
        assert same_pictures([]) == []


class TestContactSheet:
    def sheet(self, items, **options) -> np.ndarray:
        picture = Image.open(io.BytesIO(contact_sheet(items, **options)))
        assert picture.format == "PNG"
        return np.asarray(picture)

    def flat(self, count: int, classes: int) -> object:
        """Images of one colour, whose red is the class."""
        pairs = [(np.full((40, 30, 3), (k, 100, 200), np.uint8), k) for k in range(classes)] * count
        return object_items(pairs, classes=[f"class {k}" for k in range(classes)], name="flat")

    def test_has_a_row_a_class(self) -> None:
        sheet = self.sheet(self.flat(5, 3), per_class=4, cell=20)
        for k in range(3):
            assert (sheet == (k, 100, 200)).all(axis=-1).sum() == 4 * 20 * 20
        assert len(sheet) < 36 + 3 * 24 + 20

    def test_of_many_classes_takes_some_evenly(self) -> None:
        sheet = self.sheet(self.flat(1, 50), classes=3, per_class=2, cell=20)
        found = {k for k in range(50) if (sheet == (k, 100, 200)).all(axis=-1).any()}
        assert found == {0, 24, 49}

    def test_small_images_keep_their_pixels(self) -> None:
        pixels = np.array([[0, 255], [255, 0]], np.uint8)
        sheet = self.sheet(object_items([(pixels, 0)], classes=["x"], name="x"), cell=20)
        cell = sheet[36:56, -12 - 8 * 24 :][:, :20]  # the first of eight places, under the title
        expected = np.kron(pixels, np.ones((10, 10), np.uint8))
        assert (cell == expected[..., None]).all()

    def test_writes_letters_with_marks(self) -> None:
        names = ("Küste", "Kåste", "Kъste")
        labels = []
        for name in names:
            items = object_items([(np.zeros((4, 4, 3), np.uint8), 0)], classes=[name], name="x")
            labels.append(self.sheet(items, cell=20)[36:56, :40].tobytes())
        assert len(set(labels)) == 3

    def test_broken_files_are_marked(self, folder) -> None:
        red = (self.sheet(find_folder(folder).parts["train"]) == (255, 0, 0)).all(axis=-1)
        assert red.sum() >= 4 * 95

    def test_is_a_function_of_the_seed(self, folder) -> None:
        items = find_folder(folder).parts["train"]
        assert contact_sheet(items, per_class=2) == contact_sheet(items, per_class=2)
        assert contact_sheet(items, per_class=2) != contact_sheet(items, per_class=2, seed=1)


def test_the_scenes(real_data) -> None:
    """Its description tells 4 pairs in train, 14 in test (one picture is there three times), none between."""
    summary = inspect_dataset(find_folder(real_data / "scenes").parts)
    assert [part.images for part in summary.splits] == [1500, 2973]
    assert [part.modes for part in summary.splits] == [{"L": 1500}, {"L": 2973}]
    assert [
        sorted(len(same.sources) for same in summary.doubles_in(split)) for split in ("train", "test")
    ] == [
        [2] * 4,
        [2] * 11 + [3],
    ]
    assert summary.problems() == []
