"""Images drawn by rules, without a download: `shapes`, `textures` and `fractals`, to learn from.

All are drawn at the size asked for, many images at once, and are the same on every call. A training image
and a test image of a class share the rule and nothing else: place, size, angle, colours and ground are drawn
anew.

Fractals are attractors of iterated function systems, one system a class, after Kataoka et al. 2020,
"Pre-training without Natural Images" (FractalDB). As there, the maps' six numbers are uniform in -1 to 1, a
map is taken with a probability in proportion to its determinant, a system that fills too little of its
picture is drawn again, and the images of a class differ by one number of the maps times 0.8 to 1.2, and by
flips. Other than there, all maps are contractions, so that a system always has an attractor (Hutchinson
1981), colours are random, and points are single pixels: the paper draws patches of 3 x 3 into larger images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.datasets.images import ImageSet

TRAIN_SIZE, TEST_SIZE = 10_000, 2_000
IMG_SIZE = 32
"""Height and width of the images where no others are asked for."""
NUM_FRACTALS = 50

_PIXELS = 2**20  # of a block: what is drawn at once
_LUMINANCE = (0.299, 0.587, 0.114)


def synthetic_sets(name: str, img_size: tuple[int, int] | None, in_chans: int | None) -> dict[str, ImageSet]:
    """The training and test images of a drawn data set.

    Args:
        name: One of `SYNTHETIC`.
        img_size: Height and width; 32 x 32 when not given.
        in_chans: 1 or 3; 3 when not given.

    Returns:
        `train` with 10,000 images and `test` with 2,000, each class equally often.
    """
    classes, draw = SYNTHETIC[name]
    height, width = img_size or (IMG_SIZE, IMG_SIZE)
    sets: dict[str, ImageSet] = {}
    for seed, (split, count) in enumerate((("train", TRAIN_SIZE), ("test", TEST_SIZE))):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count)[torch.randperm(count, generator=generator)] % len(classes)
        images = torch.empty(count, in_chans or 3, height, width, dtype=torch.uint8)
        block = max(1, _PIXELS // (height * width))
        for start in range(0, count, block):
            drawn = draw(labels[start : start + block], (height, width), generator)
            if in_chans == 1:
                drawn = torch.einsum("nchw,c->nhw", drawn, torch.tensor(_LUMINANCE))[:, None]
            images[start : start + block] = (drawn * 255).round_().to(torch.uint8)
        sets[split] = ImageSet.from_arrays(
            images.numpy(), labels.numpy(), classes=classes, name=name, split=split
        )
    sets["test"] = replace(sets["test"], mean=sets["train"].mean, std=sets["train"].std)
    return sets


def draw_shapes(kinds: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A shape of any place, size, angle and colour on a plain or faintly textured ground.

    Args:
        kinds: Numbers of the shapes in `SHAPES`, [n].
        size: Height H and width W.
        generator: Draws everything else.

    Returns:
        [n, 3, H, W], 0 to 1.
    """
    n = len(kinds)
    radii = _uniform(n, 0.35, 0.75, generator)
    places = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - radii)[:, None]
    angles = _uniform(n, 0, 2 * math.pi, generator)
    cover = shape_cover(kinds, places, radii, angles, size)[:, None]
    grounds = torch.randint(len(TEXTURES), (n,), generator=generator)
    strength = _uniform(n, -0.3, 0.3, generator).clamp(min=0)[:, None, None, None]  # half of them are plain
    ground, colour = _colours(n, generator)
    faint = strength * (texture_values(grounds, size, generator)[:, None] - 0.5)
    return torch.lerp((ground + faint).clamp(0, 1), colour, cover)


