"""Figures: size, content and hostile names; how they look is for eyes."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.explain import draw


def pixels(figure: matplotlib.figure.Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw.png(figure))).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_has_the_width_and_shows_the_images(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "DPI", 100)
    images = torch.full((3, channels, 8, 8), 120, dtype=torch.uint8)
    shown = pixels(draw.image_grid(images, ["one", "two\nlines", "three"], columns=2))
    assert shown.shape[1] == round(100 * draw.WIDTH)
    grey = (shown == 120).all(axis=2).sum()
    side = 100 * (draw.WIDTH / 2 - 0.07)
    assert grey == pytest.approx(3 * side**2, rel=0.03)


def test_heat_is_brightest_where_it_is_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 100)
    heat = torch.tensor([[0.0, 0.0], [0.0, 0.2]])
    image = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    shown = pixels(draw.image_grid(image, [""], columns=1, heat=[heat])).astype(int).sum(axis=2)
    height, width = shown.shape
    corners = {
        (row, column): shown[int(height * (0.1 + row)) :, int(width * column) :][
            : height // 3, : width // 3
        ].mean()
        for row in (0.15, 0.55)
        for column in (0.1, 0.6)
    }
    assert max(corners, key=lambda corner: corners[corner]) == (0.55, 0.6)


def test_label() -> None:
    assert draw.label("a\n  b") == "a b"
    assert draw.label("x" * 30, 5) == "xxxx…"
    assert draw.label("$\\frac{$") == "\\$\\frac{\\$"
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for name in ("$\\frac{$", "猫", "$a$ $b"):
        draw.png(draw.image_grid(image, [draw.label(name)], columns=1))


def test_drawing_leaves_the_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw.png(draw.similarity_grid(torch.eye(20).reshape(4, 5, 4, 5)))
    assert dict(matplotlib.rcParams) == before
