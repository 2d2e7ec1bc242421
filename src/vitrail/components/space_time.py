"""Clips as sequences of tokens: moments, their grid, and where a patch is in space and time.

    B batch, T frames, t frames a tubelet, C channels, H x W pixels, D width
    N = moments * rows * columns patches: moment by moment, each in row-major order

A clip is [B, T, C, H, W], frames before channels, so that whatever treats the last three axes as an image
(normalising, cutting into patches) treats each frame as one. A tubelet (Arnab et al. 2021, ViViT; Tong et al.
2022, VideoMAE) is a patch that spans t frames; the frames of a tubelet together are a moment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.components.patch import patch_grid
from vitrail.components.position import sincos, sincos_frequencies

ClipGrid = tuple[int, int, int]
"""Moments, rows and columns."""


def moments(clips: Tensor, tubelet: int) -> Tensor:
    """The frames of each tubelet as the channels of one image: [B, T, C, H, W] -> [B, T / t, t * C, H, W].

    Raises:
        ValueError: Not a batch of clips, or frames that do not make whole tubelets.
    """
    _check(clips, tubelet)
    return clips.unflatten(1, (-1, tubelet)).flatten(2, 3)


def frames(made: Tensor, tubelet: int) -> Tensor:
    """The inverse of `moments`: [B, T / t, t * C, H, W] -> [B, T, C, H, W]."""
    return made.unflatten(2, (tubelet, -1)).flatten(1, 2)


def clip_grid(clips: Tensor, tubelet: int, patch_size: int) -> ClipGrid:
    """Moments, rows and columns of the patches of clips [B, T, C, H, W].

    Raises:
        ValueError: As `moments`.
    """
    _check(clips, tubelet)
    rows, columns = patch_grid(clips.shape[3], clips.shape[4], patch_size)
    return clips.shape[1] // tubelet, rows, columns


class SinCosPosition3d(nn.Module):
    """Sine-cosine features of moment, row and column, each in its own third of the channels.

    The thirds are even numbers; what is left over goes to the moment. No parameters, so any grid will do.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 6 or dim % 2:
            raise ValueError(f"sincos_3d positions need an even width of 6 or more, got {dim}")
        in_space = dim // 6 * 2
        self.in_time: Tensor
        self.in_space: Tensor
        self.register_buffer("in_time", sincos_frequencies(dim - 2 * in_space), persistent=False)
        self.register_buffer("in_space", sincos_frequencies(in_space), persistent=False)

    def forward(self, grid: ClipGrid) -> Tensor:
        """The table [1, N, D] for a grid."""
        moment, row, column = places(grid, self.in_time.device).unbind(1)
        return torch.cat(
            [sincos(moment, self.in_time), sincos(column, self.in_space), sincos(row, self.in_space)], dim=1
        )[None]


def places(grid: ClipGrid, device: torch.device | None = None) -> Tensor:
    """Moment, row and column of each patch as floats, [N, 3]."""
    axes = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    return torch.cartesian_prod(*axes)


def _check(clips: Tensor, tubelet: int) -> None:
    if clips.ndim != 5:
        raise ValueError(f"expected clips [B, T, C, H, W], got {list(clips.shape)}")
    if clips.shape[1] % tubelet:
        raise ValueError(
            f"{clips.shape[1]} frames do not make whole tubelets of {tubelet}; take a multiple of {tubelet} "
            "frames, or a model with tubelet=1"
        )
