"""Checkpoints from which a run goes on exactly.

Everything that decides the next step is in one file: weights, moving average, optimiser, loss scaler and the
step. The order of the images, the augmentation and dropout are functions of seed and step, the learning rate
is one of the step: they need no state. Tensors are whole, whatever the number of processes, so a run may go
on with another one.

The last two checkpoints are kept. A file is written beside and renamed, its checksums are verified before it
is used, and where the last one is damaged the one before serves. Files are read with `weights_only=True`: no
code in them runs.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vitrail.files import write_whole
from vitrail.processes import barrier, is_main
from vitrail.tasks import Task
from vitrail.training.average import MovingAverage

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that changes while a run goes on."""

    task: Task
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None = None
    scaler: Any = None
    """The loss scaler of float16; None elsewhere."""
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Training time so far, that of interrupted parts included."""
    best: float | None = None
    """Highest validation score so far, kept where a run may stop early."""
    best_step: int = 0
    """The step after which it was reached."""
    best_weights: dict[str, Tensor] | None = None
    """The evaluated model's weights after that step, on the CPU."""

    def model(self) -> nn.Module:
        """What is evaluated and saved: the moving average where there is one, else the trained model."""
        return self.task.trained() if self.average is None else self.average.model


def save_checkpoint(folder: Path, state: TrainingState) -> None:
    """Write `last.pt` into a folder; the one before becomes `previous.pt`. Every process must call it.

    Raises:
        ValueError: The disk is full, or the folder cannot be written; the checkpoints that exist stay.
    """
    content = {
        "step": state.step,
        "seconds": state.seconds,
        "best": state.best,
        "best_step": state.best_step,
        "best_weights": state.best_weights,
        "task": get_model_state_dict(state.task, options=_WHOLE),
        "optimizer": get_optimizer_state_dict(state.task, state.optimizer, options=_WHOLE),
        "average": None,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
    }
    if state.average is not None:
        content["average"] = {
            "steps": state.average.steps,
            "model": get_model_state_dict(state.average.model, options=_WHOLE),
        }
    if is_main():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _rotate(folder, buffer.getvalue())
        except OSError as error:
            raise ValueError(
                f"checkpoint after step {state.step} cannot be written into {folder}: {error.strerror}; "
                "make room there, then go on with --resume from the checkpoint before"
            ) from None
    barrier()


def restore_checkpoint(folder: Path, state: TrainingState) -> bool:
    """Load the newest whole checkpoint of a folder into everything.

    Returns:
        Whether there was one; without any the state stays as it is.

    Raises:
        ValueError: All checkpoints are damaged, or they belong to another model or optimiser.
    """
    content = _newest(folder)
    if content is None:
        return False
    try:
        set_model_state_dict(state.task, content["task"], options=_WHOLE)
        set_optimizer_state_dict(state.task, state.optimizer, content["optimizer"], options=_WHOLE)
        if state.average is not None:
            set_model_state_dict(state.average.model, content["average"]["model"], options=_WHOLE)
            state.average.steps = int(content["average"]["steps"])
        if state.scaler is not None:
            state.scaler.load_state_dict(content["scaler"])
        state.step, state.seconds = int(content["step"]), float(content["seconds"])
        state.best, state.best_step = content["best"], int(content["best_step"])
        state.best_weights = content["best_weights"]
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
        reason = textwrap.shorten(reason, 200, placeholder=" ...")
        raise ValueError(
            f"the checkpoint in {folder} belongs to another model or optimiser ({reason}); "
            "resume with the config it was made with (config.yaml beside it)"
        ) from None
    return True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint file whose checksums are right; no code in it runs.

    Raises:
        ValueError: Not a whole checkpoint; one line that names it.
    """
    try:
        # torch does not look at the checksums of the archive it writes: a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
        OSError,
        NotImplementedError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read: {first[:200]}") from None
    if not isinstance(content, dict) or "step" not in content:
        raise ValueError(f"checkpoint {path} cannot be read: it holds something else")
    return content


def _rotate(folder: Path, content: bytes) -> None:
    """Write the new file whole, keep the last one as the previous one: at any moment one of them is whole."""
    last, previous, new = folder / "last.pt", folder / "previous.pt", folder / "new.pt"
    write_whole(new, content)
    if last.exists():
        os.replace(last, previous)
    os.replace(new, last)


def _newest(folder: Path) -> dict[str, Any] | None:
    """The first of the three that is whole; `new.pt` is there when a run was killed between two renamings."""
    damaged = []
    for name in ("new.pt", "last.pt", "previous.pt"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged and is_main():
            print(f"{damaged[0]}; going on from {path.name}, step {content['step']}", file=sys.stderr)
        return content
    if damaged:
        raise ValueError(f"{damaged[0]}; no other checkpoint is whole: start anew with --overwrite")
    return None
