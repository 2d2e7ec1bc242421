"""CaiT: exact counts, timm's logits, talking heads against a slow reference, class attention."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from vitrail.components.tap import edit, record
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model, model_config
from vitrail.models.cait import VARIANTS, TalkingHeadsAttention, mix_heads

# Parameters and GMACs at the variant's image size (numbers.md, 4.2).
TABLE = {
    "cait_xxs24_224": (11_956_264, 2.523),
    "cait_xxs24_384": (12_029_224, 9.599),
    "cait_xxs36_224": (17_299_720, 3.756),
    "cait_xxs36_384": (17_372_680, 14.313),
    "cait_xs24_384": (26_670_088, 19.241),
    "cait_s24_224": (46_916_200, 9.327),
    "cait_s24_384": (47_062_120, 32.11),
    "cait_s36_384": (68_366_632, 47.9),
    "cait_m36_384": (271_221_352, 172.9),
    "cait_m48_448": (356_460_520, 329.1),
    "cait_cifar": (1_343_818, 0.0814),
}


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, LayerScale too, so that every branch counts."""
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
    assert count_macs(model, (3, *model.config.image_shape)) / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cait_xxs24_224", {"depth": 2}),
        ("cait_s24_224", {"depth": 1, "img_size": (96, 144), "in_chans": 1, "num_classes": 7}),
        ("cait_xs24_384", {"depth": 2, "embed_dim": 96, "num_heads": 6}),
    ],
)
def test_logits_and_features_equal_timm(name: str, changes: dict) -> None:
    peer = _shaken(timm.create_model(name, **changes))
    ours = build_model(name, **changes).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, ours.config.in_chans, *ours.config.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=1e-5)
        features = ours.forward_features(images, layers=(0, -1))
        theirs = peer.forward_features(images)
        first = peer.forward_intermediates(images, indices=[0], norm=True, intermediates_only=True)
    both = torch.cat([features.prefix, features.patches], dim=1)
    torch.testing.assert_close(both, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.layers[0].map(), first[0], atol=1e-4, rtol=0)
    assert features.layers[0].prefix.shape[1] == 0
    torch.testing.assert_close(features.layers[-1].prefix, features.prefix)


def test_full_size_model_equals_timm() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("cait_xxs24_224", init_values=0.5).eval()
    ours = build_model("cait_xxs24_224").eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_gradients_equal_timm() -> None:
    changes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 48}
    peer = _shaken(timm.create_model("cait_xxs24_224", **changes))
    ours = build_model("cait_xxs24_224", **changes).eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(2, 3, 48, 48)
    gradients = []
    for model in (ours, peer):
        model(images).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)


def test_talking_heads_equal_a_slow_reference() -> None:
    attention = _shaken(TalkingHeadsAttention(12, 3, attn_drop=0.0, drop=0.0)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with record(attention, "*") as seen:
        out = attention(x)
    q, k, v = seen["query"], seen["key"], seen["value"]  # each [2, 3, 5, 4]
    expected = torch.zeros(2, 5, 12, dtype=torch.float64)
    for b in range(2):
        logits = [[[q[b, h, i] @ k[b, h, j] / 2 for j in range(5)] for i in range(5)] for h in range(3)]
        for i in range(5):
            shares = []
            for h in range(3):
                mixed = [
                    sum(attention.proj_l.weight[h, g] * logits[g][i][j] for g in range(3))
                    + attention.proj_l.bias[h]
                    for j in range(5)
                ]
                torch.testing.assert_close(seen["scores"][b, h, i], torch.stack(mixed))
                shares.append(torch.stack(mixed).exp() / torch.stack(mixed).exp().sum())
            for h in range(3):
                weights = attention.proj_w.bias[h] + sum(
                    attention.proj_w.weight[h, g] * shares[g] for g in range(3)
                )
                torch.testing.assert_close(seen["weights"][b, h, i], weights)
                expected[b, i, 4 * h : 4 * h + 4] = weights @ v[b, h]
    torch.testing.assert_close(seen["mixed"], expected)
    torch.testing.assert_close(out, attention.proj(expected))


def test_heads_that_do_not_talk_are_ordinary_attention() -> None:
    attention = _shaken(TalkingHeadsAttention(32, 4, attn_drop=0.0, drop=0.0))
    with torch.no_grad():
        for mixer in (attention.proj_l, attention.proj_w):
            mixer.weight.copy_(torch.eye(4))
            mixer.bias.zero_()
    x = torch.randn(2, 9, 32)
    q, k, v = attention.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(plain), atol=1e-5, rtol=1e-5)


