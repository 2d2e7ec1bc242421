"""Drawn data sets, and compositions made of training images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from vitrail.config import load_config
from vitrail.datasets import FileSet, ImageSet, find_items, list_datasets, load_dataset, load_section
from vitrail.datasets.clips import Frames
from vitrail.datasets.moving import moving_digits
from vitrail.datasets.synthetic import SHAPES, SYNTHETIC, TEXTURES, shape_cover, texture_values
from vitrail.datasets.synthetic_compositions import STRENGTH, compose, with_compositions
from vitrail.training import prepare, train

KINDS = [("shapes", 10), ("textures", 10), ("fractals", 50)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Unlabelled(ImageSet):
    """Images whose labels nobody may read."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"labels", "counts", "batch"}:
            raise AssertionError(f"{name} was read")
        return super().__getattribute__(name)

    def __post_init__(self) -> None:
        """Nothing to check: the labels must not be looked at."""


def _nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class of the nearest class mean, [N]."""
    means = np.stack([train[labels == k].mean(axis=0) for k in np.unique(labels)])
    return ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)


def _descriptors(images: np.ndarray) -> np.ndarray:
    """What a class looks like whatever its place, colour and direction, [N, D].

    The strength of each frequency of the edges, averaged over directions, after a division by the contrast.
    """
    grey = images.astype(np.float64).mean(axis=1)
    grey = grey - grey.mean(axis=(1, 2), keepdims=True)
    grey /= grey.std(axis=(1, 2), keepdims=True) + 1e-9
    power = np.log(np.abs(np.fft.fft2(grey)) + 1e-3)
    frequencies = np.fft.fftfreq(grey.shape[1]) * grey.shape[1]
    radius = np.hypot(frequencies[:, None], frequencies).round().astype(int)
    spectrum = np.stack([power[:, radius == r].mean(axis=1) for r in range(1, 14)], axis=1)
    sharp = np.stack([power[:, radius == r].std(axis=1) for r in range(1, 14)], axis=1)
    values = np.sort(np.abs(grey).reshape(len(grey), -1), axis=1)[:, ::64]
    return np.concatenate([spectrum, sharp, values], axis=1)


@pytest.mark.parametrize(("name", "num_classes"), KINDS)
def test_exact_counts_every_class_and_the_same_again(name: str, num_classes: int) -> None:
    assert name in list_datasets()
    found, again = (load_dataset(name, img_size=8, in_chans=1) for _ in range(2))
    assert found.val is not None
    assert [len(part) for part in (found.train, found.val, found.test)] == [9_000, 1_000, 2_000]
    assert found.train.counts().tolist() == [9_000 // num_classes] * num_classes
    assert found.test.counts().tolist() == [2_000 // num_classes] * num_classes
    assert len(set(found.train.classes)) == num_classes
    assert found.train.stored.shape[1:] == (1, 8, 8)
    assert found.test.mean == found.train.mean
    assert found.synthetic == 0  # of what is drawn, all is the data set's own
    for one, other in ((found.train, again.train), (found.test, again.test)):
        assert_array_equal(one.images, other.images)
        assert one.fingerprint == other.fingerprint
    images = found.train.images
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 8_900


def test_size_and_channels() -> None:
    wide, grey = (
        load_dataset("shapes", img_size=(8, 12)),
        load_dataset("shapes", img_size=(8, 12), in_chans=1),
    )
    assert wide.train.stored.shape[1:] == (3, 8, 12)
    luminance = np.einsum("nchw,c->nhw", wide.test.images.astype(np.float64), [0.299, 0.587, 0.114])
    assert np.abs(luminance - grey.test.images[:, 0]).max() <= 1  # rounded once or twice
    assert load_dataset("textures").train.stored.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(("name", "least"), [("shapes", 0.3), ("textures", 0.6)])
def test_classes_can_be_told_apart(name: str, least: float) -> None:
    """By nearest means of few numbers that no place, colour or angle changes much; chance is 10 %."""
    found = load_dataset(name, val_fraction=0.0)
    some, labels = found.train.subset(range(2_000)), found.test.labels[:1_000]
    train, test = _descriptors(some.images), _descriptors(found.test.images[:1_000])
    mean, std = train.mean(axis=0), train.std(axis=0)
    right = _nearest_mean((train - mean) / std, some.labels, (test - mean) / std) == labels
    assert right.mean() > least
    assert all(right[labels == k].mean() > 0.1 for k in range(10))


def test_fractals_can_be_told_apart() -> None:
    """By nearest means of pixels without colours, the four flips laid on one another; chance is 2 %."""
    found = load_dataset("fractals", img_size=16, in_chans=1, val_fraction=0.0)

    def folded(images: np.ndarray) -> np.ndarray:
        pixels = images[:, 0].astype(np.float64)
        ground = np.median(pixels, axis=(1, 2), keepdims=True)
        drawn = np.abs(pixels - ground)
        drawn /= drawn.max(axis=(1, 2), keepdims=True) + 1e-9
        drawn = drawn + drawn[:, ::-1]
        return (drawn + drawn[:, :, ::-1]).reshape(len(drawn), -1)

    guessed = _nearest_mean(folded(found.train.images), found.train.labels, folded(found.test.images))
    assert (guessed == found.test.labels).mean() > 0.3


def test_shapes_cover_the_area_that_geometry_says() -> None:
    """In units in which half of the side is 1; turning and moving change nothing."""
    areas = {
        "disc": np.pi * 0.81,
        "ring": np.pi * (0.95**2 - 0.55**2),
        "square": 2.0,
        "triangle": 3 * np.sqrt(3) / 4,
        "bar": 1.0,
        "cross": 2 * 2.0 * 0.56 - 0.56**2,
        "star": 10 * 0.5 * 0.42 * np.sin(np.pi / 5),
    }
    radius = 0.6
    for name, area in areas.items():
        kinds = torch.full((3,), list(SHAPES).index(name))
        places = torch.tensor([[0.0, 0.0], [0.3, -0.2], [-0.3, 0.3]])
        cover = shape_cover(kinds, places, torch.full((3,), radius), torch.tensor([0.0, 0.7, 2.5]), (64, 64))
        found = cover.sum(dim=(1, 2)) * (2 / 64) ** 2 / radius**2
        assert np.allclose(found, area, rtol=0.03), name


def test_textures_are_what_their_names_say() -> None:
    """Stripes and checks are half of each colour, dots less; values stay within 0 and 1."""
    means = {}
    for number, name in enumerate(TEXTURES):
        generator = torch.Generator().manual_seed(0)
        values = texture_values(torch.full((50,), number), (32, 40), generator)
        assert values.shape == (50, 32, 40)
        assert values.min() >= 0
        assert values.max() <= 1
        assert values.std(dim=(1, 2)).min() > 0.02, name
        means[name] = float(values.mean())
    for name in ("stripes", "zigzag", "checks", "rings"):
        assert means[name] == pytest.approx(0.5, abs=0.03), name
    assert means["dots"] == pytest.approx(np.pi * 0.09, abs=0.03)


class TestCompositions:
    def test_share_labels_and_order(self) -> None:
        plain, mixed = load_dataset("digits"), load_dataset("digits", synthetic=0.5)
        N = len(plain.train)
        M = round(0.5 * N)
        assert (mixed.synthetic, len(mixed.train)) == (M, N + M)
        assert plain.synthetic == 0
        assert_array_equal(mixed.train.images[:N], plain.train.images)
        assert_array_equal(mixed.train.labels[:N], plain.train.labels)
        sources = np.random.default_rng(0).permutation(N)[:M]
        assert_array_equal(mixed.train.labels[N:], plain.train.labels[sources])
        made, own = mixed.train.images[N:].astype(int), plain.train.images[sources].astype(int)
        assert (made != own).any(axis=(1, 2, 3)).mean() > 0.99
        bright = own == 255  # strokes stay, but for what a fragment hides
        assert (made[bright] == 255).mean() > 0.9
        assert made[own == 0].mean() > 10  # the ground does not

    def test_a_larger_share_takes_every_image_before_one_again(self) -> None:
        train = load_dataset("digits").train.subset(range(100))
        mixed = with_compositions(train, 2.3, seed=3)
        assert len(mixed) == 330
        numbered = ImageSet.from_arrays(train.images, np.arange(100))
        numbers = with_compositions(numbered, 2.3, seed=3).labels[100:]
        assert np.bincount(numbers[:200]).tolist() == [2] * 100
        assert np.bincount(numbers[200:]).max() == 1

    def test_validation_and_test_are_neither_changed_nor_read(self) -> None:
        plain, mixed = load_dataset("digits"), load_dataset("digits", synthetic=1.0)
        assert plain.val is not None
        assert mixed.val is not None
        for one, other in ((plain.val, mixed.val), (plain.test, mixed.test)):
            assert one.fingerprint == other.fingerprint
            assert_array_equal(one.images, other.images)
        assert_array_equal(
            with_compositions(plain.train, 1.0, seed=0).images, mixed.train.images
        )  # made of nothing but the training images
        assert mixed.train.mean == plain.train.mean
        assert mixed.train.std == plain.train.std

    def test_the_seed_decides(self) -> None:
        first, again, other = (
            load_dataset("digits", val_fraction=0.0, synthetic=0.2, split_seed=seed).train
            for seed in (0, 0, 1)
        )
        assert first.fingerprint == again.fingerprint != other.fingerprint
        assert_array_equal(first.images, again.images)
        assert first.fingerprint != load_dataset("digits", val_fraction=0.0).train.fingerprint

    def test_no_label_is_needed_to_make_them(self) -> None:
        digits = load_dataset("digits").train
        secret = Unlabelled(
            stored=digits.images,
            labels=np.zeros(0, dtype=np.int64),
            classes=digits.classes,
            name="secret",
            split="train",
            fingerprint="",
            mean=digits.mean,
            std=digits.std,
        )
        with pytest.raises(AssertionError, match="labels was read"):
            secret.subset([0])
        sources = np.arange(50)
        assert_array_equal(compose(secret, sources, seed=1), compose(digits, sources, seed=1))

    def test_the_texture_lies_under_the_image_and_is_never_stronger_than_it_may(self) -> None:
        images = np.zeros((400, 1, 28, 28), dtype=np.uint8)
        images[:, :, 8:20, 10:18] = 255
        blocks = ImageSet.from_arrays(images, np.zeros(400))
        made = compose(blocks, np.arange(400), seed=0)[:, 0].astype(int)
        assert (made[:, 8:20, 10:18] == 255).mean() > 0.97  # fragments find the free corners
        ground = np.ones((28, 28), dtype=bool)
        ground[8:20, 10:18] = False
        assert (made[:, ground] > 255 * STRENGTH + 1).mean() < 0.06  # fragments only
        assert made[:, ground].std(axis=1).min() > 0

    def test_colour_photographs_and_flat_images(self) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (20, 3, 12, 9), dtype=np.uint8)
        images[:5] = 130
        mixed = with_compositions(ImageSet.from_arrays(images, np.zeros(20)), 1.0, seed=0)
        assert mixed.images.shape == (40, 3, 12, 9)
        assert mixed.images[20:].std(axis=(1, 2, 3)).min() > 0

    def test_the_config_asks_for_them(self) -> None:
        config = load_config("digits-vit", {"data.synthetic": "0.25"})
        splits = load_section(config.data)
        assert len(splits.train) == round(1.25 * (len(splits.train) - splits.synthetic))

    @pytest.mark.parametrize("share", [-0.1, 10.5, float("nan")])
    def test_a_share_out_of_range(self, share: float) -> None:
        with pytest.raises(ValueError, match="synthetic: expected 0 to 10 compositions for each image, got"):
            load_dataset("digits", synthetic=share)
        with pytest.raises(ValueError, match=r"data\.synthetic: expected"):
            load_config("digits-vit", {"data.synthetic": share})

    def test_images_in_files_and_clips_are_refused(self, tmp_path: Path) -> None:
        for number in range(8):
            folder = tmp_path / "photos" / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 30 * number).save(folder / f"{number}.png")
        photos = tmp_path / "photos"
        assert isinstance(load_dataset(photos, storage="files", val_fraction=0.0).train, FileSet)
        with pytest.raises(
            ValueError, match=r"photos are read from files: take --data\.storage memory"
        ) as info:
            load_dataset(photos, storage="files", val_fraction=0.0, synthetic=0.5)
        assert "\n" not in str(info.value)
        assert load_dataset(photos, storage="memory", val_fraction=0.0, synthetic=0.5).synthetic == 3
        still = ImageSet.from_arrays(np.zeros((10, 1, 28, 28), dtype=np.uint8), np.zeros(10))
        with pytest.raises(ValueError, match=r"data\.synthetic is for images, and moving_mnist has clips"):
            with_compositions(moving_digits(still, Frames()), 0.5, seed=0)


def test_the_manifest_tells_real_from_synthetic(tmp_path: Path) -> None:
    tiny = {"model.depth": 1, "train.duration": "1 step", "train.device": "cpu"}
    train(load_config("digits-vit", tiny | {"data.synthetic": 0.5}), tmp_path / "mixed", command="")
    train(load_config("digits-vit", tiny), tmp_path / "plain", command="")
    mixed, plain = (
        json.loads((tmp_path / name / "manifest.json").read_text())["data"] for name in ("mixed", "plain")
    )
    assert plain["train"].keys() == {"images", "fingerprint"}
    real = plain["train"]["images"]
    assert mixed["train"]["real"] == real
    assert mixed["train"]["synthetic"] == round(0.5 * real)
    assert mixed["train"]["images"] == real + round(0.5 * real)
    assert mixed["train"]["fingerprint"] != plain["train"]["fingerprint"]
    assert (mixed["val"], mixed["test"]) == (plain["val"], plain["test"])


@pytest.mark.parametrize(("recipe", "size"), [("digits-mae", 8), ("mnist-mae", 28), ("cifar10-mae", 32)])
def test_recipes_take_drawn_images_at_the_models_size(recipe: str, size: int) -> None:
    run = prepare(load_config(recipe, {"data.name": "shapes", "model.depth": 1, "train.device": "cpu"}))
    assert run.splits.train.img_size == (size, size)
    assert (run.splits.train.in_chans, run.model.config.in_chans) == (3, 3)


@pytest.mark.parametrize(("name", "channels"), [("fractals", {}), ("textures", {"model.in_chans": 1})])
def test_what_they_taught_starts_a_run_on_digits(name: str, channels: dict[str, int], tmp_path: Path) -> None:
    tiny = {"model.depth": 1, "train.duration": "1 step", "train.device": "cpu"}
    drawn = train(load_config("digits-mae", tiny | channels | {"data.name": name}), tmp_path, command="")
    assert drawn.model.config.in_chans == channels.get("model.in_chans", 3)
    start = {"model.name": None, "model.pretrained": str(tmp_path), "train.device": "cpu"}
    own = prepare(load_config("digits-vit", start)).model.state_dict()
    assert all(torch.equal(own[name], other) for name, other in drawn.model.state_dict().items())


def test_what_is_drawn_has_no_files() -> None:
    for name in SYNTHETIC:
        with pytest.raises(ValueError, match=f"{name} is drawn when it is loaded: no files to look at"):
            find_items(name)
    with pytest.raises(ValueError, match="shapes has images, not clips"):
        load_dataset("shapes", frames=3)
    with pytest.raises(ValueError, match="did you mean textures"):
        load_dataset("texturs")
