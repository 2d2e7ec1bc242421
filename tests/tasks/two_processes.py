"""What one process, or each of several, does in the tests of tasks whose losses look across processes.

`python -m torch.distributed.run --nproc_per_node 2 -m tests.tasks.two_processes FILE` trains every task for
two steps on its part of the batches, as the training loop does, and writes what it found into the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vitrail.torchvision_ops  # noqa: F401  (before anything that imports torchvision)
from vitrail.models import build_model
from vitrail.processes import mean_over_processes, rank, world
from vitrail.tasks.contrastive import InfoNCE, SupCon
from vitrail.tasks.dino import DINO
from vitrail.tasks.task import Task

TASKS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "infonce": (InfoNCE, {"projection_dim": 16}),
    "supcon": (SupCon, {"projection_dim": 16}),
    "dino": (DINO, {"out_dim": 32, "crops": 2, "crop_size": 4, "hold_prototypes": 0.0, "momentum": 0.9}),
}
STEPS = 2
IMAGES = 8


def train(name: str, micro_batch: int = IMAGES) -> dict[str, Tensor]:
    """Loss and gradients of each step, and the weights and buffers after the last."""
    torch.manual_seed(0)
    kind, options = TASKS[name]
    task = kind(build_model("vit_digits", depth=1, patch_embed="conv"), **options)
    task.begin(10)
    replica = nn.parallel.DistributedDataParallel(task) if world() > 1 else task
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        whole = {
            "views": torch.randn(IMAGES, 2, 1, 8, 8),
            "crops": torch.randn(IMAGES, 2, 1, 4, 4),
            "targets": torch.randint(0, 3, (IMAGES,)),
        }
        own = {key: value[rank() :: world()] for key, value in whole.items()}
        count = len(own["views"])
        for first in range(0, count, micro_batch):
            part = {key: value[first : first + micro_batch] for key, value in own.items()}
            loss = replica(part, step)["loss"] * (len(part["views"]) / count)
            loss.backward()
            value = mean_over_processes(loss.detach().clone())
            found[f"loss {step}"] = found.get(f"loss {step}", 0.0) + value
        for key, parameter in task.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                found[f"gradient {step} {key}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
    return found | {f"state {key}": value for key, value in task.state_dict().items()}


def main() -> None:
    """Train in this process of several; the first writes."""
    dist.init_process_group("gloo")
    found = {name: train(name) for name in TASKS}
    if rank() == 0:
        torch.save(found, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
