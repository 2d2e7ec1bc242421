"""Out of memory is recognised, and what fits is found; with a real limit on a process's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from vitrail.models import build_model
from vitrail.tasks import Classify
from vitrail.training.memory import (
    fitting_micro_batch,
    is_out_of_memory,
    largest_micro_batch,
    out_of_memory_message,
)


def test_errors_of_torch_numpy_and_python_are_recognised() -> None:
    for ask in (
        lambda: torch.empty(2**50),
        lambda: np.zeros(2**50),
        lambda: bytearray(2**50),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for the convolution"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


@pytest.mark.parametrize(
    ("start", "limit", "found", "tried"),
    [
        (128, 128, 128, [128]),
        (128, 40, 32, [128, 64, 32]),
        (100, 13, 13, [100, 50, 25, 13]),
        (5, 1, 1, [5, 3, 2, 1]),
    ],
)
def test_halving(start: int, limit: int, found: int, tried: list[int]) -> None:
    seen: list[int] = []

    def try_step(size: int) -> None:
        seen.append(size)
        if size > limit:
            torch.empty(2**50)

    assert largest_micro_batch(try_step, start) == found
    assert seen == tried


def test_halving_ends_with_one_image_and_at_other_errors() -> None:
    with pytest.raises(ValueError, match=r"single image: take --train\.recompute true"):
        largest_micro_batch(lambda size: torch.empty(2**50), 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        largest_micro_batch(lambda size: torch.ones(2, 3) @ torch.ones(2, 3), 4)


def test_a_batch_that_fits_is_taken_whole_and_nothing_changes() -> None:
    task = Classify(build_model("vit_mnist_2blk")).train()
    optimizer = torch.optim.AdamW(task.parameters())
    before = [own.clone() for own in task.parameters()]
    batch = {"images": torch.randn(6, 1, 28, 28), "targets": torch.arange(6)}
    assert fitting_micro_batch(task, batch, optimizer) == 6
    assert all(torch.equal(own, old) for own, old in zip(task.parameters(), before, strict=True))
    assert all(own.grad is None for own in task.parameters())
    assert not optimizer.state


def test_messages_are_one_line_with_what_to_do() -> None:
    fresh = out_of_memory_message(128, 128)
    assert fresh.startswith("out of memory with a batch of 128 images: take --train.micro_batch 64 (or auto)")
    assert "--train.recompute true" in fresh
    known = out_of_memory_message(128, 64, fits=16)
    assert "a batch of 128 images, 64 at a time: take --train.micro_batch 16, which fits" in known
    assert "micro_batch" not in out_of_memory_message(128, 1)
    assert not any("\n" in text for text in (fresh, known))


_LIMITED = """
import json, resource, sys
import torch
from vitrail.models import build_model
from vitrail.tasks import Classify
from vitrail.training.memory import fitting_micro_batch, is_out_of_memory

task = Classify(build_model("vit_mnist_2blk")).train()
optimizer = torch.optim.AdamW(task.parameters())
batch = {"images": torch.zeros(4096, 1, 28, 28), "targets": torch.zeros(4096, dtype=torch.long)}

def step(size):
    task({name: value[:size] for name, value in batch.items()}, 0)["loss"].backward()

step(1)
for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        used = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20,) * 2)
try:
    step(4096)
    caught = None
except (RuntimeError, MemoryError) as error:
    caught = is_out_of_memory(error)
optimizer.zero_grad()
fits = fitting_micro_batch(task, batch, optimizer)
step(fits)
optimizer.step()
step(fits)
try:
    step(4 * fits)
    larger = None
except (RuntimeError, MemoryError) as error:
    larger = is_out_of_memory(error)
print(json.dumps({"caught": caught, "fits": fits, "larger": larger}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on a process's memory needs Linux")
def test_under_a_real_limit_the_micro_batch_that_was_found_fits_and_much_larger_ones_do_not() -> None:
    # Else glibc keeps what was freed, in pieces that depend on chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["caught"] is True
    assert found["fits"] in {256, 512, 1024, 2048}
    assert found["larger"] is True
