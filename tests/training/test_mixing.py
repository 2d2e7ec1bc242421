"""Mixup and CutMix: the mixture of images and targets, lambda's distribution, exact areas."""

import pytest
import torch
from scipy import stats

from vitrail.config import AugmentSection
from vitrail.training.mixing import Mix, cutmix, mixup, one_hot


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=64, channels=3, height=12, width=16, classes=10):
    images = torch.rand(count, channels, height, width, generator=generator(1))
    labels = torch.randint(classes, (count,), generator=generator(2))
    return images, labels


def shares(targets, labels):
    """Each image's own share, from targets whose labels differ from the partners'."""
    return targets.gather(1, labels[:, None])[:, 0]


def test_one_hot():
    assert torch.equal(one_hot(torch.tensor([2, 0]), 3), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))


def test_mixup_is_the_mixture_of_image_and_partner():
    images, _ = batch()
    labels = torch.arange(64)
    mixed, targets = Mix(AugmentSection(mixup=0.8), 64)(images, labels, generator())
    own = shares(targets, labels)[:, None]
    plain = one_hot(labels, 64)
    torch.testing.assert_close(targets, own * plain + (1 - own) * plain.roll(1, 0), atol=1e-6, rtol=0)
    weight = own[:, :, None, None]
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_lambda_follows_the_beta_distribution(alpha):
    count = 4000
    targets = torch.eye(2)[torch.arange(count) % 2]
    _, mixed = mixup(torch.zeros(count, 1, 1, 1), targets, alpha, generator())
    own = mixed.gather(1, (torch.arange(count) % 2)[:, None])[:, 0]
    assert stats.kstest(own.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert own.std() > 0.1


@pytest.mark.parametrize("size", [(12, 16), (8, 8), (1, 5), (32, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix_area_is_one_minus_lambda_exactly(size, channels):
    count = 500
    height, width = size
    # The image number is in the pixels, so a pasted pixel is one that shows the partner's.
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, channels, height, width)
    labels = torch.arange(count)
    mixed, targets = Mix(AugmentSection(cutmix=1.0), count)(images, labels, generator())
    pasted = mixed == images.roll(1, 0)
    assert (pasted | (mixed == images)).all()
    assert torch.equal(pasted[:, :1].expand_as(pasted), pasted)
    area = pasted[:, 0].sum((1, 2)) / (height * width)
    torch.testing.assert_close(shares(targets, labels), 1 - area, atol=2e-7, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    rows, columns = pasted[:, 0].any(2).sum(1), pasted[:, 0].any(1).sum(1)
    assert torch.equal(pasted[:, 0].sum((1, 2)), rows * columns)


def test_cutmix_areas_before_clipping_follow_lambda():
    count = 2000
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 64, 64)
    mixed, _ = cutmix(images, torch.zeros(count, 1), 1.0, generator())
    area = (mixed != images).float().mean((1, 2, 3))
    # Uniform lambda; clipping takes about half of the side of a large box.
    assert area.max() > 0.8
    assert area.min() < 0.01
    assert 0.25 < area.mean() < 0.45


def test_off_means_plain_images_and_targets():
    images, labels = batch()
    for section in (AugmentSection(), AugmentSection(mixup=1.0, cutmix=1.0, mix_probability=0.0)):
        mixed, targets = Mix(section, 10)(images, labels, generator())
        assert torch.equal(mixed, images)
        assert torch.equal(targets, one_hot(labels, 10))


def test_each_batch_draws_whether_and_which():
    images, labels = batch(count=8)
    mix = Mix(AugmentSection(mixup=1.0, cutmix=1.0, mix_probability=0.6), 10)
    rng = generator()
    drawn = {"plain": 0, "cutmix": 0, "mixup": 0}
    for _ in range(300):
        mixed, _ = mix(images, labels, rng)
        if torch.equal(mixed, images):
            drawn["plain"] += 1
        elif ((mixed == images) | (mixed == images.roll(1, 0))).all():
            drawn["cutmix"] += 1
        else:
            drawn["mixup"] += 1
    assert 90 < drawn["plain"] < 150
    assert 60 < drawn["cutmix"] < 120
    assert 60 < drawn["mixup"] < 120


@pytest.mark.parametrize("section", [AugmentSection(mixup=0.8), AugmentSection(cutmix=1.0)])
def test_same_generator_state_same_batch(section):
    images, labels = batch()
    before = images.clone()
    mix = Mix(section, 10)
    first, again, other = (mix(images, labels, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, before)


def test_batch_of_one():
    images, labels = batch(count=1)
    for section in (AugmentSection(mixup=0.8), AugmentSection(cutmix=1.0)):
        mixed, targets = Mix(section, 10)(images, labels, generator())
        torch.testing.assert_close(mixed, images)
        torch.testing.assert_close(targets, one_hot(labels, 10))
