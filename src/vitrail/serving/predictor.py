"""A trained classifier with its preprocessing and class names: from image files to named probabilities."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from vitrail.datasets import BrokenImageError, Preprocessing
from vitrail.datasets.folder import image_files
from vitrail.models import Encoder
from vitrail.pretrained.hub import from_pretrained


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
        """A model with its preprocessing; classes without names are called by their numbers."""
        self.model = model.eval()
        self.preprocessing = preprocessing
        self.classes = classes or tuple(map(str, range(model.config.num_classes)))

    @classmethod
    def from_source(cls, source: str | Path) -> Self:
        """Load a run or model folder, `timm:NAME.TAG`, `torchvision:NAME`, or a hub repository.

        Raises:
            ValueError: No model there, or a damaged one.
        """
        stored = from_pretrained(source)
        return cls(stored.model, Preprocessing.from_dict(stored.preprocessing), stored.classes)

    def class_number(self, name: str) -> int:
        """The number of a class, from its name or the number itself.

        Raises:
            ValueError: There is no such class.
        """
        if name in self.classes:
            return self.classes.index(name)
        if name.isdigit() and int(name) < len(self.classes):
            return int(name)
        near = difflib.get_close_matches(name, self.classes, n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"no class {name!r} among the {len(self.classes)} of the model{hint}")

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
            names = ["image" if isinstance(image, Image.Image) else str(image) for image in some]
            results += self._classified(names, [self.preprocessing.open_image(image) for image in some], top)
        return results

    @torch.inference_mode()
    def predict_files(
        self, paths: Sequence[str | Path], top: int = 5
    ) -> tuple[list[Prediction], list[BrokenImageError]]:
        """Predict image files and the images of folders, as far as they can be read.

        Args:
            paths: Files, and folders, of which the images directly in them are taken, by extension, sorted.
            top: How many classes to name.

        Returns:
            The predictions, and what is wrong with each file or folder that cannot be read.
        """
        files: list[Path] = []
        found: list[Prediction] = []
        broken: list[BrokenImageError] = []
        for path in map(Path, paths):
            inside = image_files(path)
            files += inside
            if not inside:
                broken.append(BrokenImageError(str(path), "no image files in this folder"))
        for start in range(0, len(files), 64):
            opened: list[tuple[str, torch.Tensor]] = []
            for path in files[start : start + 64]:
                try:
                    opened.append((str(path), self.preprocessing.open_image(path)))
                except BrokenImageError as error:
                    broken.append(error)
            if opened:
                names, images = zip(*opened, strict=True)
                found += self._classified(names, images, top)
        return found, broken

    def _classified(self, names: Sequence[str], images: Sequence[torch.Tensor], top: int) -> list[Prediction]:
        if not self.model.has_head:
            raise ValueError(
                "the model has no head, so it predicts nothing; train one on labelled images with "
                "`vitrail train --model.pretrained MODEL`"
            )
        best = self.model(torch.stack(list(images))).softmax(dim=1).topk(min(top, len(self.classes)), dim=1)
        return [
            Prediction(
                source=name,
                classes=tuple(self.classes[number] for number in numbers.tolist()),
                probabilities=tuple(shares.tolist()),
            )
            for name, shares, numbers in zip(names, best.values, best.indices, strict=True)
        ]
