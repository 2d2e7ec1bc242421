"""State dictionaries from files of any library, without running code that is in them.

    .safetensors              tensors and nothing else
    .pth .pt .bin .ckpt       torch's pickles, read with a list of what may be in them: a pickle that wants to
                              call anything else is refused, not run
    .npz                      numpy arrays, as google-research publishes ViT

A checkpoint of a training run holds more than a model. Its weights are looked for under the usual keys
(`model`, `state_dict`, `teacher`), and what wrappers put before every name (`module.`, `backbone.`) is taken
off. Optimiser states and arguments beside them are left out.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")

_CONTAINERS = ("model_ema", "model", "state_dict", "teacher", "params")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_BACKBONE = "backbone."
# What published checkpoints hold besides tensors, and what cannot do harm: arguments, numpy's numbers.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    # The function that makes numpy's numbers, under its old and its new name.
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    NotImplementedError,
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file, by the names that they have there.

    Raises:
        ValueError: No such file, a damaged one, one of another kind, one that wants to run code, or one
            without weights; one line.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                content = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no weights {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path} {_why(error)}") from None
    state = _unwrapped(content)
    if not state:
        raise ValueError(f"{path} holds no weights (expected names with tensors)")
    return state


def _why(error: Exception) -> str:
    """What to say of a file that could not be read."""
    text = str(error)
    if "Unsupported global" in text or "Unsupported class" in text or "weights_only" in text.lower():
        wanted = text.partition("GLOBAL ")[2].split(" ")[0]
        return (
            f"wants to run code{f' ({wanted})' if wanted else ''}, which was not done: "
            "take a file with tensors only, best .safetensors"
        )
    first = text.splitlines()[0][:120] if text else type(error).__name__
    return f"is damaged or of another kind ({first})"


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint, without what wrappers put before their names."""
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        return {}
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    # DINO keeps a projection head beside its backbone: that one is no part of the model.
    inside = {name for name in state if name.startswith(_BACKBONE)}
    return {name.removeprefix(_BACKBONE): state[name] for name in inside} if inside else state
