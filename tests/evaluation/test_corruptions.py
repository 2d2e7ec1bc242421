"""Damaged images: what each corruption does to pixels, and that every model is tested on the same ones."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from vitrail.datasets import ImageSet, Preprocessing, load_dataset
from vitrail.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    blur,
    contrast,
    noise,
    occlusion,
    robustness,
    rotation,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pictures(B: int = 4, C: int = 3, H: int = 28, W: int = 28) -> Tensor:
    return torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_grows_with_severity_and_repeats(name: str) -> None:
    images = pictures(H=24, W=36)
    apart = []
    for severity in SEVERITIES:
        found = CORRUPTIONS[name](images, severity, generator())
        assert found.shape == images.shape
        assert found.min() >= -1e-6
        assert found.max() <= 1 + 1e-6
        assert torch.equal(found, CORRUPTIONS[name](images, severity, generator()))
        apart.append(float((found - images).square().mean()))
    if name != "rotation":  # noise for noise: any angle is as far
        assert apart == sorted(apart)
    assert apart[0] > 0


def test_blur_is_scipys() -> None:
    images = pictures(1, 1, 30, 40)
    deviation = 0.015 * 3 * 30
    radius = math.ceil(3 * deviation)
    expected = gaussian_filter(images[0, 0].numpy(), deviation, mode="nearest", radius=radius)
    torch.testing.assert_close(
        blur(images, 3, generator())[0, 0], torch.from_numpy(expected), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("severity", SEVERITIES)
def test_occlusion_hides_its_share_in_every_image(severity: int) -> None:
    found = occlusion(torch.ones(10, 1, 28, 28), severity, generator())
    hidden = (found == 0).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(hidden, torch.full((10,), round(4.9 * severity) / 49))


def test_noise_and_contrast() -> None:
    middle = torch.full((4, 1, 100, 100), 0.5)
    assert float(noise(middle, 2, generator()).std()) == pytest.approx(0.1, rel=0.02)
    images = pictures()
    found = contrast(images, 4, generator())
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), 0.4 * images.std(dim=(1, 2, 3)))
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))


def test_rotation_keeps_shapes_and_goes_both_ways() -> None:
    # A point 10 to the right of the middle of a wide image comes to lie 10 away at the angle.
    image = torch.zeros(1, 1, 41, 61)
    image[0, 0, 19:22, 39:42] = 1.0
    places = set()
    for seed in range(8):
        found = rotation(image, 3, torch.Generator().manual_seed(seed))[0, 0]
        rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(61.0), indexing="ij")
        y = float((found * rows).sum() / found.sum()) - 20
        x = float((found * columns).sum() / found.sum()) - 30
        assert math.hypot(x, y) == pytest.approx(10, abs=0.3)
        assert abs(math.degrees(math.atan2(y, x))) == pytest.approx(30, abs=1)
        places.add(y > 0)
    assert places == {True, False}


class Dark(nn.Module):
    """Says 1 for images whose mean is below one half."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, 1 - mean], dim=1)


def test_accuracy_of_a_known_classifier() -> None:
    pixels = torch.cat([torch.full((6, 1, 14, 14), 140), torch.full((6, 1, 14, 14), 60)]).byte().numpy()
    images = ImageSet.from_arrays(pixels, [0] * 6 + [1] * 6, classes=("light", "dark"), split="test")
    preprocessing = Preprocessing(img_size=(14, 14), in_chans=1, mean=(0.0,), std=(1.0,))
    found = robustness(Dark(), images, preprocessing, corruptions=["occlusion", "contrast"], batch_size=5)
    assert found.clean == 1.0
    # 140 of 255 is 0.549: without a tenth of it 0.494, so light images become dark; dark ones stay.
    assert found.accuracy["occlusion"] == (0.5,) * 5
    assert found.accuracy["contrast"] == (1.0,) * 5
    assert found.mean("occlusion") == 0.5
    assert found.overall == 0.75
    with pytest.raises(ValueError, match="no corruption 'fog': expected one of noise, blur"):
        robustness(Dark(), images, preprocessing, corruptions=["fog"])


def test_batches_change_nothing_of_what_is_judged() -> None:
    test = load_dataset("digits").test.subset(range(40))
    preprocessing = Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.0,), std=(1.0,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = robustness(model, test, preprocessing, batch_size=40)
    again = robustness(model, test, preprocessing, batch_size=40)
    assert found == again
    assert found.accuracy.keys() == CORRUPTIONS.keys()
