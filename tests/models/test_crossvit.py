"""CrossViT: exact counts, timm's logits and features of both branches, and what passes between them."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vitrail.components.tap import edit, record, taps
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.crossvit import VARIANTS, CrossViT

# numbers.md 4.2.
PARAMETERS = {
    "crossvit_tiny_240": 7_014_800,
    "crossvit_small_240": 26_856_272,
    "crossvit_base_240": 105_025_232,
    "crossvit_9_240": 8_553_296,
    "crossvit_15_240": 27_528_464,
    "crossvit_18_240": 43_271_408,
    "crossvit_9_dagger_240": 8_776_592,
    "crossvit_15_dagger_240": 28_209_008,
    "crossvit_18_dagger_240": 44_266_976,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18_dagger_408": 44_606_560,
    "crossvit_cifar": 1_280_660,
}
GIGA_MACS = {
    "crossvit_tiny_240": 1.563,
    "crossvit_small_240": 5.616,
    "crossvit_base_240": 21.191,
    "crossvit_9_240": 1.841,
    "crossvit_15_240": 5.791,
    "crossvit_18_240": 9.031,
    "crossvit_9_dagger_240": 1.979,
    "crossvit_15_dagger_240": 6.112,
    "crossvit_18_dagger_240": 9.473,
    "crossvit_15_dagger_408": 21.40,
    "crossvit_18_dagger_408": 32.41,
}


def _small(**changes: object) -> CrossViT:
    """Two multi-scale blocks, 16 and 32 wide; with 32 pixels 16 x 16 small and 8 x 8 large patches."""
    torch.manual_seed(0)
    model = build_model("crossvit_cifar", **({"depth": 2, "embed_dim": (16, 32)} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_every_variant_is_in_the_table() -> None:
    assert set(PARAMETERS) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(GIGA_MACS))
def test_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    macs = count_macs(model, (3, *model.config.image_shape))
    assert macs / 1e9 == pytest.approx(GIGA_MACS[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "changes", "theirs", "size"),
    [
        ("crossvit_9_240", {}, {}, (240, 240)),
        ("crossvit_9_dagger_240", {"depth": 1}, {"depth": [[1, 3, 0]]}, (240, 240)),
        ("crossvit_15_dagger_408", {"depth": 1, "branch_depth": (1, 1)}, {"depth": [[1, 1, 0]]}, (408, 408)),
        ("crossvit_tiny_240", {"depth": 1, "in_chans": 1}, {"depth": [[1, 4, 0]], "in_chans": 1}, (240, 240)),
        ("crossvit_tiny_240", {"depth": 1, "num_classes": 7}, {"depth": [[1, 4, 0]], "num_classes": 7},
         (120, 360)),
        ("crossvit_9_dagger_240", {"depth": 1}, {"depth": [[1, 3, 0]]}, (240, 120)),
    ],
)  # fmt: skip
def test_logits_and_features_equal_timm_with_its_weights(
    name: str, changes: dict, theirs: dict, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    peer = timm.create_model(name, img_size=size, **theirs).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = build_model(name, img_size=size, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, ours.config.in_chans, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)
        features = ours.forward_features(images)
        small, large = peer.forward_features(images)
    for branch, expected in ((features.small, small), (features, large)):
        tokens = torch.cat([branch.prefix, branch.patches], dim=1)
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


def test_layers_equal_timms_intermediates() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("crossvit_9_240").eval()
    ours = build_model("crossvit_9_240").eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        maps = peer.forward_intermediates(images, indices=[1, 4], norm=True, intermediates_only=True)
        layers = ours.forward_features(images, layers=(1, -1)).layers
    assert set(layers) == {1, -1}
    torch.testing.assert_close(layers[1].small.map(), maps[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(layers[1].map(), maps[1], atol=1e-4, rtol=0)


def test_features_hold_both_branches() -> None:
    model = _small()
    features = model.forward_features(torch.randn(2, 3, 20, 41))
    assert features.grid == (5, 11)
    assert features.small.grid == (10, 21)
    assert features.patches.shape == (2, 55, 32)
    assert features.prefix.shape == (2, 1, 32)
    assert features.small.prefix.shape == (2, 1, 16)
    assert [tuple(stage.shape) for stage in features.stages] == [(2, 16, 10, 21), (2, 32, 5, 11)]
    assert torch.equal(features.stages[1], features.map())
    assert [tuple(stage) for stage in model.stages] == [(2, 16), (4, 32)]
    with torch.device("meta"):
        native = build_model("crossvit_9_240")
    assert [tuple(stage) for stage in native.stages] == [(12, 128), (17, 256)]


@pytest.mark.parametrize("size", [(240, 240), (100, 333), (16, 16)])
def test_any_image_size_scales_both_branches(size: tuple[int, int]) -> None:
    model = build_model("crossvit_9_dagger_240", depth=1, embed_dim=(16, 32)).eval()
    height, width = size
    features = model.forward_features(torch.randn(1, 3, *size))
    assert features.small.grid == (-(-height // 12), -(-width // 12))
    scaled = int(height * 224 / 240), int(width * 224 / 240)
    assert features.grid == (-(-scaled[0] // 16), -(-scaled[1] // 16))
    assert model.forward_head(features).shape == (1, 1000)


def test_the_large_branch_sees_the_resized_image() -> None:
    model = build_model("crossvit_9_240", depth=1, embed_dim=(16, 32)).eval()
    images = torch.randn(1, 3, 240, 240)
    resized = F.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False)
    with torch.no_grad():
        tokens, grid = model.patch(images, 1)
        assert torch.equal(tokens, model.patch_embed[1](resized)[0])
    assert grid == (14, 14)


def test_class_tokens_carry_what_passes_between_the_branches() -> None:
    """Cut the exchange (its residual branch and the class tokens' way there and back) and nothing passes."""
    model = _small()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model.forward_features(images).small.patches
        with edit(model, {"embed": lambda tokens: tokens.flip(-1)}):  # the large branch sees something else
            assert not torch.allclose(model.forward_features(images).small.patches, before)
            with edit(model, {"blocks.0.fusion.0.out": torch.zeros_like}):
                first = model.forward_features(images).small.patches
        with edit(model, {"blocks.0.fusion.0.out": torch.zeros_like}):
            second = model.forward_features(images).small.patches
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_patches_of_the_last_block_do_not_see_the_other_branch() -> None:
    model = _small(depth=1)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model.forward_features(images)
        with edit(model, {"embed": lambda tokens: tokens.flip(-1)}):
            other = model.forward_features(images)
    assert torch.equal(plain.small.patches, other.small.patches)
    assert not torch.allclose(plain.small.prefix, other.small.prefix)


def test_logits_are_the_mean_of_two_heads() -> None:
    model = _small()
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    expected = (model.head[0](features.small.prefix[:, 0]) + model.head[1](features.prefix[:, 0])) / 2
    torch.testing.assert_close(model.forward_head(features), expected)


def test_watching_changes_nothing() -> None:
    model = _small()
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        plain = model(images)
        with record(model, "*weights") as seen:
            torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=0)
    assert len(seen) == 2 * (1 + 2 + 2)
    assert seen["blocks.1.blocks.0.0.attn.weights"].shape == (2, 2, 241, 241)
    assert seen["blocks.1.fusion.0.attn.weights"].shape == (2, 4, 1, 61)  # class token of the small branch
    assert seen["blocks.1.fusion.1.attn.weights"].shape == (2, 2, 1, 241)
    for weights in seen.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_every_tap_is_used() -> None:
    model = _small()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        for name in taps(model):
            with edit(model, {name: lambda values: values.roll(1, -1) * 2}):
                assert not torch.allclose(model(images), plain, atol=1e-6), name
        assert torch.equal(model(images), plain)


