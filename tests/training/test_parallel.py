"""Two processes are as one: the same loss, step by step, and a checkpoint that one process goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vitrail.config import load_config
from vitrail.training import train

# Without the stem's batch normalisation, whose statistics are those of each process, and without
# augmentation, which each process draws for its own part.
CONFIG = {
    "model.depth": "2",
    "model.patch_embed": "conv",
    "augment.rotate": "0",
    "augment.translate": "0",
    "augment.scale": "0",
    "train.ema": "0.9",
    "train.duration": "20 steps",
    "train.batch_size": "32",
    "train.micro_batch": "9",
    "train.log_every": "1 step",
    "train.eval_every": "10 steps",
    "train.save_every": "10 steps",
    "train.device": "cpu",
}


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIG | {"optim.name": request.param}


@pytest.fixture(scope="module")
def alone(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(load_config("digits-vit", config), folder, command="")
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_as_one(parallel: str, config: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [word for key, value in config.items() for word in (f"--{key}", value)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
        "vitrail", "train", "digits-vit", *flags, "--train.parallel", parallel, "--output", str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert _losses(folder) == pytest.approx(_losses(alone), abs=1e-5)
    ours, theirs = (json.loads((run / "manifest.json").read_text()) for run in (folder, alone))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["test_accuracy"] == theirs["test_accuracy"]
    assert ours["images_seen"] == theirs["images_seen"]

    # One process goes on from the two's checkpoint after step 10.
    (folder / "checkpoints" / "previous.pt").replace(folder / "checkpoints" / "last.pt")
    train(load_config("digits-vit", config | {"train.resume": True}), folder, command="")
    assert json.loads((folder / "manifest.json").read_text())["resumed_at_step"] == 10
    assert _losses(folder) == pytest.approx(_losses(alone), abs=1e-5)
    weights = load_file(folder / "model" / "model.safetensors")
    for name, value in load_file(alone / "model" / "model.safetensors").items():
        found = weights[name]
        if name.endswith("qkv.bias"):
            # Without the keys' part: softmax takes it out again, so its gradient is rounding alone, of which
            # AdamW makes whole steps.
            found, value = (torch.cat([own.chunk(3)[0], own.chunk(3)[2]]) for own in (found, value))
        torch.testing.assert_close(found, value, atol=1e-3, rtol=1e-3)
