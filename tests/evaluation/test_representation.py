"""Features without a classifier: neighbours by a slow loop, spread and rank by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from vitrail.evaluation.representation import (
    effective_rank,
    feature_std,
    knn_votes,
    representation_metrics,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_votes_by_a_slow_loop() -> None:
    bank, queries, labels = numbers(50, 6), numbers(7, 6, seed=1), torch.arange(50) % 4
    found = knn_votes(bank, labels, queries, neighbours=5)
    search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(bank)
    distances, places = search.kneighbors(queries)
    for row in range(7):
        expected = [0.0] * 4
        for distance, place in zip(distances[row], places[row], strict=True):
            expected[int(labels[place])] += math.exp((1 - distance) / 0.07)
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_nobody_votes_for_itself() -> None:
    # Two of each, far from all others, of different classes: itself is never the answer.
    points = torch.eye(4).repeat_interleave(2, dim=0) + 0.02 * numbers(8, 4)
    labels = torch.tensor([0, 1] * 4)
    found = representation_metrics(points, labels, neighbours=1)
    assert found.knn_accuracy == 0.0
    assert knn_votes(points, labels, points, neighbours=1).argmax(1).tolist() == labels.tolist()


def test_more_images_than_are_compared_at_a_time() -> None:
    points, labels = numbers(2500, 3).double(), torch.arange(2500) % 3
    every = knn_votes(points, labels, points, neighbours=3, leave_out_itself=True)
    some = knn_votes(points, labels, points[2400:], neighbours=4)
    near = torch.nn.functional.normalize(points, dim=1)[2400:].square().sum(1)  # cosine with itself
    some[torch.arange(100), labels[2400:]] -= (near / 0.07).exp()
    torch.testing.assert_close(every[2400:], some, rtol=1e-3, atol=1.0)


def test_spread() -> None:
    assert feature_std(numbers(4000, 64)) == pytest.approx(1.0, abs=0.02)
    assert feature_std(numbers(1, 64).expand(100, -1)) == pytest.approx(0.0, abs=1e-6)


def test_rank() -> None:
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5.0)
    assert effective_rank(numbers(100, 1) * numbers(1, 8)) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.zeros(10, 3)) == 1.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="two images or more, got 1"):
        representation_metrics(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="not finite"):
        representation_metrics(torch.full((3, 2), math.nan), torch.zeros(3, dtype=torch.long))
