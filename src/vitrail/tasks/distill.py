"""Distillation: a student learns from what a teacher answers, beside the labels or without any.

    B images, K classes, N patches of the teacher's grid, D, E widths of student and teacher

Papers: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (soft answers, temperature);
Touvron et al. 2021, DeiT (hard answers, a distillation token with a head of its own); Romero et al. 2015,
"FitNets" (features).

The teacher is any module that gives logits. It sees the student's images, augmentation included (Beyer et
al. 2022, "Knowledge distillation: A good teacher is patient and consistent"). It belongs to the run and not
to what the run learns: it is in evaluation mode, without gradient, and neither in the optimiser nor in
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.models.encoder import Encoder, Features
from vitrail.tasks.task import Batch, Task

Prepare = Callable[[Tensor], Tensor]
"""The student's images, normalised for it -> as the teacher wants them: size, channels, mean, deviation."""


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images (Hinton et al. 2015, section 2).

    The factor keeps the size of the gradient when the temperature changes.

    Args:
        student: Logits [B, K].
        teacher: Logits [B, K].
        temperature: T, above 0.
    """
    own, other = ((logits / temperature).log_softmax(dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, other, reduction="batchmean", log_target=True)


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K] against the teacher's answer, its largest logit (DeiT, equation 3)."""
    return F.cross_entropy(student, teacher.argmax(dim=1))


def feature_loss(student: Tensor, teacher: Tensor, kind: Literal["l2", "cosine"]) -> Tensor:
    """Distance of tokens [B, N, E]: mean squared difference, or 1 - cosine similarity."""
    if kind == "l2":
        return F.mse_loss(student, teacher)
    return 1.0 - F.cosine_similarity(student, teacher, dim=2).mean()


@torch.no_grad()
def teacher_logits(teacher: nn.Module, images: Tensor, prepare: Prepare | None = None) -> Tensor:
    """What a teacher, which is in evaluation mode, answers: images [B, C, H, W] -> logits [B, K].

    It can be kept where the student sees the same pixels every time, that is without augmentation.
    """
    logits: Tensor = teacher(images if prepare is None else prepare(images))
    return logits


def check_same_classes(student: Sequence[str], teacher: Sequence[str]) -> None:
    """The teacher's n-th answer must mean what the student's means.

    Args:
        student: Names of the classes in the data.
        teacher: Names of the teacher's, in the order of its logits.

    Raises:
        ValueError: Another number, another name, or another order; the message names the first difference.
    """
    if len(student) != len(teacher):
        raise ValueError(f"the teacher knows {len(teacher)} classes, the data has {len(student)}")
    for number, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own != other:
            raise ValueError(f"class {number} is {own!r} in the data, {other!r} for the teacher")


