"""Weights in and out: model folders, weights of anyone, and a function that builds a model with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrail.models import Encoder, build_model
from vitrail.pretrained.convert import export_model, import_model, load_pretrained
from vitrail.pretrained.fit import LoadReport
from vitrail.pretrained.folder import (
    FolderConfig,
    ModelFolder,
    find_model_folder,
    load_model,
    read_folder_config,
    save_model,
)
from vitrail.pretrained.program import load_program, save_program, trust_program
from vitrail.pretrained.sources import Weights, find_weights
from vitrail.pretrained.weights import default_weights

__all__ = [
    "FolderConfig",
    "LoadReport",
    "ModelFolder",
    "Weights",
    "create_model",
    "export_model",
    "find_model_folder",
    "find_weights",
    "import_model",
    "load_model",
    "load_pretrained",
    "load_program",
    "read_folder_config",
    "save_model",
    "save_program",
    "trust_program",
]


def create_model(
    name: str,
    *,
    pretrained: str | Path | Weights | bool | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **changes: Any,
) -> Encoder:
    """Build a model by name, with fresh weights or with anyone's.

    Args:
        name: A variant that `list_models` has.
        pretrained: Where weights are (`vitrail.pretrained.sources`): a run or model folder, a file, an
            address, `timm:NAME.TAG`, `torchvision:NAME`, a hub repository. True: the first that
            `vitrail models NAME` lists. A head for another number of classes stays fresh, positions are
            resampled and channels summed or repeated where the model differs in them; all else is
            bit-identical. `load_pretrained` does the same and tells what was done.
        num_classes: Classes of the head; the variant's when not given.
        img_size: Image size the model is built for; the variant's when not given.
        in_chans: Channels; the variant's when not given.
        changes: Further fields of the architecture's config.

    Raises:
        ValueError: Unknown names (the nearest are named), values that do not fit, weights that do not fit.
    """
    given = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    changes |= {key: value for key, value in given.items() if value is not None}
    model = build_model(name, **changes)
    if pretrained is not None and pretrained is not False:
        load_pretrained(model, default_weights(name) if pretrained is True else pretrained)
    return model
