"""What a reader needs to trust and repeat a run: command, data, seeds, compute, time, hardware, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.evaluation.cost import count_macs, count_parameters, count_training_operations
from vitrail.models import Encoder
from vitrail.processes import world
from vitrail.tasks import Batch
from vitrail.training.checkpoint import TrainingState
from vitrail.training.setup import Run


def manifest(
    run: Run,
    state: TrainingState,
    model: Encoder,
    *,
    measured: Mapping[str, float],
    command: str,
    cpu_seconds: float,
    resumed_at: int,
) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
        run: As it was prepared.
        state: At the end.
        model: The finished model, whole.
        measured: What the test found: "test_accuracy", or "knn_accuracy" of features, 0 to 1.
        command: What repeats the run.
        cpu_seconds: Of this process, since the training began or went on.
        resumed_at: The step at which this process took the run up; 0: it began it.
    """
    macs = count_macs(model, (model.config.in_chans, *run.preprocessing.img_size))
    images_seen = state.step * run.config.train.batch_size
    # The usual estimate for a classifier: the backward pass costs twice the forward pass.
    operations = 3.0 * 2 * macs
    if run.config.task.name != "classify" and world() == 1:
        operations = count_training_operations(run.task, _some_images(run))
    parts = (("train", run.splits.train), ("val", run.splits.val), ("test", run.splits.test))
    data: dict[str, dict[str, Any]] = {
        name: {"images": len(part), "fingerprint": part.fingerprint}
        for name, part in parts
        if part is not None
    }
    if synthetic := run.splits.synthetic:
        data["train"] |= {"real": len(run.splits.train) - synthetic, "synthetic": synthetic}
    return {
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": run.config.train.seed,
        "parameters": count_parameters(model),
        "macs_per_image": macs,
        "steps": state.step,
        "best_step": state.best_step or None,
        "images_seen": images_seen,
        "training_petaflop": operations * images_seen / 1e15,
        "training_seconds": round(state.seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "resumed_at_step": resumed_at or None,
        **measured,
        "data": data,
        "processes": world(),
        "hardware": hardware(run.accelerator.device),
        "versions": versions(),
    }


def _some_images(run: Run, most: int = 4) -> Batch:
    """A batch of the shapes that the task gets, without reading and augmenting a whole one."""
    views, train = run.task.views, run.splits.train
    pixels = run.preprocessing.prepare(train.pixels(np.arange(min(most, len(train)))))
    pixels = pixels.to(run.accelerator.device)
    batch = {"images": pixels} if views.full == 1 else {"views": torch.stack([pixels] * views.full, dim=1)}
    if views.crops:
        shape = (len(pixels), views.crops, *pixels.shape[1:-2], *views.crop_size)
        batch["crops"] = pixels.new_zeros(shape)
    if run.task.needs_labels:
        batch["targets"] = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
    return batch


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the commit where there is one."""
    found = {name: metadata.version(name) for name in ("vitrail", "torch", "torchvision", "numpy")}
    found["python"] = platform.python_version()
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
