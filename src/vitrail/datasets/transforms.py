"""From a picture to what a model takes: channels, size, normalisation.

A `Preprocessing` is stored with a model's weights. `decode_image` turns any image file into plain grey or RGB
pixels, and serves both the training sets and single files, so that both see the same pixels. What a file is
decides its content, never its name:

| what comes | what becomes of it |
|---|---|
| grey, 1 bit, RGB, YCbCr, HSV | as Pillow converts them |
| transparency (an alpha channel, or a transparent palette entry or colour) | laid over white |
| palette | its colours; a palette picture counts as colour, even if all its colours are grey |
| CMYK, also in JPEGs, which Adobe's programs write inverted | by its colour profile, else by Pillow |
| LAB | to sRGB |
| 16-bit grey (PNG, TIFF) | divided by 257, rounded; a transparent level is not applied |
| 32-bit whole numbers | as 16-bit grey if all are from 0 to 65535, else broken |
| 16 bits a colour channel | the upper 8 bits, by Pillow's decoder |
| floating point | broken: nobody knows the range |
| a colour profile (ICC) that fits the picture and is not sRGB | converted to sRGB, perceptual intent |
| a colour profile that is damaged, of another colour space, or of a grey picture | not applied |
| orientation stored by a camera (EXIF 1 to 8) | turned upright; not by another value or damaged EXIF |
| several frames, pages or pictures (GIF, APNG, WebP, TIFF, MPO) | the first |
| several sizes (ICO) | the largest |
| JPEG, progressive or not, whatever its subsampling | decoded; bytes after its end are not read |
| more pixels than `MAX_PIXELS` | broken, before anything is decoded (a decompression bomb) |
| cut off, empty, or not an image | broken |
| damage inside a JPEG that its decoder bridges | not noticed |

A broken image is a `BrokenImageError`, which names it. Whether it is refused or left out decides who reads.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageCms, TiffImagePlugin
from torch import Tensor

from vitrail.config import nearest

MAX_PIXELS = 178_956_970
"""Largest number of pixels an image may have; Pillow's own limit, half a gigabyte as RGB."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
# What turns a picture upright, for each orientation of EXIF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_WIDTH, _TIFF_HEIGHT = TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH
_SRGB_TOLERANCE = 2


