"""Colour jitter, greyscale and blur for the views that contrastive methods compare, on whole batches.

Source: Chen et al. 2020, SimCLR, appendix A. What differs: the four parts of the jitter follow each other in
one order instead of a random one, and the hue is turned in the plane of YIQ's two colour axes, which keeps
the luma where turning it in HSV changes it.

    B images, C channels; pixels are 0 to 1
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config import AugmentSection
from vitrail.training.augment import adjust_brightness, adjust_color, adjust_contrast, luminance

JITTERED = 0.8
"""Share of the images whose colours are changed at all."""
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def distort(images: Tensor, section: AugmentSection, generator: torch.Generator) -> Tensor:
    """Jitter, grey and blur at random, as far as a config section asks for them; [B, C, H, W]."""
    if section.jitter:
        images = color_jitter(images, section.jitter, generator)
    if section.grayscale:
        images = some_grey(images, section.grayscale, generator)
    if section.blur:
        images = some_blurred(images, section.blur, generator)
    return images


def color_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation by up to 80 %, the hue by up to 72 degrees, times strength.

    Args:
        images: [B, C, H, W]; with one channel, only brightness and contrast change.
        strength: SimCLR's s: 1 for ImageNet, 0.5 for CIFAR-10.
        generator: On the CPU; the only source of randomness.
    """
    B = len(images)
    changed = (torch.rand(B, generator=generator) < JITTERED).float()
    factors = 1 + 0.8 * strength * changed * (2 * torch.rand(3, B, generator=generator) - 1)
    turns = 0.2 * strength * changed * (2 * torch.rand(B, generator=generator) - 1)
    brightness, contrast, saturation = factors.clamp(min=0).to(images.device, non_blocking=True)
    images = adjust_contrast(adjust_brightness(images, brightness), contrast)
    if images.shape[1] == 1:
        return images
    return turn_hue(adjust_color(images, saturation), turns)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of each image [B, 3, H, W] by a share of the circle [B], on the CPU; luma stays."""
    to_yiq = torch.tensor(_YIQ)
    angle = 2 * math.pi * turns
    cosine, sine, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rows = [one, zero, zero, zero, cosine, -sine, zero, sine, cosine]
    matrices = to_yiq.inverse() @ torch.stack(rows, dim=1).view(-1, 3, 3) @ to_yiq  # [B, 3, 3]
    matrices = matrices.to(images.device, images.dtype, non_blocking=True)
    return (matrices @ images.flatten(2)).view_as(images).clamp_(0, 1)


def some_grey(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Take the colours from a share of the images [B, C, H, W]."""
    chosen = (torch.rand(len(images), generator=generator) < share).to(images.device, non_blocking=True)
    if images.shape[1] == 1:
        return images
    return torch.where(chosen[:, None, None, None], luminance(images), images)


def some_blurred(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blur a share of the images [B, C, H, W]: a Gaussian of 0.1 to 2 pixels at 224, scaled to the size."""
    B, C, H, W = images.shape
    chosen = torch.rand(B, generator=generator) < share
    deviations = (0.1 + 1.9 * torch.rand(B, generator=generator)) * min(H, W) / 224
    half = max(1, math.ceil(2.5 * 2.0 * min(H, W) / 224))
    places = torch.arange(-half, half + 1).float()
    kernels = torch.exp(-((places / deviations[:, None]) ** 2) / 2)
    alone = (places == 0).float()  # what is not chosen stays as it is
    kernels = torch.where(chosen[:, None], kernels / kernels.sum(dim=1, keepdim=True), alone)
    kernels = kernels.to(images.device, images.dtype).repeat_interleave(C, dim=0)[:, None]  # [B C, 1, k]
    padded = F.pad(images, [half] * 4, mode="replicate").reshape(1, B * C, H + 2 * half, W + 2 * half)
    rows = F.conv2d(padded, kernels[:, :, None], groups=B * C)
    return F.conv2d(rows, kernels[..., None], groups=B * C).view(B, C, H, W)
