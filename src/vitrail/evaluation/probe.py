"""What frozen features are worth: neighbours that vote, and a linear classifier trained on them.

Both leave the encoder as it is, so they compare ways of training it (Chen et al. 2020, SimCLR, section 2;
Caron et al. 2021, DINO, section 4). What differs from the papers: no augmentation, so that every image passes
the encoder once; and the linear classifier is fitted to the end (logistic regression on standardised
features) with a regularisation that held-out images choose, instead of some epochs of SGD.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vitrail.datasets import Images, Preprocessing, Splits
from vitrail.datasets.images import stratified_split
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.representation import NEIGHBOURS, knn_votes
from vitrail.models.encoder import Encoder

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the linear classifier's regularisation that are tried (scikit-learn's C)."""
_HELD_OUT = 0.1
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of right answers."""

    accuracy: float
    interval: tuple[float, float]
    """Wilson 95 % interval."""

    def text(self) -> str:
        """The share and its interval in per cent."""
        low, high = self.interval
        return f"{100 * self.accuracy:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe found on the test images."""

    knn: Share
    linear: Share
    neighbours: int
    strength: float
    """The regularisation that was chosen, one of `STRENGTHS`."""
    train_images: int
    test_images: int
    dimensions: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        return asdict(self)


def probe(
    model: Encoder,
    preprocessing: Preprocessing,
    splits: Splits,
    *,
    neighbours: int = NEIGHBOURS,
    batch_size: int = 500,
    device: torch.device | None = None,
) -> Probe:
    """Judge a frozen encoder by labelled images.

    Args:
        model: Any encoder; its classifier plays no part.
        preprocessing: How images become its input.
        splits: Training images to learn from, validation images (or a tenth of the training images) to choose
            the regularisation by, test images to judge by.
        neighbours: How many vote.
        batch_size: Images at a time.
        device: Where the encoder runs; None: the CPU.

    Raises:
        ValueError: No test images, or training images of one class only.
    """
    train, test = splits.train, splits.test
    if not len(test):
        raise ValueError(f"{test.name} has no test images to judge by")
    if len(np.unique(train.labels)) < 2:
        raise ValueError(f"{train.name}: expected training images of two classes or more to tell apart")
    device = device or torch.device("cpu")
    encoder = without_head(model).to(device)

    def features(images: Images) -> Tensor:
        return predict_logits(encoder, images, preprocessing, batch_size=batch_size, device=device)

    known, asked = features(train), features(test)
    votes = knn_votes(known, torch.from_numpy(train.labels), asked, neighbours=neighbours)
    if splits.val is not None and len(splits.val):
        held, held_labels = features(splits.val).numpy(), splits.val.labels
        kept = np.arange(len(train))
    else:
        kept, out = stratified_split(train.labels, _HELD_OUT, seed=0)
        held, held_labels = known.numpy()[out], train.labels[out]
    strength, answers = _linear(
        known.numpy()[kept], train.labels[kept], held, held_labels, asked.numpy(), len(train.classes)
    )
    return Probe(
        knn=share_of(votes.argmax(dim=1).numpy(), test.labels),
        linear=share_of(answers, test.labels),
        neighbours=min(neighbours, len(train)),
        strength=strength,
        train_images=len(train),
        test_images=len(test),
        dimensions=known.shape[1],
    )


def without_head(model: Encoder) -> Encoder:
    """A copy of an encoder that gives what its head would receive, [B, D]; in evaluation mode."""
    encoder = copy.deepcopy(model)
    encoder.reset_classifier(0)
    return encoder.eval()


def share_of(answers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Share:
    """The share of right answers [N], with its interval."""
    right = int((answers == labels).sum())
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return Share(accuracy=right / len(labels), interval=(float(interval.low), float(interval.high)))


def _linear(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    held: npt.NDArray[np.float32],
    held_labels: npt.NDArray[np.int64],
    asked: npt.NDArray[np.float32],
    num_classes: int,
) -> tuple[float, npt.NDArray[np.int64]]:
    """The best strength, and the answers of the classifier that has it."""
    scaler = StandardScaler().fit(features)
    known, out, test = (scaler.transform(own) for own in (features, held, asked))
    best: tuple[float, float, npt.NDArray[np.int64]] | None = None
    for strength in STRENGTHS:
        classifier = LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=1e-3).fit(known, labels)
        score = float((classifier.predict(out) == held_labels).mean()) if len(out) else 0.0
        if best is None or score > best[0]:
            best = score, strength, np.asarray(classifier.predict(test), dtype=np.int64)
    assert best is not None
    return best[1], best[2]
