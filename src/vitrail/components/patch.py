"""From an image to tokens: four patch embeddings with one interface.

    B batch, C channels, p patch size, D width, N = rows * columns patches in row-major order

`linear` cuts the image by hand and multiplies (Dosovitskiy et al. 2021, equation 1); `conv` is the same
with the weight of one strided convolution; `overlap` lets each patch see its neighbours (Wang et al. 2022,
PVT v2); `stem` is a small convolutional network (Hassani et al. 2021, the tokeniser of compact
transformers, with the batch normalisation of Xiao et al. 2021, "Early Convolutions Help Transformers See
Better").

All pad the right and lower edge with zeros to a whole number of patches, so every image size works.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.position import Grid

_LARGE_PATCH = 7
"""Side from which on a convolution is faster as a matrix product, as measured."""


def patch_grid(height: int, width: int, patch_size: int) -> Grid:
    """Rows and columns of patches of an image, the last ones padded where needed."""
    return math.ceil(height / patch_size), math.ceil(width / patch_size)


def cut(images: Tensor, patch_size: int) -> Tensor:
    """Images of whole patches [B, C, H, W] -> their patches [B, rows, columns, C * p * p]."""
    B, C, height, width = images.shape
    p = patch_size
    patches = images.reshape(B, C, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


class PatchConvolution(nn.Conv2d):
    """A convolution over whole patches, kernel and stride p: [B, C, H, W] -> [B, D, rows, columns].

    On a CPU it is computed as a matrix product, which is as fast forwards and up to four times as fast
    backwards (RESULTS.md, "What helped"), unless patches are so small that cutting costs more. A graph that
    is being captured keeps the one operator.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> maps [B, D, rows, columns]."""
        p = self.stride[0]
        if torch.compiler.is_compiling() or images.device.type != "cpu" or p < _LARGE_PATCH:
            return super().forward(images)
        return F.linear(cut(images, p), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Module, ABC):
    """What all have in common: they check the channels and pad to whole patches."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim

    def pad(self, images: Tensor) -> Tensor:
        """Zeros on the right and below, up to whole patches."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images [B, {self.in_chans}, H, W], got {list(images.shape)}; convert the images, "
                "or build the model with another in_chans"
            )
        height, width = images.shape[-2:]
        right, below = -width % self.patch_size, -height % self.patch_size
        return F.pad(images, (0, right, 0, below)) if right or below else images

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens [B, N, D] and the grid (rows, columns)."""
        maps = self.embed(self.pad(images))
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


class ConvPatchEmbedding(PatchEmbedding):
    """One convolution with kernel and stride p; parameter names are timm's."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.proj = PatchConvolution(patch_size, in_chans, embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""
        return self.proj(images)


class LinearPatchEmbedding(PatchEmbedding):
    """Cut into patches, flatten as [channel, row, column], multiply.

    The weight [D, C * p * p] is that of `ConvPatchEmbedding`, flattened; a state dictionary of either loads
    into the other after that reshape.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.proj = nn.Linear(in_chans * patch_size**2, embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""
        return self.proj(cut(images, self.patch_size)).permute(0, 3, 1, 2)


class OverlapPatchEmbedding(PatchEmbedding):
    """One convolution with stride p whose kernel 2p - 1 reaches into the neighbouring patches (PVT v2)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=2 * patch_size - 1, stride=patch_size, padding=patch_size - 1
        )

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""
        return self.proj(images)


class StemPatchEmbedding(PatchEmbedding):
    """log2(p) times: 3x3 convolution, batch normalisation, ReLU, 3x3 max-pooling with stride 2.

    Channels double from stage to stage and end at D. The patch size must be a power of two.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or halvings < 1:
            raise ValueError(
                f"patch_embed 'stem' halves the image step by step: patch_size must be 2, 4, 8, ..., "
                f"got {patch_size}; take 'conv' or 'overlap' for other sizes"
            )
        widths = [in_chans] + [embed_dim // 2**left for left in range(halvings - 1, -1, -1)]
        self.proj = nn.Sequential()
        for narrow, wide in itertools.pairwise(widths):
            self.proj.append(nn.Conv2d(narrow, wide, kernel_size=3, padding=1, bias=False))
            self.proj.append(nn.BatchNorm2d(wide))
            self.proj.append(nn.ReLU(inplace=True))
            self.proj.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""
        return self.proj(images)


PATCH_EMBEDDINGS: dict[str, type[PatchEmbedding]] = {
    "conv": ConvPatchEmbedding,
    "linear": LinearPatchEmbedding,
    "overlap": OverlapPatchEmbedding,
    "stem": StemPatchEmbedding,
}
