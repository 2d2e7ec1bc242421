"""Checkpoints from which a run goes on exactly.

Everything that decides the next step is in one file: the task's and the average's weights, the optimiser's
state, the random state and the step. The order of the images and the augmentation are functions of seed and
step, the learning rate is one of the step: they need no state. Files are written beside and renamed, and read
with `weights_only=True`, so that no code in them runs.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from vitrail.files import write_whole


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; an interrupted write leaves the one before untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: No such file, or not a whole checkpoint; one line that names it.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path} to resume from; start the run without --train.resume")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read: {first}") from None


def random_state() -> dict[str, Any]:
    """The state of torch's generators, on the CPU and on every GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
