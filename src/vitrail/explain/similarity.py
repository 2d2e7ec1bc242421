"""How similar layers, models and distributions are: linear CKA and the Jensen-Shannon distance.

    B images of a batch, N images of a set, L layers, D channels

Papers: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (CKA); Nguyen et al.
2021, "Do Wide and Deep Networks Learn the Same Things?" (CKA over batches), with the unbiased estimate of
HSIC by Song et al. 2012, "Feature Selection via Dependence Maximization"; Lin 1991, "Divergence Measures
Based on the Shannon Entropy", and Endres and Schindelin 2003 (its root is a distance).

CKA compares how two representations arrange the same images. It is 1 for representations that differ by a
rotation, a scale and a shift only, so neurons need not correspond and widths may differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.explain.target import evaluating
from vitrail.models.encoder import Encoder, Features

FEWEST_IMAGES = 4
"""The unbiased estimate divides by n - 3."""


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two representations of the same images (Kornblith et al. 2019, section 3).

    For a set that is at hand as a whole. It is biased upwards where there are fewer images than channels;
    `BatchedCKA` is not.

    Args:
        first: [N, ...], flattened to channels.
        second: [N, ...], of any other width.

    Returns:
        0 to 1.

    Raises:
        ValueError: Other images in one than in the other, or one that is alike for all of them.
    """
    if len(first) != len(second):
        raise ValueError(
            f"representations of the same images are compared, got {len(first)} and {len(second)}"
        )
    x, y = (_centred(values.flatten(1).cpu().double()) for values in (first, second))
    for name, values in (("first", x), ("second", y)):
        if not values.any():
            raise ValueError(
                f"the {name} representation is the same for all {len(x)} images: nothing to compare"
            )
    return float(_products(x, y) / (_products(x, x) * _products(y, y)).sqrt())


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frobenius norm of x^T y, over images or over channels, whichever are fewer."""
    if len(x) < x.shape[1] and len(x) < y.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def _centred(values: Tensor) -> Tensor:
    """Channels [B, D] without their means; exactly 0 where what is left is rounding."""
    x = values - values.mean(dim=0)
    rounding = 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=0)
    return torch.where(x.abs() <= rounding, 0, x)


class BatchedCKA:
    """Linear CKA between many representations of a set that comes in batches (Nguyen et al. 2021).

    Each batch gives an unbiased estimate of HSIC for every pair, and the ratio is taken of their means, so
    the size of the batches does not shift the result. What differs from the paper: batches count by their
    number of images, because the last one is mostly smaller.
    """

    def __init__(self) -> None:
        self.images = 0
        """How many images counted."""
        self._cross: Tensor | float = 0.0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Count a batch.

        Args:
            first: Representations [B, ...] of the same images, L of them, always in the same order.
            second: The same for the other side, M of them. A batch of fewer than four images is left out: it
                has no unbiased estimate.

        Raises:
            ValueError: Other images in one than in another, no representation, or one that is not finite.
        """
        sizes = {len(values) for values in (*first, *second)}
        if not first or not second or len(sizes) != 1:
            raise ValueError(
                "representations of the same images are compared, at least one on each side; got "
                f"{len(first)} and {len(second)}, of {sorted(sizes)} images"
            )
        (B,) = sizes
        if B < FEWEST_IMAGES:
            return
        # Scalar products of u-centred matrices are Song's estimate (Szekely and Rizzo 2014).
        left = torch.stack([_centred_gram(values) for values in first]).flatten(1)  # [L, B * B]
        right = (
            left if second is first else torch.stack([_centred_gram(values) for values in second]).flatten(1)
        )
        weight = B / (B * (B - 3))
        self.images += B
        self._cross = self._cross + weight * left @ right.T
        self._first = self._first + weight * left.square().sum(dim=1)
        self._second = self._second + weight * right.square().sum(dim=1)

    def result(self) -> Tensor:
        """[L, M], float64: about 0 to 1; chance may bring it below 0. NaN where all images look alike.

        Raises:
            ValueError: No batch counted.
        """
        if not self.images:
            raise ValueError(
                f"no batch of at least {FEWEST_IMAGES} images: CKA compares how images are arranged"
            )
        assert isinstance(self._cross, Tensor)
        assert isinstance(self._first, Tensor)
        assert isinstance(self._second, Tensor)
        return self._cross / (self._first[:, None] * self._second).sqrt()


