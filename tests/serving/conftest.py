"""A small classifier in a model folder."""

from pathlib import Path

import pytest
import torch

from vitrail.datasets import Preprocessing
from vitrail.models import build_model
from vitrail.pretrained import save_model


def write_model(folder: Path, *, in_chans: int = 1, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    statistics = (0.13,) * in_chans, (0.31,) * in_chans
    save_model(
        folder,
        build_model("vit_mnist_2blk", in_chans=in_chans),
        name="vit_mnist_2blk",
        classes=("zero, nil", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        preprocessing=Preprocessing((28, 28), in_chans, *statistics).to_dict(),
    )
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serving") / "model", in_chans=3)
