"""Class attention against the attention equation worked out from the block's own input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.components.tap import record, taps
from vitrail.explain import attention_layers, class_attention
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


def expected_maps(weights: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """By hand from weights [B, H, Q, K]: the class token's row, or the mean over the patches that ask."""
    rows = weights[:, :, 0, prefix:] if prefix else weights.mean(dim=2)
    return rows.reshape(*weights.shape[:2], *grid)


@pytest.mark.parametrize(
    ("name", "size", "layers", "prefix"),
    [
        (
            "cct_2_3x2_32",
            32,
            ["classifier.blocks.0.self_attn.weights", "classifier.blocks.1.self_attn.weights"],
            0,
        ),
        ("cait_cifar", 32, [f"blocks.{n}.attn.weights" for n in range(8)], 0),
        ("cait_cifar", 32, [f"blocks_token_only.{n}.attn.weights" for n in range(2)], 1),
        (
            "crossvit_cifar",
            32,
            [f"blocks.{n}.blocks.1.{m}.attn.weights" for n in range(3) for m in range(2)],
            1,
        ),
        ("crossvit_cifar", 32, [f"blocks.{n}.fusion.0.attn.weights" for n in range(3)], 1),
        ("deit_cifar", 48, [f"blocks.{n}.attn.weights" for n in range(6)], 2),
        ("diffvit_cifar", 32, [f"blocks.{n}.attn.weights" for n in range(2)], 0),
        ("pvt_cifar", 32, [f"block3.{n}.attn.weights" for n in range(2)], 1),
        ("pvt_v2_cifar", 48, [f"stages.2.blocks.{n}.attn.weights" for n in range(2)], 0),
        ("swin_mnist_2blk", 28, [f"layers.0.blocks.{n}.attn.weights" for n in range(2)], 0),
    ],
)
def test_every_architecture_shows_what_its_taps_hold(
    name: str, size: int, layers: list[str], prefix: int
) -> None:
    torch.manual_seed(0)
    model = build_model(name).eval()
    found = attention_layers(model, (size, size))
    assert [layer for layer in found if layer in layers] == layers
    pixels = torch.randn(2, model.config.in_chans, size, size)
    with torch.no_grad(), record(model, *layers) as seen:
        grid = model.forward_features(pixels).grid
    for layer in (layers[0], layers[-1]):
        maps = class_attention(model, pixels, found.index(layer), heads="all")
        assert maps.shape[2:] == grid
        torch.testing.assert_close(maps, expected_maps(seen[layer], prefix, grid))


def test_layers_that_see_another_grid_are_left_out() -> None:
    fine = attention_layers(build_model("crossvit_cifar"))
    assert len(fine) == 9  # 3 of 3 fine blocks and 3 class tokens that ask them are not there
    assert not [name for name in fine if ".blocks.0." in name or "fusion.1" in name]
    assert len(attention_layers(build_model("pvt_cifar"))) == 2  # of 6: the first four have reduced keys


def test_windows_have_no_maps_and_say_so() -> None:
    model = build_model("swin_cifar").eval()
    assert attention_layers(model) == []
    with pytest.raises(
        ValueError, match=r"Swin has no attention among all tokens at 32x32 pixels: its 6 .*windows"
    ):
        class_attention(model, torch.randn(1, 3, 32, 32))
    # In the second of two stages 4x4 tokens are left: one window holds them all.
    assert attention_layers(model, (16, 16)) == [f"layers.1.blocks.{n}.attn.weights" for n in range(4)]


def test_looking_for_layers_leaves_the_model_as_it_is() -> None:
    model = tiny().train()
    attention_layers(model)
    assert model.training
    assert next(model.parameters()).device.type == "cpu"
    assert not any(tap.watched for tap in taps(model).values())
