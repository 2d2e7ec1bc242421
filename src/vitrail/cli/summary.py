"""`vitrail summary`: show a model as a tree, with shapes, parameters and cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vitrail.cli.words import Parser, Verbs, parse_overrides


def add(verbs: Verbs) -> None:
    """Add `summary` to the verbs."""
    verbs.add_parser(
        "summary", help="show a model as a tree, with shapes, parameters and cost", add_help=False
    )


def run(words: list[str]) -> None:
    """Print the tree of a model that is built without memory."""
    own = Parser(
        prog="vitrail summary",
        usage="vitrail summary MODEL [--img-size H [W]] [--depth N] [--json] [--model.KEY VALUE]...",
        description="Show a model as a tree: what each module gives out, its parameters and multiply-adds "
        "(MACs), both products of attention included. Only shapes pass through the model: any size will do. "
        "Every option of the architecture can be changed: --model.depth 6.",
        allow_abbrev=False,
    )
    own.add_argument(
        "model", metavar="MODEL", help="a name that `vitrail models` lists, a run or model folder"
    )
    own.add_argument(
        "--img-size", "--img_size", metavar=("H", "W"), type=int, nargs="+", help="pixels of the image"
    )
    own.add_argument("--depth", metavar="N", type=int, default=2, help="levels of the tree (default 2)")
    own.add_argument("--json", action="store_true", help="print the tree as JSON")
    options, rest = own.parse_known_args(words)
    import torch

    from vitrail.config import parse_value
    from vitrail.evaluation.summary import summarize
    from vitrail.models import SHORT_NAMES, VARIANTS, build_model
    from vitrail.pretrained import read_folder_config

    size = options.img_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(
            f"--img-size: expected one number or height and width, got {' '.join(map(str, size))}"
        )
    if options.depth < 0:
        raise ValueError(f"--depth: expected 0 or more, got {options.depth}")
    changes: dict[str, Any] = {}
    for key, text in parse_overrides(rest).items():
        section, _, option = key.partition(".")
        if section != "model" or not option:
            raise ValueError(
                f"unknown option --{key}: `vitrail summary` takes --model.KEY VALUE; see its --help"
            )
        changes[option] = parse_value(text)
    name = options.model
    if name not in VARIANTS and name not in SHORT_NAMES and ("/" in name or Path(name).exists()):
        stored = read_folder_config(name)
        name, changes = stored.name, stored.changes | changes
    with torch.device("meta"):
        model = build_model(name, **changes)
    height, width = model.config.image_shape if size is None else (size[0], size[-1])
    found = summarize(model, (model.config.in_chans, height, width))
    if options.json:
        print(json.dumps(found.to_dict(options.depth), indent=2))
        return
    print(found.text(options.depth, shutil.get_terminal_size().columns))
