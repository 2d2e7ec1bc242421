"""Sweeps: all combinations, honest means, and going on where one was stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from vitrail.config import load_config
from vitrail.studies import Outcome, grid, list_variant_sets, load_variants, run_sweep, summarize, write_sweep

TINY = {
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "train.duration": "2 epochs",
    "train.eval_every": "1 epoch",
    "train.batch_size": 256,
    "train.device": "cpu",
}


def _outcome(variant: str, seed: int, val: float | None, test: float) -> Outcome:
    return Outcome(
        variant=variant, seed=seed, folder="", val_accuracy=val, test_accuracy=test, parameters=1,
        macs_per_image=2, seconds=3.0,
    )  # fmt: skip


def test_grid_is_the_product() -> None:
    variants = grid({"model.depth": [1, 2], "optim.lr": [1e-3]})
    assert variants == {
        "depth=1,lr=0.001": {"model.depth": 1, "optim.lr": 1e-3},
        "depth=2,lr=0.001": {"model.depth": 2, "optim.lr": 1e-3},
    }
    with pytest.raises(ValueError, match=r"sweep over model\.depth: expected some values"):
        grid({"model.depth": []})


def test_variants_are_ranked_by_validation_not_by_test() -> None:
    outcomes = [
        _outcome("a", 0, 0.90, 0.99), _outcome("a", 1, 0.92, 0.97), _outcome("b", 0, 0.95, 0.90),
    ]  # fmt: skip
    best, second = summarize(outcomes)
    assert (best.variant, second.variant) == ("b", "a")
    assert second.val_accuracy == pytest.approx(0.91)
    assert second.test_accuracy == pytest.approx(0.98)
    assert second.spread == pytest.approx(0.02 / 2**0.5)
    assert best.spread == 0.0


def test_a_stopped_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = grid({"model.depth": [1, 2]})
    arguments = {"seeds": 2, "folder": tmp_path, "overrides": TINY, "command": "test"}
    first = next(run_sweep("digits-vit", variants, **arguments))
    weights = (Path(first.folder) / "model" / "model.safetensors").stat().st_mtime_ns
    outcomes = list(run_sweep("digits-vit", variants, **arguments))
    assert [(own.variant, own.seed) for own in outcomes] == [
        ("depth=1", 0), ("depth=1", 1), ("depth=2", 0), ("depth=2", 1),
    ]  # fmt: skip
    assert (Path(first.folder) / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert outcomes[2].parameters > outcomes[0].parameters
    assert outcomes[0].test_accuracy != outcomes[1].test_accuracy
    table = write_sweep(tmp_path, outcomes)
    assert table.count("\n") == 4
    assert (tmp_path / "sweep.md").read_text() == table
    with (tmp_path / "sweep.csv").open() as file:
        assert [float(row["test_accuracy"]) for row in csv.DictReader(file)] == [
            own.test_accuracy for own in outcomes
        ]
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="holds a run with another config"):
        list(run_sweep("digits-vit", variants, **arguments | {"overrides": TINY | {"optim.lr": 0.5}}))


def test_a_variant_that_does_not_fit_stops_before_anything_is_trained(tmp_path: Path) -> None:
    for bad, message in (({"optim.lr": -1}, r"optim\.lr"), ({"model.depht": 2}, "no option 'depht'")):
        variants = {"good": {}, "bad": bad}
        with pytest.raises(ValueError, match=message):
            list(
                run_sweep("digits-vit", variants, seeds=1, folder=tmp_path / "s", overrides=TINY, command="")
            )
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", list_variant_sets())
def test_every_set_of_variants_fits(name: str) -> None:
    variants = load_variants(name)
    assert len(variants) >= 6
    for changes in variants.values():
        load_config("cifar10-vit", changes)


def test_files_of_variants(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("deep: {model.depth: 6}\nwide: {model.embed_dim: 128}\n")
    assert load_variants(path) == {"deep": {"model.depth": 6}, "wide": {"model.embed_dim": 128}}
    for text in ("- 1", "a: 3", "a: ["):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml"):
            load_variants(path)
    with pytest.raises(ValueError, match="no set of variants file"):
        load_variants(tmp_path / "none.yaml")
