"""Scores of clusters against their definitions, and maps that keep what they promise."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

from vitrail.explain.embedding import Embedding, embed_features, knn_accuracy

Array = npt.NDArray[Any]


def blobs(classes: int, each: int = 20, distance: float = 20.0, channels: int = 6) -> tuple[Array, Array]:
    """Clusters of unit width around corners that lie `distance` apart."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    centres = distance * np.eye(classes, channels)
    return centres[labels] + generator.normal(size=(len(labels), channels)), labels


def digits(count: int = 300) -> tuple[Array, Array]:
    pixels, labels = load_digits(return_X_y=True)
    return pixels[:count], labels[:count]


def distances(features: Array) -> Array:
    return np.sqrt(((features[:, None] - features[None]) ** 2).sum(axis=2))


def silhouette_by_hand(features: Array, labels: Array) -> float:
    """Rousseeuw 1987: (b - a) / max(a, b), a within the own class, b to the nearest other one."""
    apart = distances(features)
    values = []
    for i, label in enumerate(labels):
        own = labels == label
        own[i] = False
        a = apart[i, own].mean()
        b = min(apart[i, labels == other].mean() for other in set(labels) - {label})
        values.append((b - a) / max(a, b))
    return float(np.mean(values))


def knn_by_hand(features: Array, labels: Array, neighbours: int) -> float:
    right = 0
    for i, row in enumerate(distances(features)):
        near = [j for j in np.argsort(row, kind="stable") if j != i][:neighbours]
        counts = np.bincount(labels[near])
        right += counts.argmax() == labels[i]
    return right / len(labels)


@pytest.mark.parametrize("neighbours", [1, 5, 8])
def test_scores_are_their_definitions(neighbours: int) -> None:
    features, labels = digits(150)
    found = embed_features(features, labels, neighbours=neighbours)
    assert found.silhouette == pytest.approx(silhouette_by_hand(features, labels))
    assert found.knn_accuracy == knn_by_hand(features, labels, neighbours)
    assert found.neighbours == neighbours
    assert 0.5 < found.knn_accuracy < 1
    assert 0.5 < found.nmi < 1
    assert 0.3 < found.ari < found.nmi


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_classes_that_are_apart(classes: int, method: Any) -> None:
    features, labels = blobs(classes)
    found = embed_features(features, labels + 7, method=method)  # labels need not start at 0
    assert found.method == method
    assert (found.points.shape, found.points.dtype) == ((len(labels), 2), np.float32)
    np.testing.assert_array_equal(found.labels, labels + 7)
    assert found.knn_accuracy == found.nmi == found.ari == 1
    assert found.silhouette > 0.7
    if classes < 4:  # a plane has room for three clusters
        assert knn_by_hand(found.points, labels, 5) == 1


def test_classes_that_are_not_there() -> None:
    features = np.random.default_rng(1).normal(size=(200, 10))
    labels = np.arange(200) % 2
    found = embed_features(features, labels)
    assert abs(found.silhouette) < 0.02
    assert abs(found.ari) < 0.05
    assert found.nmi < 0.05
    assert 0.35 < found.knn_accuracy < 0.65


def test_pca_points_are_the_main_directions() -> None:
    features, labels = digits()
    points = embed_features(features, labels).points
    centred = features - features.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    for axis in range(2):
        expected = centred @ directions[axis]
        sign = np.sign(expected @ points[:, axis])
        np.testing.assert_allclose(points[:, axis], sign * expected, atol=1e-3)


def test_tsne_keeps_neighbours_that_pca_does_not() -> None:
    features, labels = digits()
    by_tsne, by_pca = (
        knn_by_hand(embed_features(features, labels, method=method).points, labels, 5)
        for method in ("tsne", "pca")
    )
    assert by_tsne > 0.9 > 0.75 > by_pca


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_seed_gives_the_same_result(method: Any) -> None:
    features, labels = digits(100)
    first, second = (embed_features(features, labels, method=method, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.points, second.points)
    assert (first.nmi, first.ari) == (second.nmi, second.ari)


def test_tensors_of_any_precision_are_taken() -> None:
    features, labels = blobs(2)
    expected = embed_features(features, labels)
    found = embed_features(
        torch.from_numpy(features).bfloat16().requires_grad_(), torch.from_numpy(labels).int()
    )
    assert isinstance(found, Embedding)
    assert found.silhouette == pytest.approx(expected.silhouette, abs=0.01)
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_smallest_set(method: Any) -> None:
    features, labels = np.array([[0.0, 1.0], [0.0, 2.0], [9.0, 9.0]]), np.array([0, 0, 1])
    found = embed_features(features, labels, method=method, neighbours=1)
    assert found.points.shape == (3, 2)
    assert found.ari == 1
    assert found.knn_accuracy == pytest.approx(2 / 3)  # a single image of a class has no neighbour of it


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (
            np.ones((4, 3, 2)),
            [0, 1, 0, 1],
            {},
            r"expected \[N, D\] with at least 2 channels, got \[4, 3, 2\]",
        ),
        (np.ones((4, 1)), [0, 1, 0, 1], {}, r"at least 2 channels, got \[4, 1\]"),
        (np.eye(4), [0, 1, 0], {}, r"labels: expected 4 integers, one for each image, got int64 \[3\]"),
        (np.eye(4), [0.0, 1.0, 0.0, 1.0], {}, r"expected 4 integers, .*, got float64 \[4\]"),
        (np.eye(4) * np.nan, [0, 1, 0, 1], {}, "the features are not finite"),
        (np.eye(4), [1, 1, 1, 1], {}, "images of at least two classes, got 4 of 1"),
        (np.ones((0, 4)), np.zeros(0, int), {}, "images of at least two classes, got 0 of 0"),
        (np.eye(4), [0, 1, 2, 3], {}, "each of 4 images has a class of its own"),
        (np.eye(4), [0, 1, 0, 1], {}, "neighbours: expected 1 to 3 for 4 images, got 5"),
        (np.eye(4), [0, 1, 0, 1], {"neighbours": 0}, "neighbours: expected 1 to 3 for 4 images, got 0"),
        (np.ones((6, 4)), [0, 1] * 3, {}, "6 images of 2 classes have only 1 different features"),
        (np.eye(4), [0, 1, 0, 1], {"method": "mds"}, "expected 'pca', 'tsne' or 'umap', got 'mds'"),
    ],
)
def test_bad_input_gets_one_line(features: Array, labels: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        embed_features(features, labels, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap-learn is installed")
def test_umap_says_what_it_needs() -> None:
    features, labels = blobs(2)
    with pytest.raises(ValueError, match="'umap' needs the package umap-learn: install it, or take 'tsne'"):
        embed_features(features, labels, method="umap")


@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_keeps_classes_apart() -> None:
    features, labels = blobs(3)
    first, second = (embed_features(features, labels, method="umap", seed=1).points for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert knn_by_hand(first, labels, 5) == 1


@pytest.mark.parametrize("neighbours", [1, 5])
def test_neighbours_alone(neighbours: int) -> None:
    features, labels = digits(150)
    found = knn_accuracy(torch.from_numpy(features), torch.from_numpy(labels), neighbours)
    assert found == knn_by_hand(features, labels, neighbours)
    assert found == embed_features(features, labels, neighbours=neighbours).knn_accuracy
    with pytest.raises(ValueError, match="neighbours: expected 1 to 149 for 150 images, got 150"):
        knn_accuracy(features, labels, 150)
