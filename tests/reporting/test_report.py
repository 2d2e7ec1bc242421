"""The report of small made-up runs: complete, bare, hostile."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vitrail.config import load_config
from vitrail.datasets import ImageSet, Preprocessing
from vitrail.evaluation.metrics import classification_metrics, write_evaluation
from vitrail.explain import draw
from vitrail.models import Encoder, build_model
from vitrail.reporting import write_report

PICTURES = {
    "attention",
    "augmented",
    "calibration",
    "confusion",
    "curves",
    "gradients",
    "learning_rate",
    "mistakes",
    "positions",
    "predictions",
}
MANIFEST = {
    "command": "vitrail train --model vit_digits",
    "finished": "2026-01-02T03:04:05+00:00",
    "parameters": 136_138,
    "macs_per_image": 2_380_000,
    "images_seen": 15_360,
    "training_petaflop": 0.00022,
    "training_seconds": 3725.0,
    "cpu_seconds": 59.0,
    "hardware": {"device": "cpu", "cpu": "Some CPU, 2 cores", "threads": 2},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 60)


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def digits(N: int = 60, classes: tuple[str, ...] = tuple("0123456789")) -> ImageSet:
    data = load_digits()
    images = (data.images[:N, None] * 15.9).astype(np.uint8)
    return ImageSet.from_arrays(images, data.target[:N], classes=classes, name="digits", split="test")


def tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_model("vit_digits", **({"embed_dim": 16, "depth": 2, "num_heads": 2} | changes))


def preprocessing(test: ImageSet) -> Preprocessing:
    return Preprocessing(img_size=(8, 8), in_chans=1, mean=test.mean, std=test.std)


def start_run(run: Path) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(load_config(None, {"model.name": "vit_digits"}).to_yaml())


def log_training(run: Path, *, val: bool = True, norms: bool = True) -> None:
    lines = []
    for step in range(10, 130, 10):
        line = {
            "kind": "train",
            "step": step,
            "epoch": step / 30,
            "loss": 20 / step,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        line |= {"images_per_second": 500.0}
        if norms:
            line |= {"grad_norms": {"patch_embed": 0.1, "blocks.0": 1.0 / step, "blocks.1": 0.0, "head": 2.0}}
        lines.append(line)
        if val and step % 30 == 0:
            lines.append({"kind": "val", "step": step, "epoch": step / 30, "loss": 1.0, "accuracy": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluate(run: Path, test: ImageSet, *, perfect: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(test), len(test.classes), generator=generator)
    logits[torch.arange(len(test)), torch.from_numpy(test.labels)] += 50.0 if perfect else 2.0
    probabilities = logits.softmax(dim=1)
    metrics = classification_metrics(probabilities, test.labels, test.classes)
    write_evaluation(run / "evaluation", "digits-test", metrics, probabilities, test.labels)


def test_complete_run(tmp_path: Path) -> None:
    start_run(tmp_path)
    log_training(tmp_path)
    test = digits()
    evaluate(tmp_path, test)
    np.save(tmp_path / "augmented.npy", test.images[:20])
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    path = write_report(tmp_path, model=tiny(), preprocessing=preprocessing(test), test=test)

    assert path == tmp_path / "report.html"
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == PICTURES
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "augmented.npy",
        "config.yaml",
        "evaluation",
        "figures",
        "manifest.json",
        "metrics.csv",
        "metrics.jsonl",
        "report.html",
    ]
    page = path.read_text()
    tags = Tags(page)
    pictures = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(pictures) == len(PICTURES)
    for text in (
        "vit_digits on digits",
        "136 k",
        "2.38 M",
        "1 h 02 min",
        "15.4 k",
        "Some CPU, 2 cores",
        "vitrail train --model vit_digits",
        "95 % interval",
        "versions.torch",
        "val_fraction: 0.1",
    ):
        assert text in tags.text.replace("\u202f", " "), text
    assert "absent" not in [attributes.get("class") for _, attributes in tags.found]

    # It opens offline.
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for tag, attributes in tags.found:
        assert "href" not in attributes, tag
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")

    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 + 4
    assert float(rows[0]["grad_norms.blocks.0"]) == 0.1
    assert rows[-1]["kind"] == "val"
    assert rows[-1]["accuracy"] == "0.5"


def test_bare_run_says_what_is_missing_and_replaces_old_pictures(tmp_path: Path) -> None:
    start_run(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").write_bytes(b"old")
    test = digits()
    model = tiny(position="none", embed_dim=16)
    page = write_report(tmp_path, model=model, preprocessing=preprocessing(test), test=test).read_text()
    text = Tags(page).text
    assert [own.name for own in (tmp_path / "figures").iterdir()] == ["attention.png"]
    assert "has logged no training step" in text
    assert "has no test results" in text
    assert "is not told where a patch is" in text
    assert "has no manifest" in text
    assert page.count("<img") == 1


def test_unfinished_run(tmp_path: Path) -> None:
    start_run(tmp_path)
    log_training(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    test = digits()
    text = Tags(
        write_report(
            tmp_path, model=tiny(class_token=False, pool="mean"), preprocessing=preprocessing(test), test=test
        ).read_text()
    ).text
    assert "Validation accuracy" in text
    assert "at step 120; no test results yet" in text


def test_no_validation_split_no_gradients_no_mistakes(tmp_path: Path) -> None:
    start_run(tmp_path)
    log_training(tmp_path, val=False, norms=False)
    test = digits(12)
    evaluate(tmp_path, test, perfect=True)
    page = write_report(tmp_path, model=tiny(), preprocessing=preprocessing(test), test=test).read_text()
    text = Tags(page).text
    assert "100.00 %" in text
    assert "has logged no gradient norms" in text
    assert "No test image was answered wrongly" in text
    assert "Most frequent confusions" not in text


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    hostile = (
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "$\\frac{$",
        "{{ 7 * 7 }}",
        "猫",
        "</pre></style>",
        "a & b",
        "line\nbreak",
        "x" * 200,
        "",
    )
    start_run(tmp_path)
    text = load_config(None, {"model.name": "vit_digits", "model.note": "</pre><script>1</script>"}).to_yaml()
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "manifest.json").write_text(json.dumps({"command": "<b>bold</b>", "<i>": "<script>"}))
    test = digits(60, hostile)
    evaluate(tmp_path, test)
    tags = Tags(
        write_report(tmp_path, model=tiny(), preprocessing=preprocessing(test), test=test).read_text()
    )
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "b"})
    assert all("onerror" not in attributes for _, attributes in tags.found)
    assert len([tag for tag, _ in tags.found if tag == "img"]) == len(PICTURES) - 4  # no training was logged
    assert "<script>alert(1)</script>" in tags.text
    assert "{{ 7 * 7 }}" in tags.text


def test_hundred_classes(tmp_path: Path) -> None:
    start_run(tmp_path)
    test = digits(300, tuple(f"class {k}" for k in range(100)))
    evaluate(tmp_path, test)
    page = write_report(tmp_path, model=tiny(), preprocessing=preprocessing(test), test=test).read_text()
    tags = Tags(page)
    assert "details" in [tag for tag, _ in tags.found]
    assert "All 100 classes" in tags.text
    assert "class 99" in tags.text


def test_refusals(tmp_path: Path) -> None:
    test = digits()
    arguments = {"model": tiny(), "preprocessing": preprocessing(test)}
    with pytest.raises(ValueError, match="is no run folder"):
        write_report(tmp_path, test=test, **arguments)
    start_run(tmp_path)
    evaluate(tmp_path, test)
    with pytest.raises(ValueError, match="of other images than the 50 given"):
        write_report(tmp_path, test=digits(50), **arguments)
