"""What a classifier is worth: accuracy with intervals, per-class scores, confusion and calibration.

Everything is computed from class probabilities and true labels, so a stored evaluation can be measured again
without the model. scikit-learn and scipy do the counting; torchmetrics gives the same numbers (tests compare)
but takes three times as long to import.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from vitrail.files import write_whole

Interval = tuple[float, float]

CALIBRATION_BINS = 15
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """How one class fares; precision, recall and f1 are 0 where they divide by zero images."""

    name: str
    count: int
    """Images of this class."""
    precision: float
    """Share of the images called this class that are of it."""
    recall: float
    """Share of the images of this class that are called so."""
    f1: float
    """Harmonic mean of precision and recall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """The images whose confidence (largest probability) lies in [low, high); the last bin includes 1."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean confidence, 0 for an empty bin."""
    accuracy: float
    """Share of right answers, 0 for an empty bin."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassificationMetrics:
    """The measurements of one classifier on one set of images; shares lie in 0 to 1."""

    count: int
    """Images, N."""
    accuracy: float
    accuracy_interval: Interval
    """Wilson 95 % interval (Wilson 1927, "Probable inference")."""
    top5: float | None
    """Share of images whose true class is among the five most probable; None below six classes."""
    top5_interval: Interval | None
    loss: float
    """Mean negative logarithm of the true class's probability, in nats."""
    macro_f1: float
    """Mean f1 over the classes that occur among the labels or the answers."""
    calibration_error: float
    """Expected calibration error with 15 equal bins (Guo et al. 2017, arXiv:1706.04599)."""
    per_class: tuple[ClassScore, ...]
    confusion: npt.NDArray[np.int64]
    """Counts [K, K]: the row is the truth, the column the answer; row k sums to the images of class k."""
    calibration: tuple[CalibrationBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, lists and dictionaries, ready for JSON."""
        return asdict(self) | {"confusion": self.confusion.tolist()}

    def headline(self) -> str:
        """The accuracy in a line."""
        low, high = self.accuracy_interval
        return (
            f"test accuracy {100 * self.accuracy:.2f} % "
            f"(95 % interval {100 * low:.2f} to {100 * high:.2f}, {self.count} images)"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassificationMetrics:
        """Inverse of `to_dict`."""
        top5_interval = values["top5_interval"]
        changed = {
            "accuracy_interval": tuple(values["accuracy_interval"]),
            "top5_interval": None if top5_interval is None else tuple(top5_interval),
            "per_class": tuple(ClassScore(**score) for score in values["per_class"]),
            "confusion": np.array(values["confusion"], dtype=np.int64),
            "calibration": tuple(CalibrationBin(**one) for one in values["calibration"]),
        }
        return cls(**(values | changed))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """A stored evaluation: the measurements and what they were computed from."""

    metrics: ClassificationMetrics
    probabilities: npt.NDArray[np.floating]
    """[N, K], in the order of the evaluated images."""
    labels: npt.NDArray[np.int64]
    """[N], true classes."""


def classification_metrics(
    probabilities: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor, classes: Sequence[str]
) -> ClassificationMetrics:
    """Measure a classifier's answers.

    The answer is the most probable class (the first one where several are equal). For the loss, a
    probability below the smallest normal float32 counts as that number, so the loss stays finite.

    Args:
        probabilities: [N, K], rows that sum to one (softmax of the logits).
        labels: [N], integers in 0 to K-1.
        classes: The K class names.

    Raises:
        ValueError: The shapes disagree, there is no image, a label is out of range, or a row is no
            probability distribution.
    """
    table, truth = _checked(probabilities, labels, classes)
    N, K = table.shape
    ranked = np.argsort(-table, axis=1, kind="stable")[:, :5]
    answers = ranked[:, 0]
    right = answers == truth
    true_probability = table[np.arange(N), truth]

    confusion = confusion_matrix(truth, answers, labels=np.arange(K))
    precision, recall, f1, count = precision_recall_fscore_support(
        truth, answers, labels=np.arange(K), zero_division=0.0
    )
    occurs = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    calibration = _calibration(table.max(axis=1), right)
    in_top5 = int((ranked == truth[:, None]).any(axis=1).sum())
    return ClassificationMetrics(
        count=N,
        accuracy=float(right.mean()),
        accuracy_interval=_wilson(int(right.sum()), N),
        top5=in_top5 / N if K > 5 else None,
        top5_interval=_wilson(in_top5, N) if K > 5 else None,
        loss=float(-np.log(np.maximum(true_probability, SMALLEST_PROBABILITY)).mean()),
        macro_f1=float(f1[occurs].mean()),
        calibration_error=sum(one.count / N * abs(one.accuracy - one.confidence) for one in calibration),
        per_class=tuple(
            ClassScore(
                name=str(classes[k]),
                count=int(count[k]),
                precision=float(precision[k]),
                recall=float(recall[k]),
                f1=float(f1[k]),
            )
            for k in range(K)
        ),
        confusion=confusion.astype(np.int64),
        calibration=calibration,
    )


def write_evaluation(
    folder: Path,
    name: str,
    metrics: ClassificationMetrics,
    probabilities: npt.ArrayLike | Tensor,
    labels: npt.ArrayLike | Tensor,
) -> Path:
    """Write `<name>.json` (metrics), `<name>.npz` (what they come from) and `<name>-confusion.csv`.

    Each file is written beside its place and renamed, so none is ever half there; the JSON file comes last.

    Args:
        folder: Made when it does not exist.
        name: Such as "mnist-test".
        metrics: What `classification_metrics` gave for the two arrays.
        probabilities: [N, K].
        labels: [N].

    Returns:
        The path of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = io.BytesIO()
    np.savez_compressed(arrays, probabilities=_array(probabilities), labels=_array(labels))
    write_whole(folder / f"{name}.npz", arrays.getvalue())

    names = [score.name for score in metrics.per_class]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["truth \\ answer", *names])
    writer.writerows([own, *row] for own, row in zip(names, metrics.confusion.tolist(), strict=True))
    write_whole(folder / f"{name}-confusion.csv", text.getvalue())

    # One key a line: readable, and a confusion matrix of 1000 classes does not become a million lines.
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in metrics.to_dict().items())
    path = folder / f"{name}.json"
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n"))
    return path


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        FileNotFoundError: There is no such evaluation.
    """
    metrics = ClassificationMetrics.from_dict(json.loads((folder / f"{name}.json").read_text()))
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return Evaluation(metrics=metrics, probabilities=arrays["probabilities"], labels=arrays["labels"])


def _array(values: npt.ArrayLike | Tensor) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    return np.asarray(values)


def _checked(
    probabilities: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor, classes: Sequence[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    table, truth = _array(probabilities), _array(labels)
    if table.ndim != 2 or truth.shape != table.shape[:1]:
        raise ValueError(
            f"expected probabilities [N, K] and labels [N], got {list(table.shape)} and {list(truth.shape)}"
        )
    N, K = table.shape
    if N == 0:
        raise ValueError("there are no images to measure: probabilities are empty")
    if len(classes) != K:
        raise ValueError(f"expected one name for each of the {K} classes, got {len(classes)} names")
    if not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"expected integer labels, got {truth.dtype}")
    if truth.min() < 0 or truth.max() >= K:
        raise ValueError(f"expected labels in 0 to {K - 1}, got {truth.min()} to {truth.max()}")
    table = table.astype(np.float64)
    if not np.isfinite(table).all():
        bad = int(np.argmin(np.isfinite(table).all(axis=1)))
        raise ValueError(
            f"probabilities of image {bad} are not finite; the model's weights may have diverged"
        )
    # Half-precision softmax sums to one within a percent.
    wrong = (table < 0).any(axis=1) | (np.abs(table.sum(axis=1) - 1) > 0.02)
    if wrong.any():
        raise ValueError(
            f"probabilities of image {int(wrong.argmax())} do not sum to one or are negative; "
            "apply softmax to the logits"
        )
    return table, truth.astype(np.int64)


def _wilson(right: int, count: int) -> Interval:
    interval = binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _calibration(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]
) -> tuple[CalibrationBin, ...]:
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    # The inner edges only: a confidence of one then falls into the last bin.
    place = np.digitize(confidence, edges[1:-1])
    bins = []
    for number in range(CALIBRATION_BINS):
        inside = place == number
        count = int(inside.sum())
        bins.append(
            CalibrationBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                count=count,
                confidence=float(confidence[inside].mean()) if count else 0.0,
                accuracy=float(right[inside].mean()) if count else 0.0,
            )
        )
    return tuple(bins)
