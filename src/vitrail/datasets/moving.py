"""Moving digits: clips whose class is the motion, made from MNIST without a download.

A digit of half its size moves over a canvas of its own size: in one of eight directions, or it turns. What a
clip shows half-way, place, angle and digit, is drawn the same way for all classes, so that its middle frame
tells nothing of the class; frames in a random order tell the line of a motion, but not its direction.

After Srivastava et al. 2015, "Unsupervised Learning of Video Representations using LSTMs" (Moving MNIST),
where two digits bounce around and the next frames are predicted; there are no classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.datasets.clips import Frames
from vitrail.datasets.images import ImageSet

MOVING_MNIST = "moving_mnist"
MOTIONS = (
    "right",
    "up right",
    "up",
    "up left",
    "left",
    "down left",
    "down",
    "down right",
    "counter-clockwise",
    "clockwise",
)
"""The classes."""
LENGTH = 9
"""Frames of a whole clip, of which some are taken."""
SPEED = 1.0
"""Pixels a frame."""
TURN = math.radians(10)
"""Angle a frame."""

_AWAY = 3.0  # the middle frame shows the digit up to so many pixels from the centre: it never leaves
_TILT = math.radians(20)  # and turned by up to so much
_BLOCK = 2048


def moving_digits(digits: ImageSet, frames: Frames) -> ImageSet:
    """A clip of each digit, the motions equally often.

    Args:
        digits: Grey images; the same images and split give the same clips.
        frames: Which frames make a clip.

    Returns:
        Clips [N, T, 1, H, W]; the classes are `MOTIONS`.

    Raises:
        ValueError: More frames are asked for than there are.
    """
    times = torch.tensor(frames.choose(LENGTH, MOVING_MNIST)) - (LENGTH - 1) / 2
    generator = np.random.default_rng(["train", "val", "test"].index(digits.split))
    N = len(digits)
    labels = generator.permutation(np.arange(N) % len(MOTIONS))
    drawn = torch.from_numpy(generator.uniform(-1, 1, (N, 3)).astype(np.float32))
    motion = torch.from_numpy(labels)
    direction = motion * (math.pi / 4)
    moves = (motion < 8).float()
    velocity = SPEED * moves[:, None] * torch.stack([direction.cos(), -direction.sin()], dim=1)  # [N, 2]
    turning = TURN * (1 - moves) * torch.where(motion == 8, 1.0, -1.0)
    clips = np.empty((N, len(times), 1, *digits.img_size), dtype=np.uint8)
    for start in range(0, N, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, N))
        small = F.avg_pool2d(digits.pixels(block).float(), 2)
        for number, time in enumerate(times.tolist()):
            places = _AWAY * drawn[block, :2] + time * velocity[block]
            angles = _TILT * drawn[block, 2] + time * turning[block]
            clips[block, number] = _draw(small, places, angles, digits.img_size).numpy()
    return ImageSet.from_arrays(clips, labels, classes=MOTIONS, name=MOVING_MNIST, split=digits.split)


def _draw(small: Tensor, places: Tensor, angles: Tensor, size: tuple[int, int]) -> Tensor:
    """Put pictures on black canvases.

    Args:
        small: [n, 1, h, w], 0 to 255.
        places: Pixels right of and below the centre, [n, 2].
        angles: Counter-clockwise, in radians, [n].
        size: Height and width of the canvas.

    Returns:
        uint8 [n, 1, *size].
    """
    rows, columns = (torch.arange(length) - (length - 1) / 2 for length in size)
    x = columns[None, None, :] - places[:, 0, None, None]  # [n, 1, W]
    y = rows[None, :, None] - places[:, 1, None, None]  # [n, H, 1]
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    # From a place on the canvas to the one in the picture that it shows; y points downwards.
    inside = torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=3)  # [n, H, W, 2]
    half = torch.tensor([small.shape[3] / 2, small.shape[2] / 2])
    return F.grid_sample(small, inside / half, align_corners=False).round_().to(torch.uint8)
