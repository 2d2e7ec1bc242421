"""Hiding parts of an image: against captum, exact enumeration, and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, Occlusion
from captum.attr import ShapleyValues as AllOrders
from tests.explain.test_class_activation import (
    ARCHITECTURES,
    assert_untouched,
    every_architecture,
    images,
    lively,
    mixed_state,
    state,
)
from tests.explain.test_gradients import relative
from torch import Tensor

from vitrail.explain.perturbation import (
    gains_in_order,
    leave_one_patch_out,
    occlusion,
    patch_grid_of,
    region_numbers,
    shapley_values,
)
from vitrail.models import Encoder

SIZES: list[tuple[int, ...]] = [(), (30, 43)]


@every_architecture
@pytest.mark.parametrize("size", SIZES)
def test_shape_and_state(architecture: str, size: tuple[int, ...]) -> None:
    model = mixed_state(architecture)
    before = state(model)
    x = images(model, *size)
    grid = patch_grid_of(model, x)
    features = model.eval().forward_features(x)
    model.train()
    model.get_submodule(model.block_names()[0]).training = False
    first = (features.stages or (features.map(),))[0]
    assert grid == first.shape[2:]
    found = {
        "occlusion": occlusion(model, x, window=x.shape[2] // 2, stride=x.shape[2] // 2),
        "shapley": shapley_values(model, x, grid=(2, 2), pairs=2).values,
    }
    if not size:
        found["leave one out"] = leave_one_patch_out(model, x)
        assert found["leave one out"].shape == (2, *grid)
    assert found["occlusion"].shape == (2, *x.shape[2:])
    assert found["shapley"].shape == (2, 2, 2)
    for maps in found.values():
        assert maps.isfinite().all()
        assert maps.any()
        assert not maps.requires_grad
    assert_untouched(model, before)


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize(("window", "stride"), [(8, 5), (7, 7), (10, 3), (28, 28), (28, 1)])
def test_occlusion_equals_captum(architecture: str, window: int, stride: int) -> None:
    """In double precision: a score's loss is a small difference of large numbers."""
    model = lively(architecture).eval().double()
    x, classes = images(model, 28, 33).double(), torch.tensor([3, 7])
    found = occlusion(model, x, classes, window=window, stride=stride, baseline=0.1, batch_size=7)
    shape = (1, window, window)
    expected = Occlusion(model).attribute(
        x, shape, strides=(1, stride, stride), baselines=0.1, target=classes
    )[:, 0]
    assert relative(found, expected.float()) < 1e-4


def test_occlusion_defaults() -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    assert torch.equal(occlusion(model, x), occlusion(model, x, window=7, stride=3))
    for window, stride in ((29, 1), (4, 5), (0, 0), (4, 0)):
        with pytest.raises(ValueError, match="expected 1 <= stride <= window <= 28"):
            occlusion(model, x, window=window, stride=stride)


@pytest.mark.parametrize("architecture", ["vit", "swin", "deit", "vit-mean"])
def test_filled_patches_equal_captum(architecture: str) -> None:
    model = lively(architecture).eval().double()
    x, classes = images(model).double(), torch.tensor([3, 7])
    grid = patch_grid_of(model, x)
    regions = region_numbers(model, x, grid)
    expected = FeatureAblation(model).attribute(
        x, baselines=0.1, target=classes, feature_mask=regions[None, None]
    )[:, 0]
    found = leave_one_patch_out(model, x, classes, removal="fill", baseline=0.1, batch_size=9)
    assert relative(found.flatten(1)[:, regions], expected.double()) < 1e-4


@pytest.mark.parametrize("architecture", ["vit", "vit-registers", "deit", "cait", "cct", "diffvit"])
def test_dropped_patches_by_hand(architecture: str) -> None:
    model = lively(architecture).eval()
    x = images(model)
    found = leave_one_patch_out(model, x, 3, batch_size=5).flatten(1)
    with torch.no_grad():
        for patch in (0, 6, found.shape[1] - 1):
            keep = torch.tensor([n for n in range(found.shape[1]) if n != patch]).expand(2, -1)
            rest = model.forward_head(model.forward_features(x, keep=keep))[:, 3]
            torch.testing.assert_close(found[:, patch], model(x)[:, 3] - rest, rtol=1e-4, atol=1e-5)


@every_architecture
def test_drops_where_it_can(architecture: str) -> None:
    model = lively(architecture).eval()
    x = images(model)[:1]
    if ARCHITECTURES[architecture][0].startswith(("swin", "pvt", "crossvit")):
        with pytest.raises(ValueError, match="cannot drop patches"):
            leave_one_patch_out(model, x, removal="drop")
        expected = leave_one_patch_out(model, x, removal="fill")
    else:
        expected = leave_one_patch_out(model, x, removal="drop")
    assert torch.equal(leave_one_patch_out(model, x), expected)


def subset_scores(model: Encoder, x: Tensor, regions: Tensor, R: int) -> dict[frozenset[int], Tensor]:
    with torch.no_grad():
        return {
            shown: model(x * sum((regions == n for n in shown), torch.zeros_like(regions)))[:, 3]
            for size in range(R + 1)
            for shown in map(frozenset, itertools.combinations(range(R), size))
        }


