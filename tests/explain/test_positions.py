"""Similarity of position embeddings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitrail.explain import position_similarity
from vitrail.models import build_model


@pytest.mark.parametrize("position", ["learned", "learned_2d", "sincos_2d"])
def test_cosine_of_every_pair(position: str) -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits", position=position, embed_dim=16, num_heads=2, depth=1)
    found = position_similarity(model, (4, 4))
    table = model.position_table((4, 4))
    assert table is not None
    table = table.detach()
    assert found.shape == (4, 4, 4, 4)
    for row, column, other_row, other_column in [(0, 0, 3, 2), (1, 2, 1, 3), (2, 1, 0, 0)]:
        expected = F.cosine_similarity(table[4 * row + column], table[4 * other_row + other_column], dim=0)
        torch.testing.assert_close(found[row, column, other_row, other_column], expected)
    torch.testing.assert_close(found.reshape(16, 16).diagonal(), torch.ones(16))


def test_another_grid() -> None:
    model = build_model("vit_digits", depth=1)
    assert position_similarity(model, (3, 5)).shape == (3, 5, 3, 5)


@pytest.mark.parametrize("position", ["none", "relative", "rotary"])
def test_nothing_added(position: str) -> None:
    model = build_model("vit_digits", depth=1, position=position)
    with pytest.raises(ValueError, match="adds no position embedding"):
        position_similarity(model, (4, 4))
