"""`vitrail bench`: measure speed and memory, beside other libraries and the machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `bench` to the verbs."""
    parser = verbs.add_parser(
        "bench", help="measure speed and memory, beside other libraries and the machine"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a name that `vitrail models` lists, a pattern, a run or model folder"
    )
    parser.add_argument("--batch", default="1,8", metavar="N,N", help="images at a time (default 1,8)")
    parser.add_argument("--size", type=int, metavar="N", help="pixels of a side (default: the model's)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: cuda where there is one)")
    parser.add_argument("--train", action="store_true", help="training steps instead of inference")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    parser.add_argument(
        "--against",
        default="",
        metavar="NAME,NAME",
        help="the same weights in timm, transformers, torchvision, vit-pytorch, onnxruntime, openvino",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="how the cost grows with image side, batch, depth and width, and the time of a whole training",
    )
    parser.add_argument(
        "--dataset-size", "--dataset_size", type=int, metavar="N", help="its images (default: ImageNet-1k's)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="its epochs (default 300)")
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON, CSV, PNG and SVG there")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Measure one model or several, printing each line as it is known; write what `--output` asks for."""
    import torch

    from vitrail.bench.bench import run_bench, write_bench
    from vitrail.bench.measure import Settings
    from vitrail.bench.scaling import run_scaling, write_scaling

    batches = options.batch.split(",")
    if not all(number.isdigit() for number in batches):
        raise ValueError(f"--batch: expected whole numbers with commas between, got {options.batch!r}")
    given = {"dataset_size": options.dataset_size, "epochs": options.epochs}
    training = {name: number for name, number in given.items() if number is not None}
    if training and not options.scaling:
        raise ValueError("--dataset-size and --epochs are of the training that --scaling estimates: add it")
    if options.scaling and options.against:
        raise ValueError("--scaling measures our model alone: leave out --against")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected a whole number from 1 on, got {options.threads}")
        torch.set_num_threads(options.threads)
    settings = Settings(
        batches=tuple(map(int, batches)),
        img_size=options.size,
        dtype=options.dtype,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        training=options.train,
        repetitions=options.repetitions,
        against=tuple(options.against.split(",")) if options.against else (),
    )
    say = (lambda _: None) if options.json else (lambda line: print(line, flush=True))
    if options.scaling:
        growth = run_scaling(options.model, settings, say, **training)
        picture = write_scaling(options.output, growth) if options.output else None
        shown = growth.to_dict()
    else:
        found = run_bench(options.model, settings, say)
        picture = write_bench(options.output, found) if options.output else None
        shown = found.to_dict()
    if options.json:
        print(json.dumps(shown, indent=2))
    elif picture:
        print(f"plot {picture}")