def draw_textures(kinds: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A texture in two colours, [n, 3, H, W], 0 to 1; `kinds` are numbers in `TEXTURES`, [n]."""
    values = texture_values(kinds, size, generator)
    low, high = _colours(len(kinds), generator)
    return torch.lerp(low, high, values[:, None])


def draw_fractals(kinds: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The attractor of a class's system, slightly changed, in two colours, [n, 3, H, W], 0 to 1.

    `kinds` are numbers of classes, below `NUM_FRACTALS`, [n].
    """
    n = len(kinds)
    maps, chances = _fractal_systems()
    # One of a to f is changed, in all maps of the system.
    letter = torch.randint(6, (n,), generator=generator)
    factor = 1 + _uniform(n, -0.2, 0.2, generator)[:, None] * F.one_hot(letter, 6)  # [n, 6]
    orbit = _orbit(maps[kinds] * factor[:, None], chances[kinds], size[0] * size[1], generator)
    hit = _raster(orbit, size)
    for axis in (1, 2):
        turn = torch.rand(n, generator=generator) < 0.5
        hit = torch.where(turn[:, None, None], hit.flip(axis), hit)
    ground, colour = _colours(n, generator)
    return torch.lerp(ground, colour, (1 - 0.4**hit)[:, None])


# Shapes -----------------------------------------------------------------------------------------------------
# Each maps places u, v (to the right, downwards; the shape reaches about 1 from the middle) to how far they
# lie inside of the border: positive inside, negative outside.


def _polygon(u: Tensor, v: Tensor, sides: int) -> Tensor:
    angles = [2 * math.pi * side / sides for side in range(sides)]
    inside = [math.cos(math.pi / sides) - u * math.cos(angle) - v * math.sin(angle) for angle in angles]
    return torch.stack(inside).amin(dim=0)


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.minimum(width - u.abs(), height - v.abs())


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return 0.9 - torch.hypot(u, v)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return 0.2 - (torch.hypot(u, v) - 0.75).abs()


def _half_disc(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(1 - torch.hypot(u, v - 0.4), 0.4 - v)


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(1 - torch.hypot(u, v), torch.hypot(u - 0.55, v) - 0.8)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return _polygon(u, v, 3)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _polygon(u, v, 4)


def _bar(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 1.0, 0.25)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_box(u, v, 1.0, 0.28), _box(u, v, 0.28, 1.0))


def _corner(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_box(u, v + 0.55, 0.8, 0.25), _box(u + 0.55, v, 0.25, 0.8))


def _star(u: Tensor, v: Tensor) -> Tensor:
    # All ten edges fall on one line when the plane is folded into a sector of 36 degrees.
    sector = math.pi / 5
    angle = torch.atan2(v, u)
    angle = (angle - 2 * sector * (angle / (2 * sector)).round()).abs()
    radius = torch.hypot(u, v)
    tip, notch = (1.0, 0.0), (0.42 * math.cos(sector), 0.42 * math.sin(sector))
    along, across = notch[0] - tip[0], notch[1] - tip[1]
    x, y = radius * angle.cos() - tip[0], radius * angle.sin() - tip[1]
    return (y * along - x * across) / math.hypot(along, across)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "ring": _ring,
    "half disc": _half_disc,
    "crescent": _crescent,
    "triangle": _triangle,
    "square": _square,
    "bar": _bar,
    "cross": _cross,
    "corner": _corner,
    "star": _star,
}


def shape_cover(
    kinds: Tensor, places: Tensor, radii: Tensor, angles: Tensor, size: tuple[int, int]
) -> Tensor:
    """What share of each pixel a shape covers.

    Args:
        kinds: Numbers of the shapes in `SHAPES`, [n].
        places: Of the middle, right of and below the image's middle, [n, 2]; half of the shorter side is 1.
        radii: On the same scale, [n].
        angles: In radians, [n].
        size: Height H and width W.

    Returns:
        [n, H, W], 0 to 1.
    """
    u, v = _turned(size, places, angles)
    scale = radii[:, None, None]
    u, v = u / scale, v / scale
    distance = torch.empty_like(u)
    for number, inside in enumerate(SHAPES.values()):
        own = kinds == number
        distance[own] = inside(u[own], v[own])
    return _cover(distance * scale, 2 / min(size))


# Textures ---------------------------------------------------------------------------------------------------
# Each maps places u, v (in periods), the width of a pixel (in periods, [n, 1, 1]) and randomness to 0 to 1.


def _wave(u: Tensor) -> Tensor:
    """A zigzag, 0.25 at whole numbers, -0.25 half-way: how far u lies inside of one of the stripes."""
    return (u - u.floor() - 0.5).abs() - 0.25


