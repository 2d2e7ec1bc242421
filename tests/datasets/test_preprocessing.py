from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import ExifTags, Image

from vitrail.datasets import Preprocessing

RGB = Preprocessing(img_size=(8, 8), in_chans=3, mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.0,), std=(1.0,))
RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def levels(prepared: torch.Tensor) -> np.ndarray:
    return np.rint(prepared.numpy() * 255).astype(np.uint8)


def colours() -> np.ndarray:
    return np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def test_dictionary_round_trip_through_json() -> None:
    made = Preprocessing((20, 24), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.875)
    text = json.dumps(made.to_dict())
    assert Preprocessing.from_dict(json.loads(text)) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"men": [0.5]}, r"unknown preprocessing key 'men': did you mean mean"),
        ({"std": None}, "preprocessing std: expected a list, got None"),
        ({"std": [0.5, 0.5]}, "one number for each of 1 channels, got 1 and 2"),
        ({"std": [0.0]}, "expected positive numbers"),
        ({"img_size": [8]}, "expected height and width"),
        ({"img_size": [8.5, 8]}, r"img_size: expected int, got 8\.5"),
        ({"in_chans": True}, "in_chans: expected int, got True"),
        ({"in_chans": "1"}, "in_chans: expected int, got '1'"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean bicubic"),
        ({"crop_ratio": 1.5}, "crop_ratio: expected above 0 and up to 1"),
    ],
)
def test_strict_dictionary(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(GREY.to_dict() | change)


def test_missing_key() -> None:
    values = GREY.to_dict()
    del values["mean"]
    with pytest.raises(ValueError, match="preprocessing: mean is missing"):
        Preprocessing.from_dict(values)


def test_normalise_bytes_and_floats_alike() -> None:
    made = Preprocessing((4, 4), 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (made.mean, made.std))
    expected = (images.double() / 255 - mean) / std
    torch.testing.assert_close(made.normalise(images), expected.float())
    floats = images.float() / 255
    kept = floats.clone()
    torch.testing.assert_close(made.normalise(floats), expected.float())
    torch.testing.assert_close(made.normalise(floats.double()), expected.float())
    assert torch.equal(floats, kept)
    made.normalise(floats.requires_grad_()).sum().backward()
    assert floats.grad is not None
    torch.testing.assert_close(floats.grad, (1 / std).float().expand_as(floats))
    with pytest.raises(ValueError, match=r"3 channels, got \[5, 1, 4, 4\]"):
        made.normalise(images[:, :1])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resize(interpolation) -> None:
    made = Preprocessing((6, 10), 1, (0.0,), (1.0,), interpolation)
    assert made.resize(torch.full((2, 1, 13, 7), 0.25)).shape == (2, 1, 6, 10)
    torch.testing.assert_close(made.resize(torch.full((2, 1, 13, 7), 0.25)), torch.full((2, 1, 6, 10), 0.25))
    same = torch.rand(2, 1, 6, 10)
    assert made.resize(same) is same


@pytest.mark.parametrize(
    ("size", "ratio"), [((50, 31), 0.875), ((31, 50), 1.0), ((9, 17), 0.9), ((8, 8), 1.0)]
)
def test_resize_and_crop_are_torchvisions(size, ratio) -> None:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    made = Preprocessing((8, 8), 3, (0.0,) * 3, (1.0,) * 3, crop_ratio=ratio)
    resized = Resize(int(8 / ratio), InterpolationMode.BICUBIC)(picture)
    expected = np.asarray(CenterCrop(8)(resized)).transpose(2, 0, 1)
    assert_array_equal(levels(made.open_image(picture)), expected)


@pytest.mark.parametrize("size", [(100, 20), (20, 100), (24, 20), (3, 3)])
def test_target_that_is_not_square(size) -> None:
    made = Preprocessing((12, 10), 3, (0.0,) * 3, (1.0,) * 3, crop_ratio=0.9)
    white = Image.new("RGB", size[::-1], "white")
    # A crop outside the picture would be black.
    assert_array_equal(levels(made.open_image(white)), np.full((3, 12, 10), 255))


def in_modes() -> dict[str, tuple[Image.Image, np.ndarray, np.ndarray]]:
    """PIL image, expected RGB [3, 8, 8] and expected luminance [1, 8, 8]."""
    grey = Image.fromarray(RAMP)
    rgb = Image.fromarray(colours())
    luminance = np.asarray(rgb.convert("L"))[None]
    as_rgb, as_grey = colours().transpose(2, 0, 1), RAMP[None]
    half = np.dstack([colours(), np.where(RAMP < 128, 0, 255)])
    on_white = np.where(RAMP < 128, 255, as_rgb).astype(np.uint8)
    white_luminance = np.asarray(Image.fromarray(on_white.transpose(1, 2, 0)).convert("L"))[None]
    palette = rgb.quantize(256)
    palette_rgb = np.asarray(palette.convert("RGB"))
    holes = grey.convert("P")
    holes.info["transparency"] = 0
    with_hole = RAMP.copy()
    with_hole[0, 0] = 255
    grey_alpha = Image.fromarray(np.dstack([RAMP, np.where(RAMP < 128, 0, 255).astype(np.uint8)]))
    grey_on_white = np.where(RAMP < 128, 255, RAMP).astype(np.uint8)
    wide = RAMP.astype(np.uint16) * 257
    inks = rgb.convert("CMYK")
    bits = Image.fromarray(np.where(RAMP < 128, 0, 255).astype(np.uint8)).convert("1")
    bit_levels = np.where(RAMP < 128, 0, 255).astype(np.uint8)[None]

    def three(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 3, axis=0)

    return {
        "L": (grey, three(as_grey), as_grey),
        "RGB": (rgb, as_rgb, luminance),
        "RGBA": (Image.fromarray(half.astype(np.uint8)), on_white, white_luminance),
        "LA": (grey_alpha, three(grey_on_white[None]), grey_on_white[None]),
        "P": (
            palette,
            palette_rgb.transpose(2, 0, 1),
            np.asarray(Image.fromarray(palette_rgb).convert("L"))[None],
        ),
        "P with a hole": (holes, three(with_hole[None]), with_hole[None]),
        "I;16": (Image.fromarray(wide), three(as_grey), as_grey),
        "I": (Image.fromarray(wide.astype(np.int32)), three(as_grey), as_grey),
        "CMYK": (inks, as_rgb, luminance),
        "1": (bits, three(bit_levels), bit_levels),
    }


@pytest.mark.parametrize("mode", in_modes())
def test_every_mode(mode) -> None:
    picture, rgb, luminance = in_modes()[mode]
    assert picture.mode == mode.split()[0]
    assert_array_equal(levels(RGB.open_image(picture)), rgb)
    assert_array_equal(levels(GREY.open_image(picture)), luminance)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("I;16", "png"), ("RGBA", "png"), ("I;16", "tiff")]
)
def test_files_are_as_the_images_in_them(tmp_path, mode, suffix) -> None:
    picture, rgb, _ = in_modes()[mode]
    picture.save(tmp_path / f"a.{suffix}")
    assert_array_equal(levels(RGB.open_image(tmp_path / f"a.{suffix}")), rgb)
    assert_array_equal(levels(RGB.open_image(str(tmp_path / f"a.{suffix}"))), rgb)


