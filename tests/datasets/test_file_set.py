from __future__ import annotations

import io
import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from odd_images import colours, odd_images, save
from PIL import Image

from vitrail.datasets.decode import decode_resized, random_crop
from vitrail.datasets.file_set import FileSet
from vitrail.datasets.images import ImageSet
from vitrail.datasets.items import FileItems
from vitrail.datasets.objects import object_items
from vitrail.datasets.transforms import BrokenImageError, decode_image

FILES = odd_images()
WHOLE = [name for name, odd in FILES.items() if odd.pixels is not None]
BROKEN = [name for name, odd in FILES.items() if odd.pixels is None]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Detail at every scale, as photographs have it: noise of amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(np.hypot(x, y), 1 / width)
    values = np.fft.ifft2(spectrum).real
    values = 128 + 50 * (values - values.mean()) / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(height: int, width: int, **options: object) -> bytes:
    return save(photo(height, width), "JPEG", quality=90, **options)


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    assert found.dtype == torch.uint8
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.numpy().astype(float) - expected).mean())


class TestDecode:
    @pytest.mark.parametrize("in_chans", [1, 3])
    @pytest.mark.parametrize("name", WHOLE)
    def test_odd_files_come_out_as_from_the_exact_decoder(self, name, in_chans) -> None:
        exact = decode_image(FILES[name].content, name, in_chans)
        found = decode_resized(FILES[name].content, name, exact.shape[1:], in_chans)
        # The luminance of a JPEG is what it stores, not rounded a second time from its colours.
        assert np.abs(found.numpy().astype(int) - exact).max() <= (1 if in_chans == 1 else 0)

    @pytest.mark.parametrize("name", WHOLE)
    def test_odd_files_resized(self, name) -> None:
        exact = decode_image(FILES[name].content, name, 3, (9, 12))
        assert difference(decode_resized(FILES[name].content, name, (9, 12), 3), exact) <= 1.0

    @pytest.mark.parametrize("name", BROKEN)
    def test_broken_files_are_named(self, name) -> None:
        with pytest.raises(BrokenImageError) as caught:
            decode_resized(FILES[name].content, f"somewhere/{name}", (8, 8), 3)
        assert str(caught.value).startswith(f"somewhere/{name}: {FILES[name].reason}")

    @pytest.mark.parametrize("in_chans", [1, 3])
    @pytest.mark.parametrize("img_size", [(96, 96), (64, 96), (96, 40)])
    @pytest.mark.parametrize("size", [(150, 190), (191, 100), (97, 97), (40, 30)])
    def test_at_full_scale_it_is_pillow_to_a_tenth_of_a_level(self, size, img_size, in_chans) -> None:
        encoded = jpeg(*size)
        exact = decode_image(encoded, "x", in_chans, img_size)
        assert difference(decode_resized(encoded, "x", img_size, in_chans), exact) <= 0.1

    @pytest.mark.parametrize("subsampling", [0, 2])
    @pytest.mark.parametrize("side", [128, 64, 31])
    @pytest.mark.parametrize("size", [(400, 600), (513, 385), (387, 387)])
    def test_at_a_reduced_scale_it_is_pillow_to_three_levels(self, size, side, subsampling) -> None:
        encoded = jpeg(*size, subsampling=subsampling)
        exact = decode_image(encoded, "x", 3, (side, side))
        # The noise has more detail than photographs have, where it is one level.
        assert 0 < difference(decode_resized(encoded, "x", (side, side), 3), exact) <= 3.0

    @pytest.mark.parametrize(
        ("side", "scale"), [(401, 1), (134, 1), (133, 2), (67, 2), (66, 4), (34, 4), (33, 8), (10, 8)]
    )
    def test_the_decoder_leaves_one_and_a_half_times_the_size(self, side, scale) -> None:
        picture = Image.open(io.BytesIO(jpeg(400, 500)))
        decode_resized(picture, "x", (side, side), 3)
        assert picture.size == (math.ceil(500 / scale), math.ceil(400 / scale))

    def test_grey_is_decoded_without_colours_unless_a_profile_needs_them(self) -> None:
        plain, profiled = (
            Image.open(io.BytesIO(jpeg(60, 80, **options))) for options in ({}, {"icc_profile": b"x" * 200})
        )
        for picture in (plain, profiled):
            decode_resized(picture, "x", (60, 80), 1)
        assert plain.mode == "L"
        assert profiled.mode == "RGB"

    def test_a_wide_gamut_is_converted_after_resizing(self) -> None:
        name = "wide_profile.png"
        exact = decode_image(FILES[name].content, name, 3, (8, 12))
        plain = decode_image(save(Image.fromarray(colours()), "PNG"), name, 3, (8, 12))
        found = decode_resized(FILES[name].content, name, (8, 12), 3)
        assert difference(found, exact) <= 1.0 < difference(found, plain)

    def test_a_picture_of_a_pil_image(self) -> None:
        picture = photo(50, 70)
        exact = decode_image(picture, "x", 3, (20, 20))
        assert difference(decode_resized(picture, "x", (20, 20), 3), exact) <= 0.1

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_picture_whose_rows_pillow_keeps_apart(self, mode) -> None:
        picture = photo(210, 900).convert(mode).resize((9000, 2100))  # more than 16 MiB
        with pytest.raises(ValueError, match="contiguous"):
            pyarrow.array(picture)
        exact = decode_image(picture, "x", 3, (21, 90))
        assert difference(decode_resized(picture, "x", (21, 90), 3), exact) <= 0.1

    def test_real_photographs(self, real_data) -> None:
        files = sorted((real_data / "imagenet-sample").glob("*.JPEG"))[::8]
        for side, most in ((224, 0.2), (64, 1.0)):
            found = [
                difference(
                    decode_resized(path.read_bytes(), str(path), (side, side), 3),
                    decode_image(path.read_bytes(), str(path), 3, (side, side)),
                )
                for path in files
            ]
            assert len(found) == 25
            assert np.mean(found) <= most
            assert max(found) <= 4.0


