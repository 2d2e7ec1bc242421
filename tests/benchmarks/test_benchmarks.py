"""The benchmarks run, and write what they say they write. Their times mean nothing here."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(folder, name):
    """Run a copy, so that nothing is written into the checkout."""
    copy = folder / "benchmarks"
    shutil.copytree(BENCHMARKS, copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    done = subprocess.run(
        [sys.executable, copy / f"{name}.py", "--quick"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, copy / "results" / f"{name}-quick.json"


@pytest.mark.skipif(not os.environ.get("VITRAIL_DATA"), reason="needs MNIST: set VITRAIL_DATA")
def test_mnist_epoch(tmp_path):
    done, path = run(tmp_path, "mnist_epoch")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["quick"]
    assert result["settings"]["steps"] == 15
    assert set(result["ways"]) == {"vitrail", "torch"}
    for way in result["ways"].values():
        assert len(way["epoch"]["raw_s"]) == len(way["data"]["raw_s"]) == 1
        assert way["data"]["median_s"] > 0
        assert 0 < way["last_loss"] < 3
    assert "torch / vitrail: epoch" in done.stdout


def test_mnist_epoch_without_data_says_what_is_missing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"set VITRAIL_DATA to a folder that holds mnist/$"):
        importlib.import_module("mnist_epoch").measure(quick=True)


def test_training_step(tmp_path):
    done, path = run(tmp_path, "training_step")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["contestants"]) == {"vitrail", "timm", "transformers"}
    for found in result["contestants"].values():
        assert len(found["raw_s"]) == result["settings"]["rounds"] == 2
        assert found["quartiles_s"][0] <= found["median_s"] <= found["quartiles_s"][1]
        assert 0 < found["share_of_ceiling"] < 2
    assert result["faster_peer"] in {"timm", "transformers"}
    assert result["machine"]["versions"]["timm"]
