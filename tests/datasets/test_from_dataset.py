from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from vitrail.datasets import FileSet, ImageSet, Splits, from_dataset

N = 12


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, 3, 4, 5), dtype=np.uint8)


LABELS = [k % 3 for k in range(N)]


class Pictures(Dataset):
    """A data set as people write them, with an own transform."""

    def __init__(self, pixels: np.ndarray, transform=None) -> None:
        self.pixels, self.transform, self.reads = pixels, transform, 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[object, int]:
        self.reads += 1
        if index >= len(self):
            raise IndexError(index)
        picture = Image.fromarray(self.pixels[index].transpose(1, 2, 0))
        return (self.transform(picture) if self.transform else picture), LABELS[index]


def one_line(dataset: object, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers compare the text)
        from_dataset(dataset, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWhatAnItemMayBe:
    def images(self, pixels: np.ndarray) -> dict[str, list[object]]:
        tensors = torch.from_numpy(pixels)
        return {
            "PIL images": [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels],
            "uint8 tensors": list(tensors),
            "float tensors": list(tensors / 255),
            "double tensors": list(tensors.double() / 255),
            "uint8 arrays": [image.transpose(1, 2, 0) for image in pixels],
            "float arrays": [(image.transpose(1, 2, 0) / 255).astype(np.float32) for image in pixels],
        }

    def test_all_kinds_give_the_same_pixels(self, pixels) -> None:
        for kind, images in self.images(pixels).items():
            found = from_dataset(list(zip(images, LABELS, strict=True)))
            assert isinstance(found, ImageSet), kind
            assert_array_equal(found.images, pixels, err_msg=kind)
            assert found.labels.tolist() == LABELS
            records = [
                {"img": image, "y": label, "id": "x"} for image, label in zip(images, LABELS, strict=True)
            ]
            assert_array_equal(from_dataset(records).images, pixels, err_msg=kind)

    def test_grey(self, pixels) -> None:
        grey = pixels[:, 0]
        for images in (torch.from_numpy(grey), torch.from_numpy(grey)[:, None] / 255, grey[..., None]):
            found = from_dataset([(image, 0) for image in images])
            assert_array_equal(found.images, grey[:, None])
            assert from_dataset([(image, 0) for image in images], in_chans=3).images.shape == (N, 3, 4, 5)

    def test_labels_of_any_whole_kind(self, pixels) -> None:
        image = pixels[0].transpose(1, 2, 0)
        labels = [torch.tensor(2), np.int32(1), 0, 1.0]
        assert from_dataset([(image, label) for label in labels]).labels.tolist() == [2, 1, 0, 1]

    def test_values_that_are_not_levels(self, pixels) -> None:
        tensor = torch.from_numpy(pixels[0]) / 255
        assert one_line([(tensor, 0), ((tensor - 0.5) / 0.25, 1)]) == (
            "list/train, row 1: expected floating-point values from 0 to 1, got "
            f"{(tensor.min() - 0.5) / 0.25:.3g} to {(tensor.max() - 0.5) / 0.25:.3g}; leave the "
            "normalisation out of the transform: the model's preprocessing does it"
        )
        assert one_line([(tensor * 0.99, 0)]).startswith(
            "list/train, row 0: expected floating-point values k / 255 as ToTensor gives them, got "
            "values between"
        )
        assert "expected values as uint8 or floating point 0 to 1, got int64" in one_line(
            [(tensor.long(), 0)]
        )
        assert "got shape [5, 4, 4]" in one_line([(torch.zeros(5, 4, 4), 0)])
        assert "got shape [2]" in one_line([(torch.zeros(2), 0)])
        assert "expected floating-point values from 0 to 1, got nan" in one_line([(tensor * np.nan, 0)])

    def test_items_of_other_kinds(self, pixels) -> None:
        image = pixels[0].transpose(1, 2, 0)
        assert one_line([1, 2]) == "list/train, row 0: expected an image and its class number, got int"
        assert one_line([(image,)]) == "list/train, row 0: expected an image and its class number, got tuple"
        assert one_line([("a.png", 0)]).endswith("expected a PIL image, an array or a tensor, got str")
        assert one_line([(image, "cat")]) == "list/train, row 0: expected a class number, got 'cat'"
        assert one_line([(image, 0.5)]) == "list/train, row 0: expected a class number, got 0.5"
        assert one_line([{"image": image, "a": 1, "b": 2}]) == (
            "list/train, row 0: expected one image and one class number among image, a, b; "
            "choose with label_column"
        )
        assert from_dataset([{"image": image, "a": 1, "b": 0}], label_column="b").labels.tolist() == [0]
        assert one_line([(image, 2)], classes=("a", "b")) == "list: expected labels from 0 to 1, got 2 to 2"
        assert one_line([(image, 0), (image[:3], 0)]).startswith(
            "list/train, row 1: expected 4x5 pixels as in list/train, row 0, got 3x5; give one size"
        )

    def test_objects_of_other_kinds(self, pixels) -> None:
        class Stream(IterableDataset):
            def __iter__(self):
                yield from []

        assert one_line(Stream()).startswith(
            "expected a data set with a length, got Stream: take a part of a stream"
        )
        assert one_line(DataLoader(Pictures(pixels))) == (
            "expected a data set with items by number, got DataLoader: give a loader's own dataset"
        )
        assert (
            one_line({"train": [], "test": []})
            == "expected one split of a data set, got dict with train, test"
        )
        assert len(from_dataset([])) == 0


class TestTorch:
    def test_own_transforms_run(self, pixels) -> None:
        from torchvision.transforms import v2

        mirror = v2.Compose(
            [v2.RandomHorizontalFlip(p=1.0), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        )
        found = from_dataset(Pictures(pixels, mirror))
        assert_array_equal(found.images, pixels[..., ::-1])

    def test_random_transforms_run_at_every_read_of_files(self, pixels) -> None:
        from torchvision.transforms import v2

        dataset = Pictures(pixels, v2.RandomHorizontalFlip(p=0.5))
        torch.manual_seed(0)
        found = from_dataset(dataset, storage="files", img_size=(4, 5))
        assert isinstance(found, FileSet)
        reads = torch.stack([found.batch([0])[0][0] for _ in range(20)])
        assert len(reads.unique(dim=0)) == 2

    def test_subset_and_tensor_dataset(self, pixels) -> None:
        whole = Pictures(pixels)
        part = from_dataset(Subset(whole, [5, 3]))
        assert_array_equal(part.images, pixels[[5, 3]])
        assert part.labels.tolist() == [2, 0]
        assert part.name == "pictures"
        tensors = TensorDataset(torch.from_numpy(pixels), torch.tensor(LABELS))
        assert_array_equal(from_dataset(tensors).images, pixels)

    def test_torchvisions_own(self, pixels, tmp_path) -> None:
        from torchvision.datasets import CIFAR10, FakeData, ImageFolder
        from torchvision.transforms import ToTensor

        for k, image in enumerate(pixels):
            path = tmp_path / "images" / "cba"[k % 3] / f"{k:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
        for transform in (None, ToTensor()):
            folder = ImageFolder(str(tmp_path / "images"), transform=transform)
            found = from_dataset(folder)
            assert found.classes == ("a", "b", "c")
            assert_array_equal(found.labels, folder.targets)
            assert_array_equal(found.images[0], pixels[2])
            part = from_dataset(Subset(folder, [11, 0]))
            assert part.classes == ("a", "b", "c")
            assert_array_equal(part.images, [pixels[9], pixels[2]])
        assert len(from_dataset(FakeData(5, (3, 6, 7), transform=ToTensor()))) == 5
        made = CIFAR10.__new__(CIFAR10)
        made.data, made.targets = pixels.transpose(0, 2, 3, 1), LABELS
        made.classes, made.transform, made.target_transform = ["x", "y", "z"], None, None
        found = from_dataset(made)
        assert_array_equal(found.images, pixels)
        assert (found.classes, found.name) == (("x", "y", "z"), "cifar10")

    def test_targets_that_a_transform_changes_are_not_trusted(self, pixels, tmp_path) -> None:
        from torchvision.datasets import ImageFolder

        for k in range(4):
            (tmp_path / "images" / str(k % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[k, 0]).save(tmp_path / "images" / str(k % 2) / f"{k}.png")
        folder = ImageFolder(str(tmp_path / "images"), target_transform=lambda label: 1 - label)
        assert from_dataset(folder).labels.tolist() == [1, 1, 0, 0]


# The library leaves files of its own to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
class TestHub:
    def made(self, features: dict[str, object], **columns: list[object]) -> object:
        hub = pytest.importorskip("datasets")
        kinds = {
            "image": hub.Image(),
            "label": hub.ClassLabel(names=["x", "y"]),
            "number": hub.Value("int64"),
        }
        return hub.Dataset.from_dict(
            columns, features=hub.Features({name: kinds[str(kind)] for name, kind in features.items()})
        )

    def test_gives_the_pixels_and_names(self, pixels, png) -> None:
        dataset = self.made(
            {"n": "number", "picture": "image", "kind": "label"},
            n=[1, 2, 3, 4],
            picture=[{"bytes": png(image), "path": None} for image in pixels[:4]],
            kind=[0, 1, 1, 0],
        )
        images = from_dataset(dataset)
        assert_array_equal(images.images, pixels[:4])
        assert images.labels.tolist() == [0, 1, 1, 0]
        assert images.classes == ("x", "y")
        assert_array_equal(from_dataset(dataset.with_format("torch")).images, pixels[:4])
        assert_array_equal(from_dataset(dataset.select([2, 0])).images, pixels[[2, 0]])

    def test_grey_among_colour_becomes_colour(self, pixels, png) -> None:
        grey, colour = pixels[0, :1], pixels[1]
        encoded = [{"bytes": png(image), "path": None} for image in (grey, colour)]
        images = from_dataset(self.made({"i": "image", "l": "label"}, i=encoded, l=[0, 1]))
        assert_array_equal(images.images[0], np.repeat(grey, 3, axis=0))
        assert_array_equal(images.images[1], colour)

    def test_says_what_does_not_fit(self, png) -> None:
        good = {"bytes": png(np.zeros((1, 4, 4), np.uint8)), "path": None}
        wide = {"bytes": png(np.zeros((1, 4, 6), np.uint8)), "path": None}
        unequal = self.made({"i": "image", "l": "label"}, i=[good, wide], l=[0, 1])
        assert "hub/train, row 1: expected 4x4 pixels as in hub/train, row 0, got 4x6" in one_line(unequal)
        assert from_dataset(unequal, img_size=3).img_size == (3, 3)
        broken = {"bytes": good["bytes"][:-25], "path": None}
        message = one_line(self.made({"i": "image", "l": "label"}, i=[good, broken], l=[0, 1]))
        assert message.startswith("hub/train, row 1: the image cannot be decoded (")
        assert "one column of type Image, got 0 (none) among l" in one_line(self.made({"l": "label"}, l=[0]))
        two = self.made({"i": "image", "l": "label", "m": "label"}, i=[good], l=[0], m=[1])
        assert one_line(two).endswith("got 2 (l, m) among i, l, m; choose with label_column")
        assert from_dataset(two, label_column="m").labels.tolist() == [1]

    def test_a_label_column_that_counts_its_values(self, pixels, png) -> None:
        hub = pytest.importorskip("datasets")
        columns = {
            "image": [{"bytes": png(image), "path": None} for image in pixels[:3]],
            "vendor": ["b", "a", "b"],
            "year": [10, 9, None],
        }
        kinds = {"image": hub.Image(), "vendor": hub.Value("string"), "year": hub.Value("int64")}
        dataset = hub.Dataset.from_dict(columns, features=hub.Features(kinds))
        found = from_dataset(dataset, label_column="vendor")
        assert (found.classes, found.labels.tolist()) == (("a", "b"), [1, 0, 1])
        found = from_dataset(dataset.select([0, 1]), label_column="year")
        assert (found.classes, found.labels.tolist()) == (("9", "10"), [1, 0])
        assert one_line(dataset, label_column="year") == "hub/train, row 2: expected a class, got None"
        assert one_line(dataset, label_column="x") == "hub: expected a column x, got image, vendor, year"

    def test_streams_are_taken_in_part(self, pixels, png) -> None:
        dataset = self.made(
            {"i": "image", "l": "label"},
            i=[{"bytes": png(image), "path": None} for image in pixels],
            l=[0, 1] * 6,
        )
        stream = dataset.to_iterable_dataset()
        assert one_line(stream) == (
            "expected a data set with a length, got IterableDataset: take a part of a stream into memory, as "
            "list(stream.take(5000))"
        )
        part = from_dataset(list(stream.take(5)), classes=stream.features["l"].names)
        assert_array_equal(part.images, pixels[:5])
        assert part.labels.tolist() == [0, 1, 0, 1, 0]
        assert part.classes == ("x", "y")

    def test_imagefolder_is_what_load_dataset_reads(self, pixels, tmp_path, monkeypatch) -> None:
        hub = pytest.importorskip("datasets")
        from vitrail.datasets import load_dataset

        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
        for k, image in enumerate(pixels):
            path = tmp_path / "images" / ("train" if k < 8 else "test") / "BaC"[k % 3] / f"{k:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
        made = hub.load_dataset(
            "imagefolder", data_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "hf")
        )
        own = load_dataset(tmp_path / "images", val_fraction=0.0)
        for split in ("train", "test"):
            found, mine = from_dataset(made[split]), getattr(own, split)
            assert found.classes == mine.classes == ("B", "C", "a")
            assert found.name == "imagefolder"
            assert_array_equal(found.images, mine.images)
            assert_array_equal(found.labels, mine.labels)
        assert one_line(made) == "expected one split of a data set, got DatasetDict with train, test"


class TestSplits:
    def test_three_data_sets(self, pixels) -> None:
        splits = Splits.from_datasets(
            Pictures(pixels), val=Subset(Pictures(pixels), [1]), test=Pictures(pixels[:6])
        )
        assert splits.val is not None
        assert [len(splits.train), len(splits.val), len(splits.test)] == [12, 1, 6]
        assert [splits.train.split, splits.val.split, splits.test.split] == ["train", "val", "test"]
        assert splits.test.classes == splits.train.classes == ("0", "1", "2")
        assert splits.test.mean == splits.train.mean

    def test_one_data_set(self, pixels) -> None:
        splits = Splits.from_datasets(Pictures(np.concatenate([pixels, pixels])[:N]), val_fraction=0.25)
        assert splits.val is not None
        assert splits.train.counts().tolist() == [2, 2, 2]
        assert splits.val.counts().tolist() == splits.test.counts().tolist() == [1, 1, 1]

    def test_classes_are_matched_by_name(self, pixels) -> None:
        class Named(Pictures):
            classes: tuple[str, ...] = ("a", "b", "c")

        class Other(Pictures):
            classes: tuple[str, ...] = ("c", "a", "b")

        splits = Splits.from_datasets(Named(pixels), test=Other(pixels[:3]))
        assert splits.test.labels.tolist() == [2, 0, 1]
        Other.classes = ("c", "a", "d")
        with pytest.raises(ValueError, match=r"class 'd' of test is not among the 3 of train \(a, b, c\)"):
            Splits.from_datasets(Named(pixels), test=Other(pixels[:3]))

    def test_broken_images_are_told(self, pixels, png) -> None:
        hub = pytest.importorskip("datasets")
        features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["x"])})
        contents = [{"bytes": png(pixels[0]), "path": None}, {"bytes": b"x", "path": None}]
        dataset = hub.Dataset.from_dict({"image": contents, "label": [0, 0]}, features=features)
        for storage in ("memory", "files"):
            splits = Splits.from_datasets(dataset, test=dataset, broken="skip", storage=storage)
            assert [source for source, _ in splits.skipped] == ["hub/train, row 1", "hub/test, row 1"]
            with pytest.raises(ValueError, match=r"row 1: expected an image.* 1 of 2 images is broken"):
                Splits.from_datasets(dataset, test=dataset, storage=storage)
