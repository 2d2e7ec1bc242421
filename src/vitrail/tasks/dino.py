"""DINO: a student learns to answer as its own moving average does, from other views of the image.

    B images, V full views (2), L small crops, K prototypes, D width of the bottleneck

Paper: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". The teacher sees the
full views only, the student all. Two forces on the teacher's answers keep both from collapsing: centring
(no prototype wins everywhere) and sharpening (a low temperature: the answer is not uniform).

What differs from the paper: schedules are shares of the run instead of epochs; the centre moves once a step
by the whole batch of all processes, also where the batch is taken in micro-batches; the teacher runs in
evaluation mode, which matters for stems with batch normalisation only.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.models.encoder import Encoder
from vitrail.processes import mean_over_processes
from vitrail.tasks.contrastive import spread, without_classifier
from vitrail.tasks.task import Batch, Task, Views

_SMALL = 3 / 7
"""Side of a crop as a share of the image's side: 96 of 224 pixels in the paper."""


def dino_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of every view of the student against every other full view of the teacher (equation 3).

    Args:
        student: Logarithms of shares [V + L, B, K], full views first.
        teacher: Shares [V, B, K], each row sums to 1.

    Returns:
        Mean over images and over the pairs of different views.
    """
    every, B, _ = student.shape
    full = len(teacher)
    together = torch.einsum("tbk,sbk->", teacher, student)  # the sum over all pairs
    same = torch.einsum("tbk,tbk->", teacher, student[:full])
    return (same - together) / (B * (full * every - full))


class Prototypes(nn.Module):
    """The head: three layers, a bottleneck of length 1, its cosines to K learned directions (section 3.1).

    No batch normalisation. The directions are what the paper calls a weight-normalised last layer, with the
    lengths fixed at 1.
    """

    def __init__(self, width: int, hidden_dim: int, bottleneck_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.directions = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        nn.init.trunc_normal_(self.directions, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, embedding: Tensor, *, hold: bool = False) -> Tensor:
        """[n, width] -> cosines [n, K]; with `hold` the gradient of the directions is zero."""
        directions = F.normalize(self.directions, dim=1)
        if hold:
            # Zero and not absent: DDP waits for the gradient of every parameter.
            directions = directions.detach() + 0.0 * directions
        return F.linear(F.normalize(self.mlp(embedding), dim=1), directions)


class DINO(Task):
    """Student, teacher, and what keeps them from collapsing.

    The teacher is what is evaluated and saved, as in the paper: it is ahead of the student all the way. The
    classifier is taken off the model, for nothing trains it.
    """

    centre: Tensor

    def __init__(
        self,
        model: Encoder,
        *,
        out_dim: int = 1024,
        hidden_dim: int | None = None,
        bottleneck_dim: int | None = None,
        crops: int = 8,
        crop_size: int | None = None,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        hold_prototypes: float = 0.01,
    ) -> None:
        """Copy the model as teacher and put a head on both.

        Args:
            model: The student; loses its classifier.
            out_dim: Prototypes, K: 65536 in the paper, on 1.3 million images; far fewer by default, because
                with small models the head would be most of the work.
            hidden_dim: Width of the head's hidden layers; None: four times the encoder's, 2048 (paper) at
                most.
            bottleneck_dim: Width before the prototypes; None: that of the encoder, 256 (paper) at most.
            crops: Small crops an image, L; 8 is the authors' default, 0 leaves the two full views alone.
            crop_size: Their side in pixels; None: 3/7 of the image's (96 of 224), in whole patches.
            momentum: Of the teacher at the start; it rises to 1 along a cosine.
            centre_momentum: Of the centre.
            student_temperature: Sharpness of the student's answers.
            teacher_temperature: Sharpness of the teacher's; above 0.07 training gets unstable.
            first_teacher_temperature: What that begins with.
            temperature_warmup: Share of the run in which the one becomes the other, linearly.
            hold_prototypes: Share of the run at whose beginning the prototypes stay as they are, so that the
                student does not follow a random teacher too fast; the authors hold them for the first epoch.

        Raises:
            ValueError: A value outside its range.
        """
        super().__init__()
        width = model.num_features
        hidden = min(2048, 4 * width) if hidden_dim is None else hidden_dim
        bottleneck = min(256, width) if bottleneck_dim is None else bottleneck_dim
        for name, count, least in (
            ("out_dim", out_dim, 2),
            ("hidden_dim", hidden, 1),
            ("bottleneck_dim", bottleneck, 1),
            ("crops", crops, 0),
            ("crop_size", 1 if crop_size is None else crop_size, 1),
        ):
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        for name, share in (
            ("momentum", momentum),
            ("centre_momentum", centre_momentum),
            ("temperature_warmup", temperature_warmup),
            ("hold_prototypes", hold_prototypes),
        ):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        for name, temperature in (
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
            ("first_teacher_temperature", first_teacher_temperature),
        ):
            if not temperature > 0.0:
                raise ValueError(f"{name} must be above 0, got {temperature}")
        self.model = without_classifier(model)
        self.head = Prototypes(width, hidden, bottleneck, out_dim)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(out_dim))
        self.views = Views(full=2, crops=crops, crop_size=_crop_shape(model, crop_size))
        self.momentum, self.centre_momentum = momentum, centre_momentum
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.first_teacher_temperature = first_teacher_temperature
        self.temperature_warmup, self.hold_prototypes = temperature_warmup, hold_prototypes
        self._total_steps, self._step = 1, 0
        self._answers: list[Tensor] = []  # what the teacher answered in this step, one a micro-batch

    def begin(self, total_steps: int) -> None:
        """The schedules run over so many steps."""
        self._total_steps = total_steps

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `views` [B, 2, C, H, W] and, where there are crops, `crops` [B, L, C, h, w].

        Returns:
            "loss"; "teacher_entropy", 0 (one prototype) to 1 (all alike), whose mean should keep away from
            both; "kl", what the student still misses of the teacher; "feature_std" of the student.
        """
        self._step = step
        views = batch["views"]
        B, V = views.shape[:2]
        with torch.no_grad():
            answers = self.teacher_head(self.teacher(views.flatten(0, 1))).float()  # [B V, K]
            sharpened = (answers - self.centre) / self.teacher_temperature_at(step)
            shares = sharpened.softmax(dim=1).unflatten(0, (B, V)).transpose(0, 1)
        if self.training:
            self._answers.append(answers)
        hold = step < self.hold_prototypes * self._total_steps
        features = self.model(views.flatten(0, 1))
        student = self.head(features, hold=hold).unflatten(0, (B, V))
        if self.views.crops:
            crops = batch["crops"]
            small = self.head(self.model(crops.flatten(0, 1)), hold=hold)
            student = torch.cat([student, small.unflatten(0, (B, crops.shape[1]))], dim=1)
        logs = (student.float() / self.student_temperature).log_softmax(dim=2).transpose(0, 1)
        loss = dino_loss(logs, shares)
        entropy = torch.special.entr(shares).sum(dim=2).mean()
        return {
            "loss": loss,
            "teacher_entropy": entropy / math.log(len(self.centre)),
            "kl": loss.detach() - entropy,
            "feature_std": spread(features),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the teacher towards the student, and the centre to what the teacher answered in this step."""
        momentum = self.momentum_at(self._step)
        for teacher, student in ((self.teacher, self.model), (self.teacher_head, self.head)):
            pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            torch._foreach_lerp_([own for own, _ in floats], [other for _, other in floats], 1.0 - momentum)
        answer = mean_over_processes(torch.cat(self._answers).mean(dim=0))
        self.centre.lerp_(answer, 1.0 - self.centre_momentum)
        self._answers = []

    def momentum_at(self, step: int) -> float:
        """Momentum of the teacher after a step: from its start to 1, along a cosine."""
        return 1.0 - (1.0 - self.momentum) * 0.5 * (1.0 + math.cos(math.pi * step / self._total_steps))

    def teacher_temperature_at(self, step: int) -> float:
        """Temperature of the teacher in a step."""
        warmup = self.temperature_warmup * self._total_steps
        done = min(step / warmup, 1.0) if warmup else 1.0
        return self.first_teacher_temperature + done * (
            self.teacher_temperature - self.first_teacher_temperature
        )

    def trained(self) -> Encoder:
        """The teacher, without a classifier."""
        return self.teacher


def _crop_shape(model: Encoder, side: int | None) -> tuple[int, int]:
    """Height and width of a crop: as told, else 3/7 of the image's in whole cells of the coarsest map."""
    if side is not None:
        return side, side
    stride = model.stages[-1].stride
    height, width = (max(stride, round(_SMALL * full / stride) * stride) for full in model.config.image_shape)
    return height, width
