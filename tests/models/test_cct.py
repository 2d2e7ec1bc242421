"""Compact transformers: exact counts, and the logits of a slow loop written from the paper."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.tap import edit, record, taps
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.cct import CCT, VARIANTS, sine_positions

# numbers.md 4.1 and 4.2; CVT printed there as 3.717 M and 3.190 M, CCT-7/7x2 not at all.
PARAMETERS = {
    "cct_2_3x2_32": 283_723,
    "cct_4_3x2_32": 482_123,
    "cct_6_3x1_32": 3_168_267 + 256 * 256,
    "cct_6_3x1_32_sine": 3_168_267,
    "cct_6_3x2_32": 3_326_923,
    "cct_7_3x1_32": 3_760_139,
    "cct_7_3x1_32_sine": 3_760_139 - 256 * 256,
    "cct_7_3x2_32": 3_853_259,
    "cct_7_7x2_224": 4_804_521,
    "cct_14_7x2_224": 22_367_273,
    "cct_14_7x2_384": 22_367_273 + (24**2 - 14**2) * 384,
    "cvt_6_4_32": 3_190_283,
    "cvt_7_4_32": 3_716_619,
}
# The authors' counter leaves the two products of attention out, 2 x layers x tokens^2 x width.
MEGA_MACS_WITHOUT_ATTENTION = {
    "cct_2_3x2_32": (33, 2 * 2 * 64**2 * 128),
    "cct_4_3x2_32": (46, 2 * 4 * 64**2 * 128),
    "cct_6_3x1_32_sine": (813, 2 * 6 * 256**2 * 256),
    "cct_6_3x2_32": (241, 2 * 6 * 64**2 * 256),
    "cct_7_3x1_32": (947, 2 * 7 * 256**2 * 256),
    "cct_7_3x2_32": (275, 2 * 7 * 64**2 * 256),
    "cct_14_7x2_224": (5110, 2 * 14 * 196**2 * 384),
    "cvt_6_4_32": (202, 2 * 6 * 64**2 * 256),
    "cvt_7_4_32": (236, 2 * 7 * 64**2 * 256),
}


def _small(name: str = "cct_2_3x2_32", **changes: object) -> CCT:
    torch.manual_seed(0)
    model = build_model(name, **({"embed_dim": 16, "num_heads": 2, "depth": 2} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_every_variant_is_in_the_table() -> None:
    assert set(PARAMETERS) == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(MEGA_MACS_WITHOUT_ATTENTION))
def test_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    printed, attention = MEGA_MACS_WITHOUT_ATTENTION[name]
    macs = count_macs(model, (3, *model.config.image_shape)) - attention
    assert macs / 1e6 == pytest.approx(printed, rel=0.005, abs=0.5)  # printed in whole millions


def _normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _as_in_the_paper(weights: dict[str, Tensor], images: Tensor, depth: int, heads: int, p: int) -> Tensor:
    """The tokeniser of section 3.3, the encoder, and sequence pooling (equations 2 to 4), image by image.

    `p`: Side of a patch; 0: convolutions. Convolutions are sums over a window, pooling is a maximum over one.
    """
    logits = []
    for image in images:
        maps, stage = image, 0
        while f"tokenizer.conv_layers.{stage}.0.weight" in weights:
            kernel = weights[f"tokenizer.conv_layers.{stage}.0.weight"]
            k = kernel.shape[-1]
            step, border = (p, 0) if p else (1, k // 2)
            padded = torch.zeros(maps.shape[0], maps.shape[1] + 2 * border, maps.shape[2] + 2 * border)
            padded[:, border : border + maps.shape[1], border : border + maps.shape[2]] = maps
            windows = padded.unfold(1, k, step).unfold(2, k, step)  # [C, rows, columns, k, k]
            maps = torch.einsum("crsij,dcij->drs", windows, kernel)
            if p:
                maps = maps + weights[f"tokenizer.conv_layers.{stage}.0.bias"][:, None, None]
            else:
                maps, (rows, columns) = maps.clamp_min(0), maps.shape[1:]
                pooled = torch.empty(maps.shape[0], -(-rows // 2), -(-columns // 2))
                for r in range(pooled.shape[1]):
                    for c in range(pooled.shape[2]):
                        window = maps[:, max(2 * r - 1, 0) : 2 * r + 2, max(2 * c - 1, 0) : 2 * c + 2]
                        pooled[:, r, c] = window.amax(dim=(1, 2))
                maps = pooled
            stage += 1
        x = maps.flatten(1).T + weights["classifier.positional_emb"][0]  # [N, D]
        for layer in range(depth):
            part = {
                name.removeprefix(f"classifier.blocks.{layer}."): value for name, value in weights.items()
            }
            y = _normalise(x, part["pre_norm.weight"], part["pre_norm.bias"])
            q, k, v = (y @ part["self_attn.qkv.weight"].T).chunk(3, dim=1)
            mixed = []
            for h in range(heads):
                d = x.shape[1] // heads
                one = slice(h * d, (h + 1) * d)
                similar = (q[:, one] @ k[:, one].T / math.sqrt(d)).exp()
                mixed.append(similar / similar.sum(1, keepdim=True) @ v[:, one])
            x = x + torch.cat(mixed, 1) @ part["self_attn.proj.weight"].T + part["self_attn.proj.bias"]
            x = _normalise(x, part["norm1.weight"], part["norm1.bias"])
            hidden = x @ part["linear1.weight"].T + part["linear1.bias"]
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            x = x + hidden @ part["linear2.weight"].T + part["linear2.bias"]
        x = _normalise(x, weights["classifier.norm.weight"], weights["classifier.norm.bias"])
        asked = x @ weights["classifier.attention_pool.weight"][0] + weights["classifier.attention_pool.bias"]
        pooled = asked.exp() / asked.exp().sum() @ x
        logits.append(weights["classifier.fc.weight"] @ pooled + weights["classifier.fc.bias"])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        ("cct_2_3x2_32", (32, 32), 0),
        ("cct_6_3x1_32", (12, 20), 0),
        ("cct_6_3x1_32_sine", (9, 14), 0),
        ("cvt_7_4_32", (32, 32), 4),
    ],
)
def test_logits_equal_the_paper(name: str, size: tuple[int, int], patch: int) -> None:
    model = _small(name, img_size=size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = _as_in_the_paper(model.state_dict(), images, depth=2, heads=2, p=patch)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=0)


def test_a_7x7_convolution_steps_by_two() -> None:
    with torch.device("meta"):
        model = build_model("cct_14_7x2_224", depth=1)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.stride, c.padding, c.bias, c.out_channels) for c in convolutions] == [
        ((2, 2), (3, 3), None, 64),
        ((2, 2), (3, 3), None, 384),
    ]
    assert model.config.grid == (14, 14)
    assert [tuple(stage) for stage in model.stages] == [(16, 384)]


def test_parameter_names_are_the_authors() -> None:
    with torch.device("meta"):
        names = set(build_model("cct_2_3x2_32", depth=1).state_dict())
    block = {"pre_norm.weight", "pre_norm.bias", "self_attn.qkv.weight", "self_attn.proj.weight",
             "self_attn.proj.bias", "linear1.weight", "linear1.bias", "norm1.weight", "norm1.bias",
             "linear2.weight", "linear2.bias"}  # fmt: skip
    assert names == {f"classifier.blocks.0.{name}" for name in block} | {
        "tokenizer.conv_layers.0.0.weight", "tokenizer.conv_layers.1.0.weight", "classifier.positional_emb",
        "classifier.attention_pool.weight", "classifier.attention_pool.bias", "classifier.norm.weight",
        "classifier.norm.bias", "classifier.fc.weight", "classifier.fc.bias",
    }  # fmt: skip
    assert "classifier.positional_emb" in build_model("cct_6_3x1_32_sine", depth=1).state_dict()


def test_sine_positions_equal_their_definition() -> None:
    table = sine_positions((2, 3), 6)
    for number in range(6):
        for channel in range(6):
            angle = number / 10_000 ** (channel // 2 * 2 / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[0, number, channel].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "cct_7_3x1_32_sine", "cvt_7_4_32", "cct_7_7x2_224"])
@pytest.mark.parametrize("size", [(32, 32), (17, 42)])
def test_any_size_trains_and_reaches_every_parameter(name: str, size: tuple[int, int]) -> None:
    model = _small(name, in_chans=2, drop=0.1, attn_drop=0.1, drop_path=0.2, num_classes=10).train()
    features = model.forward_features(torch.randn(3, 2, *size))
    assert features.grid == tuple(math.ceil(side / model.config.stride) for side in size)
    assert features.prefix.shape == (3, 0, 16)
    assert features.map().shape == (3, 16, *features.grid)
    model.forward_head(features).square().mean().backward()
    assert not {key for key, parameter in model.named_parameters() if parameter.grad is None}


def test_pooling_weighs_the_tokens() -> None:
    """With equal shares it is the mean; with one share it is that token."""
    model = _small()
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    pool = model.classifier.attention_pool
    with torch.no_grad():
        pool.weight.zero_()
        mean = model.classifier.fc(features.patches.mean(dim=1))
        torch.testing.assert_close(model.forward_head(features), mean, atol=1e-5, rtol=0)
        pool.weight.copy_(1e4 * features.patches[:1, 5])
        one = model.classifier.fc(features.patches[:1, (features.patches[0] @ pool.weight[0]).argmax()])
        torch.testing.assert_close(model.forward_head(features)[:1], one, atol=1e-5, rtol=0)


def test_keep_and_fill() -> None:
    model = _small("cvt_7_4_32")
    images, order = torch.randn(1, 3, 32, 32), torch.randperm(64)[None]
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 1] = True
    other = images.clone()
    other[:, :, :4, 4:8] = 9.0  # patch 1
    with torch.no_grad():
        full, kept = model.forward_features(images), model.forward_features(images, keep=order)
        torch.testing.assert_close(kept.patches, full.patches[:, order[0]], atol=1e-4, rtol=0)
        some = torch.tensor([[0, 2, 33]])
        assert torch.equal(
            model.forward_features(images, keep=some).patches,
            model.forward_features(other, keep=some).patches,
        )
        a, b = (model.forward_features(x, fill=(mask, torch.ones(16))).patches for x in (images, other))
    assert torch.equal(a, b)
    assert not torch.allclose(a, full.patches)


def test_layers_and_taps() -> None:
    model = _small()
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        plain = model(images)
        with record(model, "*") as seen:
            torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=0)
        layers = model.forward_features(images, layers=(0, -1)).layers
        for name in taps(model):
            with edit(model, {name: lambda values: values.roll(1, -1) * 2}):
                assert not torch.allclose(model(images), plain, atol=1e-6), name
    weights = seen["classifier.blocks.1.self_attn.weights"]
    assert weights.shape == (2, 2, 48, 48)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 48))
    assert seen["classifier.blocks.0.hidden"].shape == (2, 48, 16)
    normalised = model.classifier.norm(seen["classifier.blocks.0.out"])
    torch.testing.assert_close(layers[0].patches, normalised, atol=1e-5, rtol=0)
    torch.testing.assert_close(layers[-1].patches, seen["final"], atol=1e-5, rtol=0)


def test_recompute_gives_equal_gradients() -> None:
    model = _small().train()
    images = torch.randn(2, 3, 32, 32)
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cct_6_3x1_32_sine", "cvt_7_4_32"])
def test_compiles_in_one_graph_and_exports(name: str) -> None:
    model = _small(name, depth=1)
    images = torch.randn(2, 3, 30, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it traces
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=0)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)


def test_head_weight_decay_depth_and_initialisation() -> None:
    model = build_model("cct_4_3x2_32")
    assert model.no_weight_decay() == {"classifier.positional_emb"}
    assert model.block_names()[-1] == "classifier.blocks.3"
    depths = {"tokenizer.conv_layers.0.0.weight": 0, "classifier.positional_emb": 0,
              "classifier.blocks.3.linear1.weight": 4, "classifier.fc.bias": 5,
              "classifier.norm.weight": 5}  # fmt: skip
    assert {name: model.layer_of(name) for name in depths} == depths
    assert model.classifier.positional_emb.std().item() == pytest.approx(0.2, rel=0.05)
    assert model.classifier.blocks[0].linear1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    he = math.sqrt(2 / (64 * 9))
    assert model.tokenizer.conv_layers[1][0].weight.std().item() == pytest.approx(he, rel=0.05)
    model.reset_classifier(3)
    images = torch.randn(1, 3, 32, 32)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, 128)
    assert model.position_table((8, 8)).shape == (64, 128)
    assert build_model("cct_4_3x2_32", position="none").position_table((8, 8)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": 4}, "tokenizer 'conv' needs an odd kernel_size, got 4"),
        ({"tokenizer": "patch"}, "tokenizer 'patch' is one convolution, got num_convs 2"),
        ({"num_heads": 3}, "embed_dim 128 is not divisible by num_heads 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"position": "rotary"}, "option position"),
        ({"seq_pool": True}, "no option 'seq_pool'"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("cct_2_3x2_32", **changes)
    assert "\n" not in str(error.value)


def test_bad_images_and_layers_are_refused() -> None:
    model = _small()
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="layer -3 of a model with 2 blocks; expected -2 to 1"):
        model.forward_features(torch.randn(1, 3, 32, 32), layers=(-3,))


def test_convolution_of_the_reference_is_a_convolution() -> None:
    """The slow loop of this file and torch's convolution agree, so the loop can be trusted."""
    torch.manual_seed(0)
    image, kernel = torch.randn(2, 6, 7), torch.randn(4, 2, 3, 3)
    windows = F.pad(image, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
    expected = F.conv2d(image[None], kernel, padding=1)[0]
    torch.testing.assert_close(torch.einsum("crsij,dcij->drs", windows, kernel), expected, atol=1e-5, rtol=0)
