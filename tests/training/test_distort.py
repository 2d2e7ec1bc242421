"""Colour jitter, greyscale and blur: against torchvision and scipy, and each image by its own numbers."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as reference

from vitrail.config import AugmentSection
from vitrail.training.augment import luminance
from vitrail.training.distort import color_jitter, distort, some_blurred, some_grey, turn_hue


def pictures(B: int = 6, C: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(B, C, size, size, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_turning_the_hue_keeps_luma_and_comes_back() -> None:
    images = 0.4 + 0.2 * pictures()  # so that nothing is cut off
    turns = torch.linspace(-0.2, 0.2, 6)
    turned = turn_hue(images, turns)
    torch.testing.assert_close(luminance(turned), luminance(images), atol=1e-3, rtol=0)
    torch.testing.assert_close(turn_hue(turned, -turns), images, atol=1e-5, rtol=0)
    assert (turned - images)[0].abs().max() > 0.02


def test_a_third_of_a_turn_brings_red_near_green() -> None:
    red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    angles = [float(turn) for turn in torch.arange(-0.5, 0.5, 0.01)]
    greenest = max(angles, key=lambda turn: float(turn_hue(red, torch.tensor([turn]))[0, 1, 0, 0]))
    assert 0.2 < abs(greenest) < 0.45


def test_jitter_changes_its_share_of_the_images_and_stays_in_range() -> None:
    images = pictures(2000, size=4)
    found = color_jitter(images, 1.0, generator())
    share = float(((found - images).abs() > 1e-4).flatten(1).any(dim=1).float().mean())
    assert 0.77 < share < 0.83
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(color_jitter(images, 0.0, generator()), images, atol=2e-6, rtol=0)


def test_brightness_and_contrast_of_grey_images_are_torchvisions() -> None:
    images = pictures(1, C=1)
    source = generator(3)
    changed = (torch.rand(1, generator=source) < 0.8).float()
    brightness, contrast, _ = (
        (1 + 0.8 * 0.5 * changed * (2 * torch.rand(3, 1, generator=source) - 1)).flatten().tolist()
    )
    expected = reference.adjust_contrast(reference.adjust_brightness(images, brightness), contrast)
    assert changed
    torch.testing.assert_close(color_jitter(images, 0.5, generator(3)), expected, atol=1e-5, rtol=0)


def test_grey_images_have_equal_channels() -> None:
    images = pictures(1000, size=4)
    found = some_grey(images, 0.2, generator())
    grey = (found == found[:, :1]).flatten(1).all(dim=1)
    assert 0.15 < float(grey.float().mean()) < 0.25
    assert torch.equal(found[~grey], images[~grey])
    torch.testing.assert_close(found[grey][:, :1], luminance(images)[grey])


@pytest.mark.parametrize("size", [32, 224])
def test_blur_is_scipys(size: int) -> None:
    images = pictures(3, size=size)
    found = some_blurred(images, 1.0, generator(1))
    source = generator(1)
    torch.rand(3, generator=source)
    deviations = (0.1 + 1.9 * torch.rand(3, generator=source)) * size / 224
    half = max(1, -(-5 * size // 224))
    for image, blurred, deviation in zip(images, found, deviations.tolist(), strict=True):
        expected = gaussian_filter(
            image.numpy(), (0, deviation, deviation), mode="nearest", radius=(0, half, half)
        )
        torch.testing.assert_close(blurred, torch.from_numpy(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(some_blurred(images, 0.0, generator()), images, atol=1e-6, rtol=0)


def test_all_off_changes_nothing_and_draws_nothing() -> None:
    images, source = pictures(), generator()
    assert distort(images, AugmentSection(), source) is images
    assert torch.equal(source.get_state(), generator().get_state())
