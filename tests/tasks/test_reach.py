"""What a loss cannot reach is found and frozen, and asking leaves no trace."""

from __future__ import annotations

import pytest
import torch

from vitrail.models import build_model
from vitrail.tasks.reach import blank_features, freeze_unreached, one_patch_features


@pytest.mark.parametrize("name", ["cait_cifar", "crossvit_cifar", "cct_2_3x2_32", "swin_cifar", "pvt_cifar"])
def test_frozen_is_what_gets_no_gradient(name: str) -> None:
    model = build_model(name)
    features = blank_features(model)
    wanted = dict(model.named_parameters())
    grads = torch.autograd.grad(features.patches.sum(), list(wanted.values()), allow_unused=True)
    reached = {key for key, grad in zip(wanted, grads, strict=True) if grad is not None}
    freeze_unreached(model, blank_features(model).patches)
    assert {key for key, own in wanted.items() if own.requires_grad} == reached
    assert any(key.startswith(model.head_names) for key in set(wanted) - reached)


def test_what_the_user_froze_stays_frozen() -> None:
    model = build_model("vit_mnist_2blk")
    model.patch_embed.requires_grad_(False)
    freeze_unreached(model, blank_features(model).patches)
    assert not any(own.requires_grad for own in model.patch_embed.parameters())
    assert all(own.requires_grad for own in model.blocks.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_asking_changes_nothing(training: bool) -> None:
    """No random numbers are drawn, no batch is counted, and modes stay."""
    model = build_model("vit_cifar", drop=0.1, drop_path=0.2).train(training)  # with batch normalisation
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    blank_features(model)
    assert one_patch_features(model, "mae").patches.shape[1] == 1
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training == training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
