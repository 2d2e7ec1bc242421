"""Mixup and CutMix: each image of a batch is mixed with another one, and so is its target.

Sources: Mixup (Zhang et al. 2017, arXiv:1710.09412), CutMix (Yun et al. 2019, arXiv:1905.04899). What
differs: the papers' code draws one lambda a batch and a random permutation; here each image has a lambda of
its own (timm's mode "elem"), and its partner is the image before it, which the loader's shuffling makes a
random one, and never the image itself. Label smoothing is the loss's: smoothing the mixture is mixing the
smoothed.

Shapes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitrail.config import AugmentSection
from vitrail.training.augment import box_mask


class Mix:
    """Mixup or CutMix on whole batches; where both are on, each batch draws one of the two with equal chance.

    Args:
        section: `mixup` and `cutmix` are the alphas, 0 for off; `mix_probability` is the share of the batches
            that are mixed at all.
        num_classes: Number of classes, K.
    """

    def __init__(self, section: AugmentSection, num_classes: int) -> None:
        self.section = section
        self.num_classes = num_classes
        self._kinds = [
            (mix, alpha) for mix, alpha in ((mixup, section.mixup), (cutmix, section.cutmix)) if alpha
        ]

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch, or not, as chance has it.

        Args:
            images: Floating point [B, C, H, W], on any device; stays as it is.
            labels: int64 [B], on the same device.
            generator: On the CPU; the only source of randomness.

        Returns:
            Images [B, C, H, W], and targets float32 [B, K] whose rows sum to 1.
        """
        targets = one_hot(labels, self.num_classes)
        chance, which = torch.rand(2, generator=generator).tolist()
        if not self._kinds or chance >= self.section.mix_probability:
            return images, targets
        mix, alpha = self._kinds[int(which * len(self._kinds))]
        return mix(images, targets, alpha, generator)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels int64 [B] -> float32 [B, K], one at the label and zero elsewhere."""
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def mixup(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner: lambda of itself, 1 - lambda of the partner.

    Args:
        images: [B, C, H, W].
        targets: [B, K].
        alpha: Lambda follows Beta(alpha, alpha).
        generator: On the CPU.

    Returns:
        Images and targets of the same shapes.
    """
    share = _beta(alpha, len(images), generator).to(images.device, non_blocking=True)
    mixed = torch.lerp(_partners(images), images, share[:, None, None, None].to(images.dtype))
    return mixed, torch.lerp(_partners(targets), targets, share[:, None])


def cutmix(
    images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paste a box of its partner into each image; targets are mixed by the exact area.

    The box has the image's shape and 1 - lambda of its area. Its centre is anywhere in the image; what sticks
    out is cut off, and lambda corrected.

    Args:
        images: [B, C, H, W].
        targets: [B, K].
        alpha: Lambda, before the correction, follows Beta(alpha, alpha).
        generator: On the CPU.

    Returns:
        Images and targets of the same shapes.
    """
    height, width = images.shape[-2:]
    boxes = _random_boxes(1 - _beta(alpha, len(images), generator), height, width, generator)
    top, bottom, left, right = boxes.unbind(1)
    share = (1 - (bottom - top) * (right - left) / (height * width)).to(images.device, non_blocking=True)
    inside = box_mask(boxes.to(images.device, non_blocking=True), height, width)
    # Weights of exactly 0 and 1 select; torch.where takes three times as long on a CPU.
    mixed = torch.lerp(images, _partners(images), inside.to(images.dtype))
    return mixed, torch.lerp(_partners(targets), targets, share[:, None])


def _partners(rows: Tensor) -> Tensor:
    return rows.roll(1, 0)


def _beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """float32 [n] from Beta(alpha, alpha)."""
    # torch's Beta knows no generator, so NumPy's is seeded from it.
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count).astype(np.float32))


def _random_boxes(areas: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes (first row, row after the last, first column, column after the last), clipped to the image.

    Args:
        areas: Share of the image's area before clipping, [B], 0 to 1.
        height: Height of the images.
        width: Width of the images.
        generator: On the CPU.

    Returns:
        int64 [B, 4].
    """
    sides = []
    for length in (height, width):
        extent = (areas.sqrt() * length).long()
        centre = torch.randint(length, areas.shape, generator=generator)
        start = centre - extent // 2
        sides += [start.clamp(min=0), (start + extent).clamp(max=length)]
    return torch.stack(sides, 1)
