"""What the features of single patches know of what is drawn there: a linear probe for local detail.

    B images, N patches of a grid, D channels, K orientations

For each patch a ridge regression predicts, from the features of that patch alone, the directions of the edges
inside it: a histogram of oriented gradients (Dalal and Triggs 2005; as a target for features: Wei et al.
2022, "Masked Feature Prediction"). It is the nearest simple target that is local, needs no labels, exists for
every image, and is no linear function of the pixels: what a patch embedding passes on untouched does not
solve it.

Patches without edges are left out; that nothing is there is no detail. The score is R^2: 0 knows no more than
the mean over all patches, 1 knows all. Its interval comes from drawing the test images again (bootstrap).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.datasets import Images, Preprocessing, Splits, batches
from vitrail.models.encoder import Encoder

ORIENTATIONS = 8
"""Directions of edges that are told apart, K, over half a turn."""
LEAST_EDGE = 0.01
"""Mean gradient, of pixels 0 to 1, from which on a patch counts as having edges."""
STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""Regularisations that are tried, relative to the number of patches."""
_HELD_OUT = 0.1
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class DenseProbe:
    """How well the features of patches tell the edges inside them."""

    r2: float
    """At most 1; 0: no better than the mean."""
    interval: tuple[float, float]
    """95 % bootstrap interval over the test images."""
    pixels_r2: float
    """The same from the pixels of the patch themselves: what needs no features."""
    strength: float
    """The regularisation that was chosen, one of `STRENGTHS`."""
    train_patches: int
    test_patches: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Patches:
    """Patches with edges: what is known of them [M, D], what is asked [M, K], from which image [M]."""

    features: npt.NDArray[np.float64]
    pixels: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]
    image: npt.NDArray[np.int64]


@torch.no_grad()
def dense_probe(
    model: Encoder,
    preprocessing: Preprocessing,
    splits: Splits,
    *,
    images: int = 2000,
    batch_size: int = 500,
    device: torch.device | None = None,
) -> DenseProbe:
    """Judge the patch features of a frozen encoder, those of its last block.

    Args:
        model: Any encoder; it is put into evaluation mode.
        preprocessing: How images become its input.
        splits: Training images to learn from, a tenth of which chooses the regularisation, and test images to
            judge by.
        images: How many of each are used at most, the first in the order of the set.
        batch_size: Images at a time.
        device: Where the encoder runs; None: the CPU.

    Raises:
        ValueError: No test images, or no patch with an edge.
    """
    if not len(splits.test):
        raise ValueError(f"{splits.test.name} has no test images to judge by")
    model = model.to(device or torch.device("cpu")).eval()
    known, asked = (
        _patches(model, preprocessing, part.subset(np.arange(min(len(part), images))), batch_size)
        for part in (splits.train, splits.test)
    )
    if not len(known.image) or not len(asked.image):
        raise ValueError(f"{splits.train.name}: no patch of these images has an edge in it")
    errors, strength = _ridge(known, known.features, asked, asked.features)
    pixel_errors, _ = _ridge(known, known.pixels, asked, asked.pixels)
    spread = np.square(asked.targets - known.targets.mean(axis=0)).sum(axis=1)
    missed, whole = (np.bincount(asked.image, own) for own in (errors, spread))  # of each image
    drawn = np.random.default_rng(0).multinomial(len(whole), np.full(len(whole), 1 / len(whole)), _DRAWS)
    low, high = np.quantile(1 - (drawn @ missed) / (drawn @ whole), [0.025, 0.975])
    return DenseProbe(
        r2=float(1 - missed.sum() / whole.sum()),
        interval=(float(low), float(high)),
        pixels_r2=float(1 - pixel_errors.sum() / whole.sum()),
        strength=strength,
        train_patches=len(known.image),
        test_patches=len(asked.image),
    )