def test_mixing_is_the_linear_layer_over_the_heads() -> None:
    torch.manual_seed(0)
    x, mixer = torch.randn(2, 5, 3, 7), torch.nn.Linear(5, 5)
    expected = mixer(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(mix_heads(x, mixer), expected)
    torch.testing.assert_close(mix_heads(x, mixer, scale=0.5), mixer(0.5 * x.movedim(1, -1)).movedim(-1, 1))


def test_class_attention_leaves_the_patches_bit_identical() -> None:
    model = _shaken(build_model("cait_cifar"))
    images = torch.randn(2, 3, 32, 32)
    layers = model.forward_features(images, layers=(7, 8, 9)).layers
    assert torch.equal(layers[7].patches, layers[8].patches)
    assert torch.equal(layers[7].patches, layers[9].patches)
    assert not torch.allclose(layers[8].prefix, layers[9].prefix)
    assert [layers[number].prefix.shape[1] for number in (7, 8, 9)] == [0, 1, 1]
    other_token = torch.nn.Parameter(torch.randn(1, 1, 128))
    before = model.forward_features(images)
    model.cls_token = other_token
    after = model.forward_features(images)
    assert torch.equal(before.patches, after.patches)
    assert not torch.allclose(before.prefix, after.prefix)


def test_the_class_token_has_no_position() -> None:
    model = _shaken(build_model("cait_cifar", depth=2))
    images = torch.randn(2, 3, 32, 32)
    shuffled = F.unfold(images, 4, stride=4)[:, :, torch.randperm(64)]
    shuffled = F.fold(shuffled, (32, 32), 4, stride=4)
    with torch.no_grad():
        assert not torch.allclose(model(images), model(shuffled), atol=1e-3)
        model.pos_embed.zero_()
        torch.testing.assert_close(model(images), model(shuffled), atol=1e-4, rtol=1e-4)


def test_taps_see_what_is_used() -> None:
    model = _shaken(build_model("cait_cifar", depth=2))
    images = torch.randn(2, 3, 32, 20)
    with torch.no_grad():
        logits = model(images)
        with record(model, "*") as seen:
            explicit = model(images)
    torch.testing.assert_close(logits, explicit, atol=1e-5, rtol=1e-5)
    N = 8 * 5
    shapes = {
        "embed": (2, N, 128),
        "blocks.1.attn.query": (2, 4, N, 32),
        "blocks.1.attn.scores": (2, 4, N, N),
        "blocks.1.attn.weights": (2, 4, N, N),
        "blocks.1.attn.mixed": (2, N, 128),
        "blocks.1.mid": (2, N, 128),
        "blocks.1.mlp.hidden": (2, N, 256),
        "blocks.1.out": (2, N, 128),
        "blocks_token_only.0.attn.query": (2, 4, 1, 32),
        "blocks_token_only.0.attn.weights": (2, 4, 1, 1 + N),
        "blocks_token_only.1.out": (2, 1, 128),
        "final": (2, 1 + N, 128),
    }
    assert {name: tuple(seen[name].shape) for name in shapes} == shapes
    weights = seen["blocks_token_only.1.attn.weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1))
    mixed = (seen["blocks.1.attn.weights"] @ seen["blocks.1.attn.value"]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["blocks.1.attn.mixed"])
    for name in ("blocks.0.attn.weights", "blocks_token_only.1.attn.weights", "final"):
        with torch.no_grad(), edit(model, {name: torch.zeros_like}):
            changed = model(images)
        assert not torch.equal(changed, logits), name


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (3, 3)])
def test_every_parameter_learns_at_any_size(size: tuple[int, int]) -> None:
    model = build_model("cait_cifar", depth=2, in_chans=2, drop=0.1, attn_drop=0.1, drop_path=0.2)
    logits = model(torch.randn(3, 2, *size))
    logits.square().mean().backward()
    assert logits.shape == (3, 10)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_keeping_and_filling() -> None:
    model = _shaken(build_model("cait_cifar", depth=2))
    images = torch.randn(2, 3, 32, 24)
    order = torch.stack([torch.randperm(48), torch.randperm(48)])
    other = images.clone()
    other[:, :, :4, 4:8] = 9.0  # patch 1
    keep, mask = torch.tensor([[0, 2, 33]]).expand(2, -1), torch.zeros(2, 48, dtype=torch.bool)
    mask[:, 1] = True
    with torch.no_grad():
        full, kept = model.forward_features(images), model.forward_features(images, keep=order)
        torch.testing.assert_close(kept.prefix, full.prefix, atol=1e-4, rtol=1e-4)
        a, b = (model.forward_features(x, keep=keep) for x in (images, other))
        assert torch.equal(a.prefix, b.prefix)
        assert a.patches.shape == (2, 3, 128)
        c, d = (model.forward_features(x, fill=(mask, torch.ones(128))) for x in (images, other))
        assert torch.equal(c.patches, d.patches)
        assert not torch.allclose(c.prefix, full.prefix)


