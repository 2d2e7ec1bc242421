"""PVT v2: exact counts, timm's logits and maps, any size, keys from squares and from 7 x 7 regions."""

from __future__ import annotations

import pytest
import timm
import torch

from vitrail.components.flow import AttentionStep
from vitrail.components.tap import edit, record
from vitrail.evaluation.cost import count_macs
from vitrail.models import Encoder, build_model
from vitrail.models.pvt_v2 import VARIANTS

# Parameters and GMACs at the variant's image size (numbers.md, 4.2).
TABLE = {
    "pvt_v2_b0": (3_666_760, 0.566),
    "pvt_v2_b1": (14_009_000, 2.108),
    "pvt_v2_b2": (25_362_856, 4.027),
    "pvt_v2_b2_li": (22_553_512, 3.889),
    "pvt_v2_b3": (45_238_696, 6.897),
    "pvt_v2_b4": (62_556_072, 10.101),
    "pvt_v2_b5": (81_956_008, 11.717),
    "pvt_v2_cifar": (1_557_418, 0.0494),
}
SMALL = {"embed_dims": (16, 24, 40, 32), "depths": (2, 1, 1, 2), "num_heads": (1, 2, 5, 4)}


def _twins(name: str, **changes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """timm's model and ours with the same random weights, none of them zero or one."""
    torch.manual_seed(0)
    peer = timm.create_model(name, **changes).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = build_model(name, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    return peer, ours


def test_every_variant_is_in_the_table() -> None:
    assert set(TABLE) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    parameters, gmacs = TABLE[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_macs(model, (3, *model.config.image_shape)) / 1e9 == pytest.approx(gmacs, rel=0.005)


# Odd sizes at which each reduction divides the grid; elsewhere timm leaves out the rest, and we pad.
@pytest.mark.parametrize("size", [(224, 224), (253, 190), (64, 96)])
@pytest.mark.parametrize("name", ["pvt_v2_b1", "pvt_v2_b2_li"])
def test_logits_and_maps_equal_timm(name: str, size: tuple[int, int]) -> None:
    peer, ours = _twins(name, **SMALL, num_classes=7)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = peer.forward_intermediates(images, intermediates_only=True)
        features = ours.forward_features(images, layers=(1, -1))
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)
    torch.testing.assert_close(list(features.stages), maps, atol=1e-4, rtol=0)
    assert torch.equal(features.layers[1].map(), features.stages[0])
    assert torch.equal(features.layers[-1].map(), features.map())


def test_pooled_keys_equal_timm_at_every_size() -> None:
    peer, ours = _twins("pvt_v2_b2_li", **SMALL, in_chans=1)
    images = torch.randn(1, 1, 131, 37)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_full_size_model_equals_timm() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("pvt_v2_b0").eval()
    ours = build_model("pvt_v2_b0").eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("linear", [False, True])
def test_pyramid_at_any_size(linear: bool) -> None:
    model = build_model("pvt_v2_b1", **SMALL, linear=linear, in_chans=2).eval()
    assert [(stage.stride, stage.width) for stage in model.stages] == [(4, 16), (8, 24), (16, 40), (32, 32)]
    for height, width in ((224, 224), (65, 131), (7, 250), (1, 1)):
        features = model.forward_features(torch.randn(1, 2, height, width))
        for stage, maps in zip(model.stages, features.stages, strict=True):
            assert maps.shape == (1, stage.width, -(-height // stage.stride), -(-width // stage.stride))
        assert torch.equal(features.stages[-1], features.map())
        assert features.prefix.shape == (1, 0, 32)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_every_parameter_learns(size: tuple[int, int], linear: bool) -> None:
    model = build_model("pvt_v2_cifar", linear=linear, drop=0.1, attn_drop=0.1, drop_path=0.2)
    model(torch.randn(3, 3, *size)).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("linear", [False, True])
def test_fused_equals_explicit(linear: bool) -> None:
    torch.manual_seed(0)
    model = build_model("pvt_v2_cifar", linear=linear).eval()
    images = torch.randn(2, 3, 30, 44)
    with torch.no_grad():
        fused = model(images)
        with record(model, "*.attn.weights") as seen:
            explicit = model(images)
    torch.testing.assert_close(fused, explicit, atol=1e-5, rtol=0)
    assert list(seen) == [f"{name}.attn.weights" for name in model.block_names()]
    for name, weights in seen.items():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        step = step_of(model, name.removesuffix(".attn.weights"), (30, 44))
        rows, columns = step.tokens.grid if step.keys is None else step.keys.grid
        assert weights.shape[-1] == rows * columns
        assert step.tokens.cells.rows[-1][1] == 30
        assert step.tokens.cells.columns[-1][1] == 44


def step_of(model: Encoder, block: str, image_shape: tuple[int, int]) -> AttentionStep:
    """What the model says of the attention of one block."""
    return next(own for own in model.flow(image_shape).attentions if own.name == f"{block}.attn")


def test_keys_stand_for_pixels() -> None:
    squares = step_of(build_model("pvt_v2_b1", **SMALL), "stages.1.blocks.0", (224, 100)).keys
    assert squares is not None
    assert squares.grid == (7, 4)
    assert squares.columns == ((0, 4), (4, 8), (8, 12), (12, 13))  # cells of 8 pixels
    regions = step_of(build_model("pvt_v2_b2_li", **SMALL), "stages.3.blocks.1", (224, 320)).keys
    assert regions is not None
    assert regions.columns[:2] == ((0, 2), (1, 3))  # 10 columns of cells in 7 regions


def test_the_middle_does_not_know_where_it_is() -> None:
    # One block, squares of one cell: far from the padded border, a shift of the image shifts the features.
    torch.manual_seed(0)
    model = build_model(
        "pvt_v2_cifar",
        embed_dims=(16,),
        depths=(1,),
        num_heads=(2,),
        mlp_ratios=(2,),
        sr_ratios=(1,),
    ).eval()
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 12:18, 12:18] = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        maps = model.forward_features(images).map()
        moved = model.forward_features(images.roll((4, 2), dims=(2, 3))).map()
    torch.testing.assert_close(moved[:, :, 4:-4, 4:-4], maps.roll((2, 1), dims=(2, 3))[:, :, 4:-4, 4:-4])


def test_edits_reach_the_logits() -> None:
    model = build_model("pvt_v2_cifar").eval()
    images = torch.randn(1, 3, 32, 32)
    for name in ("embed", "stages.0.blocks.0.attn.weights", "stages.1.blocks.1.mlp.hidden", "final"):
        with torch.no_grad(), edit(model, {name: torch.zeros_like}):
            changed = model(images)
        assert not torch.equal(changed, model(images)), name


def test_filled_patches_are_not_seen() -> None:
    model = build_model("pvt_v2_cifar").eval()
    images, mask = torch.randn(1, 3, 32, 32), torch.zeros(16, 16, dtype=torch.bool)
    mask[3:6, 4:7] = True  # overlapping patches: the one in the middle is seen by its eight neighbours
    other = images.clone()
    other[:, :, 8:10, 10:12] = 9.0
    fill = mask.reshape(1, -1), torch.ones(48)
    with torch.no_grad():
        a, b = (model.forward_features(x, fill=fill).patches for x in (images, other))
        assert torch.equal(a, b)
        assert not torch.allclose(a, model.forward_features(images).patches)


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, images = build_model("pvt_v2_cifar"), torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("linear", [False, True])
def test_compiles_whole_and_exports(linear: bool) -> None:
    model = build_model("pvt_v2_cifar", linear=linear, depths=(1, 1, 1)).eval()
    images = torch.randn(2, 3, 27, 40)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected)


def test_depth_of_parameters() -> None:
    model = build_model("pvt_v2_cifar")
    depth = {
        "patch_embed.proj.weight": 0, "stages.0.blocks.0.norm1.weight": 1, "stages.0.blocks.1.attn.q.bias": 2,
        "stages.0.norm.weight": 2, "stages.1.downsample.proj.bias": 3, "stages.1.blocks.0.mlp.dwconv.bias": 3,
        "stages.2.downsample.norm.bias": 5, "stages.2.blocks.1.attn.kv.weight": 6, "stages.2.norm.bias": 7,
        "head.weight": 7,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in depth} == depth
    assert model.no_weight_decay() == set()
    assert all(model.get_submodule(name) is not None for name in model.block_names())


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    block = build_model("pvt_v2_b1").stages[3].blocks[1]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert not block.mlp.dwconv.bias.any()
    rates = [
        block.drop_path.rate
        for stage in build_model("pvt_v2_cifar", drop_path=0.5).stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_new_head() -> None:
    model, images = build_model("pvt_v2_cifar"), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sr_ratios": (2, 1)}, "sr_ratios needs one value for each of 3 stages"),
        ({"num_heads": (1, 2, 5)}, "embed_dims: 192 is not divisible by its num_heads 5"),
        ({"mlp_ratios": (4, 4, 0)}, "mlp_ratios must be positive"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("pvt_v2_cifar", **changes)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_said() -> None:
    model, images = build_model("pvt_v2_cifar"), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"PVT v2 cannot drop patches .* use fill="):
        model.forward_features(images, keep=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="layer -7 of a model with 6 blocks; expected -6 to 5"):
        model.forward_features(images, layers=(-7,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(images[:, :1])
