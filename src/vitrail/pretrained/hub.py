"""Sharing models: a folder with a model card, to and from the Hugging Face hub.

A shared model is a model folder at the root of a hub repository, with a README beside it:
`model.safetensors`, `config.json`, `README.md`. The README is the model card, whose YAML header the hub reads
(task, tags, measured accuracy). The functions have the names that transformers and diffusers gave them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from vitrail.files import write_whole
from vitrail.models import SHORT_NAMES, VARIANTS
from vitrail.pretrained.convert import import_model
from vitrail.pretrained.folder import ModelFolder, find_model_folder, load_model
from vitrail.pretrained.sources import find_weights

FILES = ("config.json", "model.safetensors")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_CLASSES = 20


def save_pretrained(source: str | Path, folder: str | Path, *, repo_id: str | None = None) -> Path:
    """Write a model as one shares it: its model folder, with a model card.

    Args:
        source: A run folder, whose measured numbers the card then states, or a model folder.
        folder: Where to write; made when it does not exist. Other files in it stay.
        repo_id: The hub repository (owner/name) that the card's example names; the folder when not given.

    Returns:
        `folder`.

    Raises:
        ValueError: There is no model in `source`, or it is damaged.
    """
    stored, origin, folder = load_model(source), find_model_folder(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        write_whole(folder / name, (origin / name).read_bytes())
    write_whole(folder / "README.md", model_card(stored, Path(source), repo_id or str(folder)))
    return folder


def push_to_hub(source: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a model with its card; the repository is made when it does not exist.

    Args:
        source: A run folder or a model folder.
        repo_id: The hub repository, owner/name.
        private: Whether a repository that is made now is private.
        token: A token that may write; the one of `hf auth login` when not given.

    Returns:
        The address of the repository.

    Raises:
        ValueError: There is no model in `source`, or the hub does not take it; in one line.
    """
    from huggingface_hub import create_repo, upload_folder

    if not _REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"repo_id: expected owner/name, got {repo_id!r}")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(source, folder, repo_id=repo_id)
        try:
            address = create_repo(repo_id, private=private, token=token, exist_ok=True)
            upload_folder(repo_id=repo_id, folder_path=folder, token=token, commit_message="Upload model")
        except Exception as error:  # the errors of the hub's HTTP client have no common kind
            raise ValueError(
                f"the hub did not take {repo_id} ({_one_line(error)}); check the network, and that `hf auth "
                "login` or token= gives a token that may write there"
            ) from None
    return str(address)


def from_pretrained(name_or_path: str | Path, *, revision: str | None = None) -> ModelFolder:
    """Load a model of anyone, with its classes and preprocessing.

    Args:
        name_or_path: A run or model folder, a hub repository (owner/name), `timm:NAME.TAG`,
            `torchvision:NAME`; see `vitrail.pretrained.sources`.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: Nothing there, an architecture's name without weights, or a model that we do not have.
    """
    return import_model(find_weights(name_or_path, revision=revision))[0]


def model_card(stored: ModelFolder, source: Path, repo_id: str) -> str:
    """The README of a shared model: YAML header for the hub, and for people what it is and how to use it.

    Args:
        stored: The model.
        source: Where it came from; a run folder's evaluation and manifest are quoted.
        repo_id: What the example loads.
    """
    classes, prepared = stored.classes, stored.preprocessing
    evaluations, manifest = _evaluations(source), _manifest(source)
    title = Path(repo_id).name
    parameters = sum(parameter.numel() for parameter in stored.model.parameters())
    rows, columns = prepared["img_size"]
    channels = "grey" if prepared["in_chans"] == 1 else f"{prepared['in_chans']}-channel"
    lines = [
        f"---\n{_header(title, bool(classes), evaluations)}\n---\n",
        f"# {title}\n",
        f"A {type(stored.model).__name__} ({_architecture(stored)}) with {parameters:,} parameters for "
        f"{channels} images of {rows} x {columns} pixels, made with Vitrail.\n",
        "## Use\n",
        "```python\nfrom vitrail.quickstart import ViTClassifier\n",
        f"model = ViTClassifier.from_pretrained({json.dumps(repo_id)})",
        'print(model.predict("image.jpg"))\n```\n',
        "## Input\n",
        f"Values 0 to 1, minus mean {_numbers(prepared['mean'])}, divided by standard deviation "
        f"{_numbers(prepared['std'])}; resized ({prepared['interpolation']}) and cropped in the centre "
        f"({prepared['crop_ratio']:g} of the shorter side). `config.json` holds this; `predict` does it.\n",
    ]
    if classes:
        shown = json.dumps(list(classes[:_SHOWN_CLASSES]), ensure_ascii=False)
        rest = f"The first {_SHOWN_CLASSES} of " if len(classes) > _SHOWN_CLASSES else ""
        lines += ["## Classes\n", f"{rest}{len(classes)}, in the order of the outputs:\n", f"    {shown}\n"]
    if evaluations:
        lines += [
            "## Measured\n",
            "| data | split | images | accuracy | 95 % interval | loss | macro F1 |",
            "|---|---|---|---|---|---|---|",
            *(_row(data, split, numbers) for (data, split), numbers in evaluations.items()),
            "",
        ]
    if manifest:
        lines += ["## Training\n", f"    {manifest['command']}\n", f"Seed {manifest['seed']}.\n"]
    return "\n".join(lines)


def _header(title: str, classifies: bool, evaluations: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-classification" if classifies else "image-feature-extraction"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type="accuracy",
            metric_value=numbers["accuracy"],
        )
        for (data, split), numbers in evaluations.items()
    ]
    header = ModelCardData(
        library_name="vitrail",
        pipeline_tag=task,
        tags=["vitrail", "vision-transformer", task],
        model_name=title,
        eval_results=results or None,
    )
    return str(header.to_yaml()).strip()


def _architecture(stored: ModelFolder) -> str:
    """The variant's name, and the options in which the model differs from it."""
    variant, own = VARIANTS[SHORT_NAMES.get(stored.name, stored.name)], stored.model.config
    changed = [
        f"{field.name} {getattr(own, field.name)}"
        for field in dataclasses.fields(own)
        if getattr(own, field.name) != getattr(variant, field.name)
    ]
    return f"{stored.name} with {', '.join(changed)}" if changed else stored.name


def _evaluations(source: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Data set and split -> the numbers, from a run folder's evaluation/<data>-<split>.json."""
    return {
        (path.stem.rpartition("-")[0], path.stem.rpartition("-")[2]): json.loads(path.read_text())
        for path in sorted((source / "evaluation").glob("*-*.json"))
    }


def _manifest(source: Path) -> dict[str, Any]:
    path = source / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _row(data: str, split: str, numbers: dict[str, Any]) -> str:
    low, high = numbers["accuracy_interval"]
    return (
        f"| {data} | {split} | {numbers['count']:,} | {100 * numbers['accuracy']:.2f} % | {100 * low:.2f} to "
        f"{100 * high:.2f} | {numbers['loss']:.4f} | {numbers['macro_f1']:.4f} |"
    )


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
