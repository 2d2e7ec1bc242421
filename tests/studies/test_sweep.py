"""Sweeps: all combinations, honest means, and going on where one was stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.studies.conftest import TINY

from vitrail.config import load_config
from vitrail.studies import FinishedRun, grid, list_variant_sets, load_variants, rank, run_sweep, write_sweep
from vitrail.studies.intervals import share


def _run(seed: int, val: float | None, test: float) -> FinishedRun:
    return FinishedRun(
        folder=Path(),
        config=load_config(None, {"train.seed": seed}),
        score="accuracy",
        test=share(test, 100),
        val=None if val is None else share(val, 100),
        curve=(),
        parameters=1,
        macs_per_image=2,
        images_seen=3,
        petaflop=4.0,
        seconds=5.0,
        tested_on="",
    )


def test_grid_is_the_product() -> None:
    variants = grid({"model.depth": [1, 2], "optim.lr": [1e-3]})
    assert variants == {
        "depth=1,lr=0.001": {"model.depth": 1, "optim.lr": 1e-3},
        "depth=2,lr=0.001": {"model.depth": 2, "optim.lr": 1e-3},
    }
    with pytest.raises(ValueError, match=r"sweep over model\.depth: expected some values"):
        grid({"model.depth": []})


def test_variants_are_ranked_by_validation_not_by_test() -> None:
    finished = [("a", _run(0, 0.90, 0.99)), ("a", _run(1, 0.92, 0.97)), ("b", _run(0, 0.95, 0.90))]
    best, second = rank(finished)
    assert (best.name, second.name) == ("b", "a")
    assert second.val is not None
    assert second.test is not None
    assert second.val.value == pytest.approx(0.91)
    assert second.test.value == pytest.approx(0.98)
    assert second.test.deviation == pytest.approx(0.02 / 2**0.5)
    assert [row.name for row in rank([("a", _run(0, None, 0.8)), ("b", _run(0, None, 0.9))])] == ["b", "a"]


def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    variants = grid({"model.depth": [1, 2]})
    arguments = {"seeds": 2, "folder": tmp_path, "overrides": TINY, "command": "test"}
    name, first = next(run_sweep("digits-vit", variants, **arguments))
    assert (name, first.seed) == ("depth=1", 0)
    weights = (first.folder / "model" / "model.safetensors").stat().st_mtime_ns
    finished = list(run_sweep("digits-vit", variants, **arguments))
    assert [(variant, run.seed) for variant, run in finished] == [
        ("depth=1", 0), ("depth=1", 1), ("depth=2", 0), ("depth=2", 1),
    ]  # fmt: skip
    assert (first.folder / "model" / "model.safetensors").stat().st_mtime_ns == weights
    runs = [run for _, run in finished]
    assert runs[2].parameters > runs[0].parameters
    assert runs[0].test != runs[1].test
    text = write_sweep(tmp_path, finished)
    assert (tmp_path / "sweep.md").read_text() == text
    assert [line.split("|")[1].strip() for line in text.splitlines()[:1]] == ["run"]
    assert {line.split("|")[1].strip() for line in text.splitlines()[2:4]} == {"depth=1", "depth=2"}
    with (tmp_path / "sweep.csv").open() as file:
        lines = {(row["run"], int(row["seed"])): float(row["test"]) for row in csv.DictReader(file)}
    assert lines == {(name, run.seed): run.test.value for name, run in finished if run.test is not None}
    assert (tmp_path / "sweep.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"holds a run with another config \(optim\.lr\): choose another"):
        list(run_sweep("digits-vit", variants, **arguments | {"overrides": TINY | {"optim.lr": 0.5}}))


def test_features_without_a_classifier_are_swept_too(tmp_path: Path) -> None:
    variants = grid({"task.ratio": [0.5]})
    finished = list(
        run_sweep("digits-mae", variants, seeds=1, folder=tmp_path, overrides=TINY, command="test")
    )
    assert "test k-NN accuracy" in write_sweep(tmp_path, finished)


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
