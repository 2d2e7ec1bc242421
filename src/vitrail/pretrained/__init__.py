"""Weights in and out: model folders, and the one function that builds a model with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrail.models import Encoder, build_model
from vitrail.pretrained.folder import (
    FolderConfig,
    ModelFolder,
    find_model_folder,
    load_model,
    load_weights,
    read_folder_config,
    save_model,
)

__all__ = [
    "FolderConfig",
    "ModelFolder",
    "create_model",
    "find_model_folder",
    "load_model",
    "load_weights",
    "read_folder_config",
    "save_model",
]


def create_model(
    name: str,
    *,
    pretrained: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **changes: Any,
) -> Encoder:
    """Build a model by name, with fresh weights or with those of a file.

    Args:
        name: A variant that `list_models` has.
        pretrained: A run folder, a model folder, or a .safetensors file with the variant's own parameter
            names (timm's, where timm has the model). A head for another number of classes stays fresh;
            all else is bit-identical.
        num_classes: Classes of the head; the variant's when not given.
        img_size: Image size the model is built for; the variant's when not given.
        in_chans: Channels; the variant's when not given.
        changes: Further fields of the architecture's config.

    Raises:
        ValueError: Unknown names (the nearest are named), values that do not fit, weights that do not fit.
    """
    given = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    changes |= {key: value for key, value in given.items() if value is not None}
    if pretrained is None:
        return build_model(name, **changes)
    path = Path(pretrained)
    weights = path if path.suffix == ".safetensors" else find_model_folder(path) / "model.safetensors"
    model = build_model(name, **changes)
    load_weights(model, weights, except_head=True)
    return model
