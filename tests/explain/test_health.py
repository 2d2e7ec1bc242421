"""Collapse is seen where it is made, and not where it is not."""

from __future__ import annotations

import pytest
import torch

from vitrail.components.tap import edit
from vitrail.explain.health import attention_collapse, effective_rank, finding
from vitrail.models import build_model


def test_effective_rank_of_known_spectra() -> None:
    torch.manual_seed(0)
    assert effective_rank(torch.ones(50, 8)) == 0.0
    assert effective_rank(torch.randn(50, 1) @ torch.randn(1, 8)) == pytest.approx(1 / 8, rel=1e-3)
    assert effective_rank(torch.randn(100_000, 8)) == pytest.approx(1.0, abs=0.01)


def test_uniform_and_single_token_attention_are_told_apart() -> None:
    torch.manual_seed(0)
    model = build_model("vit_mnist_2blk").eval()
    images = torch.randn(8, 1, 28, 28)
    fresh = attention_collapse(model, images)
    assert list(fresh) == ["blocks.0", "blocks.1"]
    assert all(0.5 < own["entropy"] <= 1.0 and 0.05 < own["rank"] < 1.0 for own in fresh.values())
    assert all(finding(own) is None for own in fresh.values())
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()  # all scores equal
    uniform = attention_collapse(model, images)["blocks.0"]
    assert uniform["entropy"] == pytest.approx(1.0)
    assert "uniform" in str(finding(uniform))
    with edit(model, {"blocks.0.attn.weights": lambda w: torch.eye(17).expand_as(w)}):
        single = attention_collapse(model, images)["blocks.0"]
    assert single["entropy"] == pytest.approx(0.0)
    assert "single tokens" in str(finding(single))
    with edit(model, {"blocks.0.out": torch.zeros_like}):
        flat = attention_collapse(model, images)["blocks.0"]
    assert flat["rank"] == 0.0
    assert "alike" in str(finding({"rank": flat["rank"]}))
