"""Tables of predictions: the same in every form, gone on with byte for byte, never of two models."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from tests.serving.conftest import write_model

from vitrail.serving import Predictor, predict_to

COUNT = 23


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor.from_source(model_folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of different sizes; two are broken."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 256, (20 + number, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "03.png").write_text("<html>")
    (folder / "21.png").write_bytes(b"")
    return sorted(folder.iterdir())


def rows(path: Path) -> list[tuple[str, list[str], list[float], str, str]]:
    """Source, classes, probabilities, error and model of each row, whatever the form."""
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            (
                own["source"],
                own.get("classes", []),
                own.get("probabilities", []),
                own.get("error", ""),
                own["model"],
            )
            for own in found
        ]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    else:
        table = parquet.read_table(path).to_pylist()
    return [
        (
            own["source"],
            [own[f"class_{k}"] for k in (1, 2, 3) if own[f"class_{k}"]],
            [float(own[f"probability_{k}"]) for k in (1, 2, 3) if own[f"probability_{k}"]],
            own["error"] or "",
            own["model"],
        )
        for own in table
    ]


def test_every_form_holds_what_predict_answers(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    whole = [path for path in files if path.name not in ("03.png", "21.png")]
    expected = {own.source: own for own in predictor.predict(whole, top=3)}
    for suffix in (".jsonl", ".csv", ".parquet"):
        output = tmp_path / f"x{suffix}"
        outcome = predict_to(predictor, [*files, files[0]], output, top=3)
        assert (outcome.count, outcome.before, len(outcome.broken)) == (COUNT, 0, 2)
        assert outcome.text().startswith("23 images in ")
        assert outcome.text().endswith(f" images a second, 2 broken: {output}")
        found = rows(output)
        assert [source for source, *_ in found] == [str(path) for path in files]
        assert {model for *_, model in found} == {predictor.fingerprint}
        assert [(source, error) for source, _, _, error, _ in found if error] == [
            (str(files[3]), "expected an image, got a file of another kind"),
            (str(files[21]), "expected an image, got an empty file"),
        ]
        for source, classes, probabilities, error, _ in found:
            if error:
                assert (classes, probabilities) == ([], [])
            else:
                assert tuple(classes) == expected[source].classes
                assert probabilities == pytest.approx(expected[source].probabilities, rel=1e-4)
    assert rows(tmp_path / "x.jsonl") == rows(tmp_path / "x.csv") == rows(tmp_path / "x.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "x.csv", "x.parquet"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_cut_anywhere_and_gone_on_with_it_is_the_same(
    suffix: str, predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / f"x{suffix}"
    growing = tmp_path / "x.parquet.csv" if suffix == ".parquet" else output
    reference = tmp_path / ("reference.csv" if suffix == ".parquet" else f"reference{suffix}")
    predict_to(predictor, files, reference, top=2, batch_size=4)
    content, table = reference.read_bytes(), None
    first = content.index(b"\n") + 1 if suffix != ".jsonl" else 0
    for end in (first, first + 5, len(content) // 3, len(content) // 2, len(content) - 1, len(content)):
        output.unlink(missing_ok=True)
        growing.write_bytes(content[:end])
        outcome = predict_to(predictor, files, output, top=2, batch_size=4)
        assert outcome.before + outcome.count == COUNT
        assert outcome.before % 4 == 0 or outcome.before == COUNT
        assert outcome.before >= content[first:end].count(b"\n") - 3
        assert len(outcome.broken) == 2
        if suffix != ".parquet":
            assert output.read_bytes() == content
        elif table is None:
            table = output.read_bytes()
        assert table is None or (output.read_bytes() == table and not growing.exists())


def test_killed_in_the_middle_and_gone_on_with(
    model_folder: Path, predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):
        os.link(files[number % 3], many / f"{number:04}.png")
    output = tmp_path / "x.jsonl"
    code = (
        "import sys\nfrom vitrail.serving import Predictor, find_files, predict_to\n"
        "predict_to(Predictor.from_source(sys.argv[1]), find_files([sys.argv[2]])[0], sys.argv[3])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(model_folder), str(many), str(output)])
    try:
        while process.poll() is None and (not output.exists() or output.stat().st_size < 20_000):
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    done = output.read_bytes().count(b"\n")
    assert 0 < done < 400
    outcome = predict_to(predictor, sorted(many.iterdir()), output)
    assert outcome.before == done // 8 * 8
    predict_to(predictor, sorted(many.iterdir()), tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_added_files_come_behind(
    suffix: str, predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / f"x{suffix}"
    predict_to(predictor, files[10:18], output, top=3)
    before = rows(output)
    outcome = predict_to(predictor, files[:20], output, top=3)
    assert (outcome.before, outcome.count) == (8, 12)
    assert rows(output)[:8] == before
    assert [source for source, *_ in rows(output)[8:]] == [str(path) for path in files[:10] + files[18:20]]
    content = output.read_bytes()
    again = predict_to(predictor, files[:20], output, top=3)
    assert (again.before, again.count, len(again.broken)) == (20, 0, 1)
    assert again.text().endswith(f"s, 20 were there before, 1 broken: {output}")
    assert output.read_bytes() == content


def test_a_row_is_a_line_whatever_a_file_is_called(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    names = [b"two\nlines.png", b'comma, "quote".png', b"no-utf8-\xff.png", "été.png".encode()]
    odd = [tmp_path / os.fsdecode(name) for name in names]
    for path in odd:
        os.link(files[0], path)
    expected = [f"{tmp_path}/{name}" for name in (
        "two\\nlines.png", 'comma, "quote".png', "no-utf8-\\xff.png", "été.png",
    )]  # fmt: skip
    for suffix in (".jsonl", ".csv", ".parquet"):
        output = tmp_path / f"x{suffix}"
        predict_to(predictor, odd, output, top=3)
        assert [source for source, *_ in rows(output)] == expected
        assert predict_to(predictor, odd, output, top=3).before == 4


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_is_something_else_is_refused_and_stays(
    suffix: str, predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / f"x{suffix}"
    predict_to(predictor, files[:5], output, top=3)
    content = output.read_bytes()
    other = Predictor.from_source(write_model(tmp_path / "other", in_chans=3, seed=1))
    assert other.fingerprint != predictor.fingerprint
    with pytest.raises(
        ValueError, match=rf"another model \({predictor.fingerprint}, not {other.fingerprint}"
    ):
        predict_to(other, files, output, top=3)
    with pytest.raises(ValueError, match=rf"x\{suffix} .* remove it$"):
        predict_to(predictor, files, output, top=4)
    assert output.read_bytes() == content
    mine = tmp_path / f"mine{suffix}"
    mine.write_bytes(b"my own notes\n")
    with pytest.raises(ValueError, match=rf"mine\{suffix} .* give another --output"):
        predict_to(predictor, files, mine, top=3)
    assert mine.read_bytes() == b"my own notes\n"
    assert {path.name for path in tmp_path.iterdir()} == {output.name, mine.name, "other"}


def test_bad_names_and_numbers_write_nothing(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.txt: expected a name that ends in \.jsonl, \.csv, \.parquet$"):
        predict_to(predictor, files, tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"no folder .*none; make it first$"):
        predict_to(predictor, files, tmp_path / "none" / "x.csv")
    for numbers in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            predict_to(predictor, files, tmp_path / "x.csv", **numbers)
    assert list(tmp_path.iterdir()) == []
