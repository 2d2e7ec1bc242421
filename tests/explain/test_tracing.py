"""Causal tracing: against restoring tokens one by one by hand, for every architecture with one sequence."""

from __future__ import annotations

import pytest
import torch
from tests.explain.test_attention import lively

from vitrail.components.tap import edit, record, taps
from vitrail.explain.tracing import causal_trace


def halves(model_chans: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(1, model_chans, *shape, generator=torch.Generator().manual_seed(0))
    damaged = image.clone()
    damaged[..., : shape[0] // 2, :] = 0
    return image, damaged


@pytest.mark.parametrize(
    "name", ["vit_cifar", "deit_cifar", "swin_cifar", "pvt_cifar", "diffvit_cifar", "cct_2_3x2_32"]
)
def test_equals_restoring_by_hand(name: str) -> None:
    model = lively(name, {}).eval()
    image, damaged = halves(model.config.in_chans, (30, 44))
    found = causal_trace(model, image, damaged, target=3, batch_size=7)
    with torch.no_grad():
        assert found.whole == pytest.approx(float(model(image).softmax(1)[0, 3]), abs=1e-6)
        assert found.damaged == pytest.approx(float(model(damaged).softmax(1)[0, 3]), abs=1e-6)
        names = model.block_names()
        assert [layer.block for layer in found.layers] == list(names)
        for number in (0, len(names) - 1):
            tap = f"{names[number]}.out"
            with record(model, tap) as seen:
                model(image)
            state, layer = seen[tap][0], found.layers[number]
            every = torch.cat([layer.prefix, layer.patches.flatten()])
            assert len(every) == len(state)
            for place in (0, 1, len(state) - 1):

                def restore(
                    tokens: torch.Tensor, state: torch.Tensor = state, place: int = place
                ) -> torch.Tensor:
                    return torch.cat(
                        [tokens[:, :place], state[None, place : place + 1], tokens[:, place + 1 :]], 1
                    )

                with edit(model, {tap: restore}):
                    by_hand = float(model(damaged).softmax(1)[0, 3])
                assert float(every[place]) == pytest.approx(by_hand - found.damaged, abs=1e-6)


def test_the_class_token_of_the_last_block_brings_all_back_and_patches_nothing() -> None:
    model = lively("deit_cifar", {"distillation": False}).eval()
    image, damaged = halves(3, (32, 32))
    found = causal_trace(model, image, damaged)
    last = found.layers[-1]
    assert float(last.prefix[0]) == pytest.approx(found.whole - found.damaged, abs=1e-6)
    assert last.patches.abs().max() < 1e-6


def test_blocks_of_the_class_token_alone() -> None:
    model = lively("cait_cifar", {}).eval()
    image, damaged = halves(3, (32, 32))
    found = causal_trace(model, image, damaged)
    assert found.layers[0].prefix.shape == (0,)
    assert found.layers[-1].prefix.shape == (1,)
    assert found.layers[-1].patches.abs().max() == 0
    assert float(found.layers[-1].prefix[0]) == pytest.approx(found.whole - found.damaged, abs=1e-6)


def test_bad_input_leaves_no_hooks() -> None:
    model = lively("crossvit_cifar", {}).eval()
    image, damaged = halves(3, (32, 32))
    with pytest.raises(ValueError, match=r"CrossViT has no tap .*: its blocks pass on several sequences"):
        causal_trace(model, image, damaged)
    vit = lively("vit_cifar", {}).eval()
    with pytest.raises(ValueError, match="expected one image and its damaged copy"):
        causal_trace(vit, image, damaged[..., :16])
    with pytest.raises(ValueError, match="no class 10"):
        causal_trace(vit, image, damaged, target=10)
    assert not any(tap.watched for tap in taps(vit).values())
