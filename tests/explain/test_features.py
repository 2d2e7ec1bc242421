"""What features hold, against the same worked out by hand from what the models' own parts give."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.tap import record, taps
from vitrail.explain.features import (
    PIXEL_LIMIT,
    STEP,
    class_logit,
    feature_colours,
    head_activation,
    layer_vectors,
    logit_lens,
    maximise,
    nearest_patches,
    unit_activation,
)
from vitrail.models import Encoder, build_model, list_models

ARCHITECTURES = [
    *list_models("*cifar*"),
    *list_models("*mnist*"),
    "vit_digits",
    "cct_2_3x2_32",
    "cct_6_3x1_32_sine",
]


def tiny(name: str = "vit_digits", **changes: Any) -> Encoder:
    torch.manual_seed(0)
    if name == "vit_digits":
        changes = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_embed": "conv"} | changes
    return build_model(name, **changes)


def pixels(model: Encoder, count: int = 3, height: int = 19, width: int = 26) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, model.config.in_chans, height, width, generator=generator)


@contextmanager
def untouched(model: Encoder) -> Iterator[None]:
    """Fails where a mode, parameter, buffer, gradient, hook or the state of the random numbers changed."""
    model.train()
    list(model.children())[-1].eval()  # a part in another mode stays in it
    modes = [module.training for module in model.modules()]
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    yield
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert not any(tap.watched for tap in taps(model).values())
    assert torch.equal(chance, torch.get_rng_state())


def layers_of(model: Encoder, images: Tensor) -> dict[int, Any]:
    model.eval()
    with torch.no_grad():
        return model.forward_features(images, layers=range(len(model.block_names()))).layers


# Colours


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_colours_are_the_main_components_of_all_patches(name: str) -> None:
    model = tiny(name)
    images = pixels(model)
    with untouched(model):
        found = feature_colours(model, images)
    expected = layers_of(model, images)
    assert list(found) == list(range(len(model.block_names())))
    for layer in (0, len(found) - 1):
        colours, features = found[layer], expected[layer]
        assert colours.shape == (3, *features.grid, 3)
        flat = features.patches.flatten(0, 1).double().numpy()
        # scikit-learn makes the largest coefficient of each direction positive, too.
        places = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(flat)).float()
        low, high = places.amin(dim=0), places.amax(dim=0)
        torch.testing.assert_close(colours.reshape(-1, 3), (places - low) / (high - low), atol=1e-4, rtol=0)


def test_the_same_image_has_the_same_colours() -> None:
    model = tiny()
    images = pixels(model, 2)
    found = feature_colours(model, torch.cat([images, images[:1]]), layers=(-1, 0))
    assert list(found) == [-1, 0]
    for colours in found.values():
        torch.testing.assert_close(colours[0], colours[2], atol=1e-5, rtol=0)
        assert not torch.allclose(colours[0], colours[1], atol=0.05)
        assert torch.equal(colours.amin(dim=(0, 1, 2)), torch.zeros(3))
        assert torch.equal(colours.amax(dim=(0, 1, 2)), torch.ones(3))


def test_directions_in_which_nothing_varies_are_grey() -> None:
    model = tiny(position="none")
    same = torch.ones(2, 1, 8, 8)  # all patches alike
    assert torch.equal(feature_colours(model, same)[0], torch.full((2, 4, 4, 3), 0.5))
    two = torch.cat([same, -same])  # two kinds of patches: one direction
    colours = feature_colours(model, two)[0].reshape(4, -1, 3)
    assert torch.equal(colours[..., 1:], torch.full_like(colours[..., 1:], 0.5))
    assert {float(colours[0, 0, 0]), float(colours[2, 0, 0])} == {0.0, 1.0}
    narrow = tiny(embed_dim=2, num_heads=1)
    assert torch.equal(feature_colours(narrow, pixels(narrow))[0][..., 2], torch.full((3, 10, 13), 0.5))
    one = feature_colours(tiny(), torch.randn(1, 1, 2, 2))[0]  # a single patch
    assert torch.equal(one, torch.full((1, 1, 1, 3), 0.5))


def test_bad_colours() -> None:
    model = tiny()
    with untouched(model):
        with pytest.raises(ValueError, match="layer 3 of a model with 3 blocks"):
            feature_colours(model, pixels(model), layers=[3])
        with pytest.raises(ValueError, match="the features of layer 0 are not finite"):
            feature_colours(model, pixels(model) * torch.nan)
        with pytest.raises(ValueError, match="no images"):
            feature_colours(model, pixels(model, 0))


# A vector an image

READ_BY_TOKEN = {
    "cait_cifar",
    "crossvit_cifar",
    "deit_cifar",
    "diffvit_cifar_plain",
    "pvt_cifar",
    "vit_cifar_plain",
    "vit_digits",
    "vit_mnist_2blk",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_are_what_heads_read(name: str) -> None:
    model = tiny(name)
    images = pixels(model)
    with untouched(model):
        found = layer_vectors(model, images)
    expected = layers_of(model, images)
    assert len(found) == len(expected)
    reads_tokens = name in READ_BY_TOKEN
    for layer, own in enumerate(found):
        features = expected[layer]
        assert torch.equal(own.patches, features.patches.mean(dim=1))
        if reads_tokens and features.prefix.shape[1]:
            tokens = 2 if name.startswith("deit") else 1
            assert own.token is not None
            torch.testing.assert_close(own.token, sum(features.prefix[:, n] for n in range(tokens)) / tokens)
            assert own.read is own.token
        else:
            assert own.token is None
            assert own.read is own.patches
    assert (found[-1].token is not None) == reads_tokens


# Nearest patches


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nearest_patches_by_a_loop(name: str) -> None:
    model = tiny(name)
    images = pixels(model)
    features = layers_of(model, images)[len(model.block_names()) - 1]
    rows, columns = features.grid
    row, column = rows - 1, columns // 2
    with untouched(model):
        count = min(4, 2 * rows * columns)
        found = nearest_patches(model, images, 1, row, column, count=count)
    maps = features.map()
    expected = []
    for image in (0, 2):
        for i in range(rows):
            for j in range(columns):
                cosine = F.cosine_similarity(maps[1, :, row, column], maps[image, :, i, j], dim=0)
                expected.append((float(cosine), image, i, j))
    expected.sort(reverse=True)
    assert len(found) == count
    torch.testing.assert_close([match.similarity for match in found], [one[0] for one in expected[:count]])
    every = {one[1:]: one[0] for one in expected}
    for match in found:
        assert match.similarity == pytest.approx(every[match[:3]], abs=1e-5)


def test_a_copy_is_the_nearest() -> None:
    model = tiny()
    images = pixels(model, 4)
    images = torch.cat([images, images[1:2]])
    for row, column in ((0, 0), (4, 11), (9, 12)):
        for layer in (0, -1):
            best, second = nearest_patches(model, images, 1, row, column, count=2, layer=layer)
            assert best[:3] == (4, row, column)
            assert best.similarity == pytest.approx(1)
            assert second.similarity < best.similarity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": 3}, "no image 3: expected 0 to 2"),
        ({"image": -1}, "no image -1: expected 0 to 2"),
        ({"row": 4}, "no row 4: expected 0 to 3"),
        ({"column": 6}, "no column 6: expected 0 to 5"),
        ({"count": 0}, "count: expected 1 to 48, the patches of 2 other images, got 0"),
        ({"count": 49}, "expected 1 to 48, .* got 49"),
        ({"layer": 5}, "layer 5 of a model with 3 blocks"),
    ],
)
def test_bad_patches(options: dict[str, int], message: str) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ValueError, match=message):
        nearest_patches(model, pixels(model, 3, 8, 12), **({"image": 0, "row": 0, "column": 0} | options))


# Logit lens

READABLE = {
    "cait_cifar": range(8, 10),
    "pvt_cifar": range(4, 6),
    "pvt_v2_cifar": range(4, 6),
    "swin_cifar": range(2, 6),
    "swinv2_cifar": range(2, 6),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_layer_of_the_lens_is_the_answer(name: str) -> None:
    model = tiny(name)
    images = pixels(model)
    with untouched(model):
        found = logit_lens(model, images)
    assert found.layers == tuple(READABLE.get(name, range(len(model.block_names()))))
    assert found.logits.shape == (len(found.layers), 3, 10)
    assert not found.logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found.logits[-1], model.eval()(images))
    if len(found.layers) > 1 and name != "swinv2_cifar":  # whose fresh blocks change nothing
        assert not torch.allclose(found.logits[0], found.logits[-1], atol=1e-3)


def mean_of(*logits: Tensor) -> Tensor:
    return torch.stack(logits).mean(dim=0)


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({}, lambda model, x: model.head(model.norm(x)[:, 0])),
        ({"registers": 2}, lambda model, x: model.head(model.norm(x)[:, 0])),
        ({"pool": "mean"}, lambda model, x: model.head(model.norm(x)[:, 1:].mean(dim=1))),
        (
            {"pool": "mean", "class_token": False, "fc_norm": True},
            lambda model, x: model.head(model.fc_norm(x.mean(dim=1))),
        ),
        (
            {"distillation": True},
            lambda model, x: mean_of(
                model.head(model.norm(x)[:, 0]), model.head_dist(model.norm(x)[:, 1])
            ),
        ),
    ],
)  # fmt: skip
def test_every_layer_of_the_lens_by_hand(
    changes: dict[str, Any], read: Callable[[Any, Tensor], Tensor]
) -> None:
    model = tiny(**changes)
    images = pixels(model)
    found = logit_lens(model, images).logits
    model.eval()
    with torch.no_grad(), record(model, "blocks.*.out") as seen:
        model(images)
        for layer in range(3):
            torch.testing.assert_close(found[layer], read(model, seen[f"blocks.{layer}.out"]))


def test_a_lens_needs_a_head() -> None:
    model = tiny(num_classes=0)
    with untouched(model), pytest.raises(ValueError, match="ViT has no head to read its layers with"):
        logit_lens(model, pixels(model))
    model.reset_classifier(7)
    assert logit_lens(model, pixels(model)).logits.shape == (3, 3, 7)


# Activation maximisation


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_class_can_be_maximised(name: str) -> None:
    model = tiny(name)
    with untouched(model):
        found = maximise(model, class_logit(3), image_shape=(13, 18), steps=12, jitter=1, smoothness=0.02)
    assert found.image.shape == (model.config.in_chans, 13, 18)
    assert not found.image.requires_grad
    assert found.after > found.before + 0.01
    with torch.no_grad():
        answer = model.eval()(found.image[None])[0, 3]
    assert found.after == pytest.approx(float(answer), abs=1e-4)


def attention_names(model: Encoder) -> list[str]:
    return [name.removesuffix(".mixed") for name in taps(model) if name.endswith(".mixed")]


@pytest.mark.parametrize("name", ["vit_cifar", "diffvit_cifar", "cait_cifar", "crossvit_cifar", "pvt_cifar",
                                  "pvt_v2_cifar", "swin_cifar", "swinv2_cifar", "cct_2_3x2_32"])  # fmt: skip
def test_heads_and_units_of_every_architecture(name: str) -> None:
    model = tiny(name)
    names = attention_names(model)
    units = [tap for tap in taps(model) if tap.endswith("hidden")]
    assert len(names) >= 2
    assert units
    for objective in (
        head_activation(names[0], 0),
        head_activation(names[-1], 0),
        unit_activation(units[-1], 2),
    ):
        with untouched(model):
            found = maximise(model, objective, image_shape=(13, 18), steps=8, jitter=0, smoothness=0)
        assert found.after > found.before


@pytest.mark.parametrize("name", ["vit_digits", "diffvit_cifar", "swin_cifar"])
def test_a_head_is_its_channels_of_what_enters_the_projection(name: str) -> None:
    model = tiny(name).eval()
    images = pixels(model)
    attention = attention_names(model)[-1]
    module = model.get_submodule(attention)
    heads = module.num_heads
    entered: list[Tensor] = []
    handle = module.get_submodule("proj").register_forward_hook(lambda _m, args, _o: entered.append(args[0]))
    with torch.no_grad():
        measured = [head_activation(attention, head)(model, images) for head in range(heads)]
    handle.remove()
    D = entered[0].shape[-1]
    d = D // heads
    for head in range(heads):
        own = entered[0].reshape(3, -1, D)[:, :, head * d : (head + 1) * d]
        torch.testing.assert_close(measured[head], own.square().mean(dim=(1, 2)))


def test_a_unit_is_its_channel_of_what_enters_the_second_layer() -> None:
    model = tiny().eval()
    images = pixels(model)
    entered: list[Tensor] = []
    handle = model.get_submodule("blocks.2.mlp.fc2").register_forward_hook(
        lambda _m, args, _o: entered.append(args[0])
    )
    with torch.no_grad():
        measured = unit_activation("blocks.2.mlp.hidden", 5)(model, images)
    handle.remove()
    torch.testing.assert_close(measured, entered[0][:, :, 5].mean(dim=1))


def test_one_step_by_hand() -> None:
    model = tiny().eval()
    noise = 0.1 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    noise.requires_grad_()
    variation = sum(noise.diff(dim=dim).abs().sum() for dim in (2, 3))
    uphill = torch.autograd.grad(model(noise)[0, 3], noise)[0]
    rougher = torch.autograd.grad(variation, noise)[0]
    expected = noise + STEP * (uphill / uphill.square().mean().sqrt() - 0.3 * rougher)
    found = maximise(model, class_logit(3), steps=1, jitter=0, smoothness=0.3, seed=5)
    torch.testing.assert_close(found.image, expected[0])
    with torch.no_grad():
        assert found.before == pytest.approx(float(model(noise)[0, 3]), abs=1e-6)


def test_seed_jitter_smoothness_and_limit() -> None:
    model = tiny()

    def image(**changes: Any) -> Tensor:
        return maximise(model, class_logit(3), **({"steps": 60, "seed": 2} | changes)).image

    def roughness(x: Tensor) -> float:
        return float(x.diff(dim=1).abs().sum() + x.diff(dim=2).abs().sum())

    usual = image()
    assert usual.shape == (1, 8, 8)  # the model's own size
    assert torch.equal(usual, image())
    assert not torch.allclose(usual, image(seed=3), atol=0.01)
    assert not torch.allclose(usual, image(jitter=0), atol=0.01)
    assert roughness(image(smoothness=0)) > 1.5 * roughness(usual) > 2 * roughness(image(smoothness=2))
    far = image(smoothness=0, jitter=0, steps=300)
    assert far.abs().max() == PIXEL_LIMIT
    with torch.no_grad():
        assert torch.equal(usual, image())


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (class_logit(10), {}, "no class 10: the model has 10, expected 0 to 9"),
        (head_activation("blocks.1.attn", 2), {}, "no head 2 in blocks.1.attn: expected 0 to 1"),
        (head_activation("blocks.9.attn", 0), {}, "no tap matches 'blocks.9.attn.value'"),
        (unit_activation("blocks.1.mlp.hidden", -1), {}, "no unit -1 in blocks.1.mlp.hidden: expected 0 to"),
        (unit_activation("blocks.*.mlp.hidden", 0), {}, "is not one tap that every image passes"),
        (class_logit(0), {"steps": 0}, "steps: expected at least 1, got 0"),
        (class_logit(0), {"jitter": -1}, "jitter: expected at least 0, got -1"),
        (class_logit(0), {"smoothness": -0.1}, "smoothness: expected at least 0, got -0.1"),
    ],
)
def test_bad_objectives(objective: Any, options: dict[str, Any], message: str) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ValueError, match=re.escape(message).replace(r"\ ", " ")):
        maximise(model, objective, **options)


def test_an_objective_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny()

    def fails(model: nn.Module, images: Tensor) -> Tensor:
        with record(model, "blocks.*.out"):
            model(images)
            raise RuntimeError("lost")

    with untouched(model), pytest.raises(RuntimeError, match="lost"):
        maximise(model, fails)