def test_positions_are_resampled() -> None:
    model = build_model("cait_cifar", depth=1)
    assert torch.equal(model.position_table((8, 8)), model.pos_embed[0])
    assert model.position_table((5, 10)).shape == (50, 128)
    assert model.forward_features(torch.randn(1, 3, 18, 40)).grid == (5, 10)


def test_layer_scale_starts_as_in_the_paper() -> None:
    assert {name: model_config(name).layer_scale for name in VARIANTS} == {
        name: 0.1 if name == "cait_cifar" else 1e-6 if name.startswith(("cait_s36", "cait_m")) else 1e-5
        for name in VARIANTS
    }
    model = build_model("cait_cifar", depth=1, drop_path=0.3)
    assert (model.blocks[0].gamma_2 == 0.1).all()
    assert (model.blocks_token_only[1].gamma_1 == 0.1).all()
    deep = build_model("cait_cifar", depth=3, drop_path=0.3)
    assert [block.drop_path.rate for block in deep.blocks] == [0.3, 0.3, 0.3]
    torch.manual_seed(0)
    assert build_model("cait_xxs24_224", depth=1).blocks[0].mlp.fc1.weight.std().item() == pytest.approx(
        0.02, rel=0.05
    )


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, images = build_model("cait_cifar", depth=2), torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_whole_and_exports() -> None:
    model, images = build_model("cait_cifar", depth=2).eval(), torch.randn(2, 3, 27, 40)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected)


def test_depth_of_parameters() -> None:
    model = build_model("cait_cifar")
    depth = {
        "patch_embed.proj.weight": 0, "pos_embed": 0, "blocks.0.attn.proj_l.weight": 1, "blocks.7.gamma_1": 8,
        "cls_token": 9, "blocks_token_only.0.attn.q.weight": 9, "blocks_token_only.1.mlp.fc1.bias": 10,
        "norm.weight": 11, "head.bias": 11,
    }  # fmt: skip
    assert {name: model.layer_of(name) for name in depth} == depth
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    assert all(model.get_submodule(name) is not None for name in model.block_names())


def test_new_head() -> None:
    model, images = build_model("cait_cifar", depth=1), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "embed_dim 128 is not divisible by num_heads 5"),
        ({"class_depth": 0}, "class_depth must be at least 1"),
        ({"class_deph": 1}, "no option 'class_deph': did you mean class_depth"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("cait_cifar", **changes)
    assert "\n" not in str(error.value)


def test_wrong_input_is_said() -> None:
    model, images = build_model("cait_cifar", depth=1), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="layer 3 of a model with 3 blocks; expected -3 to 2"):
        model.forward_features(images, layers=(3,))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(images[:, :1])
