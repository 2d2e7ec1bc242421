"""Diff-ViT: matched to its baselines, the paper's attention in every block, every switch of ViT."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DiffAttention
from torch import nn

from vitrail.components.differential import DifferentialAttention
from vitrail.components.tap import record
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model, model_config
from vitrail.models.diffvit import BASELINES, VARIANTS

# Per layer: 6 x the width of a map for lambdas and norm, less the bias of the output projection.
PARAMETERS = {
    "diffvit_tiny_patch16_224": 5_717_416 + 12 * (6 * 32 - 192),
    "diffvit_small_patch16_224": 22_050_664 + 12 * (6 * 64 - 384),
    "diffvit_base_patch16_224": 86_567_656 + 12 * (6 * 64 - 768),
    "diffvit_cifar": 350_667 + 2 * (6 * 32 - 128),
    "diffvit_cifar_plain": 1_806_538 + 6 * (6 * 48 - 192),
}


def _count(name: str) -> int:
    with torch.device("meta"):
        model = build_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_variant_is_in_the_table() -> None:
    assert set(PARAMETERS) == set(VARIANTS) == set(BASELINES)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_match_the_baseline(name: str) -> None:
    assert _count(name) == PARAMETERS[name]
    assert _count(name) == pytest.approx(_count(BASELINES[name]), rel=0.001)


@pytest.mark.parametrize("name", ["diffvit_cifar", "diffvit_cifar_plain", "diffvit_small_patch16_224"])
def test_multiply_adds_are_those_of_the_baseline(name: str) -> None:
    with torch.device("meta"):
        ours, baseline = build_model(name), build_model(BASELINES[name])
    shape = (3, *ours.config.image_shape)
    assert count_macs(ours, shape) == count_macs(baseline, shape)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_only_the_attention_differs(name: str) -> None:
    ours, baseline = model_config(name), model_config(BASELINES[name])
    differing = {
        field for field in ours.__dataclass_fields__ if getattr(ours, field) != getattr(baseline, field)
    }
    assert differing <= {"attention", "num_heads"}
    if name != "diffvit_tiny_patch16_224":  # its baseline's three heads cannot be halved
        assert 2 * ours.num_heads == baseline.num_heads
        assert ours.map_dim == baseline.map_dim


def test_every_block_has_the_lambda_of_its_depth() -> None:
    model = build_model("diffvit_cifar_plain")
    for layer, block in enumerate(model.blocks):
        assert isinstance(block.attn, DifferentialAttention)
        expected = 0.8 - 0.6 * torch.tensor(-0.3 * layer).exp().item()
        assert block.attn.lambda_init == pytest.approx(expected, abs=1e-6)
    with record(model, "blocks.*.attn.lambda") as seen:
        model(torch.randn(1, 3, 32, 32))
    assert [value.ndim for value in seen.values()] == [0] * 6


def test_logits_equal_a_vit_with_timms_attention() -> None:
    torch.manual_seed(0)
    ours = build_model("diffvit_cifar", num_classes=5).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        expected = ours(images)
        for layer, block in enumerate(ours.blocks):
            theirs = DiffAttention(128, 2, qkv_bias=True, proj_bias=False, depth=layer).eval()
            theirs.load_state_dict(block.attn.state_dict())
            block.attn.forward = lambda x, theirs=theirs, **_: theirs(x)
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)


def test_lambda_learns() -> None:
    torch.manual_seed(0)
    model = build_model("diffvit_cifar")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [block.attn.lambda_now().item() for block in model.blocks]
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
        optimiser.step()
    after = [block.attn.lambda_now().item() for block in model.blocks]
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_any_size_and_number_of_channels() -> None:
    model = build_model("diffvit_cifar", in_chans=1).eval()
    for size in ((28, 28), (17, 50)):
        assert model(torch.randn(1, 1, *size)).shape == (1, 10)
