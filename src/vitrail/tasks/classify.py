"""Supervised classification: cross-entropy against labels, or against the soft targets of Mixup and CutMix.

Label smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitrail.models.encoder import Encoder
from vitrail.tasks.task import Batch, Task


class Classify(Task):
    """Cross-entropy of a model's logits."""

    classifies = needs_labels = True

    def __init__(self, model: Encoder, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] and `targets` (labels [B] or shares [B, K]) -> "loss"."""
        logits = self.model(batch["images"])
        return {"loss": F.cross_entropy(logits, batch["targets"], label_smoothing=self.label_smoothing)}

    def trained(self) -> Encoder:
        """The classifier."""
        return self.model