def test_shapley_by_enumeration() -> None:
    """All 16 subsets of 2 x 2 regions (Shapley's formula), all 24 orders, and captum: the same values."""
    model = lively("vit").eval()
    x = images(model)
    regions = region_numbers(model, x, (2, 2))
    score = subset_scores(model, x, regions, 4)
    weight = {0: 1 / 4, 1: 1 / 12, 2: 1 / 12, 3: 1 / 4}
    expected = torch.stack(
        [
            sum(
                (
                    weight[len(shown)] * (score[shown | {n}] - score[shown])
                    for shown in score
                    if n not in shown
                ),
                torch.zeros(2),
            )
            for n in range(4)
        ],
        dim=1,
    )
    full, nothing = score[frozenset(range(4))], score[frozenset()]
    classes = torch.tensor([3, 3])
    gains = [
        gains_in_order(model, x, classes, regions, torch.tensor(order), full, nothing, 0.0, 2)
        for order in itertools.permutations(range(4))
    ]
    for each in gains:  # efficiency, whatever the order
        torch.testing.assert_close(each.sum(dim=1), full - nothing, rtol=1e-4, atol=1e-5)
    assert relative(torch.stack(gains).mean(dim=0), expected) < 1e-4
    theirs = AllOrders(model).attribute(x, baselines=0.0, target=3, feature_mask=regions[None, None])
    assert relative(expected[:, regions], theirs[:, 0]) < 1e-4


def test_gain_is_credited_to_the_region_that_appears() -> None:
    model = lively("vit").eval()
    x = images(model)
    regions = region_numbers(model, x, (2, 2))
    score = subset_scores(model, x, regions, 4)
    full, nothing = score[frozenset(range(4))], score[frozenset()]
    order = torch.tensor([2, 0, 3, 1])
    found = gains_in_order(model, x, torch.tensor([3, 3]), regions, order, full, nothing, 0.0, 64)
    torch.testing.assert_close(found[:, 3], score[frozenset({0, 2, 3})] - score[frozenset({0, 2})])


def test_shapley_values_and_their_standard_errors() -> None:
    model = lively("vit").double()
    x = images(model).double()
    found = shapley_values(model, x, 3, grid=(4, 4), pairs=4, seed=1)
    total = found.full - found.nothing
    torch.testing.assert_close(found.values.sum(dim=(1, 2)), total)  # to the 1e-7 of double
    model.eval()
    torch.testing.assert_close(found.full, model(x)[:, 3].detach())
    torch.testing.assert_close(found.nothing, model(torch.zeros_like(x))[:, 3].detach())
    many = shapley_values(model, x, 3, grid=(4, 4), pairs=64, seed=2)
    assert many.standard_errors.mean() < 0.5 * found.standard_errors.mean()
    away = (found.values - many.values).abs() / found.standard_errors
    assert away.median() < 2
    assert away.max() < 20  # of 4 pairs the spread itself is unsure
    spread = torch.stack(
        [shapley_values(model, x, 3, pairs=8, seed=seed).values for seed in range(3, 15)]
    ).std(0)
    stated = shapley_values(model, x, 3, pairs=8, seed=3).standard_errors
    assert 0.6 < float(spread.mean() / stated.mean()) < 1.6


def test_shapley_is_seeded_and_independent_of_company() -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    whole = shapley_values(model, x, 3, pairs=2, seed=5, batch_size=3)
    again = shapley_values(model, x[1:], 3, pairs=2, seed=5, batch_size=64)
    assert relative(again.values, whole.values[1:]) < 1e-4
    assert not torch.equal(shapley_values(model, x, 3, pairs=2, seed=6).values, whole.values)
    assert whole.values.shape == (2, 4, 4)
    swin = lively("swin-2-stages")
    assert shapley_values(swin, images(swin)[:1], pairs=2).values.shape == (1, 7, 7)  # of 16 x 16 patches


def test_regions() -> None:
    model = lively("vit")  # patches of 7 pixels
    x = torch.zeros(1, 1, 30, 28)  # 5 x 4 patches, the last row of 2 pixels
    numbers = region_numbers(model, x, (5, 4))
    assert numbers[:, 0].unique_consecutive(return_counts=True)[1].tolist() == [7, 7, 7, 7, 2]
    assert numbers[0].tolist() == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 7
    assert numbers[29, 27] == 19
    numbers = region_numbers(model, x, (2, 2))  # along the patches: 3 rows and 2
    assert (numbers[:, 0] == 0).sum() == 21
    numbers = region_numbers(model, x, (30, 28))
    assert torch.equal(numbers.flatten(), torch.arange(30 * 28))
    for grid in ((31, 2), (0, 2), (2, 29)):
        with pytest.raises(ValueError, match="expected 1 to 30 x 28 regions"):
            region_numbers(model, x, grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 1}, "pairs: expected at least 2"),
        ({"grid": (40, 2)}, "expected 1 to 28 x 28 regions"),
        ({"target": 10}, "no class 10"),
        ({"baseline": torch.zeros(5)}, "baseline: expected a number"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    model = mixed_state("vit")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        shapley_values(model, images(model), **options)
    assert_untouched(model, before)


def test_batch_size_bounds_what_passes_the_model() -> None:
    model, x = lively("vit").eval(), images(lively("vit"))
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    occlusion(model, x, 3, window=14, stride=14, batch_size=3)
    leave_one_patch_out(model, x, 3, removal="fill", batch_size=3)
    shapley_values(model, x, 3, pairs=2, batch_size=3)
    handle.remove()
    assert max(seen) == 3
    # 2 images: themselves; 4 windows; themselves, 16 patches; themselves, nothing, 4 orders of 15 steps.
    assert sum(seen) == 2 + 8 + 2 + 32 + 2 + 2 + 4 * 15 * 2
