"""A trained classifier with its preprocessing and class names: from image files to named probabilities."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from vitrail.datasets import Preprocessing
from vitrail.models import Encoder
from vitrail.pretrained.compiled import CompiledModel, load_compiled
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

    def __init__(
        self,
        model: Encoder,
        preprocessing: Preprocessing,
        classes: tuple[str, ...],
        compiled: CompiledModel | None = None,
    ) -> None:
        """A model with its preprocessing; classes without names are called by their numbers.

        Where it was also compiled, that is what predicts; the model is there to be looked into.
        """
        self.model = model.eval()
        self.compiled = compiled
        self.preprocessing = preprocessing
        self.classes = classes or tuple(map(str, range(model.config.num_classes)))

    @classmethod
    def from_source(cls, source: str | Path) -> Self:
        """Load a run or model folder, `timm:NAME.TAG`, `torchvision:NAME`, or a hub repository.

        Raises:
            ValueError: No model there, a damaged one, or one that was compiled for another machine.
        """
        stored, compiled = from_pretrained(source), load_compiled(source)
        return cls(stored.model, Preprocessing.from_dict(stored.preprocessing), stored.classes, compiled)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell models apart: of weights, config, preprocessing and classes."""
        described = [repr(self.model.config), self.preprocessing.to_dict(), self.classes]
        if self.compiled is not None:
            described.append(self.compiled.seal)  # another precision, slightly other probabilities
        digest = hashlib.sha256(json.dumps(described).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

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
            opened = torch.stack([self.preprocessing.open_image(image) for image in some])
            results += self.classified(names, opened, top)
        return results

    @torch.inference_mode()
    def classified(self, names: Sequence[str], images: Tensor, top: int) -> list[Prediction]:
        """Predict prepared images.

        Args:
            names: What to call each.
            images: float32 [B, C, H, W], normalised.
            top: How many classes to name.

        Raises:
            ValueError: The model has no head.
        """
        if not self.model.has_head:
            raise ValueError(
                "the model has no head, so it predicts nothing; train one on labelled images with "
                "`vitrail train --model.pretrained MODEL`"
            )
        run = self.model if self.compiled is None else self.compiled
        best = run(images).softmax(dim=1).topk(min(top, len(self.classes)), dim=1)
        return [
            Prediction(
                source=name,
                classes=tuple(self.classes[number] for number in numbers.tolist()),
                probabilities=tuple(shares.tolist()),
            )
            for name, shares, numbers in zip(names, best.values, best.indices, strict=True)
        ]
