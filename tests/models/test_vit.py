"""ViT: exact counts, timm's logits, every switch, every size."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from vitrail.components.tap import record
from vitrail.models import build_model, list_models, model_config
from vitrail.models.vit import VARIANTS

# numbers.md 4.2, and timm for the rest.
PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_tiny_patch16_384": 5_790_376,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch16_384": 22_196_584,
    "vit_small_patch8_224": 22_055_272,
    "vit_small_patch32_224": 22_878_952,
    "vit_small_patch32_384": 22_915_432,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch8_224": 86_576_872,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch32_384": 88_297_192,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "vit_large_patch32_224": 306_535_400,
    "vit_large_patch32_384": 306_632_680,
    "vit_huge_patch14_224": 632_045_800,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_base_patch14_dinov2": 86_579_712,
    "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_large_patch14_dinov2": 304_367_616,
    "vit_large_patch14_reg4_dinov2": 304_370_688,
    "vit_digits": None,
    "vit_mnist_2blk": 105_098,
    "vit_mnist_small": None,
    "vit_cifar": None,
    "vit_cifar_plain": 1_806_538,
}
AT_MOST = {
    "vit_mnist_small": 206_000,
    "vit_cifar": 2_000_000,
    "vit_cifar_plain": 2_000_000,
    "vit_digits": 206_000,
}
POSITIONS = ("none", "learned", "learned_2d", "sincos_1d", "sincos_2d", "relative", "rotary")


def _packed_swiglu(in_features: int, **options: Any) -> torch.nn.Module:
    """timm counts gate and value together, as twice the hidden width."""
    return timm.layers.SwiGLUPacked(in_features, **options | {"act_layer": torch.nn.SiLU})


def test_every_variant_is_in_the_table() -> None:
    assert set(PARAMETERS) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = PARAMETERS[name]
    assert count == expected if expected else count <= AT_MOST[name]


@pytest.mark.parametrize(
    ("name", "changes", "theirs", "size"),
    [
        ("vit_tiny_patch16_224", {}, {}, (224, 224)),
        ("vit_tiny_patch16_384", {"depth": 3}, {"depth": 3}, (384, 384)),
        ("vit_small_patch16_224", {"depth": 2}, {"depth": 2, "dynamic_img_size": True}, (160, 240)),
        (
            "vit_base_patch32_224",
            {"depth": 2},
            {"depth": 2, "dynamic_img_size": True, "dynamic_img_pad": True},
            (100, 300),
        ),
        (
            "vit_small_patch32_224",
            {"depth": 2, "in_chans": 1, "num_classes": 7},
            {"depth": 2, "in_chans": 1, "num_classes": 7},
            (224, 224),
        ),
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "class_token": False, "pool": "mean", "fc_norm": True},
            {"depth": 2, "class_token": False, "global_pool": "avg"},
            (224, 224),
        ),
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "registers": 4, "prefix_position": False, "layer_scale": 0.3, "qk_norm": True},
            {"depth": 2, "reg_tokens": 4, "no_embed_class": True, "init_values": 0.3, "qk_norm": True},
            (224, 224),
        ),
        ("vit_tiny_patch16_224", {"depth": 2, "registers": 2}, {"depth": 2, "reg_tokens": 2}, (224, 224)),
        (
            "vit_tiny_patch16_224",
            {"depth": 2, "mlp": "swiglu"},
            {"depth": 2, "mlp_layer": _packed_swiglu, "mlp_ratio": 8.0},
            (224, 224),
        ),
    ],
)  # fmt: skip
def test_logits_equal_timm_with_its_weights(
    name: str, changes: dict, theirs: dict, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    peer = timm.create_model(name, **theirs).eval()
    for parameter in peer.parameters():  # so that zero-initialised parts count too
        torch.nn.init.normal_(parameter, std=0.05)
    ours = build_model(name, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, ours.config.in_chans, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_intermediate_features_equal_timm() -> None:
    peer = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
    ours = build_model("vit_tiny_patch16_224", depth=4).eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        theirs = peer.forward_intermediates(images, indices=[1, 3], norm=True, intermediates_only=True)
        layers = ours.forward_features(images, layers=(1, -1)).layers
    torch.testing.assert_close(layers[1].map(), theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(layers[-1].map(), theirs[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("patch_embed", ["conv", "linear", "overlap", "stem"])
@pytest.mark.parametrize(("pool", "class_token"), [("cls", True), ("mean", False), ("seqpool", True)])
def test_every_switch_trains_at_odd_sizes(
    position: str, patch_embed: str, pool: str, class_token: bool
) -> None:
    model = build_model(
        "vit_cifar_plain", position=position, patch_embed=patch_embed, pool=pool, class_token=class_token,
        depth=2, embed_dim=32, registers=1, in_chans=2, drop=0.1, attn_drop=0.1, drop_path=0.2,
        layer_scale=0.1,
    )  # fmt: skip
    for size in ((32, 32), (17, 40)):
        model.zero_grad()
        logits = model(torch.randn(3, 2, *size))
        assert logits.shape == (3, 10)
        logits.square().mean().backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        # A class token that is not pooled still takes part in attention; nothing else may be idle.
        assert not without


@pytest.mark.parametrize("position", POSITIONS)
def test_fused_equals_explicit_for_every_position(position: str) -> None:
    torch.manual_seed(0)
    model = build_model("vit_cifar_plain", position=position, depth=2, registers=1).eval()
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        fused = model(images)
        with record(model, "blocks.*.attn.weights") as seen:
            explicit = model(images)
    torch.testing.assert_close(fused, explicit, atol=1e-5, rtol=0)
    for weights in seen.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def _shuffle_patches(images: torch.Tensor, patch: int, order: torch.Tensor) -> torch.Tensor:
    cut = torch.nn.functional.unfold(images, patch, stride=patch)
    return torch.nn.functional.fold(cut[:, :, order], images.shape[-2:], patch, stride=patch)


@pytest.mark.parametrize("position", POSITIONS)
def test_patch_order_matters_exactly_where_positions_are_on(position: str) -> None:
    torch.manual_seed(0)
    model = build_model("vit_cifar_plain", position=position, pool="mean", class_token=False, depth=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    shuffled = _shuffle_patches(images, 4, torch.randperm(64))
    with torch.no_grad():
        difference = (model(images) - model(shuffled)).abs().max()
    assert (difference < 1e-5) == (position == "none")


@pytest.mark.parametrize("position", POSITIONS)
def test_keeping_all_patches_in_any_order_changes_nothing(position: str) -> None:
    torch.manual_seed(0)
    model = build_model("vit_cifar_plain", position=position, depth=2, registers=1).eval()
    images = torch.randn(2, 3, 32, 24)
    order = torch.stack([torch.randperm(48), torch.randperm(48)])
    with torch.no_grad():
        full, kept = model.forward_features(images), model.forward_features(images, keep=order)
    torch.testing.assert_close(kept.prefix, full.prefix, atol=1e-5, rtol=0)
    expected = full.patches.gather(1, order[:, :, None].expand(-1, -1, 192))
    torch.testing.assert_close(kept.patches, expected, atol=1e-5, rtol=0)


def test_keep_hides_what_was_dropped() -> None:
    model = build_model("vit_cifar_plain", depth=2).eval()
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, :4, 4:8] = 9.0  # patch 1
    keep = torch.tensor([[0, 2, 33]])
    with torch.no_grad():
        kept = model.forward_features(images, keep=keep)
        assert torch.equal(kept.patches, model.forward_features(other, keep=keep).patches)
    assert kept.patches.shape == (1, 3, 192)
    with pytest.raises(ValueError, match="3 of 64 patches were kept"):
        kept.map()


def test_fill_replaces_patches_before_positions() -> None:
    model = build_model("vit_cifar_plain", depth=1).eval()
    images, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 1] = True
    other = images.clone()
    other[:, :, :4, 4:8] = 9.0
    with torch.no_grad():
        a = model.forward_features(images, fill=(mask, torch.ones(192)))
        b = model.forward_features(other, fill=(mask, torch.ones(192)))
        plain = model.forward_features(images)
    assert torch.equal(a.patches, b.patches)
    assert not torch.allclose(a.patches, plain.patches)


def test_features_know_their_geometry() -> None:
    features = build_model("vit_cifar_plain", depth=1, registers=2).forward_features(
        torch.randn(2, 3, 16, 40)
    )
    assert features.grid == (4, 10)
    assert features.prefix.shape == (2, 3, 192)
    assert torch.equal(features.map()[1, :, 2, 7], features.patches[1, 27])


def test_new_head_leaves_all_else_bit_identical() -> None:
    model = build_model("vit_mnist_2blk")
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 64)


def test_mlp_head_and_layer_scale_are_really_there() -> None:
    model = build_model("vit_mnist_2blk", head="mlp", layer_scale=0.25)
    assert len(model.head) == 3
    assert (model.blocks[1].ls2.gamma == 0.25).all()
    probabilities = model(torch.randn(4, 1, 28, 28)).softmax(1)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_initialisation_is_as_documented() -> None:
    model = build_model("vit_small_patch16_224", depth=2)
    xavier = (2 / (384 + 1536)) ** 0.5
    assert model.blocks[1].mlp.fc1.weight.std().item() == pytest.approx(xavier, rel=0.05)
    assert build_model("vit_tiny_patch16_224", depth=1, init="trunc_normal").blocks[
        0
    ].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("position", ["learned", "learned_2d", "relative"])
def test_tokens_and_positions_have_no_weight_decay(position: str) -> None:
    names = build_model("vit_cifar_plain", position=position, registers=1).no_weight_decay()
    assert {"cls_token", "reg_token"} <= names
    assert any("pos_embed" in name or "bias_table" in name for name in names)
    assert not any("qkv.weight" in name or "fc1.weight" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depht": 2}, "no option 'depht': did you mean depth"),
        ({"depth": "two"}, "option depth: .*got 'two'"),
        ({"position": "polar"}, "option position"),
        ({"num_heads": 5}, "embed_dim 192 is not divisible by num_heads 5"),
        ({"class_token": False}, "pool 'cls' needs class_token"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"img_size": (32, 0)}, r"img_size must be at least 1, got \(32, 0\)"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive, got nan"),
        ({"mlp_ratio": 1e-9}, "mlp_ratio 1e-09 leaves no hidden layer of an MLP that is 192 wide"),
        ({"attn_drop": 1.0}, r"attn_drop must lie in \[0, 1\), got 1.0"),
        ({"position": "rotary", "num_heads": 96}, "divisible by 4, got 2"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("vit_cifar_plain", **changes)
    assert "\n" not in str(error.value)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean vit_mnist_2blk"):
        build_model("vit_mnist_2block")


def test_layers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 2 of a model with 2 blocks"):
        build_model("vit_mnist_2blk").forward_features(torch.randn(1, 1, 28, 28), layers=(2,))


def test_short_names_and_patterns() -> None:
    assert model_config("vit_base") == model_config("vit_base_patch16_224")
    assert list_models("vit_huge*") == ["vit_huge_patch14_224"]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "changes", [{}, {"registers": 2, "qkv_bias": False, "qk_norm": True, "fc_norm": True}]
)
def test_logits_from_the_class_token_alone_equal_the_full_ones(position: str, changes: dict) -> None:
    torch.manual_seed(0)
    model = build_model("vit_cifar_plain", position=position, depth=2, embed_dim=32, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(3, 3, 24, 40)
    results = []
    for full in (False, True):
        model.zero_grad()
        logits = model.forward_head(model.forward_features(images)) if full else model(images)
        logits.square().sum().backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_whoever_watches_the_last_block_sees_all_of_it() -> None:
    model = build_model("vit_mnist_2blk").eval()
    for name in ("blocks.1.attn.query", "blocks.1.out", "final"):
        with record(model, name) as seen:
            model(torch.randn(2, 1, 28, 28))
        assert 17 in seen[name].shape
