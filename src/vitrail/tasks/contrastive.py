"""Contrastive learning: two views of an image are pulled together, views of other images pushed apart.

    B images of this process, W processes, D width of the projection

Papers: van den Oord et al. 2018 (InfoNCE); Chen et al. 2020, "A Simple Framework for Contrastive Learning"
(SimCLR; it calls the loss NT-Xent); Khosla et al. 2020, "Supervised Contrastive Learning" (SupCon); Wang and
Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity".

What differs from SimCLR: no batch normalisation in the projection, so that a batch shared by several
processes gives the same loss as in one. The negatives come from all processes, but from one micro-batch only.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.models.encoder import Encoder
from vitrail.processes import rank, world
from vitrail.tasks.task import Batch, Task, Views


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent, the symmetric form of InfoNCE (SimCLR, equation 1).

    Each view looks for the other view of its image among all views of all processes but itself.

    Args:
        first: [B, D], one view of each image; of any length, the loss sees directions only.
        second: [B, D], the other view.
        temperature: Divides the cosine similarities.

    Returns:
        Mean over this process's 2 B views. Its mean over processes, gradient included, is what one process
        with the whole batch gets.

    Raises:
        ValueError: A single image: there is nothing to tell it from.
    """
    return F.cross_entropy(*similarities(first, second, temperature))


