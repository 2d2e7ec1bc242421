"""Two processes are as one: same loss, same gradients, same centre, with the same images in all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tasks.two_processes import TASKS, train
from torch import Tensor


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    file = tmp_path_factory.mktemp("two") / "found.pt"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.tasks.two_processes", str(file),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_are_as_one(name: str, of_two: dict[str, dict[str, Tensor]]) -> None:
    alone, together = train(name), of_two[name]
    assert alone.keys() == together.keys()
    assert any(key.startswith("gradient") for key in alone)
    for key, value in alone.items():
        torch.testing.assert_close(
            together[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_dino_in_micro_batches_is_dino_at_once() -> None:
    whole = train("dino")
    for key, value in train("dino", micro_batch=3).items():
        torch.testing.assert_close(whole[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
