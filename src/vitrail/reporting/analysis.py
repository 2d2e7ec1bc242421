"""What a model has learnt, measured on a labelled set: the numbers behind `vitrail analyze`.

    N images, L layers, H heads, K classes

The mathematics is that of `vitrail.explain`; here it is put to one set of images, and what it found is said
in plain sentences. `analysis_page` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.datasets import Images, Preprocessing
from vitrail.explain.embedding import Embedding, embed_features, knn_accuracy
from vitrail.explain.features import (
    LayerVectors,
    PatchMatch,
    feature_colours,
    layer_vectors,
    logit_lens,
    nearest_patches,
)
from vitrail.explain.heads import even_distance, head_importance, head_statistics
from vitrail.explain.positions import Positions, read_positions
from vitrail.explain.similarity import BatchedCKA, layer_similarity, layer_tokens
from vitrail.models.encoder import Encoder

FEWEST_IMAGES = 20
"""With fewer, five neighbours say nothing about ten classes, and the unbiased CKA is mostly chance."""
IMAGES_PER_CLASS = 10
"""Of sets with many classes so many are left out that the others have about so many images each: five
neighbours of the own class must be there to be found."""
NEIGHBOURS = 5
BATCH = 64
HEAD_IMAGES = 256
"""Heads and similarity of layers are measured on so many images at most: they need fewer than accuracies."""
HEAD_PASSES = 6000
"""So often, about, an image passes a model of which one head after the other is switched off."""
FEWEST_HEAD_IMAGES = 32
GALLERY, QUERIES, MATCHES = 200, 5, 6
"""Images among which nearest patches are looked for, patches they are looked for, and how many for each."""
COLOUR_IMAGES, COLOUR_LAYERS = 5, 6
NEEDLESS = 0.005
"""A head that costs less of the mean log-probability is not missed."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with the images it is measured on."""

    title: str
    """What to call the model."""
    model: Encoder
    """On any device; it is put into evaluation mode."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """Names of the classes that the model answers with; may be empty."""
    images: Images
    """Labelled images of the size that the model takes."""


@dataclass(frozen=True, kw_only=True)
class ClassFound:
    """One class among the images."""

    name: str
    count: int
    """Images of the class."""
    recall: float | None
    """Share of them that the model answers rightly; None where it has no answer to this set."""
    closest: str
    """The class whose mean features are nearest to its own."""
    apart: float
    """How far the means of both are from each other, in features."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the images' features hold after one block."""

    name: str
    """The block: `blocks.3`."""
    patches: float
    """k-NN accuracy of the mean of the patches."""
    token: float | None
    """The same of the class token; None where the head reads none or it comes later."""
    lens: float | None
    """Accuracy of the model's own head on this layer; None where it cannot read it or has other classes."""

    @property
    def read(self) -> float:
        """k-NN accuracy of what the head would read here."""
        return self.patches if self.token is None else self.token


@dataclass(frozen=True, kw_only=True)
class Head:
    """One attention head; see `vitrail.explain.heads.LayerHeads` for the first four numbers."""

    layer: int
    """Counted from 0, among the attentions."""
    module: str
    number: int
    """Counted from 0."""
    distance: float
    entropy: float
    position: float
    prefix: float
    lost_accuracy: float | None
    """What accuracy loses when the head is switched off; None where accuracy is not known."""
    lost_log_probability: float | None
    """The same for the mean log-probability of the right class, in nats."""

    @property
    def name(self) -> str:
        """As people count."""
        return f"layer {self.layer + 1}, head {self.number + 1}"


