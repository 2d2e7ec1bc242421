"""Several processes on one run: who is who, and numbers that are right on all of them.

`torchrun --nproc_per_node N -m vitrail train ...` starts the same command N times; every process takes its
part of each global batch, and only the first one writes files. In a single process every function here does
nothing and costs nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of each number over the processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    if world() == 1:
        return flag
    found = torch.tensor([float(flag)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def gather_rows(rows: Tensor) -> Tensor:
    """Equally many rows [n, K] of each of W processes -> [n * W, K], row i of process r at i * W + r."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)  # [n, W, K] -> [n * W, K]


def own_rows(count: int) -> list[int]:
    """Which of `count` rows this process computes: every W-th, and the first ones again where some lack.

    Every process gets equally many, because a sharded model needs all processes in every forward pass.
    """
    processes = world()
    each = -(-count // processes)
    return [(number * processes + rank()) % count for number in range(each)]