def sup_con(first: Tensor, second: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon: every view of the same class is a positive (Khosla et al. 2020, equation 2, L_out).

    Args:
        first: [B, D], one view of each image.
        second: [B, D], the other view.
        labels: int64 [B].
        temperature: Divides the cosine similarities.

    Returns:
        As `nt_xent`, which it equals where all labels differ.

    Raises:
        ValueError: As `nt_xent`; or shares of classes instead of labels.
    """
    return _all_of_a_class(*similarities(first, second, temperature), labels)


def similarities(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities of this process's views to those of all processes, over the temperature.

    Args:
        first: [B, D], one view of each image.
        second: [B, D], the other view.
        temperature: Divides the similarities.

    Returns:
        [2 B, 2 W B], the first views before the second ones, -inf where a view would meet itself; and int64
        [2 B], the column of each one's other view.
    """
    B, everyone = len(first), world() * len(first)
    if everyone < 2:
        raise ValueError("a contrastive loss needs at least 2 images at a time, got 1: raise the batch size")
    # At half precision, similarities of up to 1 / temperature would be off by some per cent.
    with torch.autocast(first.device.type, enabled=False):
        precise = torch.promote_types(first.dtype, torch.float32)
        views = F.normalize(torch.stack([first, second], dim=1).to(precise), dim=2)  # [B, 2, D]
        logits = views.transpose(0, 1).flatten(0, 1) @ gather(views).transpose(0, 1).flatten(0, 1).T
    place = rank() * B + torch.arange(B, device=first.device)
    itself, other = torch.cat([place, place + everyone]), torch.cat([place + everyone, place])
    return (logits / temperature).scatter(1, itself[:, None], -math.inf), other


def _all_of_a_class(logits: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """SupCon from `similarities`."""
    if labels.ndim != 1:
        raise ValueError("supcon needs labels, got shares of classes: switch mixup and cutmix off")
    own, everyone = labels.repeat(2), gather(labels).repeat(2)  # [2 B], [2 W B]
    positive = (own[:, None] == everyone) & logits.isfinite()
    surprise = -logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    return (surprise.sum(dim=1) / positive.sum(dim=1)).mean()


def gather(rows: Tensor) -> Tensor:
    """Equally many rows [n, ...] of each of W processes -> [W n, ...], process by process.

    Gradients flow back to the process that a row came from, summed over the processes that used it: with a
    loss that is a mean over each process's rows, the mean of gradients that DDP takes is the whole one.
    """
    return rows if world() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world())[rank()]


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """How far features [B, D] are from all pointing one way: 0 when collapsed, near 1 when in all directions.

    The deviation of each channel after normalisation, mean over channels, times sqrt(D) (Chen and He 2021,
    "Exploring Simple Siamese Representation Learning", section 4.1).
    """
    directions = F.normalize(features.float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def alignment_and_uniformity(logits: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Wang and Isola's two numbers, with their exponents 2 and 2, from `similarities`; both fall in learning.

    Returns:
        Mean squared distance of an image's two views, 0 to 4; logarithm of the mean of exp(-2 d^2) over the
        distances d of views of different images, -8 to 0 (0: collapsed).
    """
    squared = 2.0 - 2.0 * temperature * logits  # of directions; infinite where a view would meet itself
    alignment = squared.gather(1, other[:, None]).mean()
    negatives = squared.scatter(1, other[:, None], math.inf)
    count = negatives.shape[0] * (negatives.shape[1] - 2)
    return alignment, (-2.0 * negatives).logsumexp(dim=(0, 1)) - math.log(count)


def projection(width: int, hidden_dim: int | None, projection_dim: int) -> nn.Sequential:
    """Embedding [B, width] -> [B, projection_dim]: one hidden layer, as wide as the embedding if not told."""
    hidden = width if hidden_dim is None else hidden_dim
    for name, value in (("hidden_dim", hidden), ("projection_dim", projection_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, projection_dim))


def without_classifier(model: Encoder) -> Encoder:
    """Take the classifier off a model, in place: it then gives what the classifier would receive, [B, D].

    A task without labels does not train it, and DDP waits for the gradient of whatever is there. Whoever goes
    on from the saved model gets a fresh one.
    """
    model.reset_classifier(0)
    model.config = dataclasses.replace(model.config, num_classes=0)
    return model


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


class Contrastive(Task):
    """Two views of each image through encoder and projection, and a loss on their similarities.

    The embedding is what the classifier would receive: the class token, or the pooled patches where there is
    none. The classifier itself is taken off the model, for nothing trains it. The projection is not part of
    what is saved: SimCLR (section 4.2) finds the embedding before it much the better one.
    """

    views = Views(full=2)

    def __init__(
        self,
        model: Encoder,
        *,
        temperature: float = 0.1,
        projection_dim: int = 128,
        hidden_dim: int | None = None,
    ) -> None:
        """Put a projection on a model.

        Args:
            model: Loses its classifier.
            temperature: Of the similarities: 0.1 in SimCLR on ImageNet and in SupCon, 0.5 in SimCLR on
                CIFAR-10, 0.2 in MoCo v3.
            projection_dim: Width of what is compared; 128 in SimCLR and SupCon.
            hidden_dim: Width of the projection's hidden layer; None: that of the embedding, as in both.

        Raises:
            ValueError: A temperature or width that is not above 0.
        """
        super().__init__()
        _check_temperature(temperature)
        self.model = without_classifier(model)
        self.temperature = temperature
        self.projection = projection(model.num_features, hidden_dim, projection_dim)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `views` [B, 2, C, H, W] -> "loss", "alignment", "uniformity" and "feature_std"."""
        embeddings = self.model(batch["views"].flatten(0, 1))
        first, second = self.projection(embeddings).unflatten(0, (-1, 2)).unbind(1)
        logits, other = similarities(first, second, self.temperature)
        alignment, uniformity = alignment_and_uniformity(logits, other, self.temperature)
        return {
            "loss": self.compare(logits, other, batch),
            "alignment": alignment,
            "uniformity": uniformity,
            "feature_std": spread(embeddings),
        }

    @abstractmethod
    def compare(self, logits: Tensor, other: Tensor, batch: Batch) -> Tensor:
        """The loss, from what `similarities` gives."""

    def trained(self) -> Encoder:
        """The encoder, without a classifier."""
        return self.model


class InfoNCE(Contrastive):
    """NT-Xent (SimCLR): the other view of the same image is the one positive; no labels."""

    def compare(self, logits: Tensor, other: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of finding the other view."""
        return F.cross_entropy(logits, other)


class SupCon(Contrastive):
    """Supervised contrastive learning: all views of the same class are positives."""

    needs_labels = True

    def compare(self, logits: Tensor, other: Tensor, batch: Batch) -> Tensor:
        """Mean surprise over the positives; reads `targets`, labels [B]."""
        return _all_of_a_class(logits, other, batch["targets"])


class ClassifyInfoNCE(Task):
    """Supervised classification with InfoNCE beside it, to enhance what the encoder learns.

    Both views of an image are classified, and both pass the encoder once. The class token is what InfoNCE
    sees, or the mean of the patches where there is none.
    """

    classifies = needs_labels = True
    views = Views(full=2)

    def __init__(
        self,
        model: Encoder,
        *,
        weight: float = 0.1,
        label_smoothing: float = 0.0,
        temperature: float = 0.1,
        projection_dim: int = 128,
        hidden_dim: int | None = None,
    ) -> None:
        """Put a projection beside a classifier.

        Args:
            model: With its classifier.
            weight: What InfoNCE counts beside the cross-entropy; 0 leaves the cross-entropy alone.
            label_smoothing: As in `Classify`.
            temperature: As in `Contrastive`.
            projection_dim: As in `Contrastive`.
            hidden_dim: As in `Contrastive`.

        Raises:
            ValueError: A value outside its range.
        """
        super().__init__()
        _check_temperature(temperature)
        if not weight >= 0.0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.model = model
        self.weight, self.label_smoothing, self.temperature = weight, label_smoothing, temperature
        # The width of the patches and the class token, which in an encoder of two branches is not the head's.
        self.projection = projection(model.stages[-1].width, hidden_dim, projection_dim)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `views` [B, 2, C, H, W] and `targets` -> "loss", "classify_loss", "infonce_loss"."""
        features = self.model.forward_features(batch["views"].flatten(0, 1))
        logits = self.model.forward_head(features)
        targets = batch["targets"].repeat_interleave(2, dim=0)
        classify = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        tokens = features.prefix[:, 0] if features.prefix.shape[1] else features.patches.mean(dim=1)
        first, second = self.projection(tokens).unflatten(0, (-1, 2)).unbind(1)
        infonce = nt_xent(first, second, self.temperature)
        return {
            "loss": classify + self.weight * infonce,
            "classify_loss": classify,
            "infonce_loss": infonce,
        }

    def trained(self) -> Encoder:
        """The classifier."""
        return self.model