@dataclass(frozen=True, kw_only=True)
class Query:
    """A patch, and the nearest one of each of some other images; images are numbers in the analysis."""

    image: int
    row: int
    column: int
    matches: tuple[PatchMatch, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """Everything that was measured of one model on one set."""

    title: str
    dataset: str
    split: str
    seed: int
    classes: tuple[str, ...]
    """Of the data set."""
    numbers: npt.NDArray[np.int64]
    """Which images of the set were used, [N]."""
    pixels: Tensor
    """As the model sees them, uint8 [N, C, height, width]."""
    labels: npt.NDArray[np.int64]
    """[N]."""
    answers: npt.NDArray[np.int64] | None
    """The model's classes, [N]; None where it has no answer to this set."""
    silent: str
    """Why there are no answers; empty where there are."""
    chance: float
    """Share of the most frequent class."""
    tsne: Embedding
    pca: Embedding
    found_classes: tuple[ClassFound, ...]
    """Those that occur among the images."""
    pixel_knn: float
    """k-NN accuracy of the pixels themselves."""
    layers: tuple[Layer, ...]
    cka: Tensor
    """Between layers, [L, L]."""
    head_images: int
    """Images on which heads were watched, and layers compared."""
    switched_images: int
    """Images on which heads were switched off; 0: none were."""
    heads: tuple[Head, ...]
    even: dict[str, float]
    """Attention module -> distance of even attention, in pixels."""
    positions: Positions | str
    """Or why there are none."""
    nearest_layer: int
    grid: tuple[int, int]
    """Of the patches in that layer."""
    queries: tuple[Query, ...]
    colours: dict[int, Tensor]
    """Layer -> [COLOUR_IMAGES, rows, columns, 3], of the first images."""

    @property
    def accuracy(self) -> float | None:
        """Of the model, on these images."""
        return None if self.answers is None else float((self.answers == self.labels).mean())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON types; what is not a number there (nan) is None."""
        positions = self.positions
        found = {
            "model": self.title,
            "dataset": self.dataset,
            "split": self.split,
            "seed": self.seed,
            "images": self.numbers.tolist(),
            "classes": list(self.classes),
            "labels": self.labels.tolist(),
            "answers": None if self.answers is None else self.answers.tolist(),
            "no_answers": self.silent or None,
            "accuracy": self.accuracy,
            "chance": self.chance,
            "features": {
                "neighbours": NEIGHBOURS,
                "knn_accuracy": self.tsne.knn_accuracy,
                "pixel_knn_accuracy": self.pixel_knn,
                "silhouette": self.tsne.silhouette,
                "nmi": self.tsne.nmi,
                "ari": self.tsne.ari,
                "tsne": self.tsne.points.tolist(),
                "pca": self.pca.points.tolist(),
            },
            "class_means": [asdict(own) for own in self.found_classes],
            "layers": [
                {"name": own.name, "knn_patches": own.patches, "knn_token": own.token, "own_head": own.lens}
                for own in self.layers
            ],
            "cka": self.cka.tolist(),
            "head_images": self.head_images,
            "switched_off_images": self.switched_images,
            "heads": [
                {
                    "layer": own.layer + 1,
                    "module": own.module,
                    "head": own.number + 1,
                    "distance": own.distance,
                    "even_distance": self.even[own.module],
                    "entropy": own.entropy,
                    "position": own.position,
                    "prefix": own.prefix,
                    "lost_accuracy": own.lost_accuracy,
                    "lost_log_probability": own.lost_log_probability,
                }
                for own in self.heads
            ],
            "positions": positions
            if isinstance(positions, str)
            else {
                "kind": positions.kind,
                "grid": list(positions.grid),
                "row_norms": positions.row_norms.tolist(),
                "column_norms": positions.column_norms.tolist(),
                **dict(zip(("similar_beside", "similar_far"), near_and_far(positions), strict=True)),
            },
            "nearest_patches": {
                "layer": self.nearest_layer + 1,
                "queries": [
                    {
                        "image": own.image,
                        "row": own.row,
                        "column": own.column,
                        "matches": [match._asdict() for match in own.matches],
                    }
                    for own in self.queries
                ],
            },
        }
        cleaned: dict[str, Any] = _without_nan(found)
        return cleaned

    def findings(self) -> dict[str, str]:
        """What was found, in a sentence or two for each section of the page."""
        return {
            "features": self._on_features(),
            "depth": self._on_depth(),
            "heads": self._on_heads(),
            "positions": self._on_positions(),
            "nearest": self._on_nearest(),
        }

    def _on_features(self) -> str:
        N = len(self.labels)
        right = (
            f"The model's accuracy is left out: {self.silent}."
            if self.accuracy is None
            else f"The model answers {percent(self.accuracy)} of these {N:,} images rightly."
        )
        silhouette, pair = self.tsne.silhouette, min(self.found_classes, key=lambda own: own.apart)
        shape = (
            "compact clusters with room between them"
            if silhouette > 0.5
            else "clusters that touch"
            if silhouette > 0.2
            else "classes that run into one another"
        )
        return (
            f"{right} {percent(self.tsne.knn_accuracy)} of the images lie among neighbours of their own "
            f"class in the last features, where the pixels themselves give {percent(self.pixel_knn)}. The "
            f"silhouette of {silhouette:.2f} means {shape}; {pair.name} and {pair.closest} lie closest "
            "together."
        )

    def _on_depth(self) -> str:
        known = [self.pixel_knn, *(own.read for own in self.layers)]
        steps = np.diff(known)
        best = int(steps.argmax())
        text = (
            f"Images among neighbours of their own class: {percent(known[0])} by pixels, "
            f"{percent(known[1])} after layer 1, {percent(known[-1])} after the last"
        )
        if len(self.layers) > 1 and steps[best] > 0:
            what = "the first, with the embedding before it," if best == 0 else f"layer {best + 1}"
            text += f"; {what} adds most ({points(steps[best])} points)"
        text += "."
        early = [n for n, own in enumerate(self.layers) if own.lens is not None]
        if len(early) > 1:
            first = self.layers[early[0]].lens
            assert first is not None
            text += f" The model's own head, put on layer {early[0] + 1}, is right for {percent(first)}."
        if len(self.layers) > 1:
            beside = self.cka.diagonal(1)
            where = int(beside.nan_to_num(1.0).argmin())
            text += (
                f" Neighbouring layers differ most between {where + 1} and {where + 2} "
                f"(CKA {float(beside[where]):.2f})."
            )
        return text

    def _on_heads(self) -> str:
        text = ""
        looking = [own for own in self.heads if not math.isnan(own.distance)]
        if looking:
            near = min(looking, key=lambda own: own.distance)
            far = max(looking, key=lambda own: own.distance)
            text = (
                f"The nearest-sighted head ({near.name}) looks {near.distance:.1f} pixels far on average, "
                f"the farthest-sighted ({far.name}) {far.distance:.1f}."
            )
        placed = sum(own.position > 0.5 for own in self.heads)
        text += f" Heads that look mostly by place: {placed} of {len(self.heads)}."
        lost = [(own.lost_log_probability, own) for own in self.heads if own.lost_log_probability is not None]
        if lost:
            worst = max(lost, key=lambda pair: pair[0])[1]
            unmissed = sum(loss < NEEDLESS for loss, _ in lost)
            assert worst.lost_accuracy is not None
            text += (
                f" Most needed is {worst.name}: without it accuracy changes by "
                f"{points(-worst.lost_accuracy)} points. Heads that can be switched off, one at a "
                f"time, with next to no loss: {unmissed} of {len(lost)}."
            )
        return text.strip()

    def _on_positions(self) -> str:
        if isinstance(self.positions, str):
            return self.positions
        beside, far = near_and_far(self.positions)
        if math.isnan(far):
            return "The grid has too few patches to compare their positions."
        kinds = {
            "added": "Positions are added to the patches",
            "rotary": "Queries and keys are rotated by position",
            "bias": "Positions are biases of the attention scores",
        }
        knows = "knows" if beside > far + 0.05 else "hardly knows"
        return (
            f"{kinds[self.positions.kind]}. Places side by side are {_alike(beside)} alike, places at least "
            f"half the grid apart {_alike(far)}: the model {knows} from its positions which patches are near."
        )

    def _on_nearest(self) -> str:
        pairs = [
            (self.labels[own.image], self.labels[one.image]) for own in self.queries for one in own.matches
        ]
        same = sum(bool(first == second) for first, second in pairs)
        return (
            f"{same} of the {len(pairs)} patches found lie in images of the same class; by chance it would "
            f"be about {len(pairs) * self._same_by_chance():.0f}."
        )

    def _same_by_chance(self) -> float:
        shares = np.bincount(self.labels) / len(self.labels)
        return float((shares**2).sum())

    def drawn(self) -> str:
        """How many images of which classes were used."""
        used, there = len(self.found_classes), len(self.classes)
        among = "" if used == there else f", of {used:,} of the {there:,} classes"
        return f"{len(self.labels):,} {self.split} images{among}, drawn with seed {self.seed}"

    def text(self) -> str:
        """For a terminal."""
        rows = [
            f"{self.title} on {self.dataset}: {self.drawn()}",
            *("  " + sentence for sentence in self.findings().values()),
        ]
        return "\n".join(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Two models on the same images."""

    first: Analysis
    second: Analysis
    cka: Tensor
    """Layers of the first by layers of the second."""
    agreement: float | None
    """Share of the images with the same answer; None where one of them gives none."""

    def to_dict(self) -> dict[str, Any]:
        """What is not in the two analyses, as JSON types."""
        found: dict[str, Any] = _without_nan({"cka_across": self.cka.tolist(), "agreement": self.agreement})
        return found

    def table(self) -> list[tuple[str, str, str]]:
        """Name of a number, and its value for either model."""

        def values(own: Analysis) -> dict[str, str]:
            distances = [head.distance for head in own.heads if not math.isnan(head.distance)]
            first, last = own.layers[0], own.layers[-1]
            return {
                "Accuracy": "left out" if own.accuracy is None else percent(own.accuracy),
                "Nearest neighbours": percent(own.tsne.knn_accuracy),
                "Silhouette": f"{own.tsne.silhouette:.2f}",
                "NMI": f"{own.tsne.nmi:.2f}",
                "Adjusted Rand index": f"{own.tsne.ari:.2f}",
                "Neighbours, first layer": percent(first.read),
                "Neighbours, last layer": percent(last.read),
                "Mean attention distance": f"{np.mean(distances):.1f} px" if distances else "",
                "Mean entropy": f"{np.mean([head.entropy for head in own.heads]):.2f}",
                "Heads mostly by place": str(sum(head.position > 0.5 for head in own.heads)),
                "Layers": str(len(own.layers)),
                "Heads": str(len(own.heads)),
            }

        second = values(self.second)
        return [(name, value, second[name]) for name, value in values(self.first).items()]

    def finding(self) -> str:
        """What was found, in two sentences."""
        row, column = divmod(int(self.cka.nan_to_num(-1.0).argmax()), self.cka.shape[1])
        text = (
            f"Most alike are layer {row + 1} of {self.first.title} and layer {column + 1} of "
            f"{self.second.title} (CKA {float(self.cka[row, column]):.2f}); their last layers have "
            f"{float(self.cka[-1, -1]):.2f}."
        )
        if self.agreement is not None:
            text += f" They give the same answer to {percent(self.agreement)} of the images."
        return text


def analyse(subject: Subject, *, images: int, seed: int) -> Analysis:
    """Measure a model on images of a set.

    Args:
        subject: The model and the set.
        images: How many images to use at most; drawn at random.
        seed: Of the draw, and of t-SNE and k-means; the same seed gives the same numbers on one machine.

    Raises:
        ValueError: Fewer than `FEWEST_IMAGES` images asked for or there, a negative seed, one class only, or
            features that tell nothing apart or are not finite.
    """
    model, test = subject.model.eval(), subject.images
    if images < FEWEST_IMAGES:
        raise ValueError(f"images: expected at least {FEWEST_IMAGES}, got {images}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if len(test) < FEWEST_IMAGES:
        raise ValueError(
            f"{test.name} has {len(test)} {test.split} images: an analysis needs at least {FEWEST_IMAGES}"
        )
    numbers = _drawn(test.labels, images, seed)
    pixels, truth = test.batch(numbers)
    labels = truth.numpy()
    N = len(labels)

    vectors = _vectors(subject, pixels)
    final = vectors[-1].read
    tsne = embed_features(final, labels, method="tsne", neighbours=NEIGHBOURS, seed=seed)
    silent = _silent(subject)
    readable, logits = ((), None) if silent else _lens(subject, pixels)
    answers = None if logits is None else logits[-1].argmax(dim=1).numpy()
    lens = {} if logits is None else dict(zip(readable, _accuracies(logits, labels), strict=True))

    some = pixels[:HEAD_IMAGES]
    heads, switched = _heads(subject, some, labels, answering=not silent)
    gallery = _inputs(subject, pixels[:GALLERY])
    layer = _layer_that_counts(model, gallery.shape[2:])
    grid, queries = _queries(model, gallery, labels, layer)
    depth = len(vectors)
    shown = np.unique(np.linspace(0, depth - 1, min(depth, COLOUR_LAYERS)).round().astype(int)).tolist()
    return Analysis(
        title=subject.title,
        dataset=test.name,
        split=test.split,
        seed=seed,
        classes=test.classes,
        numbers=numbers,
        pixels=torch.cat(
            [subject.preprocessing.denormalise(batch).cpu() for batch in _batches(subject, pixels)]
        ),
        labels=labels,
        answers=answers,
        silent=silent,
        chance=float(np.bincount(labels).max() / N),
        tsne=tsne,
        pca=embed_features(final, labels, method="pca", neighbours=NEIGHBOURS, seed=seed),
        found_classes=_classes(final.numpy(), labels, answers, test.classes),
        pixel_knn=knn_accuracy(pixels.flatten(1).float(), labels, NEIGHBOURS),
        layers=tuple(
            Layer(
                name=name,
                patches=knn_accuracy(own.patches, labels, NEIGHBOURS),
                token=None if own.token is None else knn_accuracy(own.token, labels, NEIGHBOURS),
                lens=lens.get(number),
            )
            for number, (name, own) in enumerate(zip(model.block_names(), vectors, strict=True))
        ),
        cka=layer_similarity(model, _batches(subject, some)).values,
        head_images=len(some),
        switched_images=switched,
        heads=heads,
        even=even_distance(model, subject.preprocessing.img_size),
        positions=_positions(subject),
        nearest_layer=layer,
        grid=grid,
        queries=queries,
        colours=feature_colours(model, gallery[:COLOUR_IMAGES], shown),
    )


@torch.no_grad()
def compare(first: Subject, second: Subject, *, images: int, seed: int) -> Comparison:
    """Measure two models on the same images of a set, each prepared as its model wants it.

    Args:
        first: A model and a set.
        second: Another model, and the same set in the size that it takes.
        images: As for `analyse`.
        seed: As for `analyse`.

    Raises:
        ValueError: As `analyse`, or the sets are not the same images.
    """
    if not np.array_equal(first.images.labels, second.images.labels):
        raise ValueError(
            f"{first.title} and {second.title} are compared on the same images, got {len(first.images)} and "
            f"{len(second.images)} that differ"
        )
    one, two = (analyse(subject, images=images, seed=seed) for subject in (first, second))
    counted = BatchedCKA()
    some = one.numbers[:HEAD_IMAGES]
    for own, other in zip(
        _batches(first, first.images.batch(some)[0]),
        _batches(second, second.images.batch(some)[0]),
        strict=True,
    ):
        counted.add(layer_tokens(first.model, own), layer_tokens(second.model, other))
    both = None if one.answers is None or two.answers is None else float((one.answers == two.answers).mean())
    return Comparison(first=one, second=two, cka=counted.result(), agreement=both)


def percent(share: float) -> str:
    """0.1234 -> "12.3 %"."""
    return f"{100 * share:.1f} %"


def _alike(similarity: float) -> str:
    return f"{round(similarity, 2) + 0.0:.2f}"


def points(share: float) -> str:
    """A difference of shares, in percentage points; no -0.0."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _drawn(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of the images to use, in random order; of very many classes only some."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    present = np.unique(labels)
    most = max(2, count // IMAGES_PER_CLASS)
    if len(present) > most:
        order = order[np.isin(labels[order], generator.permutation(present)[:most])]
    return order[:count]


def _inputs(subject: Subject, pixels: Tensor) -> Tensor:
    return subject.preprocessing.prepare(pixels.to(next(subject.model.parameters()).device))


def _batches(subject: Subject, pixels: Tensor) -> Iterator[Tensor]:
    """Normalised, on the model's device."""
    return (_inputs(subject, part) for part in pixels.split(BATCH))


def _silent(subject: Subject) -> str:
    """Why a model has no answer for a set; empty where it has."""
    if not subject.model.has_head:
        return "the model has no head for classes"
    if subject.classes != subject.images.classes:
        known = f"{len(subject.classes)} classes" if subject.classes else "classes, which have no names,"
        return f"the model's {known} are not the {len(subject.images.classes)} of {subject.images.name}"
    return ""


def _vectors(subject: Subject, pixels: Tensor) -> list[LayerVectors]:
    """Of all images, on the CPU, layer by layer."""
    parts = [layer_vectors(subject.model, batch) for batch in _batches(subject, pixels)]
    return [
        LayerVectors(
            patches=torch.cat([one.patches.float().cpu() for one in layer]),
            token=None
            if layer[0].token is None
            else torch.cat([one.token.float().cpu() for one in layer if one.token is not None]),
        )
        for layer in zip(*parts, strict=True)
    ]


def _lens(subject: Subject, pixels: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The layers that the head can read, and its logits [layers, N, K]."""
    parts = [logit_lens(subject.model, batch) for batch in _batches(subject, pixels)]
    return parts[0].layers, torch.cat([own.logits.float().cpu() for own in parts], dim=1)


def _accuracies(logits: Tensor, labels: npt.NDArray[np.int64]) -> list[float]:
    """[layers, N, K] -> one a layer."""
    right = logits.argmax(dim=2) == torch.from_numpy(labels)
    found: list[float] = right.double().mean(dim=1).tolist()
    return found


def _heads(
    subject: Subject, pixels: Tensor, labels: npt.NDArray[np.int64], *, answering: bool
) -> tuple[tuple[Head, ...], int]:
    """All heads, and on how many images they were switched off."""
    model = subject.model
    layers = head_statistics(model, _batches(subject, pixels))
    lost: dict[str, Tensor] = {}
    switched = 0
    if answering:
        passes = 1 + sum(len(own.distance) for own in layers)
        switched = min(len(pixels), max(FEWEST_HEAD_IMAGES, HEAD_PASSES // passes))
        device = next(model.parameters()).device
        truth = torch.from_numpy(labels[:switched]).to(device)
        lost = head_importance(
            model, zip(_batches(subject, pixels[:switched]), truth.split(BATCH), strict=True)
        )
    found = []
    for layer, own in enumerate(layers):
        for number in range(len(own.distance)):
            accuracy, likelihood = lost[own.layer][number].tolist() if answering else (None, None)
            found.append(
                Head(
                    layer=layer,
                    module=own.layer,
                    number=number,
                    distance=float(own.distance[number]),
                    entropy=float(own.entropy[number]),
                    position=float(own.position[number]),
                    prefix=float(own.prefix[number]),
                    lost_accuracy=accuracy,
                    lost_log_probability=likelihood,
                )
            )
    return tuple(found), switched


def _positions(subject: Subject) -> Positions | str:
    grid = subject.model.flow(subject.preprocessing.img_size).start[-1].grid
    try:
        return read_positions(subject.model, grid)
    except ValueError as error:  # a model that is told nothing: the page says so
        return f"{error}."


def _layer_that_counts(model: Encoder, image_shape: torch.Size) -> int:
    """The last layer whose patches the answer depends on.

    A head that reads the class token hears of the patches through the last attention only, from the layer
    before it.
    """
    depth = len(model.block_names())
    reads_token = model.flow((image_shape[0], image_shape[1])).reads[-1].prefix > 0
    return max(depth - 2, 0) if reads_token else depth - 1


@torch.no_grad()
def _queries(
    model: Encoder, gallery: Tensor, labels: npt.NDArray[np.int64], layer: int
) -> tuple[tuple[int, int], tuple[Query, ...]]:
    """The grid of the layer, and the patch of largest contrast in the first image of some classes."""
    seen = model.forward_features(gallery[:1], layers=(layer,)).layers[layer]
    grid = (seen.grid[0], seen.grid[1])
    grey = gallery.mean(dim=1, keepdim=True)
    contrast = F.adaptive_avg_pool2d(grey**2, grid) - F.adaptive_avg_pool2d(grey, grid) ** 2
    _, first = np.unique(labels[: len(gallery)], return_index=True)
    found = []
    for image in np.sort(first)[:QUERIES].tolist():
        row, column = divmod(int(contrast[image].flatten().argmax()), grid[1])
        # Enough patches for the nearest one of each of so many images, wherever they lie.
        enough = min(MATCHES, len(gallery) - 1) * grid[0] * grid[1]
        best: dict[int, PatchMatch] = {}
        for match in nearest_patches(model, gallery, image, row, column, count=enough, layer=layer):
            best.setdefault(match.image, match)
        matches = tuple(best.values())[:MATCHES]
        found.append(Query(image=image, row=row, column=column, matches=matches))
    return grid, tuple(found)


def _classes(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    answers: npt.NDArray[np.int64] | None,
    names: tuple[str, ...],
) -> tuple[ClassFound, ...]:
    present = np.unique(labels)
    means = torch.from_numpy(np.stack([features[labels == one].mean(axis=0) for one in present])).double()
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    found = []
    for number, (distance, closest) in zip(present, zip(*apart.min(dim=1), strict=True), strict=True):
        own = labels == number
        found.append(
            ClassFound(
                name=names[number],
                count=int(own.sum()),
                recall=None if answers is None else float((answers[own] == number).mean()),
                closest=names[present[int(closest)]],
                apart=float(distance),
            )
        )
    return tuple(found)


def near_and_far(positions: Positions) -> tuple[float, float]:
    """Mean similarity of places side by side, and of those at least half the longer side apart.

    nan where the grid has no such pair.
    """
    rows, columns = positions.grid
    row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float().unbind(1)
    apart = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2  # squared, [N, N]
    similarity = positions.similarity.flatten(2).flatten(0, 1).cpu()
    far = apart >= (max(rows, columns) / 2) ** 2
    return float(similarity[apart == 1].mean()), float(similarity[far & (apart > 0)].mean())


def _without_nan(value: Any) -> Any:
    """JSON has no nan: None in its place."""
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
