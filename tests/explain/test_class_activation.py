"""Class-activation maps against captum and their formulas, and the place they take in every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.tap import edit, record, taps
from vitrail.explain.class_activation import eigen_cam, grad_cam, grad_cam_plus_plus, hires_cam
from vitrail.explain.target import baseline_of, class_scores
from vitrail.models import Encoder, build_model, list_models

METHODS = [grad_cam, grad_cam_plus_plus, hires_cam, eigen_cam]

# Variant, its changes, and the strides in pixels of the map of a class-activation method.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_mnist_2blk", {}, 7),
    "vit-1-block": ("vit_mnist_2blk", {"depth": 1}, 7),
    "vit-registers": ("vit_digits", {"registers": 2, "depth": 2}, 2),
    "vit-mean": ("vit_digits", {"depth": 2, "class_token": False, "pool": "mean"}, 2),
    "vit-mean-fc-norm": ("vit_digits", {"depth": 2, "registers": 1, "pool": "mean", "fc_norm": True}, 2),
    "vit-linear": ("vit_digits", {"depth": 2, "attention": "linear"}, 2),
    "vit-seqpool": ("vit_cifar", {}, 4),
    "deit": ("deit_cifar", {"depth": 2, "embed_dim": 32}, 4),
    "diffvit": ("diffvit_cifar", {}, 4),
    "diffvit-class-token": ("diffvit_cifar_plain", {"depth": 2}, 4),
    "swin": ("swin_mnist_2blk", {}, 4),
    "swin-2-stages": ("swin_cifar", {"depths": (1, 1)}, 4),
    "swinv2": ("swinv2_cifar", {"depths": (1, 1)}, 4),
    "pvt": ("pvt_cifar", {}, 8),
    "pvt_v2": ("pvt_v2_cifar", {}, 8),
    "cait": ("cait_cifar", {"depth": 2}, 4),
    "crossvit": ("crossvit_cifar", {"depth": 2, "embed_dim": (32, 64)}, 2),
    "cct": ("cct_2_3x2_32", {}, 4),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def lively(architecture: str, **changes: Any) -> Encoder:
    """A model that answers differently to different images: fresh weights hide mistakes."""
    name, own, _ = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = build_model(name, **(own | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def images(model: Encoder, *size: int, seed: int = 1) -> Tensor:
    height, width = size or model.config.image_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, model.config.in_chans, height, width, generator=generator)


def state(model: Encoder) -> tuple[Any, ...]:
    """All that a method must leave as it was."""
    return (
        [part.training for part in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [name for name, tap in taps(model).items() if tap.watched],
    )


def assert_untouched(model: Encoder, before: tuple[Any, ...]) -> None:
    after = state(model)
    assert after[0] == before[0]
    assert after[3] == before[3] == []
    for (asks, gradient), (asked, old) in zip(after[1], before[1], strict=True):
        assert asks == asked
        assert (gradient is None and old is None) or torch.equal(gradient, old)
    for name, value in before[2].items():
        assert torch.equal(after[2][name], value), name


def mixed_state(architecture: str) -> Encoder:
    """In training mode with a part in evaluation mode, half frozen, one parameter with a gradient."""
    model = lively(architecture)
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    model.train()
    model.get_submodule(model.block_names()[0]).training = False
    return model


def test_all_families_are_here() -> None:
    families = {type(lively(name)) for name in ARCHITECTURES}
    small = [*list_models("*cifar*"), *list_models("*mnist*"), "cct_2_3x2_32"]
    assert {type(build_model(name)) for name in small} == families


@every_architecture
@pytest.mark.parametrize("size", [(), (30, 43)])
def test_shape_and_state(architecture: str, size: tuple[int, ...]) -> None:
    model = mixed_state(architecture)
    before = state(model)
    x = images(model, *size).requires_grad_()
    stride = ARCHITECTURES[architecture][2]
    expected = tuple(-(-pixels // stride) for pixels in x.shape[2:])
    for method in METHODS:
        found = method(model, x)
        assert found.shape == (2, *expected), method
        assert found.isfinite().all()
        assert found.any() or method in (grad_cam, grad_cam_plus_plus)  # the ReLU may leave nothing
        assert not found.requires_grad
    assert x.grad is None
    assert_untouched(model, before)


@every_architecture
def test_frozen_batched_and_without_gradients(architecture: str) -> None:
    model = lively(architecture).eval()
    x = images(model)
    expected = hires_cam(model, x, torch.tensor([3, 1]))
    model.requires_grad_(False)
    with torch.no_grad():
        single = [hires_cam(model, x[:1], 3), hires_cam(model, x[1:], 1)]
    torch.testing.assert_close(
        torch.cat(single), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
    )


class AsMap(nn.Module):
    """A tap in whose middle the patches are a map [B, D, h, w], as captum wants them."""

    def __init__(self, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix, self.grid, self.inner = prefix, grid, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2).flatten(2) if x.ndim == 4 else x
        patches = self.inner(tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid))
        tokens = torch.cat([tokens[:, : self.prefix], patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens.unflatten(2, (x.shape[1], -1)).transpose(1, 2) if x.ndim == 4 else tokens


# Where the map lies: taps, prefix tokens there, grid.
PLACES = {
    "vit": (["blocks.1.attn.value"], 1, (4, 4)),
    "vit-1-block": (["blocks.0.attn.value"], 1, (4, 4)),
    "vit-registers": (["blocks.1.attn.value"], 3, (4, 4)),
    "vit-mean": (["final"], 0, (4, 4)),
    "vit-seqpool": (["final"], 0, (8, 8)),
    "deit": (["blocks.1.attn.value"], 2, (8, 8)),
    "diffvit-class-token": (["blocks.1.attn.value"], 1, (8, 8)),
    "swin-2-stages": (["final"], 0, (8, 8)),
    "swinv2": (["final"], 0, (8, 8)),
    "pvt": (["block3.1.attn.value"], 1, (4, 4)),
    "pvt_v2": (["final"], 0, (4, 4)),
    "cait": ([f"blocks_token_only.{n}.attn.value" for n in range(2)], 1, (8, 8)),
    "cct": (["final"], 0, (8, 8)),
}


@pytest.mark.parametrize("architecture", PLACES)
def test_equals_captum(architecture: str) -> None:
    """captum 0.9: LayerGradCam without its ReLU, LayerGradientXActivation."""
    model = lively(architecture).eval()
    x, classes = images(model).requires_grad_(), torch.tensor([3, 7])
    names, prefix, grid = PLACES[architecture]
    found = [grad_cam(model, x, classes), hires_cam(model, x, classes)]
    assert found[0].shape[1:] == grid
    expected = [torch.zeros(2, *grid), torch.zeros(2, *grid)]
    for name in names:
        parent, _, tap = name.rpartition(".")
        layer = AsMap(prefix, grid)
        setattr(model.get_submodule(parent), tap, layer)
        expected[0] += LayerGradCam(model, layer.inner).attribute(x, target=classes)[:, 0].detach()
        expected[1] += (
            LayerGradientXActivation(model, layer.inner).attribute(x, target=classes).sum(1).detach()
        )
    for mine, theirs in zip(found, expected, strict=True):
        compared = theirs.relu() if mine is found[0] else theirs
        assert (mine - compared).abs().max() < 1e-4 * theirs.abs().max()


def test_crossvit_adds_its_branches() -> None:
    model = lively("crossvit").eval()
    x = images(model).requires_grad_()
    with record(model, "blocks.1.fusion.*.attn.value") as seen:
        score = model(x)[:, 3].sum()
    # The class token of the small branch (fusion.0) reads the 8 x 8 patches of the large one, and vice versa.
    of = {}
    for branch, size in ((0, 8), (1, 16)):
        value = seen[f"blocks.1.fusion.{branch}.attn.value"]
        (gradient,) = torch.autograd.grad(score, value, retain_graph=True)
        of[size] = (value * gradient)[:, :, 1:].sum(dim=(1, 3)).unflatten(1, (size, size)).detach()
    large = F.interpolate(of[8][:, None], size=(16, 16), mode="bilinear")[:, 0] / 4
    torch.testing.assert_close(hires_cam(model, x, 3), of[16] + large, rtol=1e-4, atol=1e-7)
    assert large.sum() == pytest.approx(float(of[8].sum()), rel=0.2)  # spread, not multiplied


def score_and_gradient(model: Encoder, x: Tensor, tap: str) -> tuple[Tensor, Tensor]:
    with record(model, tap) as seen:
        scores = model(x)[:, 3]
    return seen[tap], torch.autograd.grad(scores.sum(), seen[tap])[0]


def test_plus_plus_by_its_formula() -> None:
    """Equations 5 and 19 written out; at the same place as the others."""
    model = lively("swin").eval()
    x = images(model)
    tokens, slopes = (z.detach().double() for z in score_and_gradient(model, x, "final"))
    expected = torch.zeros(2, 49, dtype=torch.float64)
    for image in range(2):
        for channel in range(tokens.shape[2]):
            a, g = tokens[image, :, channel], slopes[image, :, channel]
            alpha = g**2 / (2 * g**2 + a.sum() * g**3)
            expected[image] += (alpha * g.clamp(min=0)).sum() * a
    found = grad_cam_plus_plus(model, x, 3)
    expected = expected.clamp(min=0).unflatten(1, (7, 7)).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_eigen_cam_is_the_best_single_direction() -> None:
    model = lively("vit-mean").eval()
    x = images(model)
    tokens, _ = score_and_gradient(model, x, "final")
    found = eigen_cam(model, x).flatten(1)
    for cells, projected in zip(tokens.detach(), found, strict=True):
        largest = torch.linalg.eigvalsh(cells.T @ cells)[-1]
        assert projected.square().sum() == pytest.approx(float(largest), rel=1e-4)
        assert projected.sum() > 0


def test_hires_cam_is_complete_where_a_mean_and_a_linear_layer_follow() -> None:
    model = lively("swin").eval()
    x = images(model)
    bias = model.get_submodule("head.fc").bias
    torch.testing.assert_close(hires_cam(model, x, 3).sum(dim=(1, 2)), (model(x)[:, 3] - bias[3]).detach())


def test_scores_depend_on_nothing_behind_the_map() -> None:
    """Behind a class token: the values of the last block matter, the patches that come out of it do not."""
    model = lively("vit").eval()
    x = images(model)
    with torch.no_grad():
        intact = model(x)
        with edit(model, {"blocks.1.out": lambda z: torch.cat([z[:, :1], 0 * z[:, 1:]], dim=1)}):
            torch.testing.assert_close(model(x), intact)
        with edit(model, {"blocks.1.attn.value": lambda z: torch.cat([z[:, :, :1], 0 * z[:, :, 1:]], 2)}):
            assert (model(x) - intact).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "layer", "tap", "grid"),
    [
        ("vit-registers", 0, "blocks.0.out", (4, 4)),
        ("swin-2-stages", 0, "layers.0.blocks.0.out", (16, 16)),
        ("pvt", -5, "block1.1.out", (16, 16)),
        ("cait", 1, "blocks.1.out", (8, 8)),
        ("vit-mean", -1, "final", (4, 4)),
        ("vit-mean", 1, "final", (4, 4)),
    ],
)
def test_another_layer(architecture: str, layer: int, tap: str, grid: tuple[int, int]) -> None:
    model = lively(architecture).eval()
    x = images(model).requires_grad_()
    tokens, slopes = score_and_gradient(model, x, tap)
    prefix = tokens.shape[1] - grid[0] * grid[1]
    weights = slopes[:, prefix:].mean(dim=1, keepdim=True)
    expected = (weights * tokens[:, prefix:]).sum(dim=2).relu().unflatten(1, grid).detach()
    torch.testing.assert_close(grad_cam(model, x, 3, layer=layer), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["vit", "cait", "pvt", "deit"])
def test_a_layer_that_nobody_reads(architecture: str) -> None:
    model = mixed_state(architecture)
    before = state(model)
    with pytest.raises(ValueError, match="no patches that come out of it influence the score"):
        grad_cam(model, images(model), layer=-1)
    assert_untouched(model, before)


def test_bad_input() -> None:
    model = mixed_state("vit")
    before = state(model)
    x = images(model)
    for method in METHODS:
        with pytest.raises(ValueError, match="layer 2 of a model with 2 blocks; expected -2 to 1"):
            method(model, x, layer=2)
        with pytest.raises(ValueError, match="no class 10: the model has 10, expected 0 to 9"):
            method(model, x, 10)
    assert_untouched(model, before)
    for parameter in model.get_submodule("head").parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="does not depend on the image"):
        grad_cam(model, x)


def test_class_scores() -> None:
    model = lively("vit").eval()
    x = images(model)
    logits = model(x)
    scores, classes = class_scores(model, x)
    assert torch.equal(classes, logits.argmax(dim=1))
    assert torch.equal(scores, logits.amax(dim=1))
    scores, classes = class_scores(model, x, 4)
    assert classes.tolist() == [4, 4]
    assert torch.equal(scores, logits[:, 4])
    scores, _ = class_scores(model, x, torch.tensor([9, 0]))
    assert scores.tolist() == [logits[0, 9], logits[1, 0]]
    assert scores.requires_grad


bad_targets: list[tuple[Any, str]] = [
    (-1, "no class -1: the model has 10, expected 0 to 9"),
    (torch.tensor([0, 12]), "no class 12"),
    (torch.tensor([0, 1, 2]), r"one for each of 2 images, got torch.int64 of shape \[3\]"),
    (torch.tensor([0.0, 1.0]), "got torch.float32"),
    (True, "got torch.bool"),
]


@pytest.mark.parametrize(("target", "message"), bad_targets)
def test_bad_target(target: Any, message: str) -> None:
    model = lively("vit").eval()
    with pytest.raises(ValueError, match=message):
        class_scores(model, images(model), target)


@pytest.mark.parametrize("architecture", ["vit", "cct", "swin", "crossvit", "deit"])
def test_no_head(architecture: str) -> None:
    model = lively(architecture)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="has no head, so there is no class to explain"):
        grad_cam(model, images(model))


@pytest.mark.parametrize(
    ("baseline", "fits"),
    [(0.5, True), (torch.ones(3, 1, 1), True), (torch.ones(4, 3, 5, 6), True), (torch.ones(2, 1, 1), False)],
)
def test_baseline(baseline: Any, fits: bool) -> None:
    x = torch.zeros(4, 3, 5, 6)
    if fits:
        assert baseline_of(x, baseline).shape == x.shape
    else:
        with pytest.raises(
            ValueError, match=r"a colour \[3, 1, 1\] or images \[4, 3, 5, 6\], got \[2, 1, 1\]"
        ):
            baseline_of(x, baseline)
