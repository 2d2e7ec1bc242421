"""What is hidden and what is shown: random, tube and block masks, and images as sequences of patches.

    B batch, N patches of the full grid in row-major order, n of them kept, P = C * h * w values of a patch

Papers: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (random masks); Tong et al. 2022,
"VideoMAE" (tubes); Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding
Predictive Architecture" (I-JEPA: blocks).

Every mask comes from random numbers alone. Without a generator they are those of the global one, which the
training loop seeds anew at each step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.patch import patch_grid
from vitrail.components.position import Grid

_DRAWS = 10_000
"""How often the blocks of an image are drawn before it is plain that they never leave it a context."""


class Masking(NamedTuple):
    """Which patches are shown and which are hidden; together each of them once."""

    keep: Tensor
    """[B, n] numbers of the patches that are shown, in random order."""
    masked: Tensor
    """[B, N - n] numbers of those that are hidden."""

    @property
    def restore(self) -> Tensor:
        """[B, N]: `take(torch.cat([shown, hidden], 1), restore)` is in the order of the grid again."""
        return torch.cat([self.keep, self.masked], dim=1).argsort(dim=1)


def random_masking(
    batch: int,
    patches: int,
    ratio: float,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Masking:
    """Hide the same number of patches in every image, all choices equally likely (MAE, section 3).

    Args:
        batch: B.
        patches: N.
        ratio: Share that is hidden, rounded to whole patches; at least one is hidden, and one shown.
        device: Where the numbers are drawn and returned.
        generator: On that device; None: the global one.

    Raises:
        ValueError: There are fewer than two patches.
    """
    if patches < 2:
        raise ValueError(f"masking needs at least 2 patches, got {patches}: take smaller patches")
    hidden = min(max(round(patches * ratio), 1), patches - 1)
    order = torch.rand(batch, patches, device=device, generator=generator).argsort(dim=1)
    return Masking(order[:, hidden:], order[:, :hidden])


def tube_masking(
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Masking:
    """Hide the same places in every frame, so that no other frame shows what is hidden in one (VideoMAE).

    Args:
        batch: B.
        grid: Time, rows and columns of the patches; their numbers count in this order.
        ratio: Share of each frame that is hidden, as in `random_masking`.
        device: Where the numbers are drawn and returned.
        generator: On that device; None: the global one.
    """
    frames, places = grid[0], grid[1] * grid[2]
    first = torch.arange(frames, device=device)[:, None] * places  # [T, 1]
    in_one = random_masking(batch, places, ratio, device, generator)
    return Masking(*((numbers[:, None] + first).flatten(1) for numbers in in_one))


class Blocks(NamedTuple):
    """I-JEPA's masks: what the encoder sees, and the blocks that are predicted."""

    context: Tensor
    """[B, n] numbers of patches, none of which lies in a block."""
    targets: Tensor
    """[B, M, m]: M blocks of m patches each; blocks may overlap."""


@torch.compiler.disable  # how often masks are drawn again depends on their values
def block_masking(batch: int, grid: Grid, count: int = 4, generator: torch.Generator | None = None) -> Blocks:
    """Target blocks, and one large block around them without what they cover (I-JEPA, section 3).

    Targets take 0.15 to 0.2 of the grid with aspect ratios from 0.75 to 1.5, the context 0.85 to 1 (the
    paper's appendix A). What differs: aspect ratios are relative to that of the grid, so that every block
    fits; sizes are drawn once for the batch, places for each image; where the targets leave less than a
    quarter of the patches as context they are drawn again; and all images keep as many context patches as
    the image with the fewest, chosen at random.

    Args:
        batch: B.
        grid: Rows and columns of patches.
        count: M, how many target blocks.
        generator: Of the CPU; None: the global one. Sizes decide shapes, so all is drawn on the CPU: a
            GPU would have to be waited for.

    Raises:
        ValueError: The grid has fewer than two patches, or so many blocks leave no context.
    """
    patches = grid[0] * grid[1]
    if patches < 2:
        raise ValueError(f"block masks need at least 2 patches, got {patches}: take smaller patches")
    scale, aspect, context_scale = torch.rand(3, generator=generator).tolist()
    target_size = _block_size(grid, 0.15 + 0.05 * scale, 0.75 * 2**aspect)
    context_size = _block_size(grid, 0.85 + 0.15 * context_scale, 1.0)
    targets = torch.empty(batch, count, target_size[0] * target_size[1], dtype=torch.long)
    context = torch.zeros(batch, patches, dtype=torch.bool)
    missing = torch.arange(batch)
    for _ in range(_DRAWS):
        blocks = _place_blocks(len(missing), count, target_size, grid, generator)
        around = _place_blocks(len(missing), 1, context_size, grid, generator)
        free = torch.zeros(len(missing), patches, dtype=torch.bool)
        free.scatter_(1, around.flatten(1), True).scatter_(1, blocks.flatten(1), False)
        enough = free.sum(dim=1) * 4 >= patches
        targets[missing[enough]], context[missing[enough]] = blocks[enough], free[enough]
        missing = missing[~enough]
        if not len(missing):
            break
    else:
        raise ValueError(
            f"{count} target blocks leave less than a quarter of {grid[0]} x {grid[1]} patches as context, "
            f"drawn {_DRAWS:,} times: take fewer targets or smaller patches"
        )
    fewest = int(context.sum(dim=1).min())
    order = torch.rand(batch, patches, generator=generator).masked_fill(~context, 2.0).argsort(dim=1)
    return Blocks(order[:, :fewest], targets)


