"""`vitrail export`: write a model as a file for other runtimes, and check it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `export` to the verbs."""
    parser = verbs.add_parser("export", help="write a model as a file for other runtimes, and check it")
    parser.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    forms = ("onnx", "torch-export", "openvino")
    parser.add_argument("--to", required=True, choices=forms, help="whose form")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: named after the model, here")
    parser.add_argument(
        "--batch",
        type=_number_or_dynamic,
        default="dynamic",
        metavar="N",
        help="images at a time, or dynamic: any number (default dynamic)",
    )
    parser.add_argument(
        "--size",
        type=_number_or_dynamic,
        nargs="+",
        metavar=("H", "W"),
        help="pixels of the images, or dynamic: any size (default: the model's)",
    )
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Write the file and print how it compares with the model."""
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.shipping.export import SUFFIXES, write_export

    size: tuple[int, int] | Literal["dynamic"] | None = None
    if options.size == ["dynamic"]:
        size = "dynamic"
    elif options.size is not None:
        if len(options.size) > 2 or "dynamic" in options.size:
            got = " ".join(map(str, options.size))
            raise ValueError(f"--size: expected one number, height and width, or dynamic, got {got}")
        size = options.size[0], options.size[-1]
    name = Path(options.model).resolve().name.replace(":", "-")
    file = options.output or Path(name + SUFFIXES[options.to])
    found = write_export(file, from_pretrained(options.model), options.to, batch=options.batch, size=size)
    print(found.text())


def _number_or_dynamic(text: str) -> int | str:
    if text != "dynamic" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number or dynamic, got {text!r}")
    return text if text == "dynamic" else int(text)