class TestCrop:
    @pytest.mark.parametrize("box", [(0, 0, 60, 40), (13, 7, 55, 32), (59, 39, 60, 40)])
    def test_is_pillow_crop_and_resize(self, box) -> None:
        picture = photo(40, 60)
        exact = np.asarray(picture.crop(box).resize((24, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        found = decode_resized(save(picture, "PNG"), "x", (16, 24), 3, crop=lambda h, w: box)
        assert difference(found, exact) <= 0.1

    def test_is_told_the_upright_size_and_taken_upright(self) -> None:
        told = []

        def crop(height: int, width: int) -> tuple[int, int, int, int]:
            told.append((height, width))
            return 2, 4, 14, 20

        found = decode_resized(FILES["exif_6.png"].content, "x", (16, 12), 3, crop=crop)
        assert told == [FILES["exif_6.png"].pixels.shape[:2]]
        assert_array_equal(found, FILES["exif_6.png"].pixels[4:20, 2:14].transpose(2, 0, 1))

    def test_a_small_part_is_taken_from_the_full_picture(self) -> None:
        encoded = jpeg(400, 500)
        for box, scale in (((101, 99, 148, 146), 1), ((100, 100, 300, 300), 4), ((0, 0, 500, 400), 8)):
            picture = Image.open(io.BytesIO(encoded))
            found = decode_resized(picture, "x", (25, 25), 3, crop=lambda h, w, box=box: box)
            assert picture.size == (math.ceil(500 / scale), math.ceil(400 / scale))
            exact = np.asarray(Image.open(io.BytesIO(encoded)).crop(box).resize((25, 25), 3)).transpose(
                2, 0, 1
            )
            assert difference(found, exact) <= 2.5

    @pytest.mark.parametrize("size", [(375, 500), (500, 375), (30, 400), (1, 1), (2, 50)])
    @pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
    def test_lies_in_the_picture_with_area_and_aspect_in_range(self, size, smallest) -> None:
        height, width = size
        generator = np.random.default_rng(0)
        for _ in range(200):
            left, top, right, bottom = random_crop(height, width, smallest, generator)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            w, h = right - left, bottom - top
            # A side is rounded by up to half a pixel.
            assert (w - 0.5) / (h + 0.5) <= 4 / 3
            assert (w + 0.5) / (h - 0.5) >= 3 / 4
            if min(size) > 200 and smallest < 1.0:
                assert w * h >= smallest * height * width * 0.98

    def test_what_never_fits_is_the_largest_centred_part(self) -> None:
        assert random_crop(30, 400, 1.0, np.random.default_rng(0)) == (180, 0, 220, 30)
        assert random_crop(400, 30, 1.0, np.random.default_rng(0)) == (0, 180, 30, 220)

    @pytest.mark.parametrize("size", [(375, 500), (100, 300)])
    def test_is_distributed_as_in_torchvision(self, size) -> None:
        from torchvision.transforms import RandomResizedCrop

        torch.manual_seed(0)
        height, width = size
        generator, n = np.random.default_rng(0), 3000
        own = np.array([random_crop(height, width, 0.08, generator) for _ in range(n)], dtype=float)
        image = torch.empty(3, height, width)
        peer = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], dtype=float
        )  # top, left, height, width
        peer = np.stack([peer[:, 1], peer[:, 0], peer[:, 1] + peer[:, 3], peer[:, 0] + peer[:, 2]], axis=1)
        for found, expected in ((own, peer), (own**2, peer**2)):
            error = np.hypot(found.std(axis=0), expected.std(axis=0)) / math.sqrt(n)
            assert (np.abs(found.mean(axis=0) - expected.mean(axis=0)) < 4 * error).all()

    def test_is_a_function_of_the_generator(self) -> None:
        draw = partial(random_crop, 300, 400, 0.08)
        assert draw(np.random.default_rng([1, 2])) == draw(np.random.default_rng([1, 2]))
        assert draw(np.random.default_rng([1, 2])) != draw(np.random.default_rng([1, 3]))


SIZE = (12, 18)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [photo(*SIZE, seed=k) for k in range(9)]


@pytest.fixture
def items(pictures, tmp_path: Path) -> FileItems:
    paths = []
    for k, picture in enumerate(pictures):
        paths.append(tmp_path / f"{k}.png")
        picture.save(paths[-1])
    return FileItems(paths, [k % 3 for k in range(9)], classes=CLASSES, name="insects", split="train")


@pytest.fixture
def images(items) -> FileSet:
    return FileSet.from_items(items, img_size=SIZE, in_chans=3)


class TestFileSet:
    def test_is_an_image_set_but_for_where_the_pixels_are(self, images, pictures) -> None:
        stack = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])
        same = ImageSet.from_arrays(stack, np.arange(9) % 3, classes=CLASSES, name="insects")
        assert len(images) == len(same) == 9
        for name in ("name", "split", "classes", "img_size", "in_chans"):
            assert getattr(images, name) == getattr(same, name)
        assert_array_equal(images.labels, same.labels)
        assert_array_equal(images.counts(), same.counts())
        assert_allclose(images.mean, same.mean, atol=1e-12)
        assert_allclose(images.std, same.std, atol=1e-12)
        for chosen in ([4, 0, 8, 4], np.array([2]), []):
            for found, expected in zip(images.batch(chosen), same.batch(chosen), strict=True):
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected)

    def test_subset(self, images) -> None:
        part = images.subset([7, 2, 5]).subset([2, 0], split="val")
        assert (len(part), part.split, images.split) == (2, "val", "train")
        assert_array_equal(part.labels, [2, 1])
        assert torch.equal(part.batch([0, 1])[0], images.batch([5, 7])[0])
        assert_array_equal(part.counts(), [0, 1, 1])
        assert part.mean == images.mean

    def test_crops(self, images) -> None:
        boxes = [(0, 0, 9, 6), (3, 2, 12, 8)]
        found, _ = images.batch([1, 1], [lambda h, w, box=box: box for box in boxes])
        picture = Image.open(images.items.path(1))
        for row, box in enumerate(boxes):
            exact = np.asarray(picture.crop(box).resize(SIZE[::-1], 3)).transpose(2, 0, 1)
            assert difference(found[row], exact) <= 0.1

    def test_channels_and_size_are_what_was_asked_for(self, items) -> None:
        images = FileSet.from_items(items, img_size=(5, 7), in_chans=1)
        assert images.batch([0, 1])[0].shape == (2, 1, 5, 7)
        assert len(images.mean) == len(images.std) == 1

    def test_statistics_are_those_given(self, items) -> None:
        images = FileSet.from_items(items, img_size=SIZE, in_chans=1, mean=(0.5,), std=(0.25,))
        assert (images.mean, images.std) == ((0.5,), (0.25,))

    def test_statistics_of_many_images_are_those_of_two_thousand(self) -> None:
        values = np.arange(2_500) % 251
        dataset = [(np.full((1, 1), value, np.uint8), 0) for value in values]
        items = object_items(dataset, name="flat", split="train")
        images = FileSet.from_items(items, img_size=(1, 1), in_chans=1)
        assert images.mean == FileSet.from_items(items, img_size=(1, 1), in_chans=1).mean
        whole = values.mean() / 255
        assert images.mean != pytest.approx((whole,), abs=1e-9)
        assert images.mean == pytest.approx((whole,), abs=4 * values.std() / 255 / math.sqrt(2_000))

    def test_fingerprint(self, items, images, pictures) -> None:
        again = FileSet.from_items(items, img_size=SIZE, in_chans=3)
        assert again.fingerprint == images.fingerprint
        others = [
            FileSet.from_items(items, img_size=(8, 8), in_chans=3),
            FileSet.from_items(items, img_size=SIZE, in_chans=1),
            images.subset(range(8)),
            images.subset([1, 0, *range(2, 9)]),
        ]
        Image.new("RGB", (20, 20)).save(items.path(3))
        fresh = FileItems(
            [items.path(k) for k in range(9)], items.labels, classes=CLASSES, name="insects", split="train"
        )
        others.append(FileSet.from_items(fresh, img_size=SIZE, in_chans=3))
        assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 6

    def test_fingerprint_of_what_has_no_key(self, pictures) -> None:
        def made(labels: list[int]) -> FileSet:
            pairs = list(zip(pictures, labels, strict=False))
            return FileSet.from_items(
                object_items(pairs, classes=CLASSES, name="x", split="train"), img_size=SIZE, in_chans=3
            )

        assert made([0, 1, 2]).fingerprint == made([0, 1, 2]).fingerprint
        assert made([0, 1, 2]).fingerprint != made([0, 2, 1]).fingerprint

    def test_can_be_sent_to_another_process(self, images) -> None:
        sent = pickle.loads(pickle.dumps(images))
        assert torch.equal(sent.batch([3, 1])[0], images.batch([3, 1])[0])
        assert sent.fingerprint == images.fingerprint

    def test_a_broken_image_is_named(self, items, images) -> None:
        items.path(4).write_bytes(b"nothing")
        with pytest.raises(BrokenImageError, match=r"4\.png: expected an image"):
            images.batch([3, 4])
        with pytest.raises(BrokenImageError, match=r"4\.png: expected an image"):
            FileSet.from_items(items, img_size=SIZE, in_chans=3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"img_size": (0, 4)}, "img_size: expected height and width, got"),
            ({"in_chans": 2}, "in_chans: expected 1 or 3, got 2"),
            ({"in_chans": 1}, "expected a mean and a std for each of 1 channels, got 3 and 3"),
        ],
    )
    def test_what_does_not_fit(self, items, changes, message) -> None:
        options = {"img_size": SIZE, "in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes
        with pytest.raises(ValueError, match=message):
            FileSet.from_items(items, **options)

    def test_no_images(self, items) -> None:
        images = FileSet.from_items(items.subset([]), img_size=SIZE, in_chans=3)
        assert len(images) == 0
        assert images.batch([])[0].shape == (0, 3, *SIZE)
