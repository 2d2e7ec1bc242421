"""Swin V2: exact counts, logits of timm and torchvision, cosine attention, offsets on their own scale."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from tests.components.test_window import expanded
from torch import Tensor
from torchvision.models import swin_transformer as torchvision_swin

from vitrail.components.tap import edit, record
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.swin_v2 import (
    VARIANTS,
    CosineWindowAttention,
    SwinV2Block,
    SwinV2Config,
    log_offsets,
)

TABLE = {
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window8_256": 87_918_816,
    "swinv2_base_window16_256": 87_918_816,
    "swinv2_base_window12_192": 109_280_841,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_base_window12to24_192to384": 87_918_816,
    "swinv2_large_window12_192": 228_772_549,
    "swinv2_large_window12to16_192to256": 196_739_932,
    "swinv2_large_window12to24_192to384": 196_739_932,
    "swinv2_cifar": 947_422,
}
# At the variant's image size, as counted in timm: each kind of windows once, a count takes a second.
GMACS = {
    "swinv2_tiny_window8_256": 5.940,
    "swinv2_tiny_window16_256": 6.661,
    "swinv2_base_window12_192": 11.878,
    "swinv2_large_window12to16_192to256": 47.740,
    "swinv2_base_window12to24_192to384": 55.148,
    "swinv2_cifar": 0.0807,
}
SMALL = {"embed_dim": 24, "depths": (1, 2, 1, 2), "num_heads": (1, 2, 3, 6)}
TWO_STAGES = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms of the branches too: they start at zero, and the blocks do nothing."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.eval()


def test_every_variant_is_in_the_table() -> None:
    assert set(TABLE) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == TABLE[name]


@pytest.mark.parametrize("name", sorted(GMACS))
def test_macs(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    macs = count_macs(model, (3, *model.config.image_shape))
    assert macs / 1e9 == pytest.approx(GMACS[name], rel=0.005)


# Sizes of whole windows in every stage; elsewhere timm attends to padding, and we do not. (60, 44) has odd
# grids, each of them one window; (36, 104) has two windows a row, and then one.
@pytest.mark.parametrize(
    ("name", "changes", "peers_own", "size"),
    [
        ("swinv2_tiny_window8_256", SMALL, {}, (256, 256)),
        ("swinv2_small_window16_256", SMALL, {}, (256, 256)),
        ("swinv2_base_window12_192", SMALL, {}, (192, 192)),
        ("swinv2_large_window12to16_192to256", SMALL, {}, (256, 256)),
        ("swinv2_tiny_window8_256", TWO_STAGES, {"strict_img_size": False}, (128, 192)),
        ("swinv2_tiny_window16_256", {**SMALL, "img_size": (60, 44)}, {}, (60, 44)),
        (
            "swinv2_tiny_window8_256",
            {**TWO_STAGES, "img_size": (36, 104), "window_size": 13, "pretrained_window_sizes": (8, 4)},
            {},
            (36, 104),
        ),
    ],
)
def test_logits_and_maps_equal_timm(name: str, changes: dict, peers_own: dict, size: tuple[int, int]) -> None:
    trained = {"pretrained_window_sizes": (16, 16, 16, 8)} if size == (60, 44) else {}
    peer = _shaken(timm.create_model(name, num_classes=7, **changes, **trained, **peers_own))
    ours = build_model(name, num_classes=7, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)
        features = ours.forward_features(images, layers=(0, -1))
        maps = peer.forward_intermediates(images, intermediates_only=True)
        final = peer.forward_features(images).flatten(1, 2)
    torch.testing.assert_close(list(features.stages), maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.patches, final, atol=1e-4, rtol=0)
    assert torch.equal(features.layers[-1].patches, features.patches)
    if changes["depths"][0] == 1:
        assert torch.equal(features.layers[0].map(), features.stages[0])


def test_equals_torchvision() -> None:
    peer = _shaken(
        torchvision_swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            num_classes=7,
            block=torchvision_swin.SwinTransformerBlockV2,
            downsample_layer=torchvision_swin.PatchMergingV2,
        )
    )
    ours = build_model("swinv2_tiny_window8_256", **TWO_STAGES, window_size=4, num_classes=7).eval()
    names = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm", "head": "head.fc"}
    names |= {"features.2": "layers.1.downsample", "norm": "norm"}
    names |= {
        f"features.{2 * stage + 1}.{block}.{theirs}": f"layers.{stage}.blocks.{block}.{own}"
        for stage in (0, 1)
        for block in (0, 1)
        for theirs, own in (
            ("norm1", "norm1"),
            ("attn", "attn"),
            ("norm2", "norm2"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
        )
    }
    state = {
        own + key.removeprefix(theirs): value
        for key, value in peer.state_dict().items()
        if not key.endswith(("relative_position_index", "relative_coords_table"))
        for theirs, own in names.items()
        if key.startswith(theirs + ".")
    }
    for name in ours.block_names():
        query_bias, _, value_bias = state.pop(f"{name}.attn.qkv.bias").chunk(
            3
        )  # theirs zeroes that of the keys
        state |= {f"{name}.attn.q_bias": query_bias, f"{name}.attn.v_bias": value_bias}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_gradients_equal_timm() -> None:
    changes = {**TWO_STAGES, "img_size": 64, "window_size": 4}
    peer = _shaken(timm.create_model("swinv2_tiny_window8_256", **changes))
    ours = build_model("swinv2_tiny_window8_256", **changes).eval()
    ours.load_state_dict(peer.state_dict())
    images, gradients = torch.randn(2, 3, 64, 64), []
    for model in (peer, ours):
        model(images).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def _slow_attention(block: SwinV2Block, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The attention of a block among all tokens, pair by pair (sections 3.2 and 3.3)."""
    layout, attention = block.layout(grid), block.attn
    (high, wide), width = layout.window, x.shape[2]
    bias = torch.cat([attention.q_bias, torch.zeros(width), attention.v_bias])
    packed = x @ attention.qkv.weight.T + bias
    q, k, v = packed.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    window = [((r - layout.shift[0]) // high, (c - layout.shift[1]) // wide) for r, c in cells]
    scores = torch.full((*q.shape[:2], len(cells), len(cells)), float("-inf"))
    heat = attention.logit_scale.flatten().exp().clamp(max=100.0)
    for i, one in enumerate(cells):
        for j, other in enumerate(cells):
            if window[i] == window[j]:
                steps = [8 * (a - b) / (attention.trained_size - 1) for a, b in zip(one, other, strict=True)]
                logs = [math.copysign(math.log(1 + abs(step), 8), step) for step in steps]
                position = 16 / (1 + (-attention.cpb_mlp(torch.tensor(logs))).exp())
                cosine = torch.cosine_similarity(q[:, :, i], k[:, :, j], dim=-1)
                scores[:, :, i, j] = cosine * heat + position
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(7, 6), (2, 5)])
def test_a_block_equals_full_attention_in_windows(grid: tuple[int, int], shifted: bool) -> None:
    config = SwinV2Config(img_size=16, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    block = _shaken(SwinV2Block(config, 0, shifted, drop_path=0.0))
    with torch.no_grad():
        block.attn.logit_scale[0] = 5.0  # e^5 is more than the largest factor, 100
    x = torch.randn(2, grid[0] * grid[1], 8)
    with torch.no_grad(), record(block, "attn.weights") as seen:
        middle = x + block.norm1(_slow_attention(block, x, grid))
        expected = middle + block.norm2(block.mlp(middle))
        torch.testing.assert_close(block(x, grid), expected, atol=1e-4, rtol=1e-4)
    weights = expanded(block.layout(grid), seen["attn.weights"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, x.shape[1]))


def test_shifted_windows_leak_nothing_across_the_border() -> None:
    config = SwinV2Config(img_size=16, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    block = _shaken(SwinV2Block(config, 0, shifted=True, drop_path=0.0))
    x = torch.randn(1, 64, 8, requires_grad=True)
    weights = torch.linspace(-1.0, 1.0, 8)  # the sum of a normalised token would not depend on it
    (gradient,) = torch.autograd.grad((block(x, (8, 8))[0, 0] * weights).sum(), x)
    seen = gradient[0].abs().sum(-1).unflatten(0, (8, 8)) > 0
    assert seen[:2, :2].all()
    assert seen.sum() == 4  # exactly zero everywhere else


def test_offsets_on_a_logarithmic_scale() -> None:
    offsets = log_offsets((3, 2), 3)
    assert offsets.shape == (15, 2)
    rows = [-math.log2(9) / 3, -math.log2(5) / 3, 0.0, math.log2(5) / 3, math.log2(9) / 3]
    torch.testing.assert_close(offsets[:, 0].reshape(5, 3), torch.tensor(rows)[:, None].expand(5, 3))
    torch.testing.assert_close(offsets[:3, 1], torch.tensor(rows)[1:4])
    # A larger window has the offsets of a smaller one, in the same scale, and further ones.
    large = log_offsets((5, 5), 3).reshape(9, 9, 2)
    torch.testing.assert_close(large[2:7, 3:6], offsets.reshape(5, 3, 2))
    assert large.max() > offsets.max()
    assert torch.equal(log_offsets((1, 1), 1), torch.zeros(1, 2))


def test_the_scale_of_the_released_weights() -> None:
    def sizes(name: str) -> list[int]:
        model = build_model(name, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
        return [stage.blocks[0].attn.trained_size for stage in model.layers]

    assert sizes("swinv2_tiny_window8_256") == [8, 8, 8, 8]
    assert sizes("swinv2_base_window16_256") == [16, 16, 16, 8]
    assert sizes("swinv2_base_window12_192") == [12, 12, 12, 6]
    assert sizes("swinv2_large_window12to24_192to384") == [12, 12, 12, 6]


def test_the_size_it_was_built_for_changes_nothing() -> None:
    images, logits = torch.randn(1, 3, 30, 44), []
    for img_size in (32, (30, 44), 6):
        model = _shaken(build_model("swinv2_cifar", img_size=img_size))
        logits.append(model(images))
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2])


def test_attention_does_not_see_the_length_of_tokens() -> None:
    attention = CosineWindowAttention(12, 3, (4, 4), 4, qkv_bias=False, attn_drop=0.0, drop=0.0)
    x = torch.randn(2, 16, 12)
    seen = []
    for factor in (1.0, 7.0):
        with record(attention, "weights", "query", "key") as taps:
            attention(factor * x, attention.bias((4, 4))[None])
        seen.append(taps)
    torch.testing.assert_close(seen[0]["weights"], seen[1]["weights"])
    torch.testing.assert_close(seen[0]["key"].norm(dim=-1), torch.ones(2, 3, 16))
    torch.testing.assert_close(seen[0]["query"].norm(dim=-1), torch.full((2, 3, 16), 10 * 4**0.5))
    bias = attention.bias((2, 3))
    assert bias.shape == (3, 6, 6)
    assert 0 < bias.min() < bias.max() < 16


def test_zeros_are_no_numbers_to_fear() -> None:
    # Padding and a mask token of zeros have no direction: the queries' bias starts at zero as well.
    torch.manual_seed(0)
    model = build_model("swinv2_cifar")
    for block in model.block_names():
        torch.nn.init.ones_(model.get_submodule(block).norm1.weight)
    token = torch.zeros(64, requires_grad=True)
    mask = torch.rand(2, 15 * 11) < 0.5
    features = model.forward_features(torch.randn(2, 3, 30, 22), fill=(mask, token))
    features.patches.square().sum().backward()
    assert token.grad.isfinite().all()
    assert all(
        parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if "head" not in name
    )
    with torch.no_grad():
        assert model.half()(torch.randn(2, 3, 30, 22).half()).isfinite().all()


def test_pyramid_at_any_size() -> None:
    model = _shaken(build_model("swinv2_tiny_window8_256", **SMALL, in_chans=2))
    assert [(stage.stride, stage.width) for stage in model.stages] == [(4, 24), (8, 48), (16, 96), (32, 192)]
    for height, width in ((256, 256), (65, 131), (7, 250), (1, 1)):
        features = model.forward_features(torch.randn(1, 2, height, width))
        for stage, maps in zip(model.stages, features.stages, strict=True):
            assert maps.shape == (1, stage.width, -(-height // stage.stride), -(-width // stage.stride))
        assert features.map().shape == features.stages[-1].shape
        assert features.prefix.shape == (1, 0, 192)
        assert features.patches.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_every_parameter_learns(size: tuple[int, int]) -> None:
    model = _shaken(build_model("swinv2_cifar", in_chans=2, drop=0.1, attn_drop=0.1, drop_path=0.2))
    model.train()(torch.randn(8, 2, *size)).square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not idle


def test_a_fresh_block_is_the_identity() -> None:
    model = build_model("swinv2_cifar").eval()
    with torch.no_grad(), record(model, "embed", "layers.0.blocks.1.out") as seen:
        model(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen["embed"], seen["layers.0.blocks.1.out"])
    block = model.layers[1].blocks[3]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(block.attn.logit_scale.exp(), torch.full((4, 1, 1), 10.0))
    assert not block.attn.q_bias.any()
    assert not block.attn.v_bias.any()


def test_taps_see_what_is_used() -> None:
    model = _shaken(build_model("swinv2_cifar"))
    images = torch.randn(2, 3, 27, 40)  # grids 14 x 20 and 7 x 10, both padded
    with torch.no_grad():
        fused = model(images)
        with record(model, "*") as seen:
            explicit = model(images)
    torch.testing.assert_close(fused, explicit, atol=1e-4, rtol=1e-4)
    names = [f"{name}.attn.weights" for name in model.block_names()]
    assert [name for name in seen if name.endswith("attn.weights")] == names
    for name in names:
        torch.testing.assert_close(seen[name].sum(-1), torch.ones_like(seen[name].sum(-1)))
    shapes = {
        "embed": (2, 280, 64),
        "layers.0.blocks.1.attn.query": (2 * 4 * 5, 2, 16, 32),
        "layers.0.blocks.1.attn.weights": (2 * 4 * 5, 2, 16, 16),
        "layers.1.blocks.3.attn.scores": (2 * 2 * 3, 4, 16, 16),
        "layers.1.blocks.3.attn.mixed": (2 * 2 * 3, 16, 128),
        "layers.1.blocks.3.mlp.hidden": (2, 70, 512),
        "layers.1.blocks.3.mid": (2, 70, 128),
        "layers.1.blocks.3.out": (2, 70, 128),
        "final": (2, 70, 128),
    }
    assert {name: tuple(seen[name].shape) for name in shapes} == shapes


def test_edits_reach_the_logits() -> None:
    model, images = _shaken(build_model("swinv2_cifar")), torch.randn(1, 3, 32, 32)
    for name in ("embed", "layers.0.blocks.1.attn.weights", "layers.1.blocks.0.mlp.hidden", "final"):
        with torch.no_grad(), edit(model, {name: torch.zeros_like}):
            changed = model(images)
        assert not torch.equal(changed, model(images)), name


def test_recomputing_gives_the_same_gradients() -> None:
    model, images = _shaken(build_model("swinv2_cifar")).train(), torch.randn(2, 3, 30, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_is_near() -> None:
    model, images = build_model("swinv2_cifar").eval(), torch.randn(2, 3, 30, 44)
    torch.manual_seed(0)
    for block in model.block_names():
        torch.nn.init.normal_(model.get_submodule(block).norm1.weight, std=0.3)
        torch.nn.init.normal_(model.get_submodule(block).norm2.weight, std=0.3)
    with torch.no_grad():
        expected = model.forward_features(images).patches
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.forward_features(images).patches
            with record(model, "*.attn.weights"):
                explicit = model.forward_features(images).patches
    for patches in (cast, explicit):
        assert (patches.float() - expected).abs().mean() < 0.02  # of values with variance 1


def test_compiles_whole_and_exports() -> None:
    model, images = _shaken(build_model("swinv2_cifar", depths=(1, 2))), torch.randn(2, 3, 27, 40)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(images), expected)
        three = torch.cat([images, images[:1].flip(3)])
        torch.testing.assert_close(exported(three), model(three))


def test_depth_of_parameters() -> None:
    model = build_model("swinv2_cifar")
    depth = {
        "patch_embed.proj.weight": 0, "layers.0.blocks.0.norm1.weight": 1,
        "layers.0.blocks.1.attn.cpb_mlp.0.bias": 2, "layers.1.downsample.norm.weight": 3,
        "layers.1.downsample.reduction.weight": 3, "layers.1.blocks.0.attn.logit_scale": 3,
        "layers.1.blocks.3.attn.q_bias": 6, "norm.weight": 7, "head.fc.weight": 7,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in depth} == depth
    assert all(isinstance(model.get_submodule(name), SwinV2Block) for name in model.block_names())
    peer = timm.create_model("swinv2_tiny_window8_256", **SMALL)
    own = build_model("swinv2_tiny_window8_256", **SMALL).no_weight_decay()
    assert own == {name for name in peer.no_weight_decay() if name in dict(peer.named_parameters())}
    assert "layers.0.blocks.0.attn.cpb_mlp.0.weight" in own


def test_new_head() -> None:
    model, images = build_model("swinv2_cifar"), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"num_heads": (2, 3)}, "width 128 of a stage is not divisible by its num_heads 3"),
        (
            {"pretrained_window_sizes": (4,)},
            r"pretrained_window_sizes needs one size for each of 2 stages, got \(4,\)",
        ),
        ({"pretrained_window_sizes": (4, 0)}, r"pretrained_window_sizes must be at least 1, got \(4, 0\)"),
        ({"patch_norm": True}, "no option 'patch_norm': did you mean patch_size"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("swinv2_cifar", **changes)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_said() -> None:
    model, images = build_model("swinv2_cifar"), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"SwinV2 cannot drop patches .* use fill="):
        model.forward_features(images, keep=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="layer -7 of a model with 6 blocks; expected -6 to 5"):
        model.forward_features(images, layers=(-7,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(images[:, :1])
