"""Gradients with respect to the image against captum, finite differences and what they promise to sum to."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from tests.explain.test_class_activation import (
    assert_untouched,
    every_architecture,
    images,
    lively,
    mixed_state,
    state,
)
from torch import Tensor

from vitrail.explain.gradients import (
    completeness_error,
    gradient_x_input,
    integrated_gradients,
    smooth_grad,
)
from vitrail.models import Encoder


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@every_architecture
@pytest.mark.parametrize("size", [(), (30, 43)])
def test_shape_and_state(architecture: str, size: tuple[int, ...]) -> None:
    model = mixed_state(architecture)
    before = state(model)
    x = images(model, *size).requires_grad_()
    found = [
        gradient_x_input(model, x),
        integrated_gradients(model, x, steps=2),
        smooth_grad(model, x, samples=2),
    ]
    for maps in found:
        assert maps.shape == (2, *x.shape[2:])
        assert maps.isfinite().all()
        assert maps.any()
        assert not maps.requires_grad
    assert x.grad is None
    assert_untouched(model, before)


@pytest.mark.parametrize("architecture", ["vit", "deit", "swin-2-stages", "pvt", "cait", "crossvit", "cct"])
def test_equals_captum(architecture: str) -> None:
    model = lively(architecture).eval()
    x, classes = images(model).requires_grad_(), torch.tensor([3, 7])
    ours = gradient_x_input(model, x, classes)
    assert relative(ours, InputXGradient(model).attribute(x, target=classes).sum(1).detach()) < 1e-4
    colour = torch.tensor([0.3, -0.2, 0.1])[: x.shape[1], None, None]
    for baseline, steps in ((0.0, 20), (colour, 7)):
        theirs = IntegratedGradients(model).attribute(
            x, torch.zeros_like(x) + baseline, target=classes, n_steps=steps
        )
        ours = integrated_gradients(model, x, classes, baseline=baseline, steps=steps, batch_size=3)
        assert relative(ours, theirs.sum(1).detach()) < 1e-4


def test_gradient_x_input_by_finite_differences() -> None:
    model = lively("vit").eval().double()
    x = images(model).double()
    found = gradient_x_input(model, x, 3)
    for row, column in ((0, 0), (13, 5), (27, 20)):
        step = torch.zeros_like(x)
        step[:, :, row, column] = 1e-5
        with torch.no_grad():
            slope = (model(x + step) - model(x - step))[:, 3] / 2e-5
        torch.testing.assert_close(found[:, row, column], slope * x[:, 0, row, column], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("architecture", ["vit", "deit", "swin-2-stages", "pvt", "cait"])
def test_integrated_gradients_are_complete(architecture: str) -> None:
    model = lively(architecture).double()
    x, classes = images(model).double(), torch.tensor([3, 7])
    errors = [
        completeness_error(
            model,
            x,
            integrated_gradients(model, x, classes, steps=steps, baseline=0.2),
            classes,
            baseline=0.2,
        )
        for steps in (2, 8, 32)
    ]
    with torch.no_grad():
        model.eval()
        difference = (model(x) - model(torch.full_like(x, 0.2)))[[0, 1], classes]
    sizes = [float((error / difference).abs().max()) for error in errors]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.01


def test_completeness_error_is_what_is_missing() -> None:
    model = lively("vit").eval()
    x = images(model)
    maps = torch.ones(2, 3, 4)
    with torch.no_grad():
        expected = 12 - model(x)[:, 3] + model(torch.zeros_like(x))[:, 3]
    torch.testing.assert_close(completeness_error(model, x, maps, 3), expected)


def test_the_class_is_that_of_the_whole_image() -> None:
    """Where the way begins another class leads: the head is biased so."""
    model, x = lively("vit").eval(), images(lively("vit"))
    nothing = torch.zeros_like(x)
    with torch.no_grad():
        bias = model.get_submodule("head").bias
        assert isinstance(bias, Tensor)
        bias -= model(nothing)[0]
        logits = model(x)
        leads_at_first = int(logits.sum(dim=0).argmin())
        bias[leads_at_first] += 0.3 * (logits.amax(dim=1) - logits[:, leads_at_first]).min()
        predicted = model(x).argmax(dim=1)
        assert model(nothing).argmax(dim=1).tolist() == [leads_at_first] * 2
        assert leads_at_first not in predicted.tolist()
    assert torch.equal(integrated_gradients(model, x), integrated_gradients(model, x, predicted))
    assert torch.equal(smooth_grad(model, x, noise=0.5), smooth_grad(model, x, predicted, noise=0.5))


def test_smooth_grad_by_hand() -> None:
    model = lively("vit").eval()
    x = images(model)
    found = smooth_grad(model, x, 3, noise=0.2, samples=5, seed=4)
    draws = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    expected = torch.zeros(2, 28, 28)
    for image in range(2):
        scale = 0.2 * (x[image].max() - x[image].min())
        for draw in draws:
            noisy = (x[image] + scale * draw)[None].requires_grad_()
            expected[image] += torch.autograd.grad(model(noisy)[0, 3], noisy)[0][0, 0] / 5
    assert relative(found, expected) < 1e-4
    assert torch.equal(
        smooth_grad(model, x, 3, samples=5, seed=4), smooth_grad(model, x, 3, samples=5, seed=4)
    )
    assert not torch.equal(smooth_grad(model, x, 3, seed=4), smooth_grad(model, x, 3, seed=5))


def test_no_noise_is_the_gradient() -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    assert (
        relative(smooth_grad(model, x, 3, noise=0.0, samples=3) * x[:, 0], gradient_x_input(model, x, 3))
        < 1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_company_change_nothing(batch_size: int) -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    for method in (
        lambda x, n: integrated_gradients(model, x, 3, steps=5, batch_size=n),
        lambda x, n: smooth_grad(model, x, 3, samples=5, batch_size=n),
    ):
        assert relative(method(x, batch_size), method(x, 10)) < 1e-5
        assert relative(method(x[1:], batch_size), method(x, 10)[1:]) < 1e-5


def test_batch_size_bounds_what_passes_the_model() -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    integrated_gradients(model, x, 3, steps=5, batch_size=3)
    smooth_grad(model, x, 3, samples=5, batch_size=3)
    handle.remove()
    assert seen == [2, 3, 3, 3, 1] * 2  # the class first


def failing(model: Encoder, x: Tensor) -> None:
    with pytest.raises(ValueError, match="no class 10"):
        gradient_x_input(model, x, 10)
    with pytest.raises(ValueError, match="no class 10"):
        smooth_grad(model, x, 10)
    with pytest.raises(ValueError, match="baseline: expected a number"):
        integrated_gradients(model, x, baseline=torch.zeros(5))


def test_frozen_without_gradients_and_after_an_error() -> None:
    model = mixed_state("vit")
    before = state(model)
    x = images(model)
    expected = gradient_x_input(model, x, 3)
    failing(model, x)
    assert_untouched(model, before)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(gradient_x_input(model, x, 3), expected)