def _stripes(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return _cover(_wave(u), pixel)


def _zigzag(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return _cover(_wave(u + 2 * _wave(v / 2)), pixel)


def _checks(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    across, along = _wave(u), _wave(v)
    return _cover(torch.minimum(across.abs(), along.abs()) * (across * along).sign(), pixel)


def _dots(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return _cover(0.3 - torch.hypot(u - u.floor() - 0.5, v - v.floor() - 0.5), pixel)


def _rings(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return _cover(_wave(torch.hypot(u, v)), pixel)


def _grid(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return _cover(torch.maximum(_wave(u), _wave(v)) - 0.1, pixel)


def _bricks(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    row = (2 * v).floor()
    return _cover(torch.maximum(_wave(u + row / 2) - 0.17, _wave(2 * v) / 2 - 0.045), pixel)


def _noise(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """Value noise: two octaves of random numbers on a lattice, smooth between them."""
    octaves = []
    for scale in (1, 2):
        lattice = torch.rand(len(u), 1, 16, 16, generator=generator)
        places = torch.stack([u, v], dim=3) * (scale / 4)
        drawn = F.grid_sample(lattice, places, padding_mode="reflection", align_corners=False)
        octaves.append(drawn[:, 0])
    return (2 * octaves[0] + octaves[1]) / 3


def _marble(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    veins = u + 1.5 * _noise(u, v, pixel, generator)
    return 0.5 + 0.5 * torch.sin(2 * math.pi * veins)


def _cells(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """Cellular noise (Worley 1996): bright at cells' borders, where two scattered points are equally far."""
    points = 5 * torch.rand(25, len(u), 2, 1, 1, generator=generator) - 2.5  # one a square period
    nearest = second = torch.full_like(u, math.inf)
    for point in points:
        distance = torch.hypot(u - point[:, 0], v - point[:, 1])
        second = torch.minimum(second, torch.maximum(nearest, distance))
        nearest = torch.minimum(nearest, distance)
    return _cover(0.15 - (second - nearest), pixel)


TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "stripes": _stripes,
    "zigzag": _zigzag,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "grid": _grid,
    "bricks": _bricks,
    "noise": _noise,
    "marble": _marble,
    "cells": _cells,
}


def texture_values(kinds: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Textures of any angle, place and width, 1.5 to 4 periods along the shorter side.

    Args:
        kinds: Numbers of the textures in `TEXTURES`, [n].
        size: Height H and width W.
        generator: Draws everything else.

    Returns:
        [n, H, W], 0 to 1.
    """
    n = len(kinds)
    angles = _uniform(n, 0, 2 * math.pi, generator)
    periods = _uniform(n, 1.5, 4, generator)[:, None, None]
    u, v = _turned(size, 2 * torch.rand(n, 2, generator=generator) - 1, angles)
    u, v, pixel = u * periods / 2, v * periods / 2, periods / min(size)
    values = torch.empty_like(u)
    for number, draw in enumerate(TEXTURES.values()):
        own = kinds == number
        if own.any():
            values[own] = draw(u[own], v[own], pixel[own], generator)
    return values


# Fractals ---------------------------------------------------------------------------------------------------

_MOST_MAPS = 8
_FILLED = 0.2  # the paper's best filling rate
_WALKERS, _START = 64, 8


@cache
def _fractal_systems() -> tuple[Tensor, Tensor]:
    """The system of each class: maps [K, 8, 6], as a, b, c, d, e, f, and the chance of each, [K, 8].

    A map takes (x, y) to (a x + b y + e, c x + d y + f). A system has 2 to 8; the chance of the rest is 0.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = 2 * torch.rand(32_000, 6, generator=generator) - 1
    # Times 1.2, a map of at most this norm is still a contraction.
    drawn = drawn[torch.linalg.matrix_norm(drawn[:, :4].view(-1, 2, 2), ord=2) < 0.8]
    maps = drawn[: len(drawn) // _MOST_MAPS * _MOST_MAPS].view(-1, _MOST_MAPS, 6)
    count = torch.randint(2, _MOST_MAPS + 1, (len(maps), 1), generator=generator)
    a, b, c, d = maps[..., :4].unbind(dim=2)
    # A map that squeezes the plane into a line still needs a chance, or its part is never drawn.
    chances = torch.where(torch.arange(_MOST_MAPS) < count, (a * d - b * c).abs().clamp(min=0.01), 0.0)
    chances = chances / chances.sum(dim=1, keepdim=True)
    filled = (_raster(_orbit(maps, chances, 1024, generator), (32, 32)) > 0).float().mean(dim=(1, 2))
    kept = torch.nonzero(filled > _FILLED)[:NUM_FRACTALS, 0]
    return maps[kept], chances[kept]


def _orbit(maps: Tensor, chances: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """About so many points of each attractor, by maps taken at random: [n, P, 2].

    Args:
        maps: [n, 8, 6].
        chances: [n, 8].
        points: Number of points, rounded up to a multiple of 64.
        generator: Chooses the maps.
    """
    n, steps = len(maps), _START + -(-points // _WALKERS)
    bounds = chances.cumsum(dim=1)[:, :-1].contiguous()
    # All start where the first map leaves a point: it is on the attractor, and so is every point after it.
    first, shift = maps[:, 0, :4].view(n, 2, 2), maps[:, 0, 4:]
    place = torch.linalg.solve(torch.eye(2) - first, shift)[:, None].expand(-1, _WALKERS, -1)
    found = []
    for step in range(steps):
        choice = torch.searchsorted(bounds, torch.rand(n, _WALKERS, generator=generator), right=True)
        a, b, c, d, e, f = maps.gather(1, choice[..., None].expand(-1, -1, 6)).unbind(dim=2)
        x, y = place.unbind(dim=2)
        place = torch.stack([a * x + b * y + e, c * x + d * y + f], dim=2)
        if step >= _START:
            found.append(place)
    return torch.cat(found, dim=1)


def _raster(points: Tensor, size: tuple[int, int]) -> Tensor:
    """How many of the points [n, P, 2] fall on each pixel of a picture that they just fill: [n, H, W]."""
    n, (height, width) = len(points), size
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    shares = (points - low) / (high - low).clamp(min=1e-6)
    column, row = (shares * torch.tensor([width - 1, height - 1])).round().long().unbind(dim=2)
    pixels = (torch.arange(n)[:, None] * height + row) * width + column
    return torch.bincount(pixels.flatten(), minlength=n * height * width).view(n, height, width).float()


# What all share ---------------------------------------------------------------------------------------------


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _turned(size: tuple[int, int], places: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of all pixels as seen from a place [n, 2], turned by an angle [n]: two of [n, H, W].

    The shorter side goes from -1 to 1.
    """
    rows, columns = ((2 * torch.arange(length) + 1 - length) / min(size) for length in size)
    x = columns[None, None, :] - places[:, 0, None, None]
    y = rows[None, :, None] - places[:, 1, None, None]
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    return cosine * x + sine * y, cosine * y - sine * x


def _cover(inside: Tensor, pixel: Tensor | float) -> Tensor:
    """What share of a pixel so wide is covered, whose middle lies so far inside of a straight border."""
    return (0.5 + inside / pixel).clamp(0, 1)


def _colours(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two colours an image, one lighter than the other by 0.3 to 0.7: [n, 3, 1, 1] each, 0 to 1."""
    first = torch.rand(n, 1, 1, 1, generator=generator)
    second = (first + 0.3 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator)) % 1
    tints = 0.3 * torch.rand(2, n, 3, 1, 1, generator=generator) - 0.15
    return (first + tints[0]).clamp(0, 1), (second + tints[1]).clamp(0, 1)


SYNTHETIC: dict[str, tuple[tuple[str, ...], Callable[[Tensor, tuple[int, int], torch.Generator], Tensor]]] = {
    "shapes": (tuple(SHAPES), draw_shapes),
    "textures": (tuple(TEXTURES), draw_textures),
    "fractals": (tuple(f"fractal {number}" for number in range(NUM_FRACTALS)), draw_fractals),
}
"""Data sets that are drawn: their classes, and what draws images of given classes."""
