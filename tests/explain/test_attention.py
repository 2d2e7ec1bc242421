"""Class attention against the attention equation worked out from the block's own input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.explain import class_attention
from vitrail.models import Encoder, build_model


def tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    model = build_model("vit_digits", **({"embed_dim": 16, "depth": 3, "num_heads": 2} | changes)).eval()
    for parameter in model.parameters():  # fresh weights attend almost evenly, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def images(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(3, 1, height, width, generator=torch.Generator().manual_seed(1))


def weights_by_hand(model: Encoder, layer: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) [B, H, L, L] from what enters the attention of a block."""
    block = model.get_submodule(f"blocks.{layer}")
    seen = []
    handle = block.get_submodule("norm1").register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(images())
        handle.remove()
        D = seen[0].shape[2]
        q, k, _ = block.get_submodule("attn.qkv")(seen[0]).split(D, dim=2)
        d = D // 2
        rows = []
        for head in range(2):
            own = slice(head * d, (head + 1) * d)
            rows.append((q[:, :, own] @ k[:, :, own].transpose(1, 2) / d**0.5).softmax(dim=2))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("layer", "number"), [(-1, 2), (0, 0), (1, 1)])
@pytest.mark.parametrize("registers", [0, 2])
def test_class_token_rows(layer: int, number: int, registers: int) -> None:
    model = tiny(registers=registers)
    expected = weights_by_hand(model, number)[:, :, 0, 1 + registers :].reshape(3, 2, 4, 4)
    found = class_attention(model, images(), layer, heads="all")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(class_attention(model, images(), layer), expected.mean(dim=1))
    torch.testing.assert_close(class_attention(model, images(), layer, heads="max"), expected.amax(dim=1))
    torch.testing.assert_close(class_attention(model, images(), layer, heads=1), expected[:, 1])
    assert found.sum(dim=(2, 3)).max() < 1  # the class token and the registers get something too


@pytest.mark.parametrize("registers", [0, 1])
def test_without_class_token_what_patches_receive(registers: int) -> None:
    model = tiny(class_token=False, pool="mean", registers=registers)
    weights = weights_by_hand(model, 2)[:, :, registers:, registers:]
    expected = weights.mean(dim=2).reshape(3, 2, 4, 4)
    torch.testing.assert_close(class_attention(model, images(), heads="all"), expected)


def test_grid_of_a_wide_image() -> None:
    assert class_attention(tiny(), images(8, 12)).shape == (3, 4, 6)


def test_bad_layer_and_head() -> None:
    with pytest.raises(ValueError, match="no layer 3: expected -3 to 2"):
        class_attention(tiny(), images(), layer=3)
    with pytest.raises(ValueError, match="-2 to 1, got 2"):
        class_attention(tiny(), images(), heads=2)
    with pytest.raises(ValueError, match="got 'median'"):
        class_attention(tiny(), images(), heads="median")  # type: ignore[arg-type]
    model = tiny()
    model.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no attention among all tokens"):
        class_attention(model, images())
