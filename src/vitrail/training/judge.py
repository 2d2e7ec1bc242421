"""What the model of a run is worth: the accuracy of a classifier, or what features without one tell.

On validation images while the run goes, on test images at its end. Features are judged by their neighbours,
on a few thousand images; the attention is looked at on a handful, for collapse.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.datasets import Images, Preprocessing
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.metrics import ClassificationMetrics, classification_metrics, write_evaluation
from vitrail.evaluation.representation import RepresentationMetrics, representation_metrics
from vitrail.explain.health import attention_collapse
from vitrail.files import write_whole
from vitrail.models import Encoder
from vitrail.training.setup import Run

JUDGED = 5000
"""Images at most by which features without a classifier are judged."""
WATCHED = 16
"""Validation images on which the attention is watched."""

Metrics = ClassificationMetrics | RepresentationMetrics
"""What a classifier is worth, or features without one."""


class Judge:
    """Judges the models of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def score(self) -> str:
        """The number of `validate` by which one model is better than another."""
        return "accuracy" if self._run.task.classifies else "knn_accuracy"

    def validate(self, model: nn.Module) -> dict[str, Any]:
        """Numbers of the validation images, of which there must be some."""
        images = self._run.splits.val
        assert images is not None
        assert isinstance(model, Encoder)
        collapse = attention_collapse(model, self._watched)
        if not self._run.task.classifies:
            found = self._features(model, images)
            return {
                "knn_accuracy": found.knn_accuracy,
                "feature_std": found.feature_std,
                "effective_rank": found.effective_rank,
                "collapse": collapse,
            }
        logits = self._answers(model, images)
        labels = torch.from_numpy(images.labels)
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(dim=1) == labels).float().mean()),
            "collapse": collapse,
        }

    def test(self, model: nn.Module, folder: Path | None = None) -> Metrics | None:
        """Metrics of the test images, kept in `folder/evaluation/` if one is given; None without images."""
        images = self._run.splits.test
        if self._run.task.classifies:
            return _classified(self._answers(model, images), images, folder)
        if len(images) < 2:
            return None
        found = self._features(model, images)
        if folder is not None:
            (folder / "evaluation").mkdir(exist_ok=True)
            path = folder / "evaluation" / f"{images.name}-{images.split}-features.json"
            write_whole(path, json.dumps(found.to_dict(), indent=2) + "\n")
        return found

    @cached_property
    def _watched(self) -> Tensor:
        """The first validation images as the model sees them."""
        run, images = self._run, self._run.splits.val
        assert images is not None
        pixels = images.pixels(np.arange(min(len(images), WATCHED)))
        return run.preprocessing.prepare(pixels.to(run.accelerator.device))

    def _features(self, model: nn.Module, images: Images) -> RepresentationMetrics:
        """What features tell of the first images."""
        judged = images.subset(np.arange(min(len(images), JUDGED)))
        return representation_metrics(self._answers(model, judged), judged.labels)

    def _answers(self, model: nn.Module, images: Images) -> Tensor:
        """Logits, or what a head would receive where there is none."""
        run = self._run
        return predict_logits(
            model,
            images,
            run.preprocessing,
            batch_size=run.config.train.eval_batch_size,
            device=run.accelerator.device,
        )


def evaluate_and_write(
    folder: Path | None,
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Images,
    *,
    batch_size: int,
    device: torch.device,
) -> ClassificationMetrics:
    """Test a classifier on an image set and keep the numbers in `folder/evaluation/`, if there is one."""
    logits = predict_logits(model, images, preprocessing, batch_size=batch_size, device=device)
    return _classified(logits, images, folder)


def _classified(logits: Tensor, images: Images, folder: Path | None) -> ClassificationMetrics:
    probabilities = logits.softmax(dim=1).numpy()
    metrics = classification_metrics(probabilities, images.labels, images.classes)
    if folder is not None:
        name = f"{images.name}-{images.split}"
        write_evaluation(folder / "evaluation", name, metrics, probabilities, images.labels)
    return metrics
