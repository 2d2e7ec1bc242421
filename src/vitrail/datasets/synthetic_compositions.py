"""Synthetic training images made of real ones: `data.synthetic`.

A composition is a training image over a texture, with a fragment pasted where it hides little: a shape cut
out of another training image, or in one colour. It keeps the image's label; no label is looked at to make it.

What is the image and what its ground, nobody tells: the ground's colour is taken to be the median along the
image's border, and a pixel belongs to the ground the more, the nearer it is to that. Of a digit on black that
leaves the strokes as they are; of a photograph the texture shines through where it has its border's colour.
After Dwibedi et al. 2017, "Cut, Paste and Learn", where cut-out objects are pasted over photographs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.datasets.file_set import Images
from vitrail.datasets.images import ImageSet
from vitrail.datasets.synthetic import SHAPES, TEXTURES, shape_cover, texture_values

STRENGTH = 0.5
"""The texture mixes at most so much of another colour into the ground's."""
RADII = (0.2, 0.4)
"""Of fragments; half of the shorter side is 1."""

_PLACES = 8  # of which the fragment takes the one where it hides least
_PIXELS = 2**20


def with_compositions(images: Images, share: float, seed: int) -> ImageSet:
    """Training images, and behind them compositions made of them.

    Args:
        images: Real images in memory.
        share: Compositions an image. Each image is taken once before one is taken again.
        seed: Decides which images are taken, and all that is drawn. A smaller share takes some of the images
            that a larger one takes.

    Returns:
        The images and round(share * their number) compositions, with the real images' mean and deviation.

    Raises:
        ValueError: The images are clips, or read from files.
    """
    if not isinstance(images, ImageSet):
        raise ValueError(
            f"data.synthetic is for images in memory, and those of {images.name} are read from files: "
            "take --data.storage memory if they fit, or leave it out"
        )
    if images.frames is not None:
        raise ValueError(f"data.synthetic is for images, and {images.name} has clips: leave it out")
    N = len(images)
    rng = np.random.default_rng(seed)
    count = round(share * N)
    sources = np.concatenate([rng.permutation(N) for _ in range(math.ceil(share))])[:count]
    return ImageSet.from_arrays(
        np.concatenate([images.images, compose(images, sources, seed)]),
        np.concatenate([images.labels, images.labels[sources]]),
        classes=images.classes,
        name=images.name,
        split=images.split,
        mean=images.mean,
        std=images.std,
    )


def compose(images: ImageSet, sources: np.ndarray, seed: int) -> np.ndarray:
    """A composition of each of the images at `sources` [n], without a look at labels: uint8 [n, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sources)
    made = np.empty((n, images.in_chans, *images.img_size), dtype=np.uint8)
    block = max(1, _PIXELS // math.prod(images.img_size))
    for start in range(0, n, block):
        own = sources[start : start + block]
        others = torch.randint(len(images), (len(own),), generator=generator).numpy()
        drawn = _draw(images.pixels(own) / 255, images.pixels(others) / 255, generator)
        made[start : start + block] = (drawn * 255).round_().to(torch.uint8).numpy()
    return made


def _draw(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Compositions of images with fragments of others, all [n, C, H, W], 0 to 1."""
    n, C, H, W = images.shape
    border = [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]]
    ground = torch.cat(border, dim=2).median(dim=2).values[..., None, None]  # [n, C, 1, 1]
    figure = (images - ground).abs().amax(dim=1)  # [n, H, W]
    figure = figure / figure.amax(dim=(1, 2), keepdim=True).clamp(min=1 / 255)

    kinds = torch.randint(len(TEXTURES), (n,), generator=generator)
    strength = STRENGTH * torch.rand(n, 1, 1, generator=generator)
    texture = (1 - figure) * strength * texture_values(kinds, (H, W), generator)
    colour = torch.rand(n, C, 1, 1, generator=generator)
    images = images + texture[:, None] * (colour - ground)

    kinds = torch.randint(len(SHAPES), (n,), generator=generator)
    radii = RADII[0] + (RADII[1] - RADII[0]) * torch.rand(n, generator=generator)
    angles = 2 * math.pi * torch.rand(n, generator=generator)
    places = _least_hidden(figure, generator)
    cover = shape_cover(kinds, places, radii, angles, (H, W))[:, None]
    colour = torch.rand(n, C, 1, 1, generator=generator)
    cut = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    fragment = torch.where(cut, _moved(others, places), colour)
    return torch.lerp(images, fragment, cover).clamp(0, 1)


def _least_hidden(figure: Tensor, generator: torch.Generator) -> Tensor:
    """Of some places that with the least of the figure [n, H, W] around it: [n, 2], for `shape_cover`."""
    n, (H, W) = len(figure), figure.shape[1:]
    half = round(RADII[1] * min(H, W) / 2)
    around = F.avg_pool2d(figure[:, None], 2 * half + 1, stride=1, padding=half)[:, 0]
    rows = torch.randint(H, (n, _PLACES), generator=generator)
    columns = torch.randint(W, (n, _PLACES), generator=generator)
    best = around.flatten(1).gather(1, rows * W + columns).argmin(dim=1, keepdim=True)
    row, column = rows.gather(1, best), columns.gather(1, best)
    # From pixels to a scale on which the shorter side goes from -1 to 1.
    return torch.cat([2 * column + 1 - W, 2 * row + 1 - H], dim=1) / min(H, W)


def _moved(images: Tensor, places: Tensor) -> Tensor:
    """Images [n, C, H, W] moved so that their middle comes to the places [n, 2]; black comes in."""
    n, _, H, W = images.shape
    matrices = torch.eye(2, 3).repeat(n, 1, 1)
    matrices[:, :, 2] = -places * min(H, W) / torch.tensor([W, H])
    return F.grid_sample(
        images, F.affine_grid(matrices, list(images.shape), align_corners=False), align_corners=False
    )
