"""The range test finds the minimum of a curve without delay, and a rate that trains on real data."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from vitrail.config import load_config
from vitrail.reporting.lr_curve import lr_curve, write_lr_range
from vitrail.training.lr_range import (
    LrRange,
    evaluate_ramp,
    find_learning_rate,
    shortened,
    smooth,
)

RATES = [1e-6 * 1e6 ** (n / 99) for n in range(100)]
TINY = {
    "model.depth": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.patch_embed": "conv",
    "train.device": "cpu",
}


def _valley(lowest: float) -> list[float]:
    """A loss whose logarithmic distance from the rate `lowest` counts, with noise."""
    noise = np.random.default_rng(0).normal(0, 0.05, 100)
    return [1.0 + abs(math.log10(rate / lowest)) ** 1.5 + n for rate, n in zip(RATES, noise, strict=True)]


def test_smoothing_is_the_mean_of_both_corrected_averages() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]

    def one_way(own: list[float]) -> list[float]:
        # The corrected average written out: weights d^0, d^1, ... into the past, normalised.
        return [
            sum(0.75**k * own[n - k] for k in range(n + 1)) / sum(0.75**k for k in range(n + 1))
            for n in range(len(own))
        ]

    expected = np.add(one_way(values), one_way(values[::-1])[::-1]) / 2
    np.testing.assert_allclose(smooth(values, 4.0), expected, rtol=1e-12)
    np.testing.assert_allclose(smooth([2.5] * 30, 10.0), 2.5, rtol=1e-12)
    ramp = np.arange(40.0)
    np.testing.assert_allclose(smooth(list(ramp), 5.0) + smooth(list(ramp[::-1]), 5.0), 39.0)  # no delay


@pytest.mark.parametrize("lowest", [3e-4, 2e-3, 2e-2])
def test_the_minimum_is_found_where_it_is(lowest: float) -> None:
    found = evaluate_ramp(RATES, _valley(lowest), configured=1e-3)
    assert lowest / 1.7 < found.suggestion < lowest * 1.7
    assert found.cautious == pytest.approx(found.suggestion / 3)
    assert found.steepest < found.suggestion
    assert found.configured == 1e-3
    assert len(found.rates) == len(found.losses) == len(found.smoothed) == 100
    assert f"{found.suggestion:.1e}" in found.text()
    assert "\n" not in found.text()


def test_a_minimum_at_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss rose from the lowest learning rate on \(1e-06\)"):
        evaluate_ramp(RATES, [1.0 + n for n in range(60)], configured=1e-3)
    with pytest.raises(ValueError, match=r"still fell at the highest learning rate \(1\)"):
        evaluate_ramp(RATES, [100.0 - n for n in range(100)], configured=1e-3)


def test_bad_ranges_are_refused() -> None:
    config = load_config("digits-vit", TINY)
    with pytest.raises(ValueError, match=r"expected 0 < lowest < highest, got 1 and 0\.1"):
        find_learning_rate(config, 1.0, 0.1)
    with pytest.raises(ValueError, match="steps: expected at least 20, got 5"):
        find_learning_rate(config, steps=5)
    with pytest.raises(ValueError, match="unknown model"):
        find_learning_rate(load_config("digits-vit", TINY | {"model.name": "vit_nothing"}))


def test_a_shortened_run_has_the_size_and_augmentation_of_most_of_the_run() -> None:
    changes = {"train.progressive": {"0%": 4, "60%": 8}, "augment.stop_at": "50%", "augment.mixup": 0.2}
    config = shortened(load_config("digits-vit", changes), 30)
    assert config.train.progressive == {"0%": 8}
    assert (config.train.duration, config.train.log_every) == ("30 steps", "1 step")
    assert (config.augment.stop_at, config.augment.mixup) == ("100%", 0.2)
    assert shortened(load_config("digits-vit"), 30).train.progressive == {}


def test_a_ramp_ends_with_the_explosion_repeats_exactly_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("digits-vit", TINY | {"optim.clip_norm": 0})
    first = find_learning_rate(config, 1e-5, 1e4, steps=50)
    assert 20 < len(first.rates) < 50
    assert first == find_learning_rate(config, 1e-5, 1e4, steps=50)
    assert first.rates[0] == 1e-5
    assert first.rates[1] / first.rates[0] == pytest.approx(1e9 ** (1 / 49))
    assert list(tmp_path.iterdir()) == []


def _close_to_the_recipe(recipe: str) -> LrRange:
    found = find_learning_rate(load_config(recipe, {"train.device": "cpu"}))
    assert found.configured / 3 < found.suggestion < found.configured * 3
    return found


def test_the_rate_found_for_digits_is_near_the_recipes(tmp_path: Path) -> None:
    found = _close_to_the_recipe("digits-vit").to_dict()
    picture = write_lr_range(tmp_path / "new" / "folder", found)
    assert picture.read_bytes().startswith(b"\x89PNG")
    stored = json.loads((picture.parent / "lr_range.json").read_text())
    assert stored["suggestion"] == found["suggestion"]
    assert stored["losses"] == list(found["losses"])
    (axes,) = lr_curve(found).axes
    assert axes.get_xscale() == "log"
    assert len(axes.lines) == 5


@pytest.mark.skipif("VITRAIL_DATA" not in os.environ, reason="needs MNIST")
def test_the_rate_found_for_mnist_is_near_the_recipes() -> None:
    _close_to_the_recipe("mnist-vit")
