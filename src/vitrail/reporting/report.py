"""The report of a run: pictures, a table of the curves, and one HTML file that needs nothing else.

Everything comes from the run folder (`config.yaml`, `metrics.jsonl`, `manifest.json`, `evaluation/`), and
from the model and the test images for what has to be looked at. What a run does not have, the report says.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from vitrail.config import load_config
from vitrail.datasets import Images, Preprocessing, side_by_side
from vitrail.evaluation.metrics import ClassificationMetrics, Evaluation, read_evaluation
from vitrail.evaluation.representation import RepresentationMetrics
from vitrail.explain.attention import attention_layers, attention_maps
from vitrail.explain.draw import INK, RED, image_grid, label, png, similarity_grid
from vitrail.explain.health import CollapseReport, attention_collapse, finding
from vitrail.explain.positions import read_positions
from vitrail.files import write_whole
from vitrail.models.encoder import Encoder
from vitrail.reporting import figures

PREDICTIONS, MISTAKES, LOOKED_AT = 20, 20, 5
"""How many test images are shown: at random, among the mistakes, and with attention."""

ATTENTION_LAYERS = 4

UNTRAINED = "The run has logged no training step."
UNTESTED = "The run has no test results: it did not finish, or its task has none."


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """How often images of one class were called another."""

    truth: str
    answer: str
    count: int
    share: float
    """Of the images of the true class."""


def write_report(run: Path, *, model: Encoder, preprocessing: Preprocessing, test: Images) -> Path:
    """Write `figures/*.png`, `metrics.csv` and `report.html` into a run folder.

    Sections whose data are missing (no validation split, no test results, no attention among all tokens, no
    added positions) say so instead. Files of an earlier report are replaced.

    Args:
        run: Run folder with `config.yaml`; the other files are optional.
        model: The trained model; it is put into evaluation mode.
        preprocessing: How test images become the model's input.
        test: The images that `evaluation/<name>-<split>` was computed on, in the same order.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: No run folder, or its stored evaluation is of other images.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run folder: it has no config.yaml")
    config = load_config(run / "config.yaml")
    lines = _read_lines(run / "metrics.jsonl")
    manifest = json.loads((run / "manifest.json").read_text()) if (run / "manifest.json").is_file() else {}
    evaluation = _read_evaluation(run, test)
    metrics = None if evaluation is None else evaluation.metrics
    features = _read_features(run / "evaluation" / f"{test.name}-{test.split}-features.json")
    model.eval()

    drawn = (
        _draw_augmented(run / "augmented.npy")
        | _draw_reconstructed(run / "reconstructed.npy")
        | _draw_training(lines, metrics)
        | _draw_test(test, evaluation)
        | _draw_inside(model, preprocessing, test)
    )
    pictures, absent = {}, {}
    (run / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        path = run / "figures" / f"{name}.png"
        if isinstance(figure, str):
            absent[name] = figure
            path.unlink(missing_ok=True)
        else:
            content = png(figure)
            write_whole(path, content)
            pictures[name] = "data:image/png;base64," + base64.b64encode(content).decode()
    write_whole(run / "metrics.csv", _table(lines))

    environment = Environment(
        loader=PackageLoader("vitrail.reporting", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"finding": finding, "percent": _percent, "thousands": _thousands}
    page = environment.get_template("report.html.jinja").render(
        title=f"{config.model.name} on {config.data.name}"
        + ("" if config.task.name == "classify" else f": {config.task.name}"),
        run=run.resolve().name,
        test=test,
        headline=list(_headline(manifest, metrics, features, lines)),
        finished=manifest.get("finished"),
        hardware=_machine(manifest.get("hardware", {})),
        command=manifest.get("command"),
        health=_health(model, preprocessing, test),
        pictures=pictures,
        absent=absent,
        metrics=metrics,
        features=features,
        classes=[] if metrics is None else list(enumerate(metrics.per_class)),
        confusions=[] if metrics is None else _most_confused(metrics),
        config=(run / "config.yaml").read_text(),
        manifest=list(_flat(manifest)),
    )
    write_whole(run / "report.html", page)
    return run / "report.html"


def _read_lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by their kind; a last line that a killed run left half-written is ignored."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    if path.is_file():
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n") and text.strip():
                line = json.loads(text)
                lines.setdefault(line["kind"], []).append(line)
    return lines


def _read_evaluation(run: Path, test: Images) -> Evaluation | None:
    name = f"{test.name}-{test.split}"
    try:
        evaluation = read_evaluation(run / "evaluation", name)
    except FileNotFoundError:
        return None
    if not np.array_equal(evaluation.labels, test.labels):
        raise ValueError(
            f"{run / 'evaluation' / name}.npz is of other images than the {len(test)} given: evaluate again"
        )
    return evaluation


def _read_features(path: Path) -> RepresentationMetrics | None:
    return RepresentationMetrics(**json.loads(path.read_text())) if path.is_file() else None


Drawn = dict[str, Figure | str]
"""Pictures by file name; a sentence where there is none, and why."""


def _draw_augmented(path: Path) -> Drawn:
    if not path.is_file():
        return {"augmented": "The run has stored no training images."}
    images = torch.from_numpy(np.load(path))
    return {"augmented": image_grid(images, [""] * len(images), columns=5)}


def _draw_reconstructed(path: Path) -> Drawn:
    """Rows of three: what the model saw, what it made of it, and the whole image."""
    if not path.is_file():
        return {}
    images = torch.from_numpy(np.load(path)).transpose(0, 1).flatten(0, 1)  # [3 N, C, H, W]
    captions = ["seen", "guessed", "original"] * (len(images) // 3)
    return {"reconstructed": image_grid(images, captions, columns=6)}


def _draw_training(lines: Mapping[str, list[dict[str, Any]]], metrics: ClassificationMetrics | None) -> Drawn:
    train = lines["train"]
    if not train:
        return {"curves": UNTRAINED, "learning_rate": UNTRAINED, "gradients": UNTRAINED}
    drawn: Drawn = {}
    if figures.own_numbers(train, lines["val"]):
        drawn["details"] = figures.details(train, lines["val"])
    has_gradients = any(line.get("grad_norms") for line in train)
    return drawn | {
        "curves": figures.curves(train, lines["val"], metrics),
        "learning_rate": figures.learning_rate(train),
        "gradients": figures.gradients(train) if has_gradients else "The run has logged no gradient norms.",
    }


def _draw_test(test: Images, evaluation: Evaluation | None) -> Drawn:
    if evaluation is None:
        return dict.fromkeys(("confusion", "calibration", "predictions", "mistakes"), UNTESTED)
    answers = evaluation.probabilities.argmax(axis=1)
    confidence = evaluation.probabilities.max(axis=1)
    wrong = np.flatnonzero(answers != evaluation.labels)
    sample = _sample(len(test))

    def gallery(indices: np.ndarray) -> Figure:
        images, labels = test.batch(indices)
        captions, colours = [], []
        for index, truth in zip(indices, labels.tolist(), strict=True):
            answer = answers[index]
            said = f"{label(test.classes[answer], 12)} ({100 * confidence[index]:.0f} %)"
            if answer == truth:
                captions.append(f"✓ {said}")
            else:
                captions.append(f"✗ {said}\ntrue: {label(test.classes[truth], 13)}")
            colours.append(INK if answer == truth else RED)
        return image_grid(side_by_side(images), captions, columns=4, colours=colours)

    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return {
        "confusion": figures.confusion(evaluation.metrics),
        "calibration": figures.calibration(evaluation.metrics),
        "predictions": gallery(sample[:PREDICTIONS]),
        "mistakes": gallery(worst) if len(worst) else "No test image was answered wrongly.",
    }


def _draw_inside(model: Encoder, preprocessing: Preprocessing, test: Images) -> Drawn:
    if not len(test):
        return dict.fromkeys(("attention", "positions"), "There are no test images.")
    # The first image of each of a few classes, in the order of the sample.
    sample = _sample(len(test))
    _, first = np.unique(test.labels[sample], return_index=True)
    chosen = sample[np.sort(first)[:LOOKED_AT]]
    images, labels = test.batch(chosen)
    device = next(model.parameters()).device
    inputs = preprocessing.prepare(images).to(device)

    drawn: Drawn = {}
    depth = len(attention_layers(model))
    layers = np.unique(np.linspace(0, depth - 1, min(depth, ATTENTION_LAYERS)).round().astype(int)).tolist()
    maps = attention_maps(model, inputs, layers=layers)
    pictures, heats = side_by_side(images), [own.values for own in maps]
    if images.ndim == 5:  # maps show the moments below each other
        moments = model.forward_features(inputs[:1]).grid[0]
        heats = [side_by_side(own.unflatten(1, (moments, -1))[:, :, None])[:, 0] for own in heats]
    tiles, captions, heat = [], [], []
    for row, truth in enumerate(labels.tolist()):
        tiles += [pictures[row]] * (1 + len(layers))
        captions += [label(test.classes[truth], 16), *(f"layer {layer + 1}" for layer in layers)]
        heat += [None, *(own[row] for own in heats)]
    drawn["attention"] = image_grid(torch.stack(tiles), captions, columns=1 + len(layers), heat=heat)
    grid = model.flow((inputs.shape[-2], inputs.shape[-1])).start[-1].grid
    try:
        drawn["positions"] = similarity_grid(read_positions(model, grid).similarity.cpu())
    except ValueError as error:
        drawn["positions"] = f"{error}."
    return drawn


def _health(model: Encoder, preprocessing: Preprocessing, test: Images, most: int = 32) -> CollapseReport:
    if not len(test):
        return {}
    images, _ = test.batch(_sample(len(test))[:most])
    return attention_collapse(model, preprocessing.prepare(images).to(next(model.parameters()).device))


def _sample(N: int) -> np.ndarray:
    """All image numbers in an order that is random but the same for every run on the same set."""
    return np.random.default_rng(0).permutation(N)


def _most_confused(metrics: ClassificationMetrics, most: int = 10) -> list[Confusion]:
    wrong = metrics.confusion * (1 - np.eye(len(metrics.confusion), dtype=np.int64))
    names = [score.name for score in metrics.per_class]
    found = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        truth, answer = divmod(int(place), len(names))
        count = int(wrong[truth, answer])
        if count:
            share = count / metrics.per_class[truth].count
            found.append(Confusion(truth=names[truth], answer=names[answer], count=count, share=share))
    return found


def _headline(
    manifest: Mapping[str, Any],
    metrics: ClassificationMetrics | None,
    features: RepresentationMetrics | None,
    lines: Mapping[str, list[dict[str, Any]]],
) -> Iterator[tuple[str, str, str]]:
    """What to show in large numbers: name, value, detail."""
    if metrics is not None:
        low, high = metrics.accuracy_interval
        yield (
            "Test accuracy",
            _percent(metrics.accuracy),
            f"95 % interval {100 * low:.2f} to {_percent(high)}, {_thousands(metrics.count)} images",
        )
        if metrics.top5 is not None:
            yield "Among the five best", _percent(metrics.top5), "top-5 accuracy"
        yield "Test loss", f"{metrics.loss:.3f}", f"cross-entropy, macro F1 {_percent(metrics.macro_f1)}"
    elif features is not None:
        low, high = features.knn_interval
        interval = (
            f"95 % interval {100 * low:.2f} to {_percent(high)}, {_thousands(features.count)} test images"
        )
        yield "Neighbours agree", _percent(features.knn_accuracy), f"k-NN accuracy; {interval}"
        rank = f"of {features.dimensions}: how many directions the features use"
        yield "Effective rank", f"{features.effective_rank:.1f}", rank
    elif lines["val"]:
        last = lines["val"][-1]
        name = "accuracy" if "accuracy" in last else "knn_accuracy"
        yield (
            "Validation accuracy" if name == "accuracy" else "Neighbours agree",
            _percent(last[name]),
            f"at step {last['step']}; no test results yet",
        )
    known = manifest.get
    if (parameters := known("parameters")) is not None:
        yield "Parameters", _short(parameters), f"{_thousands(parameters)} numbers learnt"
    if (macs := known("macs_per_image")) is not None:
        yield "MACs", _short(macs), "multiply-adds an image"
    if (seconds := known("training_seconds")) is not None:
        processor = known("cpu_seconds")
        detail = "" if processor is None else f"{_duration(processor)} of processor time"
        yield "Training time", _duration(seconds), detail
    if (seen := known("images_seen")) is not None:
        compute = known("training_petaflop")
        yield "Images seen", _short(seen), "" if compute is None else f"{compute:.3g} petaFLOP"
    speeds = [line["images_per_second"] for line in lines["train"] if line.get("images_per_second")]
    if speeds:
        yield "Speed", _short(float(np.median(speeds))), "images a second, median"


def _machine(hardware: Mapping[str, Any]) -> str:
    """The processor that did the work."""
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    threads = hardware.get("threads")
    return f"{hardware.get('cpu', '')}{'' if threads is None else f', threads used: {threads}'}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _table(lines: Mapping[str, list[dict[str, Any]]]) -> str:
    """The lines of metrics.jsonl as CSV, one column for each (dotted) key."""
    rows = [dict(_flat(line)) for kind in lines.values() for line in kind]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\u202f")


def _short(number: float) -> str:
    """A number with three digits and a unit: 1234567 -> 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