def _centred_gram(values: Tensor) -> Tensor:
    """The u-centred matrix of the scalar products of a batch, [B, ...] -> float64 [B, B] on the CPU."""
    x = _centred(values.flatten(1).float())  # the mean changes no result, but costs digits
    gram = (x @ x.T).cpu().double().fill_diagonal_(0)
    if not gram.isfinite().all():
        raise ValueError("a representation is not finite; check images and weights")
    B = len(gram)
    sums = gram.sum(dim=0)
    gram = gram - (sums[:, None] + sums) / (B - 2) + sums.sum() / ((B - 1) * (B - 2))
    return gram.fill_diagonal_(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSimilarity:
    """Which layers represent a set of images alike."""

    layers: tuple[int, ...]
    """Those of the first model, counted from 0."""
    other_layers: tuple[int, ...]
    """Those of the second model, or of the same."""
    values: Tensor
    """CKA [layers, other_layers], float64; see `BatchedCKA.result`."""
    images: int
    """How many images counted."""


@torch.no_grad()
def layer_similarity(
    model: Encoder, batches: Iterable[Tensor], other: Encoder | None = None
) -> LayerSimilarity:
    """Linear CKA between all layers of a model, or between those of two models.

    Compared are all tokens of an image, side by side, as `forward_features(layers=)` gives them (of CrossViT
    those of the large branch).

    Args:
        model: Any encoder; it is put into evaluation mode for the while.
        batches: Images [B, C, H, W], normalised, on the models' device; of 32 or more each. Batches of fewer
            than four images do not count.
        other: A second model, of any architecture, that takes the same images; None: the model itself, and
            the diagonal is 1.

    Raises:
        ValueError: No batch counted.
    """
    counted = BatchedCKA()
    for images in batches:
        first = layer_tokens(model, images)
        counted.add(first, first if other is None else layer_tokens(other, images))
    values = counted.result()
    rows, columns = values.shape
    return LayerSimilarity(
        layers=tuple(range(rows)),
        other_layers=tuple(range(columns)),
        values=values,
        images=counted.images,
    )


@torch.no_grad()
def layer_tokens(model: Encoder, images: Tensor) -> list[Tensor]:
    """All tokens after each block, [B, P + N, D] each; what `layer_similarity` compares."""
    with evaluating(model):
        seen = model.forward_features(images, layers=range(len(model.block_names()))).layers
    return [_tokens(seen[layer]) for layer in sorted(seen)]


def _tokens(features: Features) -> Tensor:
    return torch.cat([features.prefix, features.patches], dim=1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon distance between distributions: the root of the divergence in bits.

    0: equal; 1: nothing in common. Unlike the divergence it keeps the triangle inequality. In float32 what is
    below 1e-3 is rounding; give float64 where that matters.

    Args:
        first: [..., K], not negative; scaled to sum to one over the last axis.
        second: The same; the other axes are broadcast, so `p[:, None], p[None]` compares all pairs.

    Returns:
        [...], 0 to 1.

    Raises:
        ValueError: A value that is negative or not finite, or a distribution without mass. (Differential
            attention and talking heads have negative weights; say what they shall count as, their size for
            instance.)
    """
    shares = []
    for name, values in (("first", first), ("second", second)):
        mass = values.sum(dim=-1, keepdim=True)
        if not (values.isfinite().all() and (values >= 0).all() and (mass > 0).all()):
            raise ValueError(
                f"the {name} distribution has values that are negative or not finite, or sums to zero"
            )
        shares.append(values / mass)
    p, q = shares
    gain = torch.special.entr((p + q) / 2) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return (gain.sum(dim=-1) / math.log(2)).clamp(0, 1).sqrt()
