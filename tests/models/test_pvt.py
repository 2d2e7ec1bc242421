"""PVT: exact counts, the logits of transformers, any size, one class token in the last stage."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PvtConfig, PvtForImageClassification

from vitrail.components.flow import AttentionStep
from vitrail.components.tap import edit, record
from vitrail.evaluation.cost import count_macs
from vitrail.models import Encoder, build_model
from vitrail.models.encoder import Stage
from vitrail.models.pvt import VARIANTS

# Parameters and GMACs at the variant's image size (numbers.md, 4.2).
TABLE = {
    "pvt_tiny": (13_229_288, 1.933),
    "pvt_small": (24_485_864, 3.816),
    "pvt_medium": (44_208_104, 6.659),
    "pvt_large": (61_369_320, 9.814),
    "pvt_cifar": (1_436_218, 0.0456),
}
SMALL = {
    "embed_dims": (16, 24, 40, 32),
    "depths": (2, 1, 1, 2),
    "num_heads": (1, 2, 5, 4),
    "mlp_ratios": (2, 2, 2, 2),
}
# transformers' names to the authors'; query, key and value are dealt with below.
RENAMES = (
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.cls_token", "cls_token"),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.position_embeddings", "pos_embed{}"),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.projection", "patch_embed{}.proj"),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.layer_norm", "patch_embed{}.norm"),
    (r"^pvt\.encoder\.block\.(\d)", "block{}"),
    (r"^pvt\.encoder\.layer_norm", "norm"),
    (r"^classifier", "head"),
    (r"attention\.self\.query", "attn.q"),
    (r"attention\.self\.sequence_reduction", "attn.sr"),
    (r"attention\.self\.layer_norm", "attn.norm"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_norm_(?=\d)", "norm"),
    (r"mlp\.dense", "mlp.fc"),
)


def _official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in RENAMES:
            name = re.sub(
                pattern, lambda match, new=new: new.format(*(int(g) + 1 for g in match.groups())), name
            )
        renamed[name] = tensor
    for name in [name for name in renamed if "attention.self.key" in name]:
        value = renamed.pop(name.replace("self.key", "self.value"))
        renamed[name.replace("attention.self.key", "attn.kv")] = torch.cat([renamed.pop(name), value])
    return renamed


def _peer(img_size: int) -> PvtForImageClassification:
    torch.manual_seed(0)
    peer = PvtForImageClassification(
        PvtConfig(
            image_size=img_size,
            hidden_sizes=SMALL["embed_dims"],
            depths=SMALL["depths"],
            num_attention_heads=SMALL["num_heads"],
            mlp_ratios=SMALL["mlp_ratios"],
            num_labels=7,
        )
    ).eval()
    for name, module in peer.named_modules():
        # The authors' code has PyTorch's epsilon here, transformers 1e-6.
        if "patch_embeddings" in name or "self.layer_norm" in name:
            module.eps = 1e-5
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return peer


def test_every_variant_is_in_the_table() -> None:
    assert set(TABLE) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    parameters, gmacs = TABLE[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_macs(model, (3, *model.config.image_shape)) / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(("img_size", "size"), [(224, (224, 224)), (64, (64, 64)), (64, (32, 128))])
def test_logits_and_layers_equal_transformers(img_size: int, size: tuple[int, int]) -> None:
    # transformers takes another shape where every stage has as many patches as at the native one.
    peer = _peer(img_size)
    ours = build_model("pvt_tiny", **SMALL, img_size=size, num_classes=7).eval()
    ours.load_state_dict(_official_names(peer.state_dict()))  # strictly
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs = peer(images, output_hidden_states=True)
        features = ours.forward_features(images, layers=range(6))
        torch.testing.assert_close(ours(images), theirs.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.forward_head(features), theirs.logits, atol=1e-4, rtol=0)
    for layer, expected in enumerate(theirs.hidden_states[:4]):
        torch.testing.assert_close(features.layers[layer].patches, expected, atol=1e-4, rtol=0)
        assert features.layers[layer].prefix.shape[1] == 0
    last = torch.cat([features.prefix, features.patches], dim=1)
    torch.testing.assert_close(last, theirs.hidden_states[-1], atol=1e-4, rtol=0)
    assert torch.equal(features.layers[5].patches, features.patches)
    torch.testing.assert_close(features.stages[0].flatten(2).transpose(1, 2), theirs.hidden_states[1])


def test_full_size_model_equals_transformers() -> None:
    torch.manual_seed(0)
    peer = PvtForImageClassification(PvtConfig()).eval()
    ours = build_model("pvt_tiny").eval()
    ours.load_state_dict(_official_names(peer.state_dict()))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        # Not closer: see `_peer` on the two epsilons.
        torch.testing.assert_close(ours(images), peer(images).logits, atol=1e-3, rtol=0)


def test_pyramid_at_any_size() -> None:
    model = build_model("pvt_tiny", **SMALL, in_chans=2).eval()
    assert model.stages == (Stage(4, 16), Stage(8, 24), Stage(16, 40), Stage(32, 32))
    for height, width in ((224, 224), (65, 131), (7, 250), (1, 1)):
        features = model.forward_features(torch.randn(1, 2, height, width))
        for stage, maps in zip(model.stages, features.stages, strict=True):
            assert maps.shape == (1, stage.width, -(-height // stage.stride), -(-width // stage.stride))
        assert torch.equal(features.stages[-1], features.map())
        assert features.prefix.shape == (1, 1, 32)
    assert model.position_table((9, 5)).shape == (45, 16)
    assert torch.equal(model.position_table((56, 56)), model.pos_embed1[0])


def test_images_are_padded_with_zeros_to_whole_patches() -> None:
    model = build_model("pvt_cifar").eval()
    images = torch.randn(1, 3, 31, 47)
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded))


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_every_parameter_learns(size: tuple[int, int]) -> None:
    model = build_model("pvt_cifar", drop=0.1, attn_drop=0.1, drop_path=0.2)
    model(torch.randn(3, 3, *size)).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("size", [(32, 32), (30, 44)])
def test_logits_are_the_same_however_one_looks(size: tuple[int, int]) -> None:
    # The class token alone in the last block; all tokens of it; the explicit attention.
    torch.manual_seed(0)
    model = build_model("pvt_cifar").eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model.forward_head(model.forward_features(images)), logits)
        with record(model, "*.attn.weights", "block3.1.out") as seen:
            explicit = model(images)
    torch.testing.assert_close(explicit, logits, atol=1e-5, rtol=0)
    assert seen["block3.1.out"].shape[1] == {32: 1 + 4 * 4, 30: 1 + 4 * 6}[size[0]]
    assert len(seen) == 7
    for name, weights in seen.items():
        if name.endswith("weights"):
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_edits_reach_the_logits() -> None:
    model = build_model("pvt_cifar").eval()
    images = torch.randn(1, 3, 32, 32)
    for name in ("embed", "block1.0.attn.weights", "block2.1.mlp.hidden", "block3.1.mid", "final"):
        with torch.no_grad(), edit(model, {name: torch.zeros_like}):
            changed = model(images)
        assert not torch.equal(changed, model(images)), name


def step_of(model: Encoder, block: str, image_shape: tuple[int, int]) -> AttentionStep:
    """What the model says of the attention of one block."""
    return next(own for own in model.flow(image_shape).attentions if own.name == f"{block}.attn")


def test_keys_stand_for_pixels() -> None:
    model = build_model("pvt_tiny", **SMALL)
    first = step_of(model, "block1.0", (224, 100))
    assert first.tokens.cells.columns[-1] == (96, 100)
    assert first.keys is not None
    assert first.keys.grid == (7, 4)
    assert first.keys.rows[1] == (8, 16)  # cells of 4 pixels
    assert first.keys.columns[-1] == (24, 25)
    last = step_of(model, "block4.1", (224, 224))
    assert (last.keys, last.tokens.prefix) == (None, 1)
    assert last.tokens.cells.rows[-1] == (192, 224)
    with record(model, "block3.0.attn.weights") as seen:
        model(torch.randn(1, 3, 90, 224))
    keys = step_of(model, "block3.0", (90, 224)).keys
    assert keys is not None
    assert seen["block3.0.attn.weights"].shape[-1] == keys.grid[0] * keys.grid[1]


def test_filled_patches_are_not_seen() -> None:
    model = build_model("pvt_cifar").eval()
    images, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 256, dtype=torch.bool)
    mask[0, 1] = True
    other = images.clone()
    other[:, :, :2, 2:4] = 9.0
    with torch.no_grad():
        a, b = (model.forward_features(x, fill=(mask, torch.ones(48))).patches for x in (images, other))
        assert torch.equal(a, b)
        assert not torch.allclose(a, model.forward_features(images).patches)


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, images = build_model("pvt_cifar"), torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_whole_and_exports() -> None:
    model, images = build_model("pvt_cifar").eval(), torch.randn(2, 3, 27, 40)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected)


def test_depth_of_parameters() -> None:
    model = build_model("pvt_cifar")
    depth = {
        "patch_embed1.proj.weight": 0, "pos_embed1": 0, "block1.0.norm1.bias": 1, "block1.1.attn.q.bias": 2,
        "patch_embed2.norm.bias": 3, "pos_embed2": 3, "block2.0.mlp.fc1.bias": 3, "cls_token": 5,
        "pos_embed3": 5, "block3.1.attn.kv.bias": 6, "norm.weight": 7, "head.bias": 7,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in depth} == depth
    assert model.no_weight_decay() == {"cls_token", "pos_embed1", "pos_embed2", "pos_embed3"}
    assert model.no_weight_decay() < {name for name, _ in model.named_parameters()}
    assert all(model.get_submodule(name) is not None for name in model.block_names())


def test_drop_path_grows_over_all_stages() -> None:
    model = build_model("pvt_cifar", drop_path=0.5)
    rates = [model.get_submodule(name).drop_path.rate for name in model.block_names()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_initialisation_is_the_authors() -> None:
    torch.manual_seed(0)
    model = build_model("pvt_tiny")
    assert model.block4[1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.pos_embed1.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.block1[0].attn.kv.bias.any()


def test_new_head() -> None:
    model, images = build_model("pvt_cifar"), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"depths": (2, 2)},
            r"embed_dims needs one value for each of 2 stages \(depths\), got \(48, 96, 192\)",
        ),
        ({"num_heads": (1, 2, 5)}, "embed_dims: 192 is not divisible by its num_heads 5"),
        ({"sr_ratios": (4, 2, 2)}, "the last of sr_ratios must be 1"),
        ({"depths": (2, 0, 2)}, "depths must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"embed_dims": "wide"}, "option embed_dims"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("pvt_cifar", **changes)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_said() -> None:
    model, images = build_model("pvt_cifar"), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"PVT cannot drop patches .* use fill="):
        model.forward_features(images, keep=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="layer 6 of a model with 6 blocks; expected -6 to 5"):
        model.forward_features(images, layers=(6,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(images[:, :1])
