"""Parameters and multiply-adds against closed forms."""

from __future__ import annotations

import pytest
import torch

from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.models import build_model


# GMACs of linear layers, convolutions and both attention products, from the closed form below.
@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("vit_tiny_patch16_224", 1.254),
        ("vit_small_patch16_224", 4.599),
        ("vit_base_patch32_224", 4.409),
        ("vit_base_patch16_224", 17.564),
        ("vit_base_patch16_384", 55.48),
    ],
)
def test_macs_of_the_published_sizes(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = build_model(name)
    config = model.config
    macs = count_macs(model, (3, *config.image_shape))
    N, D = config.grid[0] * config.grid[1], config.embed_dim
    L = N + 1
    blocks = config.depth * (12 * L * D * D + 2 * L * L * D)
    assert macs == N * D * 3 * config.patch_size**2 + blocks + 1000 * D
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.01)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = build_model("vit_mnist_2blk")
    assert count_parameters(model) == 105_098
    assert count_macs(model, (1, 28, 28)) == 1_795_968
    assert model.training
    assert next(model.parameters()).device.type == "cpu"
