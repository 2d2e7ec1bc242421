"""The root of a checkout: main.py, requirements.txt, configs/ and examples/, as commands use them."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail.quickstart
from vitrail.config import load_config
from vitrail.datasets import list_datasets
from vitrail.evaluation.cost import count_parameters
from vitrail.models import build_model

ROOT = Path(__file__).parent.parent
QUICK = "--model.depth 1 --train.device cpu"


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, what it printed, what it said on standard error."""

    code: int
    out: str
    err: str


Run = Callable[[str], Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python FILE ...` in a folder with a checkout's entries, where it may write beside them.

    The files run as the interpreter runs them, but in this process: importing torch takes seconds.
    """
    for name in ("main.py", "configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> Done:
        python, *words = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)  # as the interpreter does
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return command


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Four photographs of unequal size in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for number, (split, synset) in enumerate(
        (split, synset) for split in ("train", "val") for synset in ("n01440764", "n01443537")
    ):
        folder = tmp_path / "data" / "imagenet" / split / synset
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, (240 + number, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{synset}_1.JPEG")
    return tmp_path / "data"


def test_main_exposes_the_four_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    main = importlib.import_module("main")
    assert main.__all__ == [
        "AttentionVisualizer",
        "ViTClassifier",
        "ViTConfig",
        "ViTTrainer",
        "ViTTransferLearning",
    ]
    for name in main.__all__:
        assert getattr(main, name) is getattr(vitrail.quickstart, name)


def test_main_answers_in_a_process_of_its_own() -> None:
    words = [sys.executable, "main.py", "train", "digits-vti"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vitrail: unknown recipe 'digits-vti': did you mean digits-vit")
    assert done.stderr.count("\n") == 1


def test_main_is_the_command_line(run: Run) -> None:
    assert run("python main.py --help").out.startswith("usage: vitrail")
    done = run(f"python main.py train configs/digits-vit.yaml --dry-run {QUICK}")
    assert done.code == 0, done.err
    assert re.search(r"^parameters +[\d,]+$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    "flags", ["--batch_size 256 --learning_rate 1e-3", "--batch-size 256 --learning-rate 1e-3"]
)
def test_the_training_command_starts(flags: str, run: Run, imagenet: Path) -> None:
    line = f"python main.py train --model vit_base --dataset imagenet --epochs 100 {flags}"
    done = run(f"{line} --data.root {imagenet} --dry-run {QUICK}")
    assert done.code == 0, done.err
    assert "parameters        8,601,064\n" in done.out  # ViT-B/16 with one of its twelve blocks
    assert "steps             100 (100.0 epochs of 1)" in done.out
    assert re.search(r"^  batch_size: 256$", done.out, re.MULTILINE)
    assert re.search(r"^  lr: 0.001$", done.out, re.MULTILINE)


def test_requirements_are_those_of_the_package() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith(("#", "-"))]
    assert listed == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "-c constraints.txt" in lines
    assert lines[-1] == "-e ."


def test_every_requirement_is_pinned() -> None:
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith(("#", "-")):
            assert re.split("[>=<]", line)[0].lower() in pins, line


@pytest.mark.parametrize(
    ("name", "parameters"), [("swin_tiny", 28_288_354), ("vit_base", 86_567_656), ("vit_large", 304_326_632)]
)
def test_configs_build(name: str, parameters: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config == load_config(name)
    assert config.data.name in list_datasets()
    with torch.device("meta"):
        model = build_model(str(config.model.name), **config.model.options)
    assert count_parameters(model) == parameters


def test_the_config_of_hyperparameters_trains_any_model(run: Run, imagenet: Path) -> None:
    line = f"python main.py train configs/training.yaml --model vit_tiny --dataset imagenet {QUICK}"
    done = run(f"{line} --data.root {imagenet} --dry-run")
    assert done.code == 0, done.err
    assert "steps             90 (90.0 epochs of 1)" in done.out


def test_the_sample_is_what_its_script_draws() -> None:
    draw_sample = runpy.run_path(str(ROOT / "examples" / "make_sample.py"))["draw_sample"]
    with Image.open(ROOT / "examples" / "sample.jpg") as sample:
        assert (sample.format, sample.mode, sample.size) == ("JPEG", "RGB", (320, 240))
        difference = np.asarray(sample).astype(int) - np.asarray(draw_sample())
    assert np.abs(difference).mean() < 2  # what JPEG changes


def test_attention_analysis_of_a_state_dictionary(run: Run, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    weights = build_model("vit_tiny").state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "vit_tiny.pth")
    command = (
        "python examples/attention_analysis.py --model_path checkpoints/vit_tiny.pth "
        "--image_path examples/sample.jpg --output_dir visualizations/"
    )
    done = run(command)
    assert done.code == 0, done.err
    written = sorted((tmp_path / "visualizations").iterdir())
    assert [path.name for path in written] == [
        "attention-sample-heads-of-layer-12.png",
        "attention-sample-layers.png",
    ]
    assert sorted(done.out.split()) == [f"visualizations/{path.name}" for path in written]
    for path in written:
        with Image.open(path) as picture:
            assert picture.width == 1120

    (tmp_path / "checkpoints" / "vit_tiny.pth").write_bytes(b"no weights")
    torch.save({"model": weights}, tmp_path / "checkpoints" / "vit_small.pth")
    for other, message in (
        ("vit_tiny", "vit_tiny.pth cannot be read"),
        ("vit_small", "vit_small.pth is no vit_small: size mismatch for cls_token"),
        (
            "vit_base",
            "no file checkpoints/vit_base.pth; the head of attention_analysis.py tells how to make one",
        ),
    ):
        done = run(command.replace("vit_tiny", other))
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1


def test_classification_and_transfer(run: Run, tmp_path: Path) -> None:
    done = run("python examples/classification.py --epochs 1 --output_dir runs/one")
    assert done.code == 0, done.err
    assert re.search(r"^validation accuracy \d+\.\d % of 359 images$", done.out, re.MULTILINE)
    assert re.search(r"^runs/one/digit.png: \d, confidence 0\.\d{3}$", done.out, re.MULTILINE)

    line = "python examples/transfer_learning.py --pretrained_model runs/one --dataset digits --epochs 2"
    done = run(f"{line} --freeze")
    assert done.code == 0, done.err
    assert re.search(r"^test accuracy \d+\.\d\d % \(.*, 359 images\)$", done.out, re.MULTILINE)
    assert (tmp_path / "runs" / "transfer" / "model.safetensors").is_file()
    done = run(line.replace("runs/one", "runs/two"))
    assert (done.code, done.err) == (1, "no run or model folder runs/two\n")
