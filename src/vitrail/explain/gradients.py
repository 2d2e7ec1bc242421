"""How each pixel influences the score of a class: gradients with respect to the image.

    B images, C channels, S points a path or noisy copies an image

Results are maps [B, H, W]: the sum over the channels, with sign. What speaks for the class is positive. The
methods need nothing but the gradient, so they serve every architecture alike. Memory is bounded by
`batch_size`: so many images pass the model at a time, however many points or copies there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vitrail.explain.target import Target, baseline_of, class_scores, evaluating
from vitrail.models.encoder import Encoder


def gradient_x_input(model: Encoder, images: Tensor, target: Target = None) -> Tensor:
    """The gradient of the score times the pixel (Shrikumar et al. 2016), summed over channels.

    It says what the score would lose, to first order, if the pixel became the mean colour.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.

    Returns:
        [B, H, W], signed, in logits.

    Raises:
        ValueError: The model has no head, or the class does not exist.
    """
    with evaluating(model):
        return (images.detach() * _gradient(model, images, target)).sum(dim=1)


def integrated_gradients(
    model: Encoder,
    images: Tensor,
    target: Target = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 64,
    batch_size: int = 32,
) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017): the mean gradient on the way from a baseline.

    The integral over the straight line is taken by Gauss-Legendre quadrature, which for smooth models needs
    far fewer points than equal steps. The map sums to score(image) - score(baseline), up to the error of
    the quadrature: `completeness_error` gives it, and more `steps` make it smaller. (Kinks and cliffs on the
    way, as ReLU stems and sharp attention have them, take more steps than the smooth rest.)

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts.
        baseline: Where the way starts: 0 is the mean colour after normalisation; or a colour [C, 1, 1], or
            images.
        steps: Points on the way, at least 1.
        batch_size: Images a forward and backward pass.

    Returns:
        [B, H, W], signed, in logits.

    Raises:
        ValueError: The model has no head, or the class does not exist, or the baseline does not fit.
    """
    images = images.detach()
    start = baseline_of(images, baseline)
    nodes, shares = (torch.from_numpy(values).to(images) for values in np.polynomial.legendre.leggauss(steps))
    places, shares = (nodes + 1) / 2, shares / 2  # from -1..1 to 0..1

    def on_the_way(image: Tensor, step: Tensor) -> Tensor:
        return torch.lerp(start[image], images[image], places[step][:, None, None, None])

    mean = _mean_gradient(model, images, target, on_the_way, shares, batch_size)
    return ((images - start) * mean).sum(dim=1)


@torch.no_grad()
def completeness_error(
    model: Encoder, images: Tensor, maps: Tensor, target: Target = None, *, baseline: Tensor | float = 0.0
) -> Tensor:
    """How far the sum of a map is from what it should explain, score(image) - score(baseline).

    For `integrated_gradients`, and for every other method that promises it (Shapley values). Compare it with
    the score's difference; below a per cent of that is usual.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        maps: [B, rows, columns].
        target: The class that was explained; None: the one that the model predicts.
        baseline: The one that the map was made with.

    Returns:
        [B]: sum of the map - score(image) + score(baseline), in logits.
    """
    with evaluating(model):
        full, classes = class_scores(model, images, target)
        nothing, _ = class_scores(model, baseline_of(images, baseline), classes)
    return maps.flatten(1).sum(dim=1) - (full - nothing)


def smooth_grad(
    model: Encoder,
    images: Tensor,
    target: Target = None,
    *,
    noise: float = 0.15,
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """SmoothGrad (Smilkov et al. 2017): the mean gradient over noisy copies of the image.

    All images get the same noise, each at its own scale, so a map does not depend on the rest of the batch.
    A gradient says how sensitive the score is to a pixel, and in which direction; it is no contribution to
    the score, and does not sum to anything.

    Args:
        model: A model with a head; it is put into evaluation mode for the while.
        images: [B, C, H, W], normalised.
        target: The class that is explained; None: the one that the model predicts (without noise).
        noise: Standard deviation as a share of the image's range (largest minus smallest value); the paper
            finds 0.1 to 0.2 best.
        samples: Noisy copies an image.
        seed: Of the noise.
        batch_size: Images a forward and backward pass.

    Returns:
        [B, H, W], signed: logits per unit of the normalised pixel.

    Raises:
        ValueError: The model has no head, or the class does not exist.
    """
    images = images.detach()
    # Drawn on the CPU: the same noise whatever the device.
    draws = torch.randn(samples, *images.shape[1:], generator=torch.Generator().manual_seed(seed))
    draws = draws.to(images)
    scale = noise * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)))  # [B]

    def noisy(image: Tensor, sample: Tensor) -> Tensor:
        return images[image] + scale[image][:, None, None, None] * draws[sample]

    shares = torch.full((samples,), 1 / samples).to(images)
    return _mean_gradient(model, images, target, noisy, shares, batch_size).sum(dim=1)


def _mean_gradient(
    model: Encoder,
    images: Tensor,
    target: Target,
    point: Callable[[Tensor, Tensor], Tensor],
    shares: Tensor,
    batch_size: int,
) -> Tensor:
    """The weighted mean [B, C, H, W] of the gradients at S points for each image.

    Args:
        model: A model with a head.
        images: [B, C, H, W].
        target: The class, decided by the images themselves.
        point: Numbers of images [n] and of points [n] -> the points [n, C, H, W].
        shares: [S], the weights.
        batch_size: Points a pass.
    """
    with evaluating(model):
        with torch.no_grad():
            _, classes = class_scores(model, images, target)
        total = torch.zeros_like(images)
        for pairs in torch.arange(len(images) * len(shares), device=images.device).split(batch_size):
            image, number = pairs // len(shares), pairs % len(shares)
            gradients = _gradient(model, point(image, number), classes[image])
            total.index_add_(0, image, shares[number][:, None, None, None] * gradients)
    return total


def _gradient(model: Encoder, images: Tensor, target: Target) -> Tensor:
    """The gradient of each image's score with respect to that image, [B, C, H, W]."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores, _ = class_scores(model, images, target)
        return torch.autograd.grad(scores.sum(), images)[0]
