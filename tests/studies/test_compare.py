"""Runs side by side: what is one row, honest numbers, and what is said about runs that do not compare."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from vitrail.cli import main
from vitrail.studies import compare, read_run, write_comparison
from vitrail.studies.compare import curves, differing_settings
from vitrail.studies.intervals import over_seeds, share


def _manifest(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "manifest.json").read_text())
    return found


def test_runs_that_differ_in_their_seed_are_one_row(finished: Path) -> None:
    found = compare([finished / name for name in ("shallow/seed0", "deep", "shallow/seed1")])
    assert [(row.name, [run.seed for run in row.runs]) for row in found.rows] == [
        ("shallow", [0, 1]), ("deep", [0]),
    ]  # fmt: skip
    manifests = [_manifest(finished / "shallow" / name) for name in ("seed0", "seed1")]
    shallow, deep = found.rows
    assert shallow.test == over_seeds([own["test_accuracy"] for own in manifests])
    assert deep.test == share(_manifest(finished / "deep")["test_accuracy"], 359)
    assert deep.val is not None
    records = [json.loads(line) for line in (finished / "deep" / "metrics.jsonl").read_text().splitlines()]
    assert deep.val.value == [own["accuracy"] for own in records if own["kind"] == "val"][-1]
    assert deep.runs[0].parameters == _manifest(finished / "deep")["parameters"]
    assert shallow.seconds == pytest.approx(sum(own["training_seconds"] for own in manifests) / 2)
    assert differing_settings(found.rows) == {"depth": ["1", "2"], "lr": ["0.002", "0.001"]}


def test_the_tables_and_files(finished: Path, tmp_path: Path) -> None:
    found = compare([finished / name for name in ("shallow/seed0", "shallow/seed1", "deep")])
    write_comparison(tmp_path / "new" / "folder", found)
    written = tmp_path / "new" / "folder"
    assert (written / "compare.md").read_text() == found.text()
    assert (written / "compare.png").stat().st_size > 5_000
    header, _, first, second = found.text().splitlines()[:4]
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["run", "depth", "lr"]
    assert [cell.strip() for cell in first.split("|")[1:5]] == ["shallow", "1", "0.002", "2"]
    assert f"{found.rows[1].runs[0].parameters:,}" in second
    assert len(first) == len(second) == len(header)
    assert "Not all were tested" not in found.text()
    with (written / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["seed"], line["depth"]) for line in lines] == [
        ("shallow", "0", "1"), ("shallow", "1", "1"), ("deep", "0", "2"),
    ]  # fmt: skip
    assert [float(line["test"]) for line in lines] == [
        run.test.value for row in found.rows for run in row.runs if run.test is not None
    ]


def test_many_differences_have_a_table_of_their_own(finished: Path) -> None:
    found = compare([finished / "deep", finished / "masked"])
    assert len(differing_settings(found.rows)) > 3
    _, settings, _ = found.text().split("\n\n", 2)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in settings.splitlines()]
    assert lines[0] == ["setting", "deep", "masked"]
    assert ["task.name", "classify", "mae"] in lines
    assert ["depth", "2", "1"] in lines
    assert ["ratio", "-", next(line[2] for line in lines if line[0] == "ratio")] in lines


def test_features_are_judged_by_their_neighbours(finished: Path) -> None:
    run = read_run(finished / "masked")
    assert run.score == "knn_accuracy"
    assert run.test is not None
    assert run.test.value == _manifest(finished / "masked")["knn_accuracy"]
    assert len(run.curve) == 2
    both = compare([finished / "masked", finished / "deep"])
    assert "test k-NN accuracy, %" in both.text()
    assert "test accuracy, %" in both.text()
    assert len(curves(both.rows).axes) == 2  # their validation scores are not drawn into one picture


def test_the_score_is_that_of_the_weights_that_were_kept(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "deep", tmp_path / "stopped")
    content = _manifest(finished / "deep")
    (tmp_path / "stopped" / "manifest.json").write_text(json.dumps(content | {"best_step": 5}))
    early, late = read_run(tmp_path / "stopped"), read_run(finished / "deep")
    assert early.val is not None
    assert late.val is not None
    assert (early.val.value, late.val.value) == (late.curve[0][1], late.curve[1][1])


def test_other_test_images_are_said(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "deep", tmp_path / "other")
    content = _manifest(finished / "deep")
    content["data"]["test"]["fingerprint"] = "0"  # type: ignore[index]
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(content))
    config = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(config.replace("name: digits", "name: mnist"))
    text = compare([finished / "deep", tmp_path / "other"]).text()
    assert (
        "Not all were tested on the same images, so their accuracies do not compare: deep (digits); "
        "other (mnist)." in text
    )


def test_names_are_as_long_as_needed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "masked", tmp_path / "here" / "deep")
    found = compare([finished / "deep", tmp_path / "here" / "deep"])
    assert [row.name for row in found.rows] == [f"{finished.name}/deep", "here/deep"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compare", "the following arguments are required: RUN"),
        ("compare deep nowhere", "nowhere is not there: expected the folder of a run"),
        ("compare deep empty", "empty is no run folder (it has no config.yaml)"),
        ("compare begun", "begun holds an unfinished run: vitrail train --output begun --resume"),
        ("compare deep deep", "deep is given twice"),
        ("compare deep --outptu x", "unrecognized arguments: --outptu x"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(
    line: str,
    message: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished / "deep", tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished / "deep", tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith(f"vitrail: {message}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "comparison").exists()


def test_the_command_prints_the_table_or_json(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(finished / "shallow/seed0"), str(finished / "deep"), "--output", str(tmp_path)]
    main(words)
    said = capsys.readouterr().out
    assert said == (tmp_path / "compare.md").read_text() + f"curves {tmp_path / 'compare.png'}\n"
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == ["shallow", "deep"]
    assert found["settings"]["depth"] == ["1", "2"]
    reader = csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text()))
    assert [float(line["test"]) for line in reader] == [row["test"]["value"] for row in found["rows"]]


def test_the_time_of_an_image_is_measured_when_asked_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished / name) for name in ("shallow/seed0", "shallow/seed1", "deep")]
    words = ["compare", *runs, "--output", str(tmp_path), "--latency"]
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    shallow, deep = (row["latency"] for row in found["rows"])
    assert len(shallow["raw_s"]) == len(deep["raw_s"]) >= 20  # in turns
    assert 0 < shallow["median_s"] < deep["median_s"] < 0.1
    assert "thread" in found["timed_on"] or "NVIDIA" in found["timed_on"]
    with (tmp_path / "compare.csv").open() as file:
        times = [float(line["ms_per_image"]) for line in csv.DictReader(file)]
    assert times[0] == times[1] == pytest.approx(1000 * shallow["median_s"])
    header = (tmp_path / "compare.md").read_text().splitlines()[0]
    assert "ms an image" in header
    assert "ms an image" not in compare([finished / "deep"]).text()
