"""Test images as the world damages them: noise, blur, occlusion, rotation, contrast, at five severities.

After Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and
perturbations", whose CIFAR-10-C and ImageNet-C are files of fixed images; these corruptions are computed for
any image size, and occlusion (Naseer et al. 2021, "Intriguing properties of vision transformers") is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.datasets import Images, Preprocessing, batches

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
"""Pixels 0 to 1 [B, C, H, W], severity 1 to 5, randomness -> pixels of the same shape."""


def noise(pixels: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a deviation of 0.05 to 0.25."""
    return (pixels + 0.05 * severity * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


def blur(pixels: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur with a deviation of 1.5 to 7.5 % of the shorter side."""
    deviation = 0.015 * severity * min(pixels.shape[-2:])
    half = math.ceil(3 * deviation)
    places = torch.arange(-half, half + 1, dtype=pixels.dtype)
    kernel = torch.exp(-((places / deviation) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, -1)
    padded = F.pad(pixels, [half] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None], groups=pixels.shape[1])
    return F.conv2d(rows, kernel[..., None], groups=pixels.shape[1])


def occlusion(pixels: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """10 to 50 % of the cells of a 7 x 7 grid, drawn anew for each image, become black."""
    B, _, H, W = pixels.shape
    order = torch.rand(B, 49, generator=generator).argsort(dim=1)
    shown = (order >= round(0.1 * severity * 49)).view(B, 1, 7, 7).to(pixels.dtype)
    return pixels * F.interpolate(shown, size=(H, W), mode="nearest-exact")


def rotation(pixels: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """10 to 50 degrees, to the left or to the right; black beyond the border."""
    B, _, H, W = pixels.shape
    sign = torch.randint(0, 2, (B,), generator=generator) * 2 - 1
    angle = sign * math.radians(10.0 * severity)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros(B)
    # Coordinates run from -1 to 1 along each axis, so the shorter axis is stretched.
    matrices = torch.stack([cosine, -sine * H / W, zero, sine * W / H, cosine, zero], dim=1).view(B, 2, 3)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def contrast(pixels: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """85 to 25 % of the contrast, around each image's mean."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (pixels - mean) * (1 - 0.15 * severity)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "occlusion": occlusion,
    "rotation": rotation,
    "contrast": contrast,
}


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Accuracy on damaged images."""

    clean: float
    """Share of right answers on the images as they are."""
    accuracy: dict[str, tuple[float, ...]]
    """Corruption -> accuracy at severities 1 to 5."""

    def mean(self, corruption: str) -> float:
        """Mean over the severities of one corruption."""
        return sum(self.accuracy[corruption]) / len(self.accuracy[corruption])

    @property
    def overall(self) -> float:
        """Mean over all corruptions and severities."""
        return sum(self.mean(name) for name in self.accuracy) / len(self.accuracy)


@torch.no_grad()
def robustness(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    batch_size: int = 500,
    device: torch.device | None = None,
    seed: int = 0,
) -> Robustness:
    """Test a classifier on images damaged in several ways.

    Args:
        model: Gives logits [B, K]; it is put into evaluation mode.
        images: Labelled images that the preprocessing fits.
        preprocessing: Resizes and normalises the damaged pixels.
        corruptions: Names of `CORRUPTIONS`.
        batch_size: Images at a time.
        device: Where the model runs; None: the CPU. Damage is done on the CPU.
        seed: Of noise, occlusion and the direction of rotations: every model gets the same images.

    Raises:
        ValueError: There is no such corruption.
    """
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise ValueError(f"no corruption {name!r}: expected one of {', '.join(CORRUPTIONS)}")
    model.eval()
    device = device or torch.device("cpu")

    def accuracy(damage: Callable[[Tensor], Tensor]) -> float:
        right = 0
        for pixels, labels in batches(images, batch_size, seed=0, epoch=0, shuffle=False, drop_last=False):
            damaged = preprocessing.prepare((damage(pixels.float() / 255) * 255).round().to(torch.uint8))
            right += int((model(damaged.to(device)).argmax(dim=1).cpu() == labels).sum())
        return right / len(images)

    found: dict[str, tuple[float, ...]] = {}
    for name in corruptions:
        shares = []
        for severity in SEVERITIES:
            generator = torch.Generator().manual_seed(seed * 1_000 + severity)
            corrupt = CORRUPTIONS[name]

            def damage(
                pixels: Tensor,
                corrupt: Corruption = corrupt,
                severity: int = severity,
                generator: torch.Generator = generator,
            ) -> Tensor:
                return corrupt(pixels, severity, generator)

            shares.append(accuracy(damage))
        found[name] = tuple(shares)
    return Robustness(clean=accuracy(lambda pixels: pixels), accuracy=found)
