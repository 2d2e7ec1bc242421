"""DeiT: exact counts, the logits of timm and transformers, two tokens with two heads."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from vitrail.components.tap import record
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.deit import VARIANTS
from vitrail.models.vit import ViT

# numbers.md 4.2, and timm for the rest.
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_huge_patch14_224": 632_126_440,
    "deit_cifar": 1_808_852,
}
GIGA_MACS = {
    "deit_tiny_patch16_224": 1.254,
    "deit_small_patch16_224": 4.599,
    "deit_base_patch16_224": 17.564,
    "deit_base_patch16_384": 55.48,
    "deit_tiny_distilled_patch16_224": 1.261,
    "deit_small_distilled_patch16_224": 4.624,
    "deit_base_distilled_patch16_224": 17.657,
    "deit_base_distilled_patch16_384": 55.59,
}


def _small(**changes: object) -> ViT:
    torch.manual_seed(0)
    model = build_model("deit_cifar", **({"depth": 2, "embed_dim": 32, "num_heads": 2} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


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
    ("name", "size"),
    [
        ("deit_tiny_patch16_224", (224, 224)),
        ("deit_tiny_distilled_patch16_224", (224, 224)),
        ("deit_small_distilled_patch16_224", (160, 240)),
        ("deit3_small_patch16_224", (224, 224)),
        ("deit3_small_patch16_224", (240, 160)),
    ],
)
def test_logits_and_features_equal_timm_with_its_weights(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    peer = timm.create_model(name, depth=2, dynamic_img_size=True).eval()
    for parameter in peer.parameters():  # so that LayerScale and the tokens count too
        nn.init.normal_(parameter, std=0.05)
    ours = build_model(name, depth=2).eval()
    ours.load_state_dict(peer.state_dict())  # strictly
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)
        features = ours.forward_features(images)
        tokens = torch.cat([features.prefix, features.patches], dim=1)
        torch.testing.assert_close(tokens, peer.forward_features(images), atol=1e-4, rtol=0)


def test_both_heads_equal_timm_in_distilled_training() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    peer.set_distilled_training()
    ours = build_model("deit_tiny_distilled_patch16_224", depth=1)
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(2, 3, 224, 224)
    theirs = peer(images)
    heads = ours.forward_heads(ours.forward_features(images))
    torch.testing.assert_close(heads, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(images), (theirs[0] + theirs[1]) / 2, atol=1e-4, rtol=0)


# transformers' names -> ours, layer {}; queries, keys and values are joined in the test.
FROM_TRANSFORMERS = {
    "deit.embeddings.cls_token": "cls_token",
    "deit.embeddings.distillation_token": "dist_token",
    "deit.embeddings.position_embeddings": "pos_embed",
    "deit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "deit.layers.{}.layernorm_before": "blocks.{}.norm1",
    "deit.layers.{}.layernorm_after": "blocks.{}.norm2",
    "deit.layers.{}.attention.o_proj": "blocks.{}.attn.proj",
    "deit.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "deit.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "deit.layernorm": "norm",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


def test_both_heads_equal_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    peer = DeiTForImageClassificationWithTeacher(
        DeiTConfig(image_size=32, patch_size=8, num_labels=7, layer_norm_eps=1e-6, **sizes)
    ).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs, weights = peer.state_dict(), {}
    for layer in range(2):
        for old, new in FROM_TRANSFORMERS.items():
            for end in ("", ".weight", ".bias"):
                if old.format(layer) + end in theirs:
                    weights[new.format(layer) + end] = theirs[old.format(layer) + end]
        for end in ("weight", "bias"):
            parts = [theirs[f"deit.layers.{layer}.attention.{part}_proj.{end}"] for part in "qkv"]
            weights[f"blocks.{layer}.attn.qkv.{end}"] = torch.cat(parts)
    ours = build_model(
        "deit_cifar", patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=7
    ).eval()
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = peer(images)
        heads = ours.forward_heads(ours.forward_features(images))
        torch.testing.assert_close(heads[0], expected.cls_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(heads[1], expected.distillation_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(images), expected.logits, atol=1e-4, rtol=0)


def test_the_answer_is_the_mean_of_both_heads() -> None:
    model = _small()
    images = torch.randn(3, 3, 20, 36)
    features = model.forward_features(images)
    assert features.prefix.shape == (3, 2, 32)
    from_class, from_distillation = model.forward_heads(features)
    assert not torch.allclose(from_class, from_distillation)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(images), (from_class + from_distillation) / 2, atol=1e-4, rtol=0)


def test_each_head_learns_from_its_own_token() -> None:
    model = _small(depth=1)
    from_class, _ = model.forward_heads(model.forward_features(torch.randn(2, 3, 32, 32)))
    from_class.sum().backward()
    assert model.head_dist.weight.grad is None
    model.zero_grad()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert model.dist_token.grad.abs().max() > 0


def test_tokens_stand_in_the_documented_order() -> None:
    """Class, distillation, registers, patches."""
    model = _small(registers=3, prefix_position=False, depth=1)
    with record(model, "embed") as seen:
        model(torch.randn(1, 3, 32, 32))
    first = torch.cat([model.cls_token, model.dist_token, model.reg_token], dim=1)
    assert torch.equal(seen["embed"][:, :5], first)


def test_a_new_classifier_has_two_new_heads() -> None:
    model = _small()
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head")}
    model.reset_classifier(3)
    images = torch.randn(1, 3, 32, 32)
    assert [head.shape for head in model.forward_heads(model.forward_features(images))] == [(1, 3), (1, 3)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.reset_classifier(0)
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), features.prefix.mean(dim=1), atol=1e-5, rtol=0)


def test_dropped_patches_and_distillation() -> None:
    model = _small().eval()
    images, order = torch.randn(1, 3, 32, 32), torch.randperm(64)[None]
    with torch.no_grad():
        kept = model.forward_features(images, keep=order)
        torch.testing.assert_close(model.forward_head(kept), model(images), atol=1e-4, rtol=0)
        assert model.forward_features(images, keep=order[:, :7]).prefix.shape == (1, 2, 32)


def test_initialisation_weight_decay_and_depth() -> None:
    model = build_model("deit_cifar")
    assert model.dist_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.blocks[1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert {"cls_token", "dist_token", "pos_embed"} <= model.no_weight_decay()
    assert model.layer_of("head_dist.weight") == 7
    assert model.layer_of("dist_token") == 0
    assert (build_model("deit3_small_patch16_224", depth=1).blocks[0].ls1.gamma == 1e-6).all()


def test_compiles_in_one_graph_and_exports() -> None:
    model = _small(depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it traces
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=0)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)


def test_a_plain_model_says_that_it_has_one_head() -> None:
    model = build_model("vit_mnist_2blk")
    with pytest.raises(ValueError, match="no distillation token; build it with distillation=True"):
        model.forward_heads(model.forward_features(torch.randn(1, 1, 28, 28)))


def test_distillation_needs_the_class_token() -> None:
    with pytest.raises(ValueError, match="distillation needs pool 'cls', got 'mean'"):
        build_model("deit_cifar", pool="mean")