def test_files_of_other_kinds(tmp_path) -> None:
    in_modes()["CMYK"][0].save(tmp_path / "inks.jpg", quality=100)
    in_modes()["P"][0].save(tmp_path / "palette.gif")
    assert (
        abs(levels(RGB.open_image(tmp_path / "inks.jpg")).astype(int) - colours().transpose(2, 0, 1)).mean()
        < 12
    )
    assert RGB.open_image(tmp_path / "palette.gif").shape == (3, 8, 8)


def test_orientation_of_the_camera_is_applied(tmp_path) -> None:
    picture = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    assert_array_equal(levels(GREY.open_image(tmp_path / "turned.png"))[0], np.rot90(RAMP, -1))


def test_normalised_with_the_mean_and_std() -> None:
    made = Preprocessing((8, 8), 1, (0.5,), (0.25,))
    torch.testing.assert_close(made.open_image(Image.new("L", (8, 8), 255)), torch.full((1, 8, 8), 2.0))


def test_files_that_are_no_images(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
        (tmp_path / f"cut.{suffix}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in {
        "none.png": "no such image file",
        ".": "expected an image file, got a folder",
        "cut.png": "cannot be decoded",
        "cut.jpg": "cannot be decoded",
        "text.png": "got a file of another kind",
        "empty.png": "expected an image, got an empty file",
    }.items():
        path = tmp_path / name
        with pytest.raises(ValueError, match=message) as caught:
            RGB.open_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_floating_point_and_odd_channel_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="got floating point"):
        RGB.open_image(Image.new("F", (8, 8)))
    with pytest.raises(ValueError, match="this model takes 2"):
        Preprocessing((8, 8), 2, (0.5,) * 2, (0.5,) * 2).open_image(Image.new("L", (8, 8)))
