"""The dense probe: its target against slow loops, its ridge against scikit-learn, both ends of its scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from vitrail.datasets import ImageSet, Preprocessing, Splits, load_dataset
from vitrail.evaluation.dense import ORIENTATIONS, DenseProbe, dense_probe, edge_histograms
from vitrail.models import build_model
from vitrail.models.encoder import Encoder


def _slow(pixels: Tensor, cell: tuple[int, int]) -> tuple[list[list[float]], list[float]]:
    """Histograms of one image [H, W], pixel by pixel."""
    H, W = pixels.shape
    rows, columns = H // cell[0], W // cell[1]
    bins = [[0.0] * ORIENTATIONS for _ in range(rows * columns)]
    strengths = [0.0] * (rows * columns)
    for y in range(H):
        for x in range(W):
            down = float(pixels[min(y + 1, H - 1), x] - pixels[max(y - 1, 0), x]) / 2
            right = float(pixels[y, min(x + 1, W - 1)] - pixels[y, max(x - 1, 0)]) / 2
            strength = math.hypot(down, right)
            place = (math.atan2(down, right) % math.pi) / math.pi * ORIENTATIONS
            below = math.floor(place)
            own = bins[y // cell[0] * columns + x // cell[1]]
            own[below % ORIENTATIONS] += strength * (1 - (place - below))
            own[(below + 1) % ORIENTATIONS] += strength * (place - below)
            strengths[y // cell[0] * columns + x // cell[1]] += strength / (cell[0] * cell[1])
    lengths = [max(math.sqrt(sum(value**2 for value in own)), 1e-12) for own in bins]
    return [[v / length for v in own] for own, length in zip(bins, lengths, strict=True)], strengths


@pytest.mark.parametrize("cell", [(4, 4), (3, 6)])
def test_histograms_equal_slow_loops(cell: tuple[int, int]) -> None:
    pixels = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    histograms, strength = edge_histograms(pixels, cell)
    for image in range(2):
        wanted, strengths = _slow(pixels[image, 0], cell)
        torch.testing.assert_close(histograms[image], torch.tensor(wanted), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(strength[image], torch.tensor(strengths))


def test_edges_have_their_direction() -> None:
    upright, level = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    upright[..., 4:] = 1.0  # brightness changes to the right: angle 0, the first bin
    level[..., 4:, :] = 1.0  # downwards: a quarter turn, the middle bin
    for pixels, place in ((upright, 0), (level, ORIENTATIONS // 2)):
        histogram, _ = edge_histograms(pixels, (8, 8))
        assert histogram[0, 0].argmax() == place
        assert float(histogram[0, 0, place]) == pytest.approx(1.0)
        # From dark to bright or from bright to dark is the same edge.
        torch.testing.assert_close(edge_histograms(1 - pixels, (8, 8))[0], histogram, atol=1e-6, rtol=0)
    assert not edge_histograms(torch.full((1, 1, 8, 8), 0.7), (4, 4))[1].any()


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dataset("digits")


def _preprocessing(splits: Splits, size: int = 8) -> Preprocessing:
    return Preprocessing(img_size=(size, size), in_chans=1, mean=splits.train.mean, std=splits.train.std)


def _found(model: Encoder, splits: Splits, size: int = 8) -> DenseProbe:
    return dense_probe(model, _preprocessing(splits, size), splits, images=400)


def test_features_that_hold_the_answer_are_right_and_noise_is_not(splits: Splits) -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits", num_classes=0, depth=1)

    class Answering(nn.Module):
        """Puts the histogram of each patch, turned, into its features."""

        def __init__(self) -> None:
            super().__init__()
            self.turn = torch.linalg.qr(torch.randn(ORIENTATIONS, ORIENTATIONS))[0]
            self.weight = nn.Parameter(torch.zeros(1))
            self.answers = True

        def forward_features(self, images: Tensor) -> object:
            seen = model.forward_features(images)
            pixels = _preprocessing(splits).denormalise(images).float() / 255
            histograms, _ = edge_histograms(pixels, (2, 2))
            noise = torch.randn(*histograms.shape, generator=torch.Generator().manual_seed(1))
            return type(seen)(
                patches=3.0 * histograms @ self.turn + 1.0 if self.answers else noise,
                prefix=seen.prefix,
                grid=seen.grid,
            )

    answering = Answering()
    known = dense_probe(answering, _preprocessing(splits), splits, images=300)  # type: ignore[arg-type]
    assert known.r2 > 0.999
    assert known.interval[0] > 0.999
    answering.answers = False
    nothing = dense_probe(answering, _preprocessing(splits), splits, images=300)  # type: ignore[arg-type]
    assert abs(nothing.r2) < 0.02
    assert nothing.pixels_r2 == known.pixels_r2


def test_the_score_of_the_pixels_is_that_of_scikit_learns_ridge(splits: Splits) -> None:
    torch.manual_seed(0)
    found = _found(build_model("vit_digits", num_classes=0, depth=1), splits)

    def patches(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        pixels = torch.from_numpy(images.images[:400]).float() / 255
        histograms, strength = edge_histograms(pixels, (2, 2))
        own = torch.nn.functional.unfold(pixels, 2, stride=2).transpose(1, 2)
        return own[strength > 0.01].numpy(), histograms[strength > 0.01].numpy()

    known, targets = patches(splits.train)  # type: ignore[arg-type]
    asked, wanted = patches(splits.test)  # type: ignore[arg-type]
    assert (found.train_patches, found.test_patches) == (len(known), len(asked))
    scale = known.std(axis=0)
    # Weak regularisation: with four numbers a patch its size hardly matters.
    ridge = Ridge(alpha=1e-4 * len(known)).fit(known / scale, targets)
    missed = np.square(ridge.predict(asked / scale) - wanted).sum()
    whole = np.square(wanted - targets.mean(axis=0)).sum()
    assert found.pixels_r2 == pytest.approx(1 - missed / whole, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "options"), [("vit_digits", {}), ("swin_mnist_2blk", {"img_size": 8, "patch_size": 2})]
)
def test_every_kind_of_encoder_and_twice_the_same(name: str, options: dict[str, int], splits: Splits) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, **options)
    found = _found(model, splits)
    assert found == _found(model, splits)
    assert 0.05 < found.interval[0] < found.r2 < found.interval[1] < 0.9
    assert found.pixels_r2 < found.r2


def test_patches_that_reach_beyond_the_image(splits: Splits) -> None:
    torch.manual_seed(0)
    model = build_model("vit_mnist_2blk", img_size=10, num_classes=0, patch_size=4)  # a grid of 3 x 3
    assert 0 < _found(model, splits, size=10).r2 < 1


def test_images_from_which_nothing_can_be_learnt(splits: Splits) -> None:
    model = build_model("vit_digits", num_classes=0, depth=1)
    pixels = np.full((4, 1, 8, 8), 90, dtype=np.uint8)
    grey = ImageSet.from_arrays(pixels, [0, 1, 0, 1], name="grey", mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="grey: no patch of these images has an edge"):
        _found(model, Splits(train=grey, val=None, test=grey))
    nothing = grey.subset(np.arange(0))
    with pytest.raises(ValueError, match="grey has no test images"):
        _found(model, Splits(train=splits.train, val=None, test=nothing))
