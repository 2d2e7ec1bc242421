"""Draw sample.jpg, the picture that the examples use: a hot-air balloon over hills.

    python examples/make_sample.py

Drawn four times as large and shrunk, so that edges are smooth. The picture is ours; anybody may use it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FINER = 320, 240, 4
STRIPES = ("#c8342b", "#f2b632", "#c8342b", "#f4e9d4", "#c8342b", "#f2b632", "#c8342b")


def draw_sample() -> Image.Image:
    """The picture, RGB, 320 x 240 pixels."""
    picture = _sky()
    draw = ImageDraw.Draw(picture)
    for height, swing, colour in ((150, 16, "#7d9bb0"), (178, 12, "#5d8a5a"), (205, 9, "#3e6b3c")):
        _hills(draw, height, swing, colour)
    _balloon(draw, left=128, top=22, width=84)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _sky() -> Image.Image:
    """From blue above to a warm horizon."""
    above, below = np.array([96, 150, 214]), np.array([246, 226, 196])
    share = np.linspace(0, 1, HEIGHT * FINER)[:, None, None]  # [H, 1, 1]
    rows = above + (below - above) * share**1.5
    return Image.fromarray(np.broadcast_to(rows, (HEIGHT * FINER, WIDTH * FINER, 3)).astype(np.uint8).copy())


def _hills(draw: ImageDraw.ImageDraw, height: int, swing: int, colour: str) -> None:
    x = np.arange(0, WIDTH + 1)
    y = height + swing * (np.sin(x / 37 + height) + 0.5 * np.sin(x / 17 + 2 * height))
    outline = [(0, HEIGHT), *zip(x.tolist(), y.tolist(), strict=True), (WIDTH, HEIGHT)]
    draw.polygon([(FINER * a, FINER * b) for a, b in outline], fill=colour)


def _balloon(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """Striped ellipses, each narrower than the one before, then ropes and basket."""
    middle, bottom = left + width / 2, top + 1.05 * width
    for number, colour in enumerate(STRIPES):
        half = width / 2 * np.cos(np.pi / 2 * number / len(STRIPES))
        draw.ellipse([FINER * own for own in (middle - half, top, middle + half, bottom)], fill=colour)
    basket = bottom + 0.22 * width
    for side in (-1, 1):
        rope = (middle + side * 0.2 * width, bottom - 0.08 * width, middle + side * 0.1 * width, basket)
        draw.line([FINER * own for own in rope], fill="#4a3b2a", width=FINER)
    box = (middle - 0.12 * width, basket, middle + 0.12 * width, basket + 0.17 * width)
    draw.rectangle([FINER * own for own in box], fill="#7a5230")


if __name__ == "__main__":
    draw_sample().save(Path(__file__).with_name("sample.jpg"), quality=90)