def _block_size(grid: Grid, scale: float, aspect: float) -> Grid:
    """Rows and columns of a block with a share of the grid's area, at least 1 x 1."""
    rows, columns = grid
    return max(1, round(rows * math.sqrt(scale * aspect))), max(1, round(columns * math.sqrt(scale / aspect)))


def _place_blocks(
    batch: int, count: int, size: Grid, grid: Grid, generator: torch.Generator | None
) -> Tensor:
    """Numbers of the patches of blocks of one size, anywhere in the grid: [B, count, rows * columns]."""
    corners = (
        torch.randint(whole - part + 1, (batch, count, 1, 1), generator=generator)
        for part, whole in zip(size, grid, strict=True)
    )
    top, left = corners
    rows, columns = top + torch.arange(size[0])[:, None], left + torch.arange(size[1])
    return (rows * grid[1] + columns).flatten(2)


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens [B, n, D] at some places [B, n] of a sequence [B, N, D]."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def patchify(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut images into patches.

    Args:
        images: [..., C, H, W]; zeros fill up the patches at the right and the lower edge, as in the models.
        size: Height and width of a patch in pixels.

    Returns:
        [..., N, P], the values of a patch in the order channel, row, column.
    """
    height, width = images.shape[-2:]
    rows, columns = _patches(height, size[0]), _patches(width, size[1])
    images = F.pad(images, (0, columns * size[1] - width, 0, rows * size[0] - height))
    cut = images.unflatten(-1, (columns, size[1])).unflatten(-3, (rows, size[0]))
    # [..., C, rows, h, columns, w] -> [..., rows, columns, C, h, w]
    return cut.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def unpatchify(patches: Tensor, size: tuple[int, int], image_shape: tuple[int, int]) -> Tensor:
    """Put images together again: the inverse of `patchify`.

    Args:
        patches: [..., N, P].
        size: Height and width of a patch in pixels.
        image_shape: H and W.

    Returns:
        [..., C, H, W].
    """
    height, width = image_shape
    rows, columns = _patches(height, size[0]), _patches(width, size[1])
    cut = patches.unflatten(-1, (-1, *size)).unflatten(-4, (rows, columns))
    whole = cut.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)
    return whole[..., :height, :width]


def _patches(length: int, size: int) -> int:
    return patch_grid(length, length, size)[0]


def hide(images: Tensor, keep: Tensor, patch_size: int) -> Tensor:
    """Images with zeros, the mean of the data, in all patches but those kept.

    Encoders drop tokens after the embedding. Where it overlaps (convolutional stems) the tokens that stay
    have seen some pixels of their neighbours; zeros make sure that nothing hidden is seen.

    Args:
        images: [B, C, H, W].
        keep: [B, n] numbers of the patches to show.
        patch_size: Height and width of a patch in pixels.
    """
    height, width = images.shape[-2:]
    rows, columns = patch_grid(height, width, patch_size)
    shown = torch.zeros(len(keep), rows * columns, dtype=torch.bool, device=keep.device)
    return images * pixels_of(shown.scatter(1, keep, True), patch_size, (height, width))


def pixels_of(mask: Tensor, patch_size: int, image_shape: tuple[int, int]) -> Tensor:
    """A mask of patches [..., N] -> of pixels [..., 1, H, W]."""
    height, width = image_shape
    maps = mask.unflatten(-1, patch_grid(height, width, patch_size))
    pixels = maps.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
    return pixels[..., None, :height, :width]
