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


def run(folder, name, *options):
    """Run a copy, so that nothing is written into the checkout."""
    copy = folder / "benchmarks"
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(BENCHMARKS, copy, ignore=ignored, dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, copy / f"{name}.py", "--quick", *options],
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
    assert result["settings"]["steps"] == 2_000 // result["settings"]["batch_size"]
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


@pytest.mark.skipif(not os.environ.get("VITRAIL_DATA"), reason="needs CIFAR-10: set VITRAIL_DATA")
def test_cifar10_epoch(tmp_path):
    done, path = run(tmp_path, "cifar10_epoch")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["settings"]["steps"] == 3
    ours, timm = result["settings"]["macs_an_image"].values()
    assert abs(ours / timm - 1) < 0.01
    assert "timm fp32 / this" in done.stdout


@pytest.mark.skipif(not os.environ.get("VITRAIL_DATA"), reason="needs MNIST: set VITRAIL_DATA")
def test_planted_evidence(tmp_path):
    done, path = run(tmp_path, "planted_evidence", "--models", "cct")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(path.read_text())["models"].values()
    assert len(model["methods"]) == 13
    assert all(0 <= own["on_digit"] <= 1 for own in model["methods"].values())
    assert 0.05 < model["area"] < 0.2


def test_a_map_of_the_box_peaks_in_the_box(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("planted_evidence")
    digits = torch.zeros(6, 28, 28, dtype=torch.uint8)
    digits[:, 4:24, 6:22] = 255
    canvases, boxes = benchmark.plant(digits, torch.zeros_like(digits), torch.Generator().manual_seed(0))
    for canvas, (top, bottom, left, right) in zip(canvases[:, 0], boxes.tolist(), strict=True):
        assert (canvas > 0).sum() == 20 * 16 == (canvas[top:bottom, left:right] > 0).sum()
    assert benchmark.on_digit(canvases[:, 0].float(), boxes).all()
    assert not benchmark.on_digit(255 - canvases[:, 0].float(), boxes).any()


def test_architectures(tmp_path):
    for _ in range(2):  # the second one finds everything measured
        done, path = run(tmp_path, "architectures", "--models", "swin_tiny*")
        assert done.returncode == 0, done.stderr
        assert "swin_tiny_patch4_window7_224" in done.stdout
        (model,) = json.loads(path.read_text())["models"].values()
        assert model["machine"]["versions"]["timm"]
        assert max(model["logit_differences"].values()) < 1e-4
        for phase in ("forward", "training"):
            found = model[phase]
            assert set(found["contestants"]) == {"vitrail", "timm", "transformers", "torchvision"}
            for taken in found["contestants"].values():
                assert len(taken["raw_s"]) == model["settings"]["repetitions"] == 1
                assert 0 < taken["share_of_ceiling"] < 2
            assert set(found["peer_over_vitrail"]) == {"timm", "transformers", "torchvision"}
    done, _ = run(tmp_path, "architectures", "--models", "resnet*")
    assert done.returncode == 2
    assert "no architecture matches 'resnet*'" in done.stderr


def test_architectures_knows_its_targets(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    misses = importlib.import_module("architectures").misses
    ratios = {"timm": 1.3, "transformers": 0.9}
    found = {phase: {"peer_over_vitrail": ratios} for phase in ("forward", "training")}
    assert misses("swin_tiny_patch4_window7_224", found) == [
        f"{phase} transformers 0.900 < 0.95" for phase in ("forward", "training")
    ]
    found["training"] = {"peer_over_vitrail": {"timm": 1.1}}
    found["forward"] = {"peer_over_vitrail": {"timm": 1.3}}
    assert misses("swin_tiny_patch4_window7_224", found) == ["training timm 1.100 < 1.2"]
    assert misses("cait_xxs24_224", found) == ["training timm 1.100 < 1.2"]


@pytest.mark.parametrize(
    ("name", "contestants", "ratio"),
    [
        ("mae_step", {"vitrail", "transformers"}, "transformers_over_ours"),
        ("attention_maps", {"plain", "maps", "transformers", "transformers maps"}, "maps_over_plain"),
    ],
)
def test_side_by_side(name, contestants, ratio, tmp_path):
    done, path = run(tmp_path, name)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["times"]) == set(result["peak_mib"]) == contestants
    assert all(len(own["raw_s"]) == 1 for own in result["times"].values())
    assert 0.1 < result[ratio] < 10


@pytest.mark.skipif(not os.environ.get("VITRAIL_DATA"), reason="needs photographs: set VITRAIL_DATA")
def test_predict_folder(tmp_path):
    done, path = run(tmp_path, "predict_folder")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["settings"]["images"] == 16
    assert set(result["ways"]) == {"vitrail", "timm_1", "timm_32", "import_torch"}
    assert set(result["peer_over_vitrail"]["vitrail"]) == {"timm_1", "timm_32"}
    assert result["answers"]["vitrail"]["same_first_class"] == 1.0
    assert result["answers"]["vitrail"]["largest_difference"] < 1e-4


def test_optimized(tmp_path):
    done, path = run(tmp_path, "optimized", "--batch", "2")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(path.read_text())["models"].values()
    assert min(model["cosine"].values()) > 0.9999
    (found,) = model["batches"].values()
    ways = found["contestants"]
    assert set(ways) == {"eager", "timm", "float32"}
    assert ways["eager"]["eager_over_this"] == ways["timm"]["timm_over_this"] == 1
    assert all(0 < own["share_of_ceiling"] < 2 for own in ways.values())
    done, _ = run(tmp_path, "optimized", "--models", "resnet*")
    assert done.returncode == 2
    assert "no model matches 'resnet*'" in done.stderr
