"""The tree of a model: its totals are the exact counts, its lines add up, its text says what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.evaluation.summary import Part, summarize
from vitrail.models import VARIANTS, build_model


def _smallest_of_each_architecture() -> list[str]:
    """The narrowest and shallowest variant of every config class."""
    found: dict[type, str] = {}
    for name, config in VARIANTS.items():
        area = config.image_shape[0] * config.image_shape[1]
        kind = type(config)
        if kind not in found or area < VARIANTS[found[kind]].image_shape[0] ** 2:
            found[kind] = name
    return sorted(found.values())


SMALL = [*_smallest_of_each_architecture(), "deit_cifar", "diffvit_cifar", "cct_7_3x1_32"]


def _walk(part: Part) -> Iterator[Part]:
    yield part
    for own in part.parts:
        yield from _walk(own)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("factor", [1, 1.5])
def test_totals_are_the_exact_counts(name: str, factor: float) -> None:
    with torch.device("meta"):
        model = build_model(name)
    height, width = model.config.image_shape
    shape = (model.config.in_chans, int(height * factor), width)
    found = summarize(model, shape).model
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == count_macs(model, shape) > 0
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for part in _walk(found):
        if part.kind == "parameter":
            assert part.shapes == (tuple(parameters[part.name].shape),)
            assert part.parameters == parameters[part.name].numel()
        else:
            assert type(modules[part.name]).__name__ == part.kind
            assert part.parameters == count_parameters(modules[part.name])
        if part.parts:
            assert part.parameters == sum(own.parameters for own in part.parts)
            assert part.macs >= sum(own.macs for own in part.parts)


def test_shapes_are_those_of_a_real_pass() -> None:
    model = build_model("vit_digits").eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape)}))
    found = summarize(model, (1, 12, 8)).model
    seen.clear()
    model.forward_head(model.forward_features(torch.zeros(1, 1, 12, 8)))
    shown = {part.name: part.shapes for part in _walk(found)}
    assert len(seen) == 4 * 6 + 2
    assert {name: (shape,) for name, shape in seen.items()} == {name: shown[name] for name in seen}


def test_the_text_of_a_small_model() -> None:
    model = build_model("vit_mnist_2blk")
    lines = summarize(model, (1, 28, 28)).text(depth=1, width=80).splitlines()
    assert [line.split() for line in lines[2:8]] == [
        ["model", "ViT", "1x10", "105,098", "1.796"],
        ["├", "cls_token", "parameter", "1x1x64", "64"],
        ["├", "pos_embed", "parameter", "1x17x64", "1,088"],
        ["├", "patch_embed", "ConvPatchEmbedding", "1x16x64", "3,200", "0.050"],
        ["├", "blocks.0", "to", "1", "2", "x", "Block", "1x17x64", "49,984", "0.873"],
        ["├", "norm", "LayerNorm", "1x17x64", "128"],
    ]
    assert lines[8].split() == ["└", "head", "Linear", "1x10", "650", "0.001"]
    assert "105,098 parameters, 1,795,968 MACs for one image of 1x28x28" in lines
    assert any("both attention products" in line for line in lines)


def test_what_rounds_to_nothing_is_not_shown_as_nothing() -> None:
    with torch.device("meta"):
        model = build_model("cait_xxs24_224")
    lines = summarize(model, (3, 224, 224)).text(depth=1, width=80).splitlines()
    head, norm = (next(line for line in lines if f" {name} " in line) for name in ("head", "norm"))
    assert head.split()[-2:] == ["193,000", "<0.001"]
    assert norm.split()[-1] == "384"


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "cait_xxs24_224", "swin_cifar", "pvt_cifar"])
def test_lines_fit_a_narrow_terminal(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    found = summarize(model, (3, *model.config.image_shape))
    assert max(map(len, found.text(depth=2, width=80).splitlines())) <= 80
    shallow, deep = found.text(depth=0, width=80), found.text(depth=9, width=120)
    assert len(shallow.splitlines()) == 7
    assert "qkv" not in shallow
    assert max(map(len, deep.splitlines())) <= 120


def test_json_holds_every_module_once() -> None:
    model = build_model("vit_digits")
    found = summarize(model, (1, 8, 8))
    tree = json.loads(json.dumps(found.to_dict(depth=9)))
    assert tree["image_shape"] == [1, 8, 8]
    names = [own["name"] for own in tree["model"]["parts"]]
    assert [name for name in names if "blocks" in name] == [f"blocks.{n}" for n in range(4)]
    assert found.to_dict(depth=1)["model"]["parts"][-1]["parts"] == []


def test_the_model_stays_as_it_is() -> None:
    model = build_model("vit_digits")
    summarize(model, (1, 8, 8))
    assert model.training
    assert next(model.parameters()).device.type == "cpu"
    assert not any(module._forward_hooks for module in model.modules())


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="in_chans"):
        summarize(build_model("vit_digits"), (3, 8, 8))
