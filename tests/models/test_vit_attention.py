"""The attentions that a ViT can have: every switch with every other, and what each promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from vitrail.components.tap import record, taps
from vitrail.models import build_model
from vitrail.models.vit import ViT

ATTENTIONS = ("full", "differential", "sparse_topk", "sparse_local", "sparse_axial", "linear")
POSITIONS = ("none", "learned", "learned_2d", "sincos_1d", "sincos_2d", "relative", "rotary")
FIT = [(a, p) for a in ATTENTIONS for p in POSITIONS if a != "linear" or p not in ("relative", "rotary")]


def _small(attention: str, **changes: object) -> ViT:
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "top_k": 5, "reach": 1, "attention": attention}
    return build_model("vit_cifar_plain", **(options | changes))


def _random(model: ViT, std: float = 0.2) -> ViT:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize(("attention", "position"), FIT)
def test_every_attention_trains_with_every_position(attention: str, position: str) -> None:
    model = _small(attention, position=position, registers=1, drop=0.1, drop_path=0.2, layer_scale=0.1)
    logits = model(torch.randn(3, 3, 17, 40))
    assert logits.shape == (3, 10)
    logits.square().mean().backward()
    assert not {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_watching_changes_nothing(attention: str) -> None:
    model = _random(_small(attention, registers=1)).eval()
    images = torch.randn(2, 3, 24, 40)
    names = [name for name in taps(model) if name.endswith((".weights", ".weights1", ".weights2"))]
    with torch.no_grad():
        plain = model(images)
        with record(model, *names) as seen:
            torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=0)
    assert set(seen) == set(names)
    for name, weights in seen.items():
        share = model.get_submodule(name.rpartition(".")[0])
        one = 1 - share.lambda_now() if attention == "differential" and name.endswith("weights") else 1.0
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]) * one)


@pytest.mark.parametrize(("attention", "position"), FIT)
def test_keeping_all_patches_in_any_order_changes_nothing(attention: str, position: str) -> None:
    model = _random(_small(attention, position=position, registers=1)).eval()
    images = torch.randn(2, 3, 32, 24)
    order = torch.stack([torch.randperm(48), torch.randperm(48)])
    with torch.no_grad():
        full, kept = model.forward_features(images), model.forward_features(images, keep=order)
    torch.testing.assert_close(kept.prefix, full.prefix, atol=1e-4, rtol=0)
    expected = full.patches.gather(1, order[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(kept.patches, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("attention", "position"), FIT)
@pytest.mark.parametrize("changes", [{}, {"registers": 2, "distillation": True, "qk_norm": True}])
def test_logits_from_the_read_tokens_alone_equal_the_full_ones(
    attention: str, position: str, changes: dict
) -> None:
    model = _random(_small(attention, position=position, **changes))
    images = torch.randn(3, 3, 24, 40)
    results = []
    for full in (False, True):
        model.zero_grad()
        logits = model.forward_head(model.forward_features(images)) if full else model(images)
        logits.square().sum().backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_density_is_the_share_of_the_weights_that_are_not_zero(attention: str) -> None:
    model = _small(attention, registers=1)
    with record(model, "blocks.1.attn.weights") as seen:
        model(torch.randn(2, 3, 24, 40))
    used = (seen["blocks.1.attn.weights"] != 0).double().mean().item()
    assert model.attention_density((6, 10)) == pytest.approx(used)
    assert (used < 0.6) == attention.startswith("sparse")


@pytest.mark.parametrize("attention", ["sparse_local", "sparse_axial"])
def test_a_pattern_hides_what_it_says(attention: str) -> None:
    """Without a global token, one block lets nothing from outside the pattern through."""
    model = _small(attention, depth=1, class_token=False, pool="mean").eval()
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, 12:16, 20:24] += 1.0  # the patch in row 3, column 5
    with torch.no_grad():
        a, b = (model.forward_features(x).map() for x in (images, other))
    changed = (a != b).any(dim=1)[0]
    rows, columns = torch.arange(8)[:, None], torch.arange(8)[None]
    if attention == "sparse_local":
        expected = ((rows - 3).abs() <= 1) & ((columns - 5).abs() <= 1)
    else:
        expected = (rows == 3) | (columns == 5)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_recompute_gives_equal_gradients(attention: str) -> None:
    model = _random(_small(attention))
    images = torch.randn(2, 3, 32, 32)
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(images).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiles_in_one_graph_and_exports(attention: str) -> None:
    model = _small(attention, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, while it traces
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=0)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "linear", "position": "relative"}, "attention 'linear' forms no scores"),
        ({"attention": "linear", "position": "rotary"}, "got position 'rotary'"),
        ({"attention": "linear", "attn_drop": 0.1}, "attn_drop 0.1"),
        ({"attention": "sparse_topk", "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"attention": "sparse_local", "reach": -1}, "reach must be at least 0, got -1"),
        ({"attention": "differential", "num_heads": 32, "embed_dim": 32}, "has two maps"),
        ({"attention": "sparse"}, "option attention: .*sparse_topk"),
    ],
)
def test_bad_options_get_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_model("vit_cifar_plain", **changes)
    assert "\n" not in str(error.value)
