"""Runs that several tests of this folder look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrail.config import load_config
from vitrail.training import train

TINY = {
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "train.duration": "2 epochs",
    "train.eval_every": "1 epoch",
    "train.batch_size": 256,
    "train.device": "cpu",
}
"""Over a recipe for digits: a run of a second."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs shallow/seed0 and shallow/seed1, deep, and masked (which is no classifier)."""
    folder = tmp_path_factory.mktemp("finished")
    for name, recipe, changes in (
        ("shallow/seed0", "digits-vit", {"train.seed": 0}),
        ("shallow/seed1", "digits-vit", {"train.seed": 1}),
        ("deep", "digits-vit", {"model.depth": 2, "optim.lr": 1e-3}),
        ("masked", "digits-mae", {}),
    ):
        train(load_config(recipe, TINY | changes), folder / name, command="test")
    return folder
