"""Parameters and multiply-adds against closed forms."""

from __future__ import annotations

import pytest
import torch

from vitrail.evaluation.cost import (
    count_macs,
    count_parameters,
    count_training_operations,
    macs_by_module,
    without_numbers,
)
from vitrail.models import build_model
from vitrail.tasks import build_task


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


def test_linear_attention_costs_what_its_equations_say() -> None:
    L, D, H, d, hidden = 17, 64, 4, 16, 128  # 4 x 4 patches and the class token; 4 heads of 16
    model = build_model("vit_digits", attention="linear", position="learned", patch_embed="linear", depth=3)
    sums_of_keys_and_values = L * d * d * H  # phi(k)^T v
    mixed = L * d * d * H  # phi(q) times these
    normaliser = L * d * H  # phi(q) times the sum of phi(k)
    block = 4 * L * D * D + 2 * L * D * hidden + sums_of_keys_and_values + mixed + normaliser
    assert count_macs(model, (1, 8, 8)) == 16 * (2 * 2) * D + 3 * block + D * 10


def test_linear_attention_grows_with_the_tokens_not_their_square() -> None:
    model = build_model(
        "vit_digits",
        attention="linear",
        patch_embed="linear",
        class_token=False,
        pool="mean",
        position="none",
    )
    head = 64 * 10
    small = count_macs(model, (1, 8, 8)) - head
    assert count_macs(model, (1, 32, 32)) - head == 16 * small
    softmax = build_model("vit_digits", patch_embed="linear", class_token=False, pool="mean", position="none")
    assert count_macs(softmax, (1, 32, 32)) - head > 16 * (count_macs(softmax, (1, 8, 8)) - head)


def test_differential_attention_costs_both_maps() -> None:
    L, D, depth = 17, 64, 4
    model = build_model("vit_digits", attention="differential", patch_embed="linear")
    # Two maps of half the width and one product with values: as much as one map of the whole width.
    block = 4 * L * D * D + 2 * L * D * 128 + 2 * L * L * D
    assert count_macs(model, (1, 8, 8)) == 16 * 4 * D + depth * block + D * 10


def test_macs_of_the_modules() -> None:
    L, D = 17, 64
    macs = macs_by_module(without_numbers(build_model("vit_digits", patch_embed="linear")), (1, 8, 8))
    assert macs[""] == macs["patch_embed"] + sum(macs[f"blocks.{n}"] for n in range(4)) + macs["head"]
    assert macs["blocks.2"] == macs["blocks.2.attn"] + macs["blocks.2.mlp"]
    assert macs["blocks.2.attn"] == 4 * L * D * D + 2 * L * L * D
    assert macs["blocks.2.attn.qkv"] == 3 * L * D * D
    assert macs["head"] == D * 10
    assert "blocks.2.norm1" not in macs


def test_operations_of_training_steps() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 28, 28)
    macs = count_macs(build_model("vit_mnist_2blk"), (1, 28, 28))
    labels = torch.arange(4)
    classify = build_task("classify", build_model("vit_mnist_2blk")).train()
    before = torch.get_rng_state()
    found = count_training_operations(classify, {"images": images, "targets": labels})
    # Backward is twice forward, but the first layer has no gradient for the images.
    assert 5.5 * macs < found < 6.0 * macs
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in classify.parameters())
    # Two views cost twice as much; half of the patches less than all of them.
    bare = {"num_classes": 0}
    infonce = build_task("infonce", build_model("vit_mnist_2blk", **bare)).train()
    views = torch.stack([images, images], dim=1)
    assert count_training_operations(infonce, {"views": views}) > 1.9 * found
    few, many = (
        build_task("mae", build_model("vit_mnist_2blk", **bare), ratio=ratio, decoder_depth=1).train()
        for ratio in (0.75, 0.25)
    )
    assert count_training_operations(few, {"images": images}) < count_training_operations(
        many, {"images": images}
    )
