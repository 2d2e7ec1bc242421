from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from odd_images import Odd, colours, huge_png, odd_images
from PIL import Image

from vitrail.datasets.transforms import (
    BrokenImageError,
    decode_image,
    fit,
    is_grey,
    open_header,
    upright_size,
)

FILES = odd_images()
WHOLE = [name for name, odd in FILES.items() if odd.pixels is not None]
BROKEN = [name for name, odd in FILES.items() if odd.pixels is None]


def difference(found: np.ndarray, odd: Odd) -> int:
    """Largest difference of [3, H, W] to what is expected."""
    assert odd.pixels is not None
    assert found.dtype == np.uint8
    assert found.shape == (3, *odd.pixels.shape[:2])
    return int(np.abs(found.transpose(1, 2, 0).astype(int) - odd.pixels.astype(int)).max())


@pytest.mark.parametrize("name", WHOLE)
def test_pixels_are_what_went_in(name) -> None:
    odd = FILES[name]
    assert difference(decode_image(odd.content, name, 3), odd) <= odd.tolerance


@pytest.mark.parametrize("name", WHOLE)
def test_luminance_is_that_of_the_colours(name) -> None:
    odd = FILES[name]
    found = decode_image(odd.content, name, 1)
    expected = np.rint(odd.pixels @ np.array([0.299, 0.587, 0.114]))
    assert found.shape == (1, *odd.pixels.shape[:2])
    assert np.abs(found[0] - expected).max() <= odd.tolerance + 1


@pytest.mark.parametrize("name", WHOLE)
def test_the_header_tells_the_size_and_the_greyness(name) -> None:
    odd = FILES[name]
    picture = open_header(odd.content, name)
    assert upright_size(picture) == odd.pixels.shape[:2]
    grey = ("grey", "bits", "int32", "tall", "wide.")
    assert is_grey(picture) == name.startswith(grey)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_in_one_line(name) -> None:
    odd = FILES[name]
    with pytest.raises(BrokenImageError) as caught:
        decode_image(odd.content, f"somewhere/{name}")
    assert caught.value.source == f"somewhere/{name}"
    assert caught.value.reason.startswith(odd.reason)
    assert str(caught.value) == f"somewhere/{name}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


def test_there_are_enough() -> None:
    assert len(FILES) >= 70
    assert len(BROKEN) == 14


def test_a_wide_gamut_changes_the_pixels() -> None:
    # Else the tests of profiles could not fail.
    assert np.abs(FILES["wide_profile.png"].pixels.astype(int) - colours()).max() > 20


def test_large_but_allowed_warns_nobody() -> None:
    # Pillow would warn from 89 million pixels on.
    picture = open_header(huge_png(10_000, 10_000), "large.png")
    assert upright_size(picture) == (10_000, 10_000)


def test_warnings_come_back_after_threads_have_decoded() -> None:
    before = list(warnings.filters)
    contents = [FILES[name].content for name in ("rgba.png", "palette_alpha.png", "exif_6.png")] * 30
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: decode_image(content, "x"), contents))
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="still told"):
        warnings.warn("still told", stacklevel=1)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (3, 500)])
def test_extreme_proportions_fit_any_size(size) -> None:
    picture = Image.new("RGB", size, "white")
    for img_size in ((8, 8), (5, 12), (12, 5)):
        fitted = fit(picture, img_size)
        assert fitted.size == img_size[::-1]
        # A crop outside the picture would be black.
        assert np.asarray(fitted).min() == 255


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (
        ("folder.jpg", "expected an image file, got a folder"),
        ("none.jpg", "no such image file"),
    ):
        with pytest.raises(BrokenImageError, match=reason):
            open_header(tmp_path / name, name)


def test_files_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(FILES["grey.png"].content)
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        with pytest.raises(BrokenImageError, match=r"cannot be read \(Permission denied\)"):
            open_header(path, "secret.png")
    else:
        pytest.skip("this user may read everything")