class BrokenImageError(ValueError):
    """An image that cannot be decoded.

    Args:
        source: What messages call the image.
        reason: What is wrong with it.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = source, reason

    def __reduce__(self) -> tuple[type[BrokenImageError], tuple[str, str]]:
        # Worker processes send it; an exception is made again from its arguments.
        return type(self), (self.source, self.reason)


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input."""

    img_size: tuple[int, int]
    """Height and width."""
    in_chans: int
    """Number of channels: 1 is luminance, 3 is RGB."""
    mean: tuple[float, ...]
    """Subtracted from values 0 to 1, a channel."""
    std: tuple[float, ...]
    """Divided by afterwards, a channel."""
    interpolation: str = "bicubic"
    """nearest, bilinear or bicubic; the last two smooth when they shrink."""
    crop_ratio: float = 1.0
    """Share of the resized picture's shorter side that the centre crop keeps."""

    def __post_init__(self) -> None:
        for name in ("img_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise ValueError(f"img_size: expected height and width, got {self.img_size}")
        if self.in_chans < 1 or not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(
                f"mean and std: expected one number for each of {self.in_chans} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {self.std}")
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"unknown interpolation {self.interpolation!r}: {nearest(self.interpolation, _FILTERS)}"
            )
        if not 0.0 < self.crop_ratio <= 1.0:
            raise ValueError(f"crop_ratio: expected above 0 and up to 1, got {self.crop_ratio}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` gives the same preprocessing back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: A key is unknown or missing, or a value is of another type or out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown preprocessing key {name!r}: {nearest(name, known)}")
        for name in known:
            if name not in values:
                raise ValueError(f"preprocessing: {name} is missing")
        return cls(
            img_size=_numbers(values, "img_size", int),
            in_chans=_number(values["in_chans"], "in_chans", int),
            mean=_numbers(values, "mean", float),
            std=_numbers(values, "std", float),
            interpolation=str(values["interpolation"]),
            crop_ratio=_number(values["crop_ratio"], "crop_ratio", float),
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Scale to 0..1, subtract the mean and divide by the standard deviation.

        Args:
            images: uint8 with values 0 to 255, or floating point with values 0 to 1; [B, C, H, W].

        Returns:
            float32 [B, C, H, W], on the device of `images`.
        """
        if images.shape[-3] != self.in_chans:
            raise ValueError(f"expected images with {self.in_chans} channels, got {list(images.shape)}")
        unit = 1.0 if images.is_floating_point() else 255.0
        scale = _channels([1.0 / (unit * std) for std in self.std], images.device)
        shift = _channels([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], images.device)
        # In place on the copy: twice as fast on a CPU as one fused addcmul with its broadcasting.
        return images.to(torch.float32, copy=True).mul_(scale).add_(shift)

    def denormalise(self, images: Tensor) -> Tensor:
        """What a model saw, to be looked at: normalised [B, C, H, W] -> uint8."""
        mean, std = (torch.tensor(own, device=images.device).view(-1, 1, 1) for own in (self.mean, self.std))
        return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)

    def resize(self, images: Tensor) -> Tensor:
        """Resize to `img_size`, whatever the proportions.

        Args:
            images: Floating point [B, C, H, W], or clips [B, T, C, H, W].

        Returns:
            [..., C, *img_size]; `images` itself where it has that size.
        """
        if tuple(images.shape[-2:]) == self.img_size:
            return images
        smooth = self.interpolation != "nearest"
        mode = self.interpolation if smooth else "nearest-exact"
        resized = F.interpolate(images.flatten(0, -4), self.img_size, mode=mode, antialias=smooth)
        return resized.unflatten(0, images.shape[:-3])

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise a batch: uint8 [B, C, H, W] -> float32 [B, C, *img_size], on its device."""
        return self.resize(self.normalise(images))

    def open_image(self, source: str | PathLike[str] | Image.Image) -> Tensor:
        """Prepare one picture: turn upright, convert, resize, crop the centre, normalise.

        Args:
            source: A file, or a PIL image.

        Returns:
            float32 [C, H, W].

        Raises:
            ValueError: No such file, or not a picture that can be decoded; the message names it.
        """
        if self.in_chans not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels, and this model takes {self.in_chans}")
        name = "image" if isinstance(source, Image.Image) else str(source)
        picture = convert(open_upright(source, name), self.in_chans, name)
        picture = fit(picture, self.img_size, crop_ratio=self.crop_ratio, interpolation=self.interpolation)
        return self.normalise(torch.from_numpy(to_array(picture)))


def fit(
    picture: Image.Image,
    img_size: tuple[int, int],
    *,
    crop_ratio: float = 1.0,
    interpolation: str = "bicubic",
) -> Image.Image:
    """Resize so that the shorter side is img_size / crop_ratio, and crop the centre.

    Args:
        picture: Mode L or RGB.
        img_size: Height and width that come out.
        crop_ratio: Share of the resized picture's shorter side that the crop keeps.
        interpolation: nearest, bilinear or bicubic.
    """
    height, width = img_size
    goal_h, goal_w = int(height / crop_ratio), int(width / crop_ratio)
    # The side that needs the larger factor gets its goal exactly, the other keeps the proportions.
    if goal_h * picture.width >= goal_w * picture.height:
        size = (max(goal_w, int(goal_h * picture.width / picture.height)), goal_h)
    else:
        size = (goal_w, max(goal_h, int(goal_w * picture.height / picture.width)))
    if size != picture.size:
        picture = picture.resize(size, _FILTERS[interpolation])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def convert(picture: Image.Image, in_chans: int, name: str) -> Image.Image:
    """Bring a PIL image of any mode to mode L (1 channel) or RGB (3 channels), as the table above says.

    Args:
        picture: Any PIL image.
        in_chans: 1 or 3.
        name: What to call it in an error.

    Raises:
        BrokenImageError: The image has floating-point values, or whole numbers out of range.
    """
    mode = "L" if in_chans == 1 else "RGB"
    if picture.mode == "F":
        raise BrokenImageError(
            name, "expected 8- or 16-bit values, got floating point; scale it to 0..255 first"
        )
    if picture.mode in _GREY and picture.mode.startswith("I"):
        return _from_wide(picture, name).convert(mode)
    if picture.mode in _ALPHA or "transparency" in picture.info:
        return _over_white(picture).convert(mode)
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode in ("RGB", "CMYK", "LAB"):
        picture = _to_srgb(picture)
    elif picture.mode not in ("1", "L"):
        picture = picture.convert("RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture is stored without colours."""
    return picture.mode in _GREY


def decode_image(
    encoded: bytes | Image.Image,
    name: str,
    in_chans: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode a picture upright into uint8 [C, H, W].

    Args:
        encoded: The bytes of an image file, or a PIL image.
        name: What to call it in an error.
        in_chans: 1 or 3; when not given, 1 for a grey picture and 3 for any other.
        img_size: Height and width to `fit` it to; its own when not given.

    Raises:
        BrokenImageError: The bytes are not a picture, or not a whole one.
    """
    picture = open_upright(encoded, name)
    picture = convert(picture, in_chans or (1 if is_grey(picture) else 3), name)
    return to_array(picture if img_size is None else fit(picture, img_size))


def to_array(picture: Image.Image) -> np.ndarray:
    """uint8 [C, H, W] of an image of mode L or RGB."""
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def open_upright(source: bytes | str | PathLike[str] | Image.Image, name: str) -> Image.Image:
    """Open, decode wholly, and apply the orientation that a camera stored.

    Args:
        source: The bytes of an image file, its path, or a PIL image.
        name: What to call it in an error.

    Raises:
        BrokenImageError: Not a picture, not a whole one, or one of too many pixels.
    """
    with _damage_named(name):
        picture = source if isinstance(source, Image.Image) else _open(source, name)
        picture.load()
        if picture.mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info:
            # Pillow takes every CMYK JPEG for one of Adobe's, which are inverted.
            picture = ImageChops.invert(picture)
        orientation = _orientation(picture)
        return picture if orientation == 1 else picture.transpose(_TURNS[orientation])


def open_header(source: bytes | str | PathLike[str], name: str) -> Image.Image:
    """Open an image file without decoding it: size and mode are known afterwards.

    Args:
        source: The bytes of an image file, or its path.
        name: What to call it in an error.

    Raises:
        BrokenImageError: Not a picture, or one of too many pixels.
    """
    with _damage_named(name):
        return _open(source, name)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width that an image has once it is turned upright; nothing is decoded for it."""
    with _QUIET:
        sideways = _orientation(picture) in (5, 6, 7, 8)
    width, height = picture.size
    if sideways and isinstance(picture, TiffImagePlugin.TiffImageFile):
        # Some versions of Pillow state the upright size of an unread TIFF, which it turns by itself.
        width, height = (int(picture.tag_v2[tag]) for tag in (_TIFF_WIDTH, _TIFF_HEIGHT))
    return (width, height) if sideways else (height, width)


def read_file(path: Path, name: str) -> bytes:
    """Read a file whole.

    Args:
        path: The file.
        name: What to call it in an error.

    Raises:
        BrokenImageError: It is not there, is a folder, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenImageError(name, "no such image file") from None
    except IsADirectoryError:
        raise BrokenImageError(name, "expected an image file, got a folder") from None
    except OSError as error:
        raise BrokenImageError(name, f"the image file cannot be read ({error.strerror})") from None


def _open(source: bytes | str | PathLike[str], name: str) -> Image.Image:
    if isinstance(source, str | PathLike):
        # Pillow keeps the files of animations open, so it never gets a file.
        source = read_file(Path(source), name)
    if not source:
        raise BrokenImageError(name, "expected an image, got an empty file")
    picture = Image.open(io.BytesIO(source))
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return picture


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a `BrokenImageError`, and keep its warnings away."""
    try:
        with _QUIET:
            yield
    except BrokenImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImageError(name, "expected an image, got a file of another kind") from None
    except Image.DecompressionBombError:
        raise BrokenImageError(name, f"the image has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        # Pillow's readers answer damaged files with errors of many kinds, from OSError to SyntaxError.
        raise BrokenImageError(
            name, f"the image cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"
        ) from None


class _Quiet:
    """Warnings off while any thread is inside; `warnings.catch_warnings` alone would mix up threads."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_QUIET = _Quiet()


def _orientation(picture: Image.Image) -> int:
    """1 to 8 as EXIF numbers them; 1, upright, where nothing sensible is stored."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Damaged EXIF is answered with errors of many kinds; the pixels are whole.
        return 1
    return value if value in _TURNS else 1


def _from_wide(picture: Image.Image, name: str) -> Image.Image:
    """16-bit grey as mode L."""
    wide = np.asarray(picture).astype(np.int64)
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high > 65535:
        raise BrokenImageError(name, f"expected 8- or 16-bit values, got {low} to {high}")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _over_white(picture: Image.Image) -> Image.Image:
    """A picture with transparency as RGB."""
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    with _QUIET:
        colour = picture.convert("RGBA")
    layer = _to_srgb(colour) if picture.mode != "LA" else colour
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Apply the colour profile of an RGB, RGBA, CMYK or LAB picture; gives RGB, or RGBA."""
    goal = "RGBA" if picture.mode == "RGBA" else "RGB"
    if picture.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.buildTransform(lab, ImageCms.createProfile("sRGB"), "LAB", "RGB").apply(picture)
    transform = to_srgb_transform(picture)
    if transform is not None:
        return transform.apply(picture)
    return picture if picture.mode == goal else picture.convert(goal)


def to_srgb_transform(picture: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What turns the colours of an RGB, RGBA or CMYK picture into sRGB (RGBA from RGBA).

    None where the picture has no colour profile, has that of sRGB, or one that is damaged or not of its mode.
    """
    profile = picture.info.get("icc_profile")
    goal = "RGBA" if picture.mode == "RGBA" else "RGB"
    return _transform(profile, picture.mode, goal) if profile else None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str, goal: str) -> ImageCms.ImageCmsTransform | None:
    """From a colour profile to sRGB; None where it is sRGB, or does not fit the picture."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, goal)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    # Profiles of sRGB have many names and sizes; what they do to colours tells them.
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, -1, 3)  # [16, 256, 3]
    before = Image.fromarray(cube).convert(mode)
    moved = np.asarray(transform.apply(before)).astype(np.int64) - np.asarray(before)
    return transform if np.abs(moved).max() > _SRGB_TOLERANCE else None


def _channels(values: list[float], device: torch.device) -> Tensor:
    # Filled on the device: a tensor made from a list is copied there, and the copy waits for the device.
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def _number(value: Any, name: str, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"preprocessing {name}: expected {kind.__name__}, got {value!r}")
    return kind(value)


def _numbers(values: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values[name], list | tuple):
        raise ValueError(f"preprocessing {name}: expected a list, got {values[name]!r}")
    return tuple(_number(value, name, kind) for value in values[name])
