"""A trained classifier with its preprocessing and class names: from image files to named probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from vitrail.datasets import Preprocessing
from vitrail.models import Encoder
from vitrail.pretrained import load_model


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image, best first."""

    source: str
    """The file, or "image" for one in memory."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictor:
    """Predicts with a model folder, or with the one of a run folder."""

    def __init__(self, model: Encoder, preprocessing: Preprocessing, classes: tuple[str, ...]) -> None:
        self.model = model.eval()
        self.preprocessing = preprocessing
        self.classes = classes

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Load a model folder, or the one of a run folder.

        Raises:
            ValueError: No model there, or a damaged one.
        """
        stored = load_model(path)
        return cls(stored.model, Preprocessing.from_dict(stored.preprocessing), stored.classes)

    @torch.inference_mode()
    def predict(self, images: Sequence[str | Path | Image.Image], top: int = 5) -> list[Prediction]:
        """Predict some images, 64 at a time.

        Args:
            images: Files, or PIL images, of any size and mode.
            top: How many classes to name.

        Raises:
            ValueError: An image that cannot be read; the message names it.
        """
        results = []
        for start in range(0, len(images), 64):
            some = images[start : start + 64]
            batch = torch.stack([self.preprocessing.open_image(image) for image in some])  # [B, C, H, W]
            best = self.model(batch).softmax(dim=1).topk(min(top, len(self.classes)), dim=1)
            for image, shares, numbers in zip(some, best.values, best.indices, strict=True):
                results.append(
                    Prediction(
                        source="image" if isinstance(image, Image.Image) else str(image),
                        classes=tuple(self.classes[number] for number in numbers.tolist()),
                        probabilities=tuple(shares.tolist()),
                    )
                )
        return results
