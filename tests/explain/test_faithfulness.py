"""Curves, sanity check and tables: by hand, against scipy, and with maps whose worth is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tests.explain.test_class_activation import (
    assert_untouched,
    every_architecture,
    images,
    lively,
    mixed_state,
    state,
)
from torch import Tensor, nn

from vitrail.explain.class_activation import grad_cam, hires_cam
from vitrail.explain.faithfulness import (
    Trust,
    agreement,
    cell_means,
    curves,
    deletion,
    insertion,
    randomisation,
    rank_correlation,
    trust,
)
from vitrail.explain.gradients import gradient_x_input
from vitrail.explain.perturbation import leave_one_patch_out, patch_grid_of, region_numbers
from vitrail.explain.target import Target
from vitrail.models import Encoder


def transparent() -> Encoder:
    """A model whose logit of class 0 is a sum over patches, so that the worth of each patch is known."""
    model = lively("vit-mean", embed_dim=16, patch_embed="conv", position="none").eval()
    model.blocks = nn.ModuleList()
    model.norm = nn.Identity()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("head", "patch_embed.proj.bias")):
                parameter.zero_()
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        head.weight[0] = 3.0
    return model


def worth(model: Encoder, x: Tensor) -> Tensor:
    """[B, 4, 4]: what each patch adds to the logit of class 0; the others are 0."""
    with torch.no_grad():
        tokens, grid = model.patch(x)  # type: ignore[operator]
    return (3 * tokens.sum(dim=2) / 16).unflatten(1, grid)


def probability(logit: Tensor) -> Tensor:
    return logit.exp() / (logit.exp() + 9)


@pytest.mark.parametrize("steps", [16, 5])
def test_curves_by_hand(steps: int) -> None:
    model = transparent()
    x = images(model)
    value = worth(model, x)
    torch.testing.assert_close(value.sum(dim=(1, 2)), model(x)[:, 0].detach())
    counts = torch.linspace(0, 16, steps + 1).round().long()
    ordered = value.flatten(1).sort(dim=1, descending=True).values
    shown = torch.cat([torch.zeros(2, 1), ordered.cumsum(dim=1)], dim=1)[:, counts]
    removed = deletion(model, x, value, 0, steps=steps)
    added = insertion(model, x, value, 0, steps=steps)
    torch.testing.assert_close(added.probabilities, probability(shown))
    torch.testing.assert_close(removed.probabilities, probability(ordered.sum(1, keepdim=True) - shown))
    torch.testing.assert_close(removed.shares, counts / 16)
    torch.testing.assert_close(added.area, torch.trapezoid(probability(shown), counts / 16))
    torch.testing.assert_close(added.gain, added.area - added.random_area)
    torch.testing.assert_close(removed.gain, removed.random_area - removed.area)


def test_no_order_is_better_than_the_true_one_and_none_worse_than_its_reverse() -> None:
    model = transparent()
    x = images(model)
    value = worth(model, x)
    for curve in (deletion, insertion):
        best, worst = curve(model, x, value, 0), curve(model, x, -value, 0)
        assert (best.gain > 0.02).all()
        assert (worst.gain < -0.02).all()
        assert torch.equal(best.random, worst.random)  # the same random orders
        for seed in range(5):
            other = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
            assert (curve(model, x, other, 0).gain < best.gain).all()


def test_what_hidden_cells_show() -> None:
    model = transparent()
    x = images(model)
    blurred = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    curve = insertion(model, x, worth(model, x), 0, baseline=blurred)
    torch.testing.assert_close(curve.probabilities[:, 0], model(blurred).softmax(1)[:, 0].detach())
    torch.testing.assert_close(curve.probabilities[:, -1], model(x).softmax(1)[:, 0].detach())
    torch.testing.assert_close(curve.random[:, [0, -1]], curve.probabilities[:, [0, -1]])


def test_equal_values_are_taken_in_random_order() -> None:
    """A map without differences is worth nothing, even where the object is at the top left."""
    model = transparent()
    x = torch.zeros(1, 1, 8, 8)
    x[:, :, :4, :4] = images(model)[:1, :, :4, :4]
    target = 0 if worth(model, x).sum() > 0 else 1
    flat = [
        float(deletion(model, x, torch.zeros(1, 4, 4), target, seed=seed, random_orders=1).gain)
        for seed in range(40)
    ]
    spread = torch.tensor(flat).std()
    assert spread > 0
    assert abs(sum(flat) / 40) < 3 * spread / 40**0.5


def test_maps_at_other_resolutions() -> None:
    model = transparent()
    x = images(model)
    value = worth(model, x)
    fine = value.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    expected = deletion(model, x, value, 0)
    assert torch.equal(deletion(model, x, fine, 0).probabilities, expected.probabilities)
    assert deletion(model, x, value[:, :2, :1], 0).probabilities.shape == (2, 17)
    pixels = deletion(model, x, fine, 0, cells=(8, 8), steps=64)
    assert pixels.shares.tolist() == [n / 64 for n in range(65)]
    few = deletion(model, x, value, 0, cells=(2, 2))
    assert few.probabilities.shape == (2, 5)


def test_cell_means() -> None:
    model = lively("vit")  # patches of 7 pixels
    x = torch.zeros(2, 1, 30, 43)
    grid = patch_grid_of(model, x)
    regions = region_numbers(model, x, grid)
    own = torch.randn(2, *grid)
    # The cells at the border are not whole, and still each has its own value.
    torch.testing.assert_close(cell_means(model, own, regions, 35), own.flatten(1))
    pixels = torch.randn(2, 30, 43)
    found = cell_means(model, pixels, regions, 35)
    assert found[0, 0] == pytest.approx(float(pixels[0, :7, :7].mean()), abs=1e-6)
    assert found[1, 34] == pytest.approx(float(pixels[1, 28:, 42:].mean()), abs=1e-6)
    coarse = cell_means(model, torch.arange(4.0).view(1, 2, 2), regions, 35).unflatten(1, grid)
    assert (coarse.diff(dim=1) > -1e-5).all()
    assert (coarse.diff(dim=2) > -1e-5).all()
    for bad in (torch.zeros(2, 31, 4), torch.zeros(2, 1, 4, 4)):
        with pytest.raises(ValueError, match="at most 30 x 43, got"):
            cell_means(model, bad, regions, 35)


def test_rank_correlation_equals_scipy() -> None:
    first = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # with ties
    second = first + torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    found = rank_correlation(first, second)
    for a, b, r in zip(first, second, found, strict=True):
        assert float(r) == pytest.approx(float(spearmanr(a.flatten(), b.flatten()).statistic))
    assert rank_correlation(second, second.exp()).tolist() == pytest.approx([1, 1, 1])
    assert rank_correlation(second, -second).tolist() == pytest.approx([-1, -1, -1])
    assert rank_correlation(second, torch.ones_like(second)).isnan().all()
    with pytest.raises(ValueError, match=r"one shape, got \[3, 4, 5\] and \[3, 4, 4\]"):
        rank_correlation(second, second[:, :, 1:])


def test_agreement() -> None:
    fine = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse = fine.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean(dim=(2, 4))
    table = agreement({"fine": fine, "coarse": coarse.exp(), "against": -coarse, "flat": 0 * coarse})
    assert list(table) == list(table["fine"]) == ["fine", "coarse", "against", "flat"]
    assert table["fine"]["fine"] == pytest.approx(1)
    assert table["fine"]["coarse"] == table["coarse"]["fine"] == pytest.approx(1)
    assert table["coarse"]["against"] == pytest.approx(-1)
    assert math.isnan(table["flat"]["fine"])


@every_architecture
def test_randomisation_cascades_and_leaves_the_model(architecture: str) -> None:
    model = mixed_state(architecture)
    before = state(model)
    x = images(model)
    seen: list[dict[str, Tensor]] = []

    def method(asked: Encoder, x: Tensor, target: Target) -> Tensor:
        seen.append({name: value.clone() for name, value in asked.named_parameters()})
        return hires_cam(asked, x, target)

    found = randomisation(model, x, method, 3)
    assert_untouched(model, before)
    blocks = model.block_names()
    parts = [part for part in ("head", "norm", *blocks[::-1], "embedding") if part in found]
    assert list(found) == parts
    assert {"head", "embedding", *blocks} <= set(parts)
    changed: set[str] = set()
    for part, (earlier, later) in zip(parts, itertools.pairwise(seen), strict=True):
        now = {name for name in later if not torch.equal(earlier[name], later[name])}
        assert now
        for name in now:  # the same entries in another order
            assert torch.equal(earlier[name].flatten().sort().values, later[name].flatten().sort().values)
            if part in blocks:
                assert model.layer_of(name) == blocks.index(part) + 1
            elif part == "head":
                assert name.startswith(model.head_names)
        assert not now & changed  # each part once
        changed |= now
    shuffled = {name for name, value in seen[0].items() if value.unique().numel() > 1}
    assert changed == shuffled  # nothing is left that could hold what was learnt
    for correlation in found.values():
        assert correlation.shape == (2,)
        assert (correlation.abs() <= 1 + 1e-9).all()


def edges(_model: Encoder, x: Tensor, _target: Target) -> Tensor:
    """A map of the image alone, which Adebayo et al. warn of."""
    return x.diff(dim=3, append=x[..., -1:]).abs().sum(dim=1)


def test_randomisation_finds_a_map_that_ignores_the_model() -> None:
    model = lively("vit").eval()
    x = images(model)
    assert all((found > 0.999).all() for found in randomisation(model, x, edges).values())
    honest = randomisation(model, x, gradient_x_input)
    assert abs(float(honest["embedding"].mean())) < 0.2
    again = randomisation(model, x, gradient_x_input)
    for part, found in honest.items():
        assert torch.equal(again[part], found)
    other = randomisation(model, x, gradient_x_input, seed=1)
    assert not torch.equal(other["head"], honest["head"])


def test_trust_ranks_what_is_known() -> None:
    model = transparent()
    x = images(model)
    methods = {
        "edges": edges,
        "reversed": lambda model, x, target: -leave_one_patch_out(model, x, target),
        "leave one out": leave_one_patch_out,
    }
    rows = trust(model, x, methods, 0, random_orders=4)
    assert [row.method for row in rows] == ["leave one out", "reversed", "edges"]
    best, worst, insane = rows
    assert best.faithful > 0.02
    assert worst.faithful < -0.02
    assert (best.sane, worst.sane, insane.sane) == (True, True, False)
    assert insane.without_weights == pytest.approx(1)
    value = worth(model, x)
    assert best.deletion == pytest.approx(
        float(deletion(model, x, value, 0, random_orders=4).gain.mean()), abs=1e-5
    )
    assert best.insertion == pytest.approx(
        float(insertion(model, x, value, 0, random_orders=4).gain.mean()), abs=1e-5
    )
    table = agreement({name: method(model, x, 0) for name, method in methods.items()})
    assert best.agreement == pytest.approx(
        (table["leave one out"]["edges"] + table["leave one out"]["reversed"]) / 2, abs=1e-6
    )
    assert best.seconds > 0


def test_trust_of_one_method_and_a_flat_map() -> None:
    model = transparent()
    x = images(model)
    (row,) = trust(model, x, {"flat": lambda model, x, target: torch.zeros(2, 4, 4)}, random_orders=1)
    assert isinstance(row, Trust)
    assert math.isnan(row.agreement)
    assert math.isnan(row.without_weights)


def test_the_class_is_the_one_that_the_intact_model_predicts() -> None:
    model = mixed_state("vit")
    before = state(model)
    x = images(model)
    asked = []

    def method(model: Encoder, x: Tensor, target: Target) -> Tensor:
        asked.append(target)
        return grad_cam(model, x, target)

    randomisation(model, x, method)
    trust(model, x, {"one": method}, steps=2, random_orders=1)
    assert_untouched(model, before)
    expected = model.eval()(x).argmax(dim=1)
    assert len(asked) == 1 + 5 + 2
    for target in asked:
        assert isinstance(target, Tensor)
        assert torch.equal(target, expected)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (torch.zeros(3, 4, 4), {}, "maps: expected one for each of 2 images, got 3"),
        (torch.zeros(2, 40, 4), {}, r"maps: expected \[B, rows, columns\], at most 28 x 28"),
        (torch.zeros(2, 4, 4), {"cells": (29, 1)}, "expected 1 to 28 x 28 regions"),
        (torch.zeros(2, 4, 4), {"target": 10}, "no class 10"),
    ],
)
def test_bad_input(maps: Tensor, options: dict[str, Any], message: str) -> None:
    model = mixed_state("vit")
    before = state(model)
    for curve in (deletion, insertion):
        with pytest.raises(ValueError, match=message):
            curve(model, images(model), maps, **options)
    assert_untouched(model, before)


@every_architecture
def test_curves_of_every_architecture(architecture: str) -> None:
    model = mixed_state(architecture)
    before = state(model)
    x = images(model, 30, 43)
    maps = hires_cam(model, x)
    for curve in (deletion, insertion):
        found = curve(model, x, maps, steps=3, random_orders=1, batch_size=5)
        assert found.probabilities.shape == found.random.shape == (2, 4)
        assert ((found.probabilities >= 0) & (found.probabilities <= 1)).all()
        assert ((found.area > 0) & (found.area < 1)).all()
    assert_untouched(model, before)


@pytest.mark.parametrize("steps", [3, 4, 7, 32])
def test_several_maps_at_once_are_each_by_itself(steps: int) -> None:
    model = lively("vit-mean").eval()
    x = images(model, 10, 14)  # an odd number of cells
    maps = {"one": torch.rand(2, 5, 7), "two": torch.rand(2, 5, 7)}
    found = curves(model, x, maps, 3, steps=steps, random_orders=2)
    for name, own in maps.items():
        for curve, alone in zip(found[name], (deletion, insertion), strict=True):
            expected = alone(model, x, own, 3, steps=steps, random_orders=2)
            assert curve.kind == expected.kind
            torch.testing.assert_close(curve.shares, expected.shares)
            torch.testing.assert_close(curve.probabilities, expected.probabilities, atol=1e-6, rtol=0)
            torch.testing.assert_close(curve.random, expected.random, atol=1e-6, rtol=0)
