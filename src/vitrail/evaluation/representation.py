"""What features are worth before any head is trained on them: neighbours, spread and rank.

    N images, D channels, K classes

- k-NN (Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section
  3.4; DINO's evaluation): the most similar images vote with exp(cosine / 0.07).
- `feature_std` (Chen and He 2021, SimSiam, section 4.1): standard deviation of each channel of features of
  length one, times the root of D. 1: spread over the sphere; 0: all images alike (collapse).
- `effective_rank` (Roy and Vetterli 2007; as RankMe, Garrido et al. 2023): how many directions are used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20
TEMPERATURE = 0.07
_AT_A_TIME = 1024


@dataclass(frozen=True, kw_only=True)
class RepresentationMetrics:
    """What some labelled images say about features."""

    count: int
    """Images, N."""
    knn_accuracy: float
    """Share of images whose neighbours vote for their class."""
    knn_interval: tuple[float, float]
    """Wilson 95 % interval."""
    neighbours: int
    """How many vote."""
    feature_std: float
    """0 (collapsed) to about 1."""
    effective_rank: float
    """1 to min(N, D)."""
    dimensions: int
    """D."""

    def headline(self) -> str:
        """k-NN accuracy, spread and rank in a line."""
        low, high = self.knn_interval
        accuracy = f"k-NN accuracy {100 * self.knn_accuracy:.2f} %"
        interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
        spread = f"feature spread {self.feature_std:.2f}"
        rank = f"rank {self.effective_rank:.1f} of {self.dimensions}"
        judged = f"{self.count} test images, each judged by the others"
        return f"{accuracy} ({interval}, {judged}); {spread}, {rank}"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, ready for JSON."""
        return asdict(self)


def representation_metrics(
    features: Tensor, labels: npt.ArrayLike | Tensor, *, neighbours: int = NEIGHBOURS
) -> RepresentationMetrics:
    """Measure features of labelled images; for k-NN each image is judged by all the others.

    Args:
        features: [N, D].
        labels: int64 [N].
        neighbours: How many vote; at most N - 1 do.

    Raises:
        ValueError: Fewer than two images, or features that are not finite.
    """
    targets = torch.as_tensor(np.asarray(labels))
    if len(features) < 2:
        raise ValueError(f"expected two images or more, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError("the features are not finite; check images and weights")
    votes = knn_votes(features, targets, features, neighbours=neighbours, leave_out_itself=True)
    right = int((votes.argmax(dim=1) == targets).sum())
    interval = binomtest(right, len(features)).proportion_ci(method="wilson")
    return RepresentationMetrics(
        count=len(features),
        knn_accuracy=right / len(features),
        knn_interval=(float(interval.low), float(interval.high)),
        neighbours=min(neighbours, len(features) - 1),
        feature_std=feature_std(features),
        effective_rank=effective_rank(features),
        dimensions=features.shape[1],
    )


def knn_votes(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    leave_out_itself: bool = False,
) -> Tensor:
    """How much the most similar images of a bank speak for each class.

    Args:
        bank: Features [M, D].
        labels: Their classes, int64 [M].
        queries: Features [N, D] of the images in question.
        neighbours: How many vote, at most M.
        leave_out_itself: The queries are the bank; no image votes for itself.

    Returns:
        [N, K], sums of exp(cosine / 0.07).
    """
    others = len(bank) - int(leave_out_itself)
    own, asked = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
    for first in range(0, len(queries), _AT_A_TIME):
        similarity = asked[first : first + _AT_A_TIME] @ own.T
        if leave_out_itself:
            rows = torch.arange(len(similarity))
            similarity[rows, first + rows] = -torch.inf
        best = similarity.topk(min(neighbours, others), dim=1)
        votes[first : first + _AT_A_TIME].scatter_add_(
            1, labels[best.indices], (best.values / TEMPERATURE).exp()
        )
    return votes


def feature_std(features: Tensor) -> float:
    """Spread of features [N, D] over the sphere: 0 (all alike) to about 1."""
    channels = F.normalize(features.float(), dim=1).std(dim=0)
    return float(channels.mean() * features.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares, of centred features [N, D]: 1 to min(N, D)."""
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())
