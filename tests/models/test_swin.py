"""Swin: exact counts, logits of timm and torchvision, any size, windows that keep to themselves."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from tests.components.test_window import expanded
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from vitrail.components.tap import edit, record
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.swin import VARIANTS, Swin, SwinBlock, SwinConfig, merge_neighbours

# Parameters and GMACs at the size of the variant (numbers.md, 4.1 and 4.2; L at 384 as counted in timm).
TABLE = {
    "swin_tiny_patch4_window7_224": (28_288_354, 4.491),
    "swin_small_patch4_window7_224": (49_606_258, 8.741),
    "swin_base_patch4_window7_224": (87_768_224, 15.431),
    "swin_large_patch4_window7_224": (196_532_476, 34.476),
    "swin_base_patch4_window12_384": (87_903_584, 47.083),
    "swin_large_patch4_window12_384": (196_735_516, 103.919),
    "swin_mnist_2blk": (103_314, 0.0055),
    "swin_mnist_2blk_patch2": (102_546, 0.02178),
    "swin_cifar": (929_822, 0.0799),
}
SMALL = {"embed_dim": 24, "depths": (1, 2, 1, 2), "num_heads": (1, 2, 3, 6)}
TWO_STAGES = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, position biases too, so that everything counts."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_every_variant_is_in_the_table() -> None:
    assert set(TABLE) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    parameters, gmacs = TABLE[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    shape = (model.config.in_chans, *model.config.image_shape)
    assert count_macs(model, shape) / 1e9 == pytest.approx(gmacs, rel=0.005)


# Sizes of whole windows in every stage; elsewhere timm attends to padding, and we do not.
@pytest.mark.parametrize(
    ("name", "changes", "peers_own", "size"),
    [
        ("swin_tiny_patch4_window7_224", SMALL, {}, (224, 224)),
        ("swin_base_patch4_window12_384", SMALL, {}, (384, 384)),
        ("swin_small_patch4_window7_224", TWO_STAGES, {"dynamic_img_size": True}, (112, 168)),
        ("swin_small_patch4_window7_224", {**TWO_STAGES, "in_chans": 1, "window_size": 2}, {}, (224, 224)),
    ],
)
def test_logits_and_maps_equal_timm(name: str, changes: dict, peers_own: dict, size: tuple[int, int]) -> None:
    peer = _shaken(timm.create_model(name, num_classes=7, **changes, **peers_own))
    ours = build_model(name, num_classes=7, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, ours.config.in_chans, *size)
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


# Odd grids, which the merging pads, under windows that shrink to them; (28, 88) has two windows a row.
@pytest.mark.parametrize(("size", "window"), [((28, 20), 7), ((28, 88), 11), ((4, 12), 7)])
def test_odd_grids_equal_timm_with_its_small_tables(size: tuple[int, int], window: int) -> None:
    changes = {**SMALL, "depths": (2, 2), "num_heads": (2, 4), "img_size": size, "window_size": window}
    peer = _shaken(timm.create_model("swin_tiny_patch4_window7_224", **changes))
    ours = build_model("swin_tiny_patch4_window7_224", **changes).eval()
    state = peer.state_dict()
    for name, module in peer.named_modules():
        if hasattr(module, "relative_position_bias_table"):
            rows, columns = module.window_size
            table = torch.full((2 * window - 1, 2 * window - 1, module.num_heads), 50.0)
            table[window - rows : window + rows - 1, window - columns : window + columns - 1] = (
                module.relative_position_bias_table.unflatten(0, (2 * rows - 1, 2 * columns - 1))
            )
            state[f"{name}.relative_position_bias_table"] = table.flatten(0, 1)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)
        maps = peer.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(list(ours.forward_features(images).stages), maps, atol=1e-4, rtol=0)


def test_equals_torchvision() -> None:
    peer = _shaken(
        torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[7, 7],
            num_classes=7,
        )
    )
    ours = build_model("swin_tiny_patch4_window7_224", **TWO_STAGES, num_classes=7).eval()
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
        if not key.endswith("relative_position_index")
        for theirs, own in names.items()
        if key.startswith(theirs + ".")
    }
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 112, 168)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_full_size_model_equals_timm() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("swin_tiny_patch4_window7_224").eval()
    ours = build_model("swin_tiny_patch4_window7_224").eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_gradients_equal_timm() -> None:
    peer = _shaken(timm.create_model("swin_tiny_patch4_window7_224", img_size=112, **TWO_STAGES))
    ours = build_model("swin_tiny_patch4_window7_224", img_size=112, **TWO_STAGES).eval()
    ours.load_state_dict(peer.state_dict())
    images, gradients = torch.randn(2, 3, 112, 112), []
    for model in (peer, ours):
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def _slow_attention(block: SwinBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The attention of a block among all tokens, kept to windows by a loop over pairs of tokens."""
    layout, attention = block.layout(grid), block.attn
    (high, wide), side = layout.window, block.windows.window[0]
    heads = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    window = [((r - layout.shift[0]) // high, (c - layout.shift[1]) // wide) for r, c in cells]
    bias = torch.full(scores.shape[1:], float("-inf"))
    for i, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            if window[i] == window[j]:
                offset = (row - other_row + side - 1) * (2 * side - 1) + column - other_column + side - 1
                bias[:, i, j] = attention.relative_position_bias_table[offset]
    weights = (scores + bias).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9), (1, 1)])
