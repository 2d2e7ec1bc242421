"""Features of a frozen backbone, computed once: training a head on them is training the frozen model.

A frozen backbone gives the same features for the same image in every epoch, so the images need to pass it
once only. It is in evaluation mode: no dropout, no DropPath, and normalisation layers that keep running
statistics use the stored ones. What is given up is augmentation, which would make other images.

Others call this linear probing on cached features (Kornblith et al. 2019; the evaluation of DINO and CLIP).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.datasets import Images, Preprocessing
from vitrail.evaluation.inference import predict_logits
from vitrail.files import write_whole
from vitrail.models.encoder import Encoder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureSet:
    """Features and labels of one split; `vitrail.datasets.batches` reads it as it reads an image set."""

    features: Tensor
    """float32 [N, D], on the CPU."""
    labels: np.ndarray
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor]:
        """Features [B, D] and labels [B] at some positions."""
        chosen = np.asarray(indices, dtype=np.int64)
        return self.features[torch.from_numpy(chosen)], torch.from_numpy(self.labels[chosen])


def backbone_features(
    model: Encoder,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """What the head receives for every image, in the order of the set.

    Args:
        model: On `device`; it is put into evaluation mode for the while.
        images: Any set whose images the preprocessing fits.
        preprocessing: Resizes and normalises the batches.
        batch_size: Images at a time.
        device: Where to run.

    Returns:
        float32 [N, D] on the CPU: pooled and normalised, `model.head` of it is the logits.

    Raises:
        ValueError: The architecture has several heads (`has_one_head`).
    """
    if not has_one_head(model):
        raise ValueError(f"{type(model).__name__} has several heads: no one vector is what they receive")
    head, model.head = model.head, nn.Identity()
    try:
        return predict_logits(model, images, preprocessing, batch_size=batch_size, device=device)
    finally:
        model.head = head


def has_one_head(model: Encoder) -> bool:
    """Whether one module `head` makes the logits; CrossViT and distilled DeiTs average two."""
    heads = [name for name, _ in model.named_children() if name.startswith("head")]
    return heads == ["head"] and not isinstance(model.head, nn.ModuleList)


def cached_features(
    model: Encoder,
    images: Images,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    folder: Path | None,
) -> FeatureSet:
    """`backbone_features`, kept on disk under a name that weights, preprocessing and images decide.

    Args:
        model: As for `backbone_features`.
        images: As for `backbone_features`.
        preprocessing: As for `backbone_features`.
        batch_size: As for `backbone_features`.
        device: As for `backbone_features`.
        folder: Where the features are looked for and kept; None keeps nothing.

    Raises:
        ValueError: As `backbone_features`; or a file in the folder that holds other than these features.
    """
    if folder is None:
        found = backbone_features(model, images, preprocessing, batch_size=batch_size, device=device)
        return FeatureSet(features=found, labels=images.labels)
    path = folder / f"{images.split}-{_key(model, images, preprocessing)}.npy"
    if not path.is_file():
        found = backbone_features(model, images, preprocessing, batch_size=batch_size, device=device)
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, found.numpy())
        write_whole(path, content.getvalue())
        return FeatureSet(features=found, labels=images.labels)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it") from None
    if array.dtype != np.float32 or array.shape != (len(images), model.num_features):
        raise ValueError(
            f"{path}: expected float32 [{len(images)}, {model.num_features}], got {array.dtype} "
            f"{list(array.shape)}; delete it"
        )
    return FeatureSet(features=torch.from_numpy(array), labels=images.labels)


def _key(model: Encoder, images: Images, preprocessing: Preprocessing) -> str:
    """A hash of all that decides the features: backbone, preprocessing, images."""
    config = dataclasses.asdict(model.config) | {"num_classes": 0}
    digest = hashlib.sha256(
        json.dumps([type(model).__name__, config, preprocessing.to_dict(), images.fingerprint]).encode()
    )
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