def test_fill_hides_masked_patches_from_both_branches() -> None:
    model = build_model("crossvit_9_240", depth=1, embed_dim=(16, 32), num_heads=(2, 2)).eval()
    images, mask = torch.zeros(1, 3, 240, 240), torch.zeros(1, 14, 14, dtype=torch.bool)
    mask[0, 4:9, 5:10] = True
    mask = mask.flatten(1)
    other = images.clone()
    other[:, :, 80:140, 96:160] = 9.0  # well inside the masked patches, 17.14 pixels each
    token = torch.full((32,), 0.7)
    with torch.no_grad():
        with record(model, "embed*") as seen:
            a = model.forward_features(images, fill=(mask, token))
        b = model.forward_features(other, fill=(mask, token))
        plain = model.forward_features(images)
    assert torch.equal(a.patches, b.patches)
    assert torch.equal(a.small.patches, b.small.patches)
    assert not torch.allclose(a.patches, plain.patches)
    positions = model.pos_embed_1[:, 1:]
    torch.testing.assert_close(seen["embed"][:, 1:][mask], (token + positions)[mask])
    small_positions = model.pos_embed_0[:, 1:].unflatten(1, (20, 20))
    # Rows 4 to 8 of 14 touch rows 5 to 12 of 20, columns 5 to 9 touch columns 7 to 14.
    hidden = seen["embed_small"][:, 1:].unflatten(1, (20, 20))[:, 5:13, 7:15]
    torch.testing.assert_close(hidden, small_positions[:, 5:13, 7:15])