def edge_histograms(pixels: Tensor, cell: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How strong the edges of each direction are in each cell.

    Args:
        pixels: [B, 1, H, W], 0 to 1; H and W are whole numbers of cells.
        cell: Height and width of a cell.

    Returns:
        Histograms [B, N, K] of length one, the strength of an edge shared between both directions next to its
        own, row by row of cells; and the mean strength [B, N].
    """
    # Central differences; at the border one-sided, so that no edge appears there.
    padded = F.pad(pixels, [1, 1, 1, 1], mode="replicate")
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    strength = torch.hypot(down, right)
    place = torch.atan2(down, right).remainder(math.pi) / math.pi * ORIENTATIONS  # [B, 1, H, W], 0 to K
    below = place.floor()
    share = place - below
    first, second = below.long() % ORIENTATIONS, (below.long() + 1) % ORIENTATIONS
    bins = torch.zeros(len(pixels), ORIENTATIONS, *pixels.shape[2:])
    bins.scatter_add_(1, first, strength * (1 - share))
    bins.scatter_add_(1, second, strength * share)
    cells = F.avg_pool2d(bins, cell).flatten(2).transpose(1, 2)  # [B, N, K]
    return F.normalize(cells, dim=2), F.avg_pool2d(strength, cell).flatten(1)


def _patches(model: Encoder, preprocessing: Preprocessing, images: Images, batch_size: int) -> _Patches:
    """All patches with edges of some images."""
    device = next(model.parameters()).device
    parts: list[_Patches] = []
    seen = 0
    for pixels, _ in batches(images, batch_size, seed=0, epoch=0, shuffle=False, drop_last=False):
        inputs = preprocessing.prepare(pixels)
        features = model.forward_features(inputs.to(device))
        rows, columns = features.grid
        shown = preprocessing.denormalise(inputs).float().mean(dim=1, keepdim=True) / 255
        height, width = shown.shape[2:]
        cell = (-(-height // rows), -(-width // columns))
        # The last patches may reach beyond the image, as the model's do.
        beyond = [0, columns * cell[1] - width, 0, rows * cell[0] - height]
        shown = F.pad(shown, beyond, mode="replicate")
        histograms, strength = edge_histograms(shown, cell)
        own = F.unfold(shown, cell, stride=cell).transpose(1, 2)  # [B, N, cell * cell]
        chosen = strength > LEAST_EDGE
        parts.append(
            _Patches(
                features=features.patches.float().cpu()[chosen].double().numpy(),
                pixels=own[chosen].double().numpy(),
                targets=histograms[chosen].double().numpy(),
                image=chosen.nonzero()[:, 0].numpy() + seen,
            )
        )
        seen += len(pixels)
    return _Patches(
        features=np.concatenate([part.features for part in parts]),
        pixels=np.concatenate([part.pixels for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        image=np.concatenate([part.image for part in parts]),
    )


def _ridge(
    known: _Patches, inputs: npt.NDArray[np.float64], asked: _Patches, test: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """Squared errors on the patches that are asked [M], with the strength that held-out images choose."""
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    scale = np.where(deviation > 1e-8, deviation, 1.0).astype(np.float64)
    inputs, test = (inputs - mean) / scale, (test - mean) / scale
    centre = known.targets.mean(axis=0)
    held = known.image >= (1 - _HELD_OUT) * known.image.max()  # whole images, the last ones
    strength = min(
        STRENGTHS,
        key=lambda own: float(
            np.square(
                inputs[held] @ _solve(inputs[~held], known.targets[~held] - centre, own)
                + centre
                - known.targets[held]
            ).sum()
        ),
    )
    weights = _solve(inputs, known.targets - centre, strength)
    return np.square(test @ weights + centre - asked.targets).sum(axis=1), strength


def _solve(
    inputs: npt.NDArray[np.float64], targets: npt.NDArray[np.float64], strength: float
) -> npt.NDArray[np.float64]:
    """Weights [D, K] of the ridge regression."""
    gram = inputs.T @ inputs + strength * len(inputs) * np.eye(inputs.shape[1])
    return np.asarray(np.linalg.solve(gram, inputs.T @ targets), dtype=np.float64)
