"""Image files as people have them: every mode, format and kind of damage, with what should come out of each.

What should come out is computed from the pixels that went in, not read back with Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

H, W = 16, 24


@dataclass(frozen=True)
class Odd:
    """A file, and either the pixels expected, uint8 [H, W, 3], or the reason why there are none."""

    content: bytes
    pixels: np.ndarray | None = None
    reason: str = ""
    tolerance: int = 0


def colours() -> np.ndarray:
    """A smooth picture, uint8 [H, W, 3], that JPEG keeps almost exactly."""
    x, y = np.meshgrid(np.linspace(0, 1, W), np.linspace(0, 1, H))
    return np.rint(np.stack([40 + 180 * x, 60 + 150 * y, 200 - 100 * x], axis=-1)).astype(np.uint8)


def ramp() -> np.ndarray:
    """A grey picture, uint8 [H, W]."""
    return np.arange(H * W, dtype=np.int64).reshape(H, W).clip(0, 255).astype(np.uint8)


def save(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def rgb16_png() -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write: the lower bytes are noise."""
    rng = np.random.default_rng(0)
    wide = colours().astype(np.uint16) * 256 + rng.integers(0, 256, (H, W, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def huge_png(width: int, height: int) -> bytes:
    """The start of a black-and-white PNG of any size."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (data, body)
    )


# Primaries of Adobe RGB (1998), adapted to D50, as columns: what is X, Y and Z of each.
_WIDE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
# From XYZ at D50 to linear sRGB (Bruce Lindbloom's matrix).
_TO_SRGB = np.array(
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)
_GAMMA = 2.19921875


def wide_profile() -> bytes:
    """A colour profile (ICC version 2) of a wide gamut: primaries and one gamma."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(_GAMMA * 256)) + b"\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78
    name += b"\0" * (-len(name) % 4)
    white = xyz(np.array([0.9642, 1.0, 0.8249]))
    tags = {
        b"desc": name,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": white,
        b"rXYZ": xyz(_WIDE[:, 0]),
        b"gXYZ": xyz(_WIDE[:, 1]),
        b"bXYZ": xyz(_WIDE[:, 2]),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + white[8:] + b"\0" * 48
    assert len(header) == 128
    return header + table + body


def wide_to_srgb(colour: np.ndarray) -> np.ndarray:
    """What colours of that profile are in sRGB, uint8 [..., 3]."""
    linear = np.einsum("ij,...j->...i", _TO_SRGB @ _WIDE, (colour / 255.0) ** _GAMMA).clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * coded).astype(np.uint8)


def turned(orientation: int, kind: str = "PNG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return save(Image.fromarray(colours()), kind, exif=exif, **options)


def upright(orientation: int) -> np.ndarray:
    """What the stored picture shows, by the words of the EXIF standard on row 0 and column 0."""
    stored = colours()
    return {
        1: stored,  # top, left
        2: stored[:, ::-1],  # top, right
        3: stored[::-1, ::-1],  # bottom, right
        4: stored[::-1],  # bottom, left
        5: stored.transpose(1, 0, 2),  # left, top
        6: stored.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: stored.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: stored.transpose(1, 0, 2)[::-1],  # left, bottom
    }[orientation]


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack(">H", jpeg[at + 2 : at + 4])
    return jpeg[:at] + jpeg[at + 2 + length :]


def odd_images() -> dict[str, Odd]:
    """File names with what is in them."""
    rgb, grey = colours(), ramp()
    picture, grey_picture = Image.fromarray(rgb), Image.fromarray(grey)
    alpha = np.linspace(0, 255, H * W).reshape(H, W).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    other = Image.fromarray(255 - rgb)
    few = Image.fromarray((grey // 64 * 64).astype(np.uint8))
    palette = few.convert("RGB").quantize(4)
    palette_rgb = three(np.asarray(few))
    hole = int(np.asarray(palette)[0, 0])
    holed = np.where((np.asarray(palette) == hole)[..., None], 255, palette_rgb).astype(np.uint8)
    bits = grey > 100
    inks = np.dstack([255 - rgb, np.full((H, W), 30, np.uint8)])
    inked = np.rint((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).astype(np.uint8)
    cmyk = Image.fromarray(inks, "CMYK")
    cmyk_jpeg = save(cmyk, "JPEG", quality=100, subsampling=0)
    inverted = without_adobe_marker(
        save(Image.fromarray(255 - inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    )
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    muted = rgb // 3 + 90
    wide = grey.astype(np.uint16) * 257
    jpeg = save(picture, "JPEG", quality=100, subsampling=0)
    png = save(picture, "PNG")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise_rgb = np.asarray(noise)
    cut = "the image cannot be decoded"
    other_kind = "expected an image, got a file of another kind"
    tall = np.linspace(0, 255, 2000).astype(np.uint8)[:, None]
    files = {
        "grey.png": Odd(save(grey_picture, "PNG"), three(grey)),
        "grey_alpha.png": Odd(
            save(Image.fromarray(np.dstack([grey, alpha])), "PNG"), on_white(three(grey), alpha), tolerance=1
        ),
        "rgba.png": Odd(save(rgba, "PNG"), on_white(rgb, alpha), tolerance=1),
        "rgba.webp": Odd(save(rgba, "WEBP", lossless=True, exact=True), on_white(rgb, alpha), tolerance=1),
        "transparent_colour.png": Odd(
            save(picture, "PNG", transparency=tuple(rgb[0, 0].tolist())),
            np.where((rgb == rgb[0, 0]).all(-1)[..., None], 255, rgb),
        ),
        "palette.png": Odd(save(palette, "PNG"), palette_rgb),
        "palette_transparent.png": Odd(save(palette, "PNG", transparency=hole), holed),
        "palette_alpha.png": Odd(
            save(palette, "PNG", transparency=bytes(0 if k == hole else 255 for k in range(4))), holed
        ),
        "palette.gif": Odd(save(palette, "GIF"), palette_rgb),
        "palette_transparent.gif": Odd(save(palette, "GIF", transparency=hole), holed),
        "bits.png": Odd(save(Image.fromarray(bits), "PNG"), three(np.where(bits, 255, 0).astype(np.uint8))),
        "cmyk.tif": Odd(save(cmyk, "TIFF"), inked, tolerance=1),
        "cmyk_adobe.jpg": Odd(cmyk_jpeg, inked, tolerance=4),
        "cmyk_plain.jpg": Odd(inverted, inked, tolerance=4),
        "ycbcr.tif": Odd(save(picture.convert("YCbCr"), "TIFF"), rgb, tolerance=3),
        # Of saturated colours, 8 bits of LAB keep less.
        "lab.tif": Odd(save(to_lab.apply(Image.fromarray(muted)), "TIFF"), muted, tolerance=3),
        "grey16.png": Odd(save(Image.fromarray(wide), "PNG"), three(grey)),
        "grey16.tif": Odd(save(Image.fromarray(wide), "TIFF"), three(grey)),
        "grey16_big_endian.tif": Odd(
            save(Image.frombytes("I;16B", (W, H), wide.astype(">u2").tobytes()), "TIFF"), three(grey)
        ),
        "rgb16.png": Odd(rgb16_png(), rgb),
        "int32.tif": Odd(save(Image.fromarray(wide.astype(np.int32)), "TIFF"), three(grey)),
        "int32_large.tif": Odd(
            save(Image.fromarray(np.full((H, W), 70_000, np.int32)), "TIFF"),
            reason="expected 8- or 16-bit values, got 70000 to 70000",
        ),
        "float.tif": Odd(
            save(Image.fromarray(grey / np.float32(255)), "TIFF"),
            reason="expected 8- or 16-bit values, got floating point; scale it to 0..255 first",
        ),
        "animated.gif": Odd(
            save(palette, "GIF", save_all=True, append_images=[other.quantize(4)], duration=9), palette_rgb
        ),
        "animated.png": Odd(save(picture, "PNG", save_all=True, append_images=[other], duration=9), rgb),
        "animated.webp": Odd(
            save(picture, "WEBP", save_all=True, append_images=[other], duration=9, lossless=True), rgb
        ),
        "pages.tif": Odd(save(picture, "TIFF", save_all=True, append_images=[other]), rgb),
        "pair.mpo": Odd(
            save(picture, "MPO", save_all=True, append_images=[other], quality=100, subsampling=0),
            rgb,
            tolerance=3,
        ),
        "sizes.ico": Odd(save(noise, "ICO", sizes=[(16, 16), (64, 64)]), noise_rgb),
        "picture.bmp": Odd(save(picture, "BMP"), rgb),
        "picture.ppm": Odd(save(picture, "PPM"), rgb),
        "picture.jp2": Odd(save(picture, "JPEG2000"), rgb),
        "lossless.webp": Odd(save(picture, "WEBP", lossless=True), rgb),
        "progressive.jpg": Odd(
            save(picture, "JPEG", quality=100, subsampling=0, progressive=True), rgb, tolerance=3
        ),
        **{
            f"subsampling_{name}.jpg": Odd(
                save(picture, "JPEG", quality=100, subsampling=kind), rgb, tolerance=8
            )
            for name, kind in (("444", 0), ("422", 1), ("420", 2))
        },
        "png_named.jpg": Odd(png, rgb),
        "trailing.jpg": Odd(jpeg + b"\0<html>garbage" * 50, rgb, tolerance=3),
        "srgb_profile.png": Odd(save(picture, "PNG", icc_profile=srgb), rgb),
        "wide_profile.png": Odd(
            save(picture, "PNG", icc_profile=wide_profile()), wide_to_srgb(rgb), tolerance=2
        ),
        "wide_profile_alpha.png": Odd(
            save(rgba, "PNG", icc_profile=wide_profile()), on_white(wide_to_srgb(rgb), alpha), tolerance=3
        ),
        "damaged_profile.png": Odd(save(picture, "PNG", icc_profile=wide_profile()[:200]), rgb),
        "no_profile.jpg": Odd(
            save(picture, "JPEG", quality=100, subsampling=0, icc_profile=b"x" * 40), rgb, tolerance=3
        ),
        "grey_with_colour_profile.png": Odd(
            save(grey_picture, "PNG", icc_profile=wide_profile()), three(grey)
        ),
        **{f"exif_{k}.png": Odd(turned(k), upright(k)) for k in range(1, 9)},
        **{f"exif_{k}.png": Odd(turned(k), rgb) for k in (0, 9)},
        "exif_6.tif": Odd(turned(6, "TIFF"), upright(6)),
        "exif_6.webp": Odd(turned(6, "WEBP", lossless=True), upright(6)),
        "exif_6.jpg": Odd(turned(6, "JPEG", quality=100, subsampling=0), upright(6), tolerance=3),
        "exif_damaged.jpg": Odd(
            jpeg[:2]
            + b"\xff\xe1"
            + struct.pack(">H", 24)
            + b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"
            + b"\1" * 8
            + jpeg[2:],
            rgb,
            tolerance=3,
        ),
        "one_pixel.png": Odd(
            save(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), np.array([[[9, 8, 7]]], np.uint8)
        ),
        "tall.png": Odd(save(Image.fromarray(tall), "PNG"), three(tall)),
        "wide.png": Odd(save(Image.fromarray(tall.T.copy()), "PNG"), three(tall.T)),
        "bomb.png": Odd(huge_png(20_000, 10_000), reason="the image has more than 178,956,970 pixels"),
        "bomb_twice.png": Odd(huge_png(60_000, 60_000), reason="the image has more than 178,956,970 pixels"),
        "empty.jpg": Odd(b"", reason="expected an image, got an empty file"),
        "text.jpg": Odd(b"<html>404 not found</html>", reason=other_kind),
        "zeros.png": Odd(b"\0" * 500, reason=other_kind),
    }
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("GIF", "gif"), ("TIFF", "tif")):
        content = save(noise, kind)
        files[f"cut.{suffix}"] = Odd(content[: len(content) // 2], reason=cut)
    files["cut.webp"] = Odd(save(noise, "WEBP")[:300], reason=cut)
    files["cut_header.jpg"] = Odd(jpeg[:20], reason=other_kind)
    return files