def test_training_reaches_every_parameter_at_odd_sizes() -> None:
    model = _small(drop=0.1, attn_drop=0.1, drop_path=0.2, in_chans=2).train()
    logits = model(torch.randn(3, 2, 17, 40))
    assert logits.shape == (3, 10)
    logits.square().mean().backward()
    assert not {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_recompute_gives_equal_gradients() -> None:
    model = _small().train()
    images = torch.randn(2, 3, 16, 16)
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_compiles_in_one_graph_and_exports() -> None:
    model = _small(depth=1, img_scale=(1.0, 0.875), patch_size=(4, 4))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it traces
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=0)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)


def test_new_heads_leave_all_else_bit_identical() -> None:
    model = _small()
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    model.reset_classifier(3)
    images = torch.randn(1, 3, 32, 32)
    assert model(images).shape == (1, 3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.reset_classifier(0)
    features = model.forward_features(images)
    assert model.num_features == 48
    assert torch.equal(model(images), torch.cat([features.small.prefix, features.prefix], dim=2)[:, 0])


def test_weight_decay_depth_and_positions() -> None:
    model = _small()
    assert model.no_weight_decay() == {"cls_token_0", "cls_token_1", "pos_embed_0", "pos_embed_1"}
    assert model.block_names() == ("blocks.0", "blocks.1")
    depths = {"patch_embed.0.proj.weight": 0, "pos_embed_1": 0, "blocks.1.fusion.0.attn.wq.weight": 2,
              "norm.0.weight": 3, "head.1.bias": 3}  # fmt: skip
    assert {name: model.layer_of(name) for name in depths} == depths
    assert model.position_table((8, 8)).shape == (64, 32)
    assert model.position_table((5, 9)).shape == (45, 32)


def test_drop_path_grows_as_in_timm() -> None:
    with torch.device("meta"):
        ours, peer = (
            make("crossvit_9_240", **{option: 0.3})
            for make, option in ((build_model, "drop_path"), (timm.create_model, "drop_path_rate"))
        )
    for mine, theirs in zip(ours.blocks, peer.blocks, strict=True):
        for branch in (0, 1):
            rates = [block.drop_path.rate for block in mine.blocks[branch]]
            expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks[branch]]
            assert rates == pytest.approx(expected)
            assert mine.fusion[branch].drop_path.rate == pytest.approx(
                theirs.fusion[branch].drop_path.drop_prob
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_heads": (2, 0)}, r"num_heads must be at least 1, got \(2, 0\)"),
        ({"stem": "conv"}, "stem 'conv' is for patches of 12 and 16 pixels"),
        ({"num_heads": (3, 4)}, "embed_dim 64 is not divisible by num_heads 3"),
        ({"embed_dim": 64}, "option embed_dim"),
        ({"branches": 3}, "no option 'branches'"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("crossvit_cifar", **changes)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused() -> None:
    model = _small()
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"CrossViT cannot drop patches .*; use fill= \(SimMIM\)"):
        model.forward_features(images, keep=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="layer 2 of a model with 2 blocks; expected -2 to 1"):
        model.forward_features(images, layers=(2,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(torch.randn(1, 1, 32, 32))
