"""Whether classes form clusters in a model's features: a map in the plane, and the numbers that go with it.

    N images, D channels, K classes

Maps: PCA; t-SNE (van der Maaten and Hinton 2008); UMAP (McInnes et al. 2018). The scores are those of the
features themselves, not of the map: a map always distorts, and t-SNE shows clusters where there are none.
scikit-learn does the work.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

Method = Literal["pca", "tsne", "umap"]

TSNE_CHANNELS = 50
"""t-SNE gets this many principal components at most: less noise, and many times faster (its paper: 30)."""

THREADS_FROM = 2000
"""Sets with fewer images are worked on by one thread. Several wait for each other: on two cores that other
processes used too, t-SNE of 100 images took 1 s with one thread and 17 s with two, of 1,797 31 s and 64 s."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Features of a labelled set as points in the plane, and how well its classes are kept apart."""

    method: Method
    points: npt.NDArray[np.float32]
    """[N, 2]."""
    labels: npt.NDArray[np.int64]
    """[N]."""
    silhouette: float
    """Mean over the images, -1 to 1: nearer to the own class than to the next one (Rousseeuw 1987)."""
    neighbours: int
    """How many neighbours vote."""
    knn_accuracy: float
    """Share of images whose nearest neighbours, the image itself left out, vote for its class."""
    nmi: float
    """Normalised mutual information of labels and k-means clusters, as many as classes, 0 to 1."""
    ari: float
    """Adjusted Rand index of the same, 1 where equal, about 0 by chance (Hubert and Arabie 1985)."""


def embed_features(
    features: npt.ArrayLike | Tensor,
    labels: npt.ArrayLike | Tensor,
    *,
    method: Method = "pca",
    neighbours: int = 5,
    seed: int = 0,
) -> Embedding:
    """Map features into the plane and measure how well the classes are kept apart in them.

    All distances are Euclidean; give features of length one for those of the cosine. Ties in the vote go to
    the smaller label.

    Args:
        features: [N, D], such as `vitrail.evaluation.features.backbone_features` gives.
        labels: [N] integers; any number of classes from two on.
        method: "pca", "tsne" or "umap" (needs the package umap-learn).
        neighbours: How many neighbours vote in `knn_accuracy`; odd numbers avoid ties between two classes.
        seed: Of t-SNE, UMAP and k-means; the same seed gives the same result on one machine.

    Raises:
        ValueError: Features or labels that are of another form or not finite, fewer than two classes, a class
            of its own for each image, too few images for the neighbours, fewer different features than
            classes, or UMAP without its package.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected 'pca', 'tsne' or 'umap', got {method!r}")
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ValueError("method 'umap' needs the package umap-learn: install it, or take 'tsne' or 'pca'")
    values, classes = _checked(features, labels, neighbours)
    count = len(np.unique(classes))
    with threadpool_limits(1 if len(values) < THREADS_FROM else None, user_api="openmp"):
        points = _plane(values, method, seed)
        clusters = KMeans(count, n_init=10, random_state=seed).fit_predict(values)
        return Embedding(
            method=method,
            points=points.astype(np.float32),
            labels=classes,
            silhouette=float(silhouette_score(values, classes)),
            neighbours=neighbours,
            knn_accuracy=_knn_accuracy(values, classes, neighbours),
            nmi=float(normalized_mutual_info_score(classes, clusters)),
            ari=float(adjusted_rand_score(classes, clusters)),
        )


def knn_accuracy(
    features: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor, neighbours: int = 5
) -> float:
    """`Embedding.knn_accuracy` alone, without a map; arguments and errors are those of `embed_features`."""
    values, classes = _checked(features, labels, neighbours)
    with threadpool_limits(1 if len(values) < THREADS_FROM else None, user_api="openmp"):
        return _knn_accuracy(values, classes, neighbours)


def _checked(
    features: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor, neighbours: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Features as float64 [N, D] and labels as int64 [N], fit for all that follows."""
    if isinstance(features, Tensor):
        features = features.detach().float().cpu().numpy()
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or features.shape[1] < 2:
        raise ValueError(f"features: expected [N, D] with at least 2 channels, got {list(features.shape)}")
    N = len(features)
    values = features.astype(np.float64)
    if labels.shape != (N,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected {N} integers, one for each image, got {labels.dtype} {list(labels.shape)}"
        )
    classes = labels.astype(np.int64)
    if not np.isfinite(values).all():
        raise ValueError("the features are not finite; check images and weights")
    count = len(np.unique(classes))
    if count < 2:
        raise ValueError(f"expected images of at least two classes, got {N} of {count}")
    if count == N:
        raise ValueError(f"each of {N} images has a class of its own: there is nothing to group")
    if not 1 <= neighbours < N:
        raise ValueError(f"neighbours: expected 1 to {N - 1} for {N} images, got {neighbours}")
    different = len(np.unique(values, axis=0))
    if different < count:
        raise ValueError(f"{N} images of {count} classes have only {different} different features")
    return values, classes


def _plane(values: npt.NDArray[np.float64], method: Method, seed: int) -> npt.NDArray[np.floating]:
    """[N, D] -> [N, 2]."""
    N, D = values.shape
    if method == "umap":
        reducer = importlib.import_module("umap").UMAP(
            n_components=2, n_neighbors=min(15, N - 1), random_state=seed, n_jobs=1
        )
        return np.asarray(reducer.fit_transform(values))
    if method == "pca":
        return np.asarray(PCA(2, random_state=seed).fit_transform(values))
    if D > TSNE_CHANNELS and N > TSNE_CHANNELS:
        values = PCA(TSNE_CHANNELS, random_state=seed).fit_transform(values)
    # The perplexity must be below N; the paper's advice for large sets is 5 to 50.
    return np.asarray(TSNE(2, perplexity=min(30.0, (N - 1) / 3), random_state=seed).fit_transform(values))


def _knn_accuracy(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], neighbours: int) -> float:
    """Leave one out: without an argument `kneighbors` takes no image for its own neighbour."""
    near = NearestNeighbors(n_neighbors=neighbours).fit(values).kneighbors(return_distance=False)  # [N, k]
    classes = np.unique(labels)
    votes = np.stack([(labels[near] == one).sum(axis=1) for one in classes])  # [K, N]
    return float((classes[votes.argmax(axis=0)] == labels).mean())
