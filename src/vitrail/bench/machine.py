"""Where times were taken."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch


def machine(*packages: str, device: torch.device | None = None) -> dict[str, Any]:
    """The machine and the versions that decide the times.

    Args:
        packages: To name besides torch and what Vitrail itself runs on.
        device: That computes; the CPU when not given.
    """
    # Slow to import, and a process that measures memory has no use for it.
    from vitrail.training.manifest import hardware, versions

    found = hardware(device or torch.device("cpu"))
    gpu = {"gpu": found["gpu"]} if "gpu" in found else {}
    return {
        "cpu": found["cpu"].rsplit(",", 1)[0],
        **gpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions() | {name: metadata.version(name) for name in packages},
    }