class Distill(Task):
    """(1 - alpha) cross-entropy with the labels + alpha x loss against the teacher [+ weight x features].

    A model with a distillation token (DeiT) has two heads: the class token's learns from the labels, the
    distillation token's from the teacher. Without labels both learn from the teacher, since the model answers
    with the mean of both.
    """

    classifies = True

    def __init__(
        self,
        model: Encoder,
        *,
        teacher: nn.Module,
        prepare: Prepare | None = None,
        alpha: float = 0.5,
        temperature: float = 4.0,
        hard: bool = False,
        label_smoothing: float = 0.0,
        features: Literal["l2", "cosine"] | None = None,
        feature_weight: float = 1.0,
    ) -> None:
        """Put a teacher beside a model.

        Args:
            model: The student, with its classifier.
            teacher: Gives logits [B, K]; it is put into evaluation mode and frozen.
            prepare: Makes the teacher's images of the student's; None: it takes them as they are.
            alpha: Weight of the teacher; 1: no label is read at all.
            temperature: Softens both answers; larger shows more of what the teacher holds for unlikely.
            hard: Learn the teacher's answer alone, instead of its shares.
            label_smoothing: Of the labels, as in `Classify`.
            features: Also bring patches (and class token, where both have one) near the teacher's, through a
                linear layer and resized to its grid. The teacher must be one of our encoders, or have a
                `forward_features` that gives maps [B, E, rows, columns].
            feature_weight: What that counts.

        Raises:
            ValueError: A value outside its range, another number of classes, or no features to learn from.
        """
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if features not in (None, "l2", "cosine"):
            raise ValueError(f"features must be l2 or cosine, got {features!r}")
        if not feature_weight >= 0.0:
            raise ValueError(f"feature_weight must be at least 0, got {feature_weight}")
        self.needs_labels = alpha < 1.0
        self.model = model
        self.prepare = prepare
        self.alpha, self.temperature, self.hard = alpha, temperature, hard
        self.label_smoothing = label_smoothing
        self.features, self.feature_weight = features, feature_weight
        self.two_headed = bool(getattr(model.config, "distillation", False))
        # In a tuple it is no submodule: not trained, not saved, not sent to other processes.
        self._teacher = (teacher.eval().requires_grad_(False),)
        blank = torch.zeros(1, model.config.in_chans, *model.config.image_shape)
        was_training = model.training
        with torch.no_grad():
            own = model.eval()(blank)
            answer, seen = self._ask(blank)
        model.train(was_training)
        if own.shape != answer.shape:
            raise ValueError(
                f"the teacher's answer to one image has the shape {list(answer.shape)}, the student's "
                f"{list(own.shape)}: they need the same classes"
            )
        self.projection = None if seen is None else nn.Linear(model.stages[-1].width, seen.patches.shape[2])

    @property
    def teacher(self) -> nn.Module:
        """The teacher, in evaluation mode and frozen."""
        return self._teacher[0]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W], and `targets` where alpha is below 1.

        Returns:
            "loss"; its parts "teacher_loss", "label_loss" and "feature_loss"; and "agreement", the share of
            images that student and teacher give the same class.
        """
        images = batch["images"]
        answer, wanted = self._ask(images)
        if wanted is None and not self.two_headed:
            seen, logits = None, self.model(images)
        else:
            seen = self.model.forward_features(images)
            logits = self.model.forward_head(seen)
        by_label = by_teacher = logits
        if self.two_headed:
            two_headed: Any = self.model
            by_label, by_teacher = two_headed.forward_heads(seen)
        parts = {"teacher_loss": self._against(by_teacher, answer)}
        if self.needs_labels:
            targets = batch["targets"]
            parts["label_loss"] = F.cross_entropy(by_label, targets, label_smoothing=self.label_smoothing)
            loss = self.alpha * parts["teacher_loss"] + (1.0 - self.alpha) * parts["label_loss"]
        else:
            if self.two_headed:
                parts["teacher_loss"] = (parts["teacher_loss"] + self._against(by_label, answer)) / 2
            loss = parts["teacher_loss"]
        if seen is not None and wanted is not None:
            parts["feature_loss"] = self._feature_loss(seen, wanted)
            loss = loss + self.feature_weight * parts["feature_loss"]
        agreement = (logits.argmax(dim=1) == answer.argmax(dim=1)).float().mean()
        return {"loss": loss, **parts, "agreement": agreement}

    def trained(self) -> Encoder:
        """The student."""
        return self.model

    @torch.no_grad()
    def _ask(self, images: Tensor) -> tuple[Tensor, Features | None]:
        """The teacher's logits [B, K], and its features where the student learns from them too."""
        if self.features is None:
            return teacher_logits(self.teacher, images, self.prepare), None
        teacher: Any = self.teacher
        if not (hasattr(teacher, "forward_features") and hasattr(teacher, "forward_head")):
            raise ValueError(f"{type(teacher).__name__} gives no features to learn from: leave features out")
        seen = teacher.forward_features(images if self.prepare is None else self.prepare(images))
        return teacher.forward_head(seen), _as_features(seen)

    def _against(self, logits: Tensor, answer: Tensor) -> Tensor:
        return hard_loss(logits, answer) if self.hard else soft_loss(logits, answer, self.temperature)

    def _feature_loss(self, seen: Features, wanted: Features) -> Tensor:
        assert self.projection is not None
        assert self.features is not None
        resized = F.interpolate(seen.map(), size=wanted.grid, mode="bilinear", antialias=True)
        own, other = resized.flatten(2).transpose(1, 2), wanted.patches  # [B, N, D], [B, N, E]
        if seen.prefix.shape[1] and wanted.prefix.shape[1]:
            own = torch.cat([seen.prefix[:, :1], own], dim=1)
            other = torch.cat([wanted.prefix[:, :1], other], dim=1)
        return feature_loss(self.projection(own), other, self.features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the task to a device or a format moves the teacher too."""
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def _as_features(seen: Features | Tensor) -> Features:
    """Our features as they are; maps [B, E, rows, columns] of somebody else's network as patches."""
    if isinstance(seen, Features):
        return seen
    if not isinstance(seen, Tensor) or seen.ndim != 4:
        shape = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(f"the teacher's features must be maps [B, E, rows, columns], got {shape}")
    patches = seen.flatten(2).transpose(1, 2)
    return Features(patches=patches, prefix=patches[:, :0], grid=tuple(seen.shape[2:]))
