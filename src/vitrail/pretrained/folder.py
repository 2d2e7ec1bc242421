"""A model folder: the weights with everything that is needed to use them.

    model.safetensors   the state dictionary
    config.json         architecture and its config, class names, preprocessing

Others split the same into `config.json` and `preprocessor_config.json` (transformers) or keep the
preprocessing in code (timm); here it travels in one file, so the two cannot be mixed up.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vitrail.files import write_whole
from vitrail.models import Encoder, model_config
from vitrail.pretrained.read import read_state


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a model folder holds."""

    model: Encoder
    """In evaluation mode, on the CPU."""
    name: str
    """The variant's name."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    preprocessing: dict[str, Any]
    """As `vitrail.datasets.Preprocessing.to_dict` gives it."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What a model folder says of its model."""

    name: str
    """The variant's name."""
    changes: dict[str, Any]
    """All fields of the architecture's config."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    preprocessing: dict[str, Any]
    """As `vitrail.datasets.Preprocessing.to_dict` gives it."""


def save_model(
    folder: str | Path,
    model: Encoder,
    *,
    name: str,
    classes: tuple[str, ...],
    preprocessing: Mapping[str, Any],
) -> None:
    """Write a model folder; each file is written beside and renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_whole(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    config = {
        "model": name,
        "config": dataclasses.asdict(model.config),
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
    }
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def find_model_folder(path: str | Path) -> Path:
    """The model folder at a path that is one, or that is a run folder with one in `model/`.

    Raises:
        ValueError: Neither.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise ValueError(f"no run or model folder {path}")
    raise ValueError(
        f"{path} holds no model (expected config.json and model.safetensors, in it or in its folder model/); "
        "a run writes it when it ends: resume it, or give another folder"
    )


def load_model(path: str | Path) -> ModelFolder:
    """Read a model folder, or the one of a run folder.

    Raises:
        ValueError: No model there, or files that do not fit together; one line that names what.
    """
    stored = read_folder_config(path)
    model = model_config(stored.name, **stored.changes).build()
    load_weights(model, find_model_folder(path) / "model.safetensors")
    return ModelFolder(
        model=model.eval(), name=stored.name, classes=stored.classes, preprocessing=stored.preprocessing
    )


def read_folder_config(path: str | Path) -> FolderConfig:
    """Read what a model folder, or the one of a run folder, says of its model; the weights are not touched.

    Raises:
        ValueError: No model there, or a damaged file.
    """
    file = find_model_folder(path) / "config.json"
    try:
        stored = json.loads(file.read_text())
        if "model" not in stored and {"architecture", "model_type"} & set(stored):
            raise ValueError(
                f"{path} holds a model of timm or transformers; `vitrail convert {path} FOLDER` makes one of "
                "Vitrail of it"
            )
        return FolderConfig(
            name=stored["model"],
            changes={key: tuple(v) if isinstance(v, list) else v for key, v in stored["config"].items()},
            classes=tuple(stored["classes"]),
            preprocessing=dict(stored["preprocessing"]),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); write the model again") from None


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a .safetensors file strictly: every tensor used, every parameter filled, every shape equal.

    Args:
        model: Filled in place; untouched when anything does not fit.
        path: The file.

    Raises:
        ValueError: No such file, a damaged one, or weights of another model; one line that names what.
    """
    state, own = read_state(path), model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    unequal = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or unequal:
        first = (unequal or missing or unexpected)[0]
        raise ValueError(
            f"{path} does not fit this model: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
            f"{len(unequal)} of another shape (for instance {first})"
        )
    model.load_state_dict(state)
