"""Heads: distances that are known, entropies that are known, and a head that is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.explain.test_attention import ALL, full_matrices, images, lively, recorded, tiny
from torch import Tensor

from vitrail.components.tap import edit, taps
from vitrail.explain.heads import even_distance, head_importance, head_statistics


def by_hand(model: Any, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Distance and entropy from full matrices, patch by patch."""
    flow, weights, _ = recorded(model, pixels)
    found = {}
    for step in flow.attentions:
        matrices = full_matrices(step, weights[step.name].abs())
        branch, tokens = step.asked or (step.branch, step.tokens)
        full = matrices[branch][:, :, :, tokens.prefix :]
        centres = [
            [((a + b) / 2, (c + d) / 2) for a, b in own.cells.rows for c, d in own.cells.columns]
            for own in (step.tokens, tokens)
        ]
        far = []
        if not step.class_only:
            for number, (row, column) in enumerate(centres[0]):
                own = full[:, :, step.tokens.prefix + number]
                distances = torch.tensor([((row - r) ** 2 + (column - c) ** 2) ** 0.5 for r, c in centres[1]])
                far.append((own * distances).sum(dim=-1) / own.sum(dim=-1))
        found[step.name] = {"distance": torch.stack(far).mean(dim=(0, 1)) if far else torch.empty(0)}
    return found


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_distance_equals_a_slow_loop(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)
    pixels = torch.randn(2, model.config.in_chans, 22, 36)
    expected = by_hand(model, pixels)
    for own in head_statistics(model, [pixels[:1], pixels[1:]]):
        if len(expected[own.layer]["distance"]):
            torch.testing.assert_close(own.distance, expected[own.layer]["distance"], atol=1e-4, rtol=1e-4)
        else:
            assert own.distance.isnan().all()
        assert ((own.position >= 0) & (own.position <= 1)).all()
        assert ((own.entropy >= 0) & (own.entropy <= 1 + 1e-5)).all()
    assert not any(tap.watched for tap in taps(model).values())


def test_uniform_attention_has_the_distance_of_geometry() -> None:
    model = tiny(class_token=False, pool="mean")
    with edit(model, {"*.attn.scores": torch.zeros_like}):
        found = head_statistics(model, [images()])
    centres = [(1 + 2 * r, 1 + 2 * c) for r in range(4) for c in range(4)]
    mean = sum(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in centres for c, d in centres) / 256
    for own in found:
        torch.testing.assert_close(own.distance, torch.full((2,), mean), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.entropy, torch.ones(2))
        torch.testing.assert_close(own.prefix, torch.zeros(2), atol=1e-6, rtol=0)


WITH_SCORES = [own for own in ALL if own[1].get("attention") is None]


@pytest.mark.parametrize(("name", "changes"), WITH_SCORES)
def test_even_distance_is_that_of_equal_scores(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)

    def alike(scores: Tensor) -> Tensor:  # what windows forbid stays forbidden
        return torch.where(scores.isfinite(), 0.0, scores)

    expected = even_distance(model, (22, 36))
    with edit(model, {"*.scores*": alike}):
        found = head_statistics(model, [torch.randn(1, model.config.in_chans, 22, 36)])
    assert list(expected) == [own.layer for own in found]
    for own in found:
        distance = torch.full_like(own.distance, expected[own.layer])
        torch.testing.assert_close(own.distance, distance, atol=1e-3, rtol=1e-4, equal_nan=True)


def test_what_looks_at_places_and_what_at_contents() -> None:
    """The same random map in every image, and another one in each."""
    model = tiny()
    generator = torch.Generator().manual_seed(3)
    same = torch.randn(1, 2, 17, 17, generator=generator).expand(40, -1, -1, -1)
    other = torch.randn(40, 2, 17, 17, generator=generator)
    pixels = torch.randn(40, 1, 8, 8, generator=generator)
    edits = {"blocks.0.attn.scores": lambda _: same, "blocks.1.attn.scores": lambda _: other}
    with edit(model, edits):
        places, contents, _ = head_statistics(model, [pixels])
    assert places.position.min() > 0.999
    assert contents.position.max() < 0.05


def test_a_head_whose_output_is_not_read_is_not_needed() -> None:
    model = tiny(embed_dim=16)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        model.get_submodule("blocks.1.attn.proj").weight[:, 8:] = 0.0  # the second of two heads
    found = head_importance(model, [(images(), labels)])
    assert list(found) == [f"blocks.{n}.attn" for n in range(3)]
    assert found["blocks.1.attn"].shape == (2, 2)
    torch.testing.assert_close(found["blocks.1.attn"][1], torch.zeros(2))
    assert found["blocks.1.attn"][0, 1] != 0
    logits = model(images()).log_softmax(dim=1)
    with torch.no_grad():
        kept = model.get_submodule("blocks.0.attn.proj").weight[:, :8].clone()
        model.get_submodule("blocks.0.attn.proj").weight[:, :8] = 0.0
        without = model(images()).log_softmax(dim=1)
        model.get_submodule("blocks.0.attn.proj").weight[:, :8] = kept
    expected = (logits - without)[range(3), labels].mean()
    torch.testing.assert_close(found["blocks.0.attn"][0, 1], expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "changes"), [ALL[n] for n in (0, 5, 6, 8, 9, 12)])
def test_every_architecture_loses_heads(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)
    pixels = torch.randn(2, model.config.in_chans, 32, 32)
    found = head_importance(model, [(pixels, torch.tensor([1, 2]))], layers=[0, -1])
    assert len(found) == 2
    assert all(own.isfinite().all() and own[:, 1].abs().max() > 0 for own in found.values())


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        head_statistics(tiny(), [])
    with pytest.raises(ValueError, match="images of one size are needed"):
        head_statistics(tiny(), [images(), images(8, 12)])
    with pytest.raises(ValueError, match="at least one batch"):
        head_importance(tiny(), [])