def test_a_block_equals_full_attention_in_windows(grid: tuple[int, int], shifted: bool) -> None:
    config = SwinConfig(img_size=16, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    block = _shaken(SwinBlock(config, 0, shifted, drop_path=0.0))
    x = torch.randn(2, grid[0] * grid[1], 8)
    with torch.no_grad(), record(block, "attn.weights") as seen:
        middle = x + _slow_attention(block, block.norm1(x), grid)
        torch.testing.assert_close(block(x, grid), middle + block.mlp(block.norm2(middle)))
    weights = expanded(block.layout(grid), seen["attn.weights"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, x.shape[1]))


def test_shifted_windows_leak_nothing_across_the_border() -> None:
    config = SwinConfig(img_size=16, patch_size=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    block = _shaken(SwinBlock(config, 0, shifted=True, drop_path=0.0))
    x = torch.randn(1, 64, 8, requires_grad=True)
    out = block(x, (8, 8)).unflatten(1, (8, 8))
    # In the shifted grid the corners of the image share a window.
    for cell, sees in (((0, 0), (2, 2)), ((1, 7), (2, -2)), ((7, 0), (-2, 2)), ((7, 7), (-2, -2))):
        (gradient,) = torch.autograd.grad(out[0, *cell].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1).unflatten(0, (8, 8)) > 0
        rows = slice(0, 2) if sees[0] > 0 else slice(6, 8)
        columns = slice(0, 2) if sees[1] > 0 else slice(6, 8)
        assert seen[rows, columns].all()
        assert seen.sum() == 4  # exactly zero everywhere else


def test_merging_takes_the_neighbours_column_by_column() -> None:
    x = torch.arange(15.0).reshape(1, 15, 1)
    merged, grid = merge_neighbours(x, (3, 5))
    assert grid == (2, 3)
    expected = [[0, 5, 1, 6], [2, 7, 3, 8], [4, 9, 0, 0], [10, 0, 11, 0], [12, 0, 13, 0], [14, 0, 0, 0]]
    assert merged[0].tolist() == expected


def test_pyramid_at_any_size() -> None:
    model = build_model("swin_tiny_patch4_window7_224", **SMALL, in_chans=2).eval()
    assert [(stage.stride, stage.width) for stage in model.stages] == [(4, 24), (8, 48), (16, 96), (32, 192)]
    for height, width in ((224, 224), (65, 131), (7, 250), (1, 1)):
        features = model.forward_features(torch.randn(1, 2, height, width))
        for stage, maps in zip(model.stages, features.stages, strict=True):
            assert maps.shape == (1, stage.width, -(-height // stage.stride), -(-width // stage.stride))
        assert features.map().shape == features.stages[-1].shape
        assert features.prefix.shape == (1, 0, 192)
        assert features.patches.isfinite().all()


def test_the_size_it_was_built_for_changes_nothing() -> None:
    images, logits = torch.randn(1, 3, 30, 44), []
    for img_size in (32, (30, 44), 6):
        model = _shaken(build_model("swin_cifar", img_size=img_size))
        logits.append(model(images))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_every_parameter_learns(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = build_model("swin_cifar", in_chans=2, drop=0.1, attn_drop=0.1, drop_path=0.2)
    model(torch.randn(8, 2, *size)).square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not idle


def test_taps_see_what_is_used() -> None:
    model = _shaken(build_model("swin_cifar"))
    images = torch.randn(2, 3, 27, 40)  # grids 14 x 20 and 7 x 10, both padded
    with torch.no_grad():
        fused = model(images)
        with record(model, "*") as seen:
            explicit = model(images)
    torch.testing.assert_close(fused, explicit, atol=1e-5, rtol=0)
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
    model, images = build_model("swin_cifar").eval(), torch.randn(1, 3, 32, 32)
    for name in ("embed", "layers.0.blocks.1.attn.weights", "layers.1.blocks.0.mlp.hidden", "final"):
        with torch.no_grad(), edit(model, {name: torch.zeros_like}):
            changed = model(images)
        assert not torch.equal(changed, model(images)), name


def test_filled_patches_are_not_seen() -> None:
    model = build_model("swin_cifar").eval()
    images, mask = torch.randn(2, 3, 32, 24), torch.zeros(2, 192, dtype=torch.bool)
    mask[:, 13] = True  # row 1, column 1
    other = images.clone()
    other[:, :, 2:4, 2:4] = 9.0
    with torch.no_grad():
        a, b = (model.forward_features(x, fill=(mask, torch.ones(64))).patches for x in (images, other))
        assert torch.equal(a, b)
        assert not torch.allclose(a, model.forward_features(images).patches)
        tapped, fill = model.place(model.patch(images)[0], (16, 12)), torch.full((64,), 3.0)
        with record(model, "embed") as seen:
            model.forward_features(images, fill=(mask, fill))
    assert torch.equal(seen["embed"][mask], fill.expand(2, 64))
    assert torch.equal(seen["embed"][~mask], tapped[~mask])


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, images = build_model("swin_cifar"), torch.randn(2, 3, 30, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_is_near() -> None:
    model, images = _shaken(build_model("swin_cifar")), torch.randn(2, 3, 30, 44)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images)
            with record(model, "*.attn.weights"):
                explicit = model(images)
    torch.testing.assert_close(cast.float(), expected, atol=0.05, rtol=0.1)
    torch.testing.assert_close(explicit.float(), expected, atol=0.05, rtol=0.1)


def test_compiles_whole_and_exports() -> None:
    model, images = build_model("swin_cifar", depths=(1, 2)).eval(), torch.randn(2, 3, 27, 40)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(images), expected)
        three = torch.cat([images, images[:1].flip(3)])
        torch.testing.assert_close(exported(three), model(three))


def test_one_compilation_for_each_image_size() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build_model("swin_cifar", depths=(2,), num_heads=(2,)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    sizes = ((32, 32), (27, 40), (8, 6))
    with torch.no_grad():
        for number, size in enumerate((*sizes, *sizes), start=1):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(images), model(images))
            assert counter.frame_count == min(number, 3)


def test_depth_of_parameters() -> None:
    model = build_model("swin_cifar")
    depth = {
        "patch_embed.proj.weight": 0, "patch_embed.norm.bias": 0, "layers.0.blocks.0.norm1.weight": 1,
        "layers.0.blocks.1.attn.relative_position_bias_table": 2, "layers.1.downsample.norm.weight": 3,
        "layers.1.downsample.reduction.weight": 3, "layers.1.blocks.0.mlp.fc1.bias": 3,
        "layers.1.blocks.3.attn.proj.bias": 6, "norm.weight": 7, "head.fc.weight": 7,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in depth} == depth
    assert model.block_names()[1:3] == ("layers.0.blocks.1", "layers.1.blocks.0")
    assert all(isinstance(model.get_submodule(name), SwinBlock) for name in model.block_names())
    assert model.no_weight_decay() == {
        f"{name}.attn.relative_position_bias_table" for name in model.block_names()
    }
    peer = timm.create_model("swin_tiny_patch4_window7_224", **SMALL)
    assert build_model("swin_tiny_patch4_window7_224", **SMALL).no_weight_decay() == peer.no_weight_decay()


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    block = build_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 2)).layers[3].blocks[1]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attn.qkv.bias.any()
    model = build_model("swin_cifar", drop_path=0.5)
    rates = [model.get_submodule(name).drop_path.rate for name in model.block_names()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    shifts = [model.get_submodule(name).layout((9, 9)).shift for name in model.block_names()]
    assert shifts == [(0, 0), (2, 2)] * 3


def test_digits_have_one_window_and_with_smaller_patches_four() -> None:
    one = build_model("swin_mnist_2blk").layers[0].blocks[1]
    four = build_model("swin_mnist_2blk_patch2").layers[0].blocks[1]
    assert (one.windows.usual.num_windows, one.windows.usual.shift) == ((1, 1), (0, 0))
    assert (four.windows.usual.num_windows, four.windows.usual.shift) == ((2, 2), (3, 3))


def test_new_head() -> None:
    model, images = build_model("swin_cifar"), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    pooled = model(images)
    assert pooled.shape == (1, 128)
    torch.testing.assert_close(pooled, model.forward_features(images).patches.mean(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"img_size": (32, 0)}, r"img_size must be at least 1, got \(32, 0\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
        ({"depths": (2, 0)}, r"depths must be at least 1, got \(2, 0\)"),
        ({"depths": ()}, r"depths needs at least one value, got \(\)"),
        ({"num_heads": (2, 4, 8)}, r"num_heads \(2, 4, 8\) and depths \(2, 4\) need one number for each"),
        ({"num_heads": (2, 3)}, "width 128 of a stage is not divisible by its num_heads 3"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"windowsize": 4}, "no option 'windowsize': did you mean window_size"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("swin_cifar", **changes)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_said() -> None:
    model, images = build_model("swin_cifar"), torch.randn(1, 3, 32, 32)
    assert isinstance(model, Swin)
    with pytest.raises(ValueError, match=r"Swin cannot drop patches .* use fill="):
        model.forward_features(images, keep=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="layer 6 of a model with 6 blocks; expected -6 to 5"):
        model.forward_features(images, layers=(6,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(images[:, :1])
