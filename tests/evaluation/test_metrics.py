"""Metrics against torchmetrics, scikit-learn and examples worked by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as oracle

from vitrail.evaluation.metrics import (
    ClassificationMetrics,
    classification_metrics,
    read_evaluation,
    write_evaluation,
)


def random_answers(N: int, K: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (N,), generator=generator)
    logits = torch.randn(N, K, generator=generator, dtype=torch.float64)
    logits[torch.arange(N), labels] += 1.5
    return logits.softmax(1), labels


def names(K: int) -> list[str]:
    return [f"class {k}" for k in range(K)]


@pytest.mark.parametrize("K", [2, 5, 7, 30])
def test_agrees_with_torchmetrics(K: int) -> None:
    probabilities, labels = random_answers(400, K)
    found = classification_metrics(probabilities, labels, names(K))
    assert found.accuracy == pytest.approx(
        oracle.multiclass_accuracy(probabilities, labels, K, average="micro").item()
    )
    if K > 5:
        assert found.top5 == pytest.approx(
            oracle.multiclass_accuracy(probabilities, labels, K, average="micro", top_k=5).item()
        )
    else:
        assert found.top5 is None
        assert found.top5_interval is None
    for measure, field in (
        (oracle.multiclass_precision, "precision"),
        (oracle.multiclass_recall, "recall"),
        (oracle.multiclass_f1_score, "f1"),
    ):
        expected = measure(probabilities, labels, K, average="none").numpy()
        np.testing.assert_allclose([getattr(score, field) for score in found.per_class], expected, rtol=1e-6)
    assert found.macro_f1 == pytest.approx(oracle.multiclass_f1_score(probabilities, labels, K).item())
    np.testing.assert_array_equal(
        found.confusion, oracle.multiclass_confusion_matrix(probabilities, labels, K)
    )
    assert found.calibration_error == pytest.approx(
        oracle.multiclass_calibration_error(probabilities, labels, K, n_bins=15, norm="l1").item(),
        abs=1e-6,  # torchmetrics rounds the confidences to float32
    )


@pytest.mark.parametrize("K", [2, 7, 30])
def test_agrees_with_scikit_learn(K: int) -> None:
    probabilities, labels = random_answers(300, K, seed=1)
    table, truth = probabilities.numpy(), labels.numpy()
    answers = table.argmax(1)
    found = classification_metrics(table, truth, names(K))
    everything = range(K)
    assert found.accuracy == pytest.approx(sklearn.metrics.accuracy_score(truth, answers))
    assert found.loss == pytest.approx(sklearn.metrics.log_loss(truth, table, labels=everything))
    assert found.macro_f1 == pytest.approx(sklearn.metrics.f1_score(truth, answers, average="macro"))
    np.testing.assert_array_equal(
        found.confusion, sklearn.metrics.confusion_matrix(truth, answers, labels=everything)
    )
    if K > 5:
        assert found.top5 == pytest.approx(
            sklearn.metrics.top_k_accuracy_score(truth, table, k=5, labels=everything)
        )


def test_example_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
    found = classification_metrics(probabilities, np.array([0, 1, 1, 0]), ["a", "b", "c"])
    assert found.count == 4
    assert found.accuracy == 0.75
    assert found.confusion.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.7) + math.log(0.5)) / 4)
    a, b, c = found.per_class
    assert (a.count, a.precision, a.recall) == (2, pytest.approx(2 / 3), 1.0)
    assert (b.count, b.precision, b.recall, b.f1) == (2, 1.0, 0.5, pytest.approx(2 / 3))
    assert (c.count, c.precision, c.recall, c.f1) == (0, 0.0, 0.0, 0.0)
    # Class c occurs neither among the labels nor among the answers.
    assert found.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    # Each confidence has a bin of its own: 0.9 right, 0.6 wrong, 0.7 right, 0.5 right.
    assert found.calibration_error == pytest.approx((0.1 + 0.6 + 0.3 + 0.5) / 4)
    assert sum(one.count for one in found.calibration) == 4


def test_wilson_interval_by_hand() -> None:
    # Wilson's formula with z = 1.959964, 3 of 4.
    z, p, n = 1.959963984540054, 0.75, 4
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = classification_metrics(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 0]), ["a", "b"])
    assert found.accuracy_interval == pytest.approx((centre - half, centre + half))


def test_perfect_and_certain_answers() -> None:
    found = classification_metrics(np.eye(3), np.arange(3), ["a", "b", "c"])
    assert found.accuracy == 1.0
    assert found.accuracy_interval[1] == 1.0
    assert found.calibration_error == 0.0
    assert found.calibration[-1].count == 3
    wrong = classification_metrics(np.eye(3), np.array([1, 2, 0]), ["a", "b", "c"])
    assert wrong.accuracy == 0.0
    assert math.isfinite(wrong.loss)


def test_equal_probabilities_are_no_free_hit() -> None:
    found = classification_metrics(np.full((10, 10), 0.1), np.arange(10), names(10))
    assert found.accuracy == 0.1
    assert found.top5 == 0.5


def test_half_precision_tensors() -> None:
    probabilities, labels = random_answers(50, 8)
    found = classification_metrics(probabilities.to(torch.bfloat16), labels, names(8))
    assert found.accuracy == pytest.approx(
        classification_metrics(probabilities, labels, names(8)).accuracy, abs=0.05
    )


@pytest.mark.parametrize(
    ("probabilities", "labels", "classes", "message"),
    [
        (np.full((4, 2), 0.5), np.zeros(3, int), ["a", "b"], r"got \[4, 2\] and \[3\]"),
        (np.full(4, 0.5), np.zeros(4, int), ["a", "b"], r"expected probabilities \[N, K\]"),
        (np.zeros((0, 2)), np.zeros(0, int), ["a", "b"], "no images"),
        (np.full((1, 2), 0.5), np.zeros(1, int), ["a"], "got 1 names"),
        (np.full((1, 2), 0.5), np.zeros(1), ["a", "b"], "expected integer labels"),
        (np.full((1, 2), 0.5), np.array([2]), ["a", "b"], "labels in 0 to 1, got 2 to 2"),
        (np.full((1, 2), 0.5), np.array([-1]), ["a", "b"], "labels in 0 to 1, got -1 to -1"),
        (np.array([[0.5, 0.5], [np.nan, 1]]), np.zeros(2, int), ["a", "b"], "image 1 are not finite"),
        (np.array([[0.5, 0.5], [3.0, 1.0]]), np.zeros(2, int), ["a", "b"], "image 1 do not sum to one"),
        (np.array([[-0.5, 1.5]]), np.zeros(1, int), ["a", "b"], "negative"),
    ],
)
def test_bad_input_is_one_line(
    probabilities: np.ndarray, labels: np.ndarray, classes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        classification_metrics(probabilities, labels, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("K", [3, 8])
def test_dictionary_round_trip(K: int) -> None:
    found = classification_metrics(*random_answers(40, K), names(K))
    text = json.dumps(found.to_dict(), allow_nan=False)
    again = ClassificationMetrics.from_dict(json.loads(text))
    np.testing.assert_array_equal(again.confusion, found.confusion)
    assert again.to_dict() == found.to_dict()
    assert again.per_class == found.per_class
    assert again.accuracy_interval == found.accuracy_interval


def test_files_round_trip(tmp_path: Path) -> None:
    probabilities, labels = random_answers(40, 3)
    found = classification_metrics(probabilities, labels, ["a,b", 'say "c"', "d"])
    folder = tmp_path / "evaluation"
    path = write_evaluation(folder, "digits-test", found, probabilities, labels)
    assert path == folder / "digits-test.json"
    assert sorted(file.name for file in folder.iterdir()) == [
        "digits-test-confusion.csv",
        "digits-test.json",
        "digits-test.npz",
    ]
    again = read_evaluation(folder, "digits-test")
    assert again.metrics.to_dict() == found.to_dict()
    np.testing.assert_array_equal(again.probabilities, probabilities.numpy())
    np.testing.assert_array_equal(again.labels, labels.numpy())
    with (folder / "digits-test-confusion.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == ["a,b", 'say "c"', "d"]
    assert [[int(cell) for cell in row[1:]] for row in rows] == found.confusion.tolist()
    # Rows are the truth.
    assert [sum(map(int, row[1:])) for row in rows] == torch.bincount(labels, minlength=3).tolist()
