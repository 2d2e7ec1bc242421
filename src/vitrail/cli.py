"""The command line: parses, calls one function of the library, prints.

Only the standard library is imported before a verb runs, so that help and typing errors answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from vitrail.config import DataSection, RunConfig
    from vitrail.datasets import Images, Splits
    from vitrail.reporting.analysis import Subject
    from vitrail.serving import Prediction, Predictor

_LISTED_WEIGHTS = 24
"""So many sources of weights `vitrail models` lists below its table; of more it only says where they are."""

_TRAIN_HELP = """\
usage: vitrail train [RECIPE] [--section.key VALUE]... [--dry-run]

Train a model, test it, and write a run folder with its report.

RECIPE is a name that `vitrail recipes` lists, or a YAML file such as runs/<name>/config.yaml, which repeats
that run. Every value of a recipe can be changed on the command line:

  vitrail train mnist-vit
  vitrail train mnist-vit --optim.lr 1e-3 --train.duration "5 epochs"
  vitrail train --model vit_cifar --dataset cifar10 --epochs 10
  vitrail train cifar10-vit --resume            go on where the run was interrupted

  --dry-run        print the resolved config, parameters, MACs and estimated time; train nothing
  --debug          show the traceback of an error

short forms: {short}

"""


_SWEEP_HELP = """\
usage: vitrail sweep [RECIPE] (--over KEY=VALUE,... | --variants SET) [--seeds N] [--section.key VALUE]

Train a recipe once for each combination of values and each seed; write a table, best validation first.

  vitrail sweep digits-vit --over model.position=none,learned,sincos_2d,rotary --seeds 3
  vitrail sweep digits-vit --over model.depth=2,4 --over optim.lr=1e-3,2e-3
  vitrail sweep cifar10-vit --variants augmentation --epochs 10

  --over KEY=A,B     values of one key; several --over give all combinations; lists: KEY=[[1, 2], [3, 4]]
  --variants SET     a set of the package (augmentation), or a YAML file with name: {section.key: value}
  --seeds N          seeds 0 to N-1 for every variant (default 1)

A sweep that was stopped goes on where it was when the same command is given again.
"""


_STUDY_HELP = """\
usage: vitrail study NAME [--section.key VALUE]... [--seeds N] [--quick] [--output FOLDER] [--dry-run]

Train everything that a question needs, measure it, and write one report that answers: yes, no or undecided.

  vitrail study mae-infonce
  vitrail study mae-infonce --data.name digits --quick     a try, in a minute or two
  vitrail study vit-swin --dry-run

NAME is one of these, or a YAML file (docs/studies.md says how to write one):

{studies}

  --seeds N          seeds of every run (default: as the study says)
  --quick            very short runs with one seed: shows what comes out, proves nothing
  --output FOLDER    where the runs and the report lie (default runs/study-NAME)
  --dry-run          list the runs and what they would cost; train nothing

A study that was stopped goes on where it was when the same command is given again.
"""


_PROFILE_HELP = """\
usage: vitrail profile [RECIPE] [--steps N] [--json] [--section.key VALUE]...

Train a fresh model for some steps and tell where the time of a step goes: waiting for data, augmentation,
forward, backward, clipping, optimiser, moving average, logging; the longest operators; and what to change.

  --steps N    measured steps (default 20)
  --json       print everything as JSON
"""

_LR_RANGE_HELP = """\
usage: vitrail lr-range [RECIPE] [--lowest R] [--highest R] [--steps N] [--output FOLDER] [--json]
                        [--section.key VALUE]...

Train a fresh model for some steps while the learning rate grows, and suggest one for the recipe.
Writes lr_range.json and lr_range.png.

  --lowest R       learning rate of the first step (default 1e-6)
  --highest R      learning rate of the last step (default 1)
  --steps N        length of the test (default 100)
  --output FOLDER  where to write (default runs/lr-range-RECIPE)
  --json           print everything as JSON
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; leaves with exit code 2 and one line on an error of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        _run([word for word in words if word != "--debug"])
    except BrokenPipeError:
        # Whoever read the output has gone (as in `vitrail models | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stopped:
        how = str(stopped) or "interrupted; a training run goes on from its last checkpoint with --resume"
        _fail(how, code=130)
    except (ValueError, OSError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:
            _fail(f"{error.filename}: {error.strerror}")
        _fail(" ".join(str(error).split()))


def _run(words: list[str]) -> None:
    parser = _Parser(
        prog="vitrail",
        description="Build, train, measure and look inside Vision Transformers.",
        epilog="`vitrail VERB --help` tells more. First steps: vitrail train digits-vit",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", parser_class=_Parser)
    train = verbs.add_parser("train", help="train a model, test it, write its report", add_help=False)
    train.set_defaults(act=_train)
    sweep = verbs.add_parser(
        "sweep", help="train a recipe with some values varied, tell what is best", add_help=False
    )
    sweep.set_defaults(act=_sweep)
    study = verbs.add_parser("study", help="train, measure and answer a set of questions", add_help=False)
    study.set_defaults(act=_study)

    compare = verbs.add_parser("compare", help="put finished runs side by side, with intervals over seeds")
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    compare.add_argument("--output", type=Path, default=Path("comparison"), help="default comparison/")
    compare.add_argument("--json", action="store_true", help="print all numbers as JSON")
    compare.set_defaults(act=_compare)

    profile = verbs.add_parser("profile", help="tell where the time of a training step goes", add_help=False)
    profile.set_defaults(act=_profile)
    lr_range = verbs.add_parser("lr-range", help="find a learning rate for a recipe", add_help=False)
    lr_range.set_defaults(act=_lr_range)

    evaluate = verbs.add_parser("evaluate", help="test a trained model on a data set")
    evaluate.add_argument("run", metavar="RUN", help="run folder or model folder")
    evaluate.add_argument("--dataset", help="data set to test on; the run's own when not given")
    evaluate.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    evaluate.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    evaluate.add_argument(
        "--robustness", action="store_true", help="also under noise, blur, occlusion, rotation, low contrast"
    )
    evaluate.add_argument("--json", action="store_true", help="print all numbers as JSON")
    evaluate.set_defaults(act=_evaluate)

    probe = verbs.add_parser("probe", help="judge frozen features: nearest neighbours, a linear classifier")
    probe.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    probe.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    probe.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    probe.add_argument(
        "--train-fraction",
        "--train_fraction",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the training images to learn from, the same of each class (default 1)",
    )
    probe.add_argument("--neighbours", type=int, default=20, metavar="K", help="how many vote (default 20)")
    probe.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    probe.add_argument("--json", action="store_true", help="print the numbers as JSON")
    probe.set_defaults(act=_probe)

    adaptive = verbs.add_parser(
        "adaptive", help="measure token merging and early exit on a trained plain ViT: accuracy, cost, time"
    )
    adaptive.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    adaptive.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    adaptive.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    adaptive.add_argument("--batch-size", "--batch_size", type=int, default=500, help="images at a time")
    adaptive.add_argument("--output", type=Path, metavar="FOLDER", help="write adaptive.json and .png there")
    adaptive.add_argument("--json", action="store_true", help="print the numbers as JSON")
    adaptive.set_defaults(act=_adaptive)

    predict = verbs.add_parser("predict", help="classify image files")
    predict.add_argument("run", metavar="RUN", help="run folder or model folder")
    predict.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files, or folders, of which the images directly in them are taken",
    )
    predict.add_argument("--top", type=int, default=3, help="how many classes to name (default 3)")
    predict.add_argument("--batch-size", "--batch_size", type=int, default=8, help="images a core at a time")
    predict.add_argument("--json", action="store_true", help="print JSON, one object an image")
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="write a table (.jsonl, .csv or .parquet) instead; the same command again goes on with it",
    )
    predict.set_defaults(act=_predict)

    explain = verbs.add_parser("explain", help="show what a model sees in images, as a page and pictures")
    explain.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    explain.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    explain.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="again for each; all: every method (default: quick ones)",
    )
    explain.add_argument("--target", metavar="CLASS", help="name or number of the class (default: predicted)")
    explain.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layers to show, counted from 1 (default: all)"
    )
    explain.add_argument(
        "--heads",
        default="mean",
        metavar="HEADS",
        help="of the attention's picture: mean, max, min, all, or a number from 1 (default mean)",
    )
    explain.add_argument("--output", type=Path, default=Path("explanation"), help="default explanation/")
    explain.add_argument("--json", action="store_true", help="print the numbers as JSON")
    explain.set_defaults(act=_explain)

    analyze = verbs.add_parser("analyze", help="show what a model has learnt, on a data set, as a page")
    analyze.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    analyze.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    analyze.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    analyze.add_argument("--against", metavar="MODEL", help="a second model, to stand beside the first")
    analyze.add_argument("--images", type=int, default=1000, help="test images to use (default 1000)")
    analyze.add_argument("--seed", type=int, default=0, help="which images are drawn (default 0)")
    analyze.add_argument("--output", type=Path, help="default analysis/MODEL-DATASET/")
    analyze.set_defaults(act=_analyze)

    report = verbs.add_parser("report", help="write a run's report again")
    report.add_argument("run", metavar="RUN", help="run folder")
    report.set_defaults(act=_report)

    data = verbs.add_parser("data", help="look at a data set before a model is trained on it")
    data.add_argument("dataset", metavar="DATASET", help="a name, a folder of images, or a hub id")
    data.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    data.add_argument(
        "--label-column",
        "--label_column",
        "--data.label_column",
        metavar="NAME",
        help="column of the label, where there are several",
    )
    data.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw some images of each class")
    data.add_argument("--json", action="store_true", help="print everything as JSON")
    data.set_defaults(act=_data)

    models = verbs.add_parser("models", help="list the models: parameters, cost, published accuracy")
    models.add_argument(
        "pattern", nargs="?", default="*", help="shell-style pattern ('vit_*_224'), or a part of the name"
    )
    models.add_argument("--json", action="store_true", help="print everything as JSON")
    models.set_defaults(act=_models)

    optimized = verbs.add_parser("optimize", help="compile a model for this machine's CPU, and measure it")
    optimized.add_argument("model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, owner/name")
    optimized.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "fp16", "int8"),
        default="auto",
        metavar="NAME",
        help="auto (default: the fastest here), float32, bf16 or int8",
    )
    optimized.add_argument(
        "--calibrate", metavar="DATASET", help="images to calibrate int8 with, and to compare answers on"
    )
    optimized.add_argument("--root", type=Path, help="folder with data sets; else VITRAIL_DATA")
    optimized.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images at a time to be fast for (default 8)"
    )
    optimized.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="of images that must keep their answer (default 0.99, int8 0.98)",
    )
    optimized.add_argument("--output", type=Path, default=Path("optimized"), help="default optimized/")
    optimized.set_defaults(act=_optimize)

    bench = verbs.add_parser("bench", help="measure speed and memory, beside other libraries and the machine")
    bench.add_argument(
        "model", metavar="MODEL", help="a name that `vitrail models` lists, a pattern, a run or model folder"
    )
    bench.add_argument("--batch", default="1,8", metavar="N,N", help="images at a time (default 1,8)")
    bench.add_argument("--size", type=int, metavar="N", help="pixels of a side (default: the model's)")
    bench.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    bench.add_argument("--device", help="cpu, cuda or mps (default: cuda where there is one)")
    bench.add_argument("--train", action="store_true", help="training steps instead of inference")
    bench.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    bench.add_argument(
        "--against",
        default="",
        metavar="NAME,NAME",
        help="the same weights in timm, transformers, torchvision, vit-pytorch, onnxruntime, openvino",
    )
    bench.add_argument(
        "--scaling",
        action="store_true",
        help="how the cost grows with image side, batch, depth and width, and the time of a whole training",
    )
    bench.add_argument(
        "--dataset-size", "--dataset_size", type=int, metavar="N", help="its images (default: ImageNet-1k's)"
    )
    bench.add_argument("--epochs", type=int, metavar="N", help="its epochs (default 300)")
    bench.add_argument("--repetitions", type=int, default=10, metavar="N", help="default 10")
    bench.add_argument("--output", type=Path, metavar="FOLDER", help="write JSON, CSV, PNG and SVG there")
    bench.add_argument("--json", action="store_true", help="print everything as JSON")
    bench.set_defaults(act=_bench)

    summary = verbs.add_parser(
        "summary", help="show a model as a tree, with shapes, parameters and cost", add_help=False
    )
    summary.set_defaults(act=_summary)

    sources = (
        "a run or model folder, a file, an address, timm:NAME.TAG, torchvision:NAME, owner/name on the hub"
    )
    convert = verbs.add_parser("convert", help="bring a model into another library's form, and check it")
    convert.add_argument("source", metavar="SOURCE", help=sources)
    convert.add_argument("target", metavar="TARGET", type=Path, help="folder to write")
    formats = ("vitrail", "timm", "transformers", "torchvision")
    convert.add_argument("--to", choices=formats, default="vitrail", help="whose form (default vitrail)")
    convert.add_argument("--model", metavar="NAME", help="architecture, for a file that does not tell")
    for name in ("mean", "std"):
        convert.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            help="a number for each channel, for a file that does not tell",
        )
    convert.set_defaults(act=_convert)

    export = verbs.add_parser("export", help="write a model as a file for other runtimes, and check it")
    export.add_argument(
        "model", metavar="MODEL", help="run or model folder, timm:NAME.TAG, a hub repository as owner/name"
    )
    forms = ("onnx", "torch-export", "openvino")
    export.add_argument("--to", required=True, choices=forms, help="whose form")
    export.add_argument("--output", type=Path, metavar="FILE", help="default: named after the model, here")
    export.add_argument(
        "--batch",
        type=_number_or_dynamic,
        default="dynamic",
        metavar="N",
        help="images at a time, or dynamic: any number (default dynamic)",
    )
    export.add_argument(
        "--size",
        type=_number_or_dynamic,
        nargs="+",
        metavar=("H", "W"),
        help="pixels of the images, or dynamic: any size (default: the model's)",
    )
    export.set_defaults(act=_export)

    download = verbs.add_parser("download", help="fetch weights now, to use them without network later")
    download.add_argument("source", metavar="SOURCE", nargs="+", help=sources)
    download.set_defaults(act=_download)

    recipes = verbs.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(act=_recipes)

    # These take any dotted key as a flag, which argparse cannot know.
    configured = {
        "train": _train,
        "sweep": _sweep,
        "study": _study,
        "profile": _profile,
        "lr-range": _lr_range,
        "summary": _summary,
    }
    if words and words[0].replace("_", "-") in configured:
        configured[words[0].replace("_", "-")](words[1:])
        return
    options, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}; see `vitrail {words[0]} --help`")
    if options.version:
        from importlib.metadata import version

        print(f"vitrail {version('vitrail')}")
    elif "act" in options:
        options.act(options)
    else:
        parser.print_help()


def _train(words: list[str]) -> None:
    from vitrail.config import load_config

    recipe = words[0] if words and not words[0].startswith("-") else None
    flags = words[1:] if recipe else words
    if {"-h", "--help"} & set(flags):
        _print_train_help(load_config(recipe))
        return
    dry_run = "--dry-run" in flags or "--dry_run" in flags
    overrides = parse_overrides([flag for flag in flags if flag not in {"--dry-run", "--dry_run"}])
    if recipe is None and {"train.resume", "train.output"} <= overrides.keys():
        own = Path(overrides["train.output"]) / "config.yaml"
        recipe = str(own) if own.is_file() else None
    config = load_config(recipe, overrides)
    folder = config.train.output or Path("runs") / _run_name(config, recipe)
    if dry_run:
        _dry_run(config)
        return
    from vitrail.processes import is_main
    from vitrail.reporting import write_report
    from vitrail.training import train

    command = " ".join(["vitrail train", *(_quoted(word) for word in words)])
    try:
        result = train(config, folder, command=command)
    except KeyboardInterrupt as stopped:
        if not str(stopped):
            raise
        resume = command if "--resume" in words else f"{command} --resume"
        raise KeyboardInterrupt(f"{stopped}; go on with: {resume}") from None
    if not is_main():
        return
    report = folder / "report.html"
    if result.already_finished and report.is_file():
        print("already finished: nothing was trained")
    else:
        report = write_report(
            folder, model=result.model, preprocessing=result.preprocessing, test=result.test
        )
    if result.metrics is not None:
        print(result.metrics.headline())
    print(f"report {report}")


def _run_name(config: RunConfig, recipe: str | None) -> str:
    if recipe:
        return Path(recipe).stem
    if config.model.name:
        return config.model.name
    return "run" if config.model.pretrained is None else f"{Path(config.model.pretrained).stem}-tuned"


def _sweep(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(_SWEEP_HELP, end="")
        return
    from vitrail.config import parse_value
    from vitrail.studies import grid, load_variants, run_sweep, write_sweep

    recipe = words[0] if not words[0].startswith("-") else None
    over: dict[str, list[Any]] = {}
    named: str | None = None
    seeds, rest = 1, []
    flags = iter(words[1:] if recipe else words)
    for flag in flags:
        if flag not in {"--over", "--variants", "--seeds"}:
            rest.append(flag)
            continue
        value = next(flags, None)
        if value is None:
            raise ValueError(f"{flag} needs a value")
        if flag == "--variants":
            named = value
        elif flag == "--seeds":
            if not value.isdigit():
                raise ValueError(f"--seeds: expected a whole number, got {value!r}")
            seeds = int(value)
        else:
            key, equals, text = value.partition("=")
            if not equals:
                raise ValueError(f"--over: expected section.key=VALUE,VALUE,..., got {value!r}")
            listed = (
                parse_value(text) if text.startswith("[") else [parse_value(own) for own in text.split(",")]
            )
            over[key] = listed
    if (named is None) == (not over):
        raise ValueError(
            "a sweep needs what to vary: either --over section.key=VALUE,VALUE,... or --variants SET"
        )
    overrides: dict[str, Any] = dict(parse_overrides(rest))
    stem = Path(recipe).stem if recipe else "sweep"
    folder = Path(overrides.pop("train.output", f"runs/{stem}-{named or 'sweep'}"))
    variants = grid(over) if named is None else load_variants(named)
    command = " ".join(["vitrail sweep", *(_quoted(word) for word in words)])
    finished = []
    for variant, run in run_sweep(
        recipe, variants, seeds=seeds, folder=folder, overrides=overrides, command=command
    ):
        finished.append((variant, run))
        table = write_sweep(folder, finished)
        found = "" if run.test is None else f": test {100 * run.test.value:.2f} %"
        print(f"{variant}, seed {run.seed}{found}", flush=True)
    print(table, end="")
    print(f"table {folder / 'sweep.md'}")


def _compare(options: argparse.Namespace) -> None:
    from vitrail.studies import compare, write_comparison

    found = compare(options.runs)
    write_comparison(options.output, found)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found.text(), end="")
    print(f"curves {options.output / 'compare.png'}")


def _study(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        from vitrail.config import shipped_yaml

        listed = shipped_yaml("studies").items()  # `vitrail.studies` would import torch
        lines = (f"  {name:<14} {text.splitlines()[0].lstrip('# ')}" for name, text in listed)
        print(_STUDY_HELP.format(studies="\n".join(lines)), end="")
        return
    from vitrail.studies import outline, plan_study, run_study, write_study

    own = _Parser(prog="vitrail study", add_help=False, allow_abbrev=False)
    own.add_argument("name")
    own.add_argument("--seeds", type=int)
    own.add_argument("--quick", action="store_true")
    own.add_argument("--dry-run", "--dry_run", action="store_true")
    own.add_argument("--output", type=Path)
    options, rest = own.parse_known_args(words)
    folder = options.output or Path("runs") / f"study-{Path(options.name).stem}"
    study = plan_study(
        options.name, folder, overrides=parse_overrides(rest), seeds=options.seeds, quick=options.quick
    )
    if options.dry_run:
        print(outline(study))
        return
    command = " ".join(["vitrail study", *(_quoted(word) for word in words)])
    try:
        found = run_study(study, command=command, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{stopped or 'stopped'}; go on with: {command}") from None
    page = write_study(folder, found)
    print(found.text())
    print(f"report {page}")


def _profile(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(_PROFILE_HELP, end="")
        return
    own = _Parser(prog="vitrail profile", add_help=False, allow_abbrev=False)
    own.add_argument("--steps", type=int, default=20)
    own.add_argument("--json", action="store_true")
    _, options, config = _configured(own, words)
    from vitrail.training.profile import profile_training

    found = profile_training(config, options.steps)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.text())


def _lr_range(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(_LR_RANGE_HELP, end="")
        return
    own = _Parser(prog="vitrail lr-range", add_help=False, allow_abbrev=False)
    own.add_argument("--lowest", type=float, default=1e-6)
    own.add_argument("--highest", type=float, default=1.0)
    own.add_argument("--steps", type=int, default=100)
    own.add_argument("--output", type=Path)
    own.add_argument("--json", action="store_true")
    recipe, options, config = _configured(own, words)
    from vitrail.reporting.lr_curve import write_lr_range
    from vitrail.training.lr_range import find_learning_rate

    found = find_learning_rate(config, options.lowest, options.highest, options.steps)
    folder = options.output or Path("runs") / f"lr-range-{_run_name(config, recipe)}"
    picture = write_lr_range(folder, found.to_dict())
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found.text())
    print(f"curve {picture}")


def _configured(
    own: argparse.ArgumentParser, words: list[str]
) -> tuple[str | None, argparse.Namespace, RunConfig]:
    """[RECIPE] and flags -> the recipe, the verb's own options, and the config of recipe and dotted keys."""
    from vitrail.config import load_config

    recipe = words[0] if words and not words[0].startswith("-") else None
    options, rest = own.parse_known_args(words[1:] if recipe else words)
    return recipe, options, load_config(recipe, parse_overrides(rest))


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`--section.key value`, `--section.key=value` and the short forms -> dotted key to text.

    Raises:
        ValueError: A word where a flag was expected, or a flag without a value.
    """
    from vitrail.config import SHORT_KEYS

    found: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise ValueError(f"expected --section.key VALUE, got {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = words[position + 1] if position + 1 < len(words) else None
            if following is not None and not following.startswith("--"):
                value, position = following, position + 1
            elif name.rpartition(".")[2] in {
                "resume",
                "overwrite",
                "flip",
                "compile",
                "recompute",
                "deterministic",
            }:
                value = "true"
            else:
                raise ValueError(f"--{name} needs a value")
        key = name.replace("-", "_")
        if key == "epochs":
            value = f"{value} epochs"
        found[SHORT_KEYS.get(key, key)] = value
        position += 1
    return found


def _dry_run(config: RunConfig) -> None:
    from vitrail.training import estimate

    print(config.to_yaml())
    cost = estimate(config)
    epochs = cost.steps / cost.steps_per_epoch
    minutes = cost.seconds_per_epoch * epochs / 60
    print(f"parameters        {cost.parameters:,}")
    print(f"MACs an image     {cost.macs_per_image:,}")
    print(f"steps             {cost.steps:,} ({epochs:.1f} epochs of {cost.steps_per_epoch:,})")
    print(f"estimated time    {cost.seconds_per_epoch:.1f} s an epoch, {minutes:.1f} min in all, here")


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from vitrail.config import DataSection, load_config
    from vitrail.datasets import Preprocessing
    from vitrail.datasets.items import first_names
    from vitrail.evaluation.corruptions import Robustness, robustness
    from vitrail.pretrained import load_model
    from vitrail.pretrained.compiled import load_compiled
    from vitrail.training import evaluate_and_write

    folder = Path(options.run)
    stored = load_model(folder)
    recipe = folder / "config.yaml"
    if options.dataset is None and not recipe.is_file():
        raise ValueError(f"{folder} is a model folder, which names no data set: give one with --dataset")
    data = load_config(recipe).data if recipe.is_file() else DataSection()
    wanted = {"name": options.dataset or data.name, "root": options.root or data.root}
    test = _test_images(data.model_copy(update=wanted), stored.preprocessing)
    name = test.name
    if not stored.model.has_head:
        raise ValueError(
            f"{folder} has no head to test; judge its features with `vitrail probe {folder} {name}`"
        )
    if test.classes != stored.classes:
        raise ValueError(
            f"the model's {len(stored.classes)} classes ({first_names(stored.classes)}) are not the "
            f"{len(test.classes)} of {name} ({first_names(test.classes)})"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = load_compiled(folder) if device.type == "cpu" else None
    model = stored.model if compiled is None else compiled
    metrics = evaluate_and_write(
        folder,
        model,
        Preprocessing.from_dict(stored.preprocessing),
        test,
        batch_size=options.batch_size,
        device=device,
    )
    damaged: Robustness | None = None
    if options.robustness:
        damaged = robustness(
            model,
            test,
            Preprocessing.from_dict(stored.preprocessing),
            batch_size=options.batch_size,
            device=device,
        )
    if options.json:
        found = metrics.to_dict()
        print(json.dumps(found if damaged is None else found | {"robustness": asdict(damaged)}, indent=2))
        return
    low, high = metrics.accuracy_interval
    print(f"{name} test, {metrics.count} images")
    print(f"accuracy {100 * metrics.accuracy:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})")
    if metrics.top5 is not None:
        print(f"top-5 accuracy {100 * metrics.top5:.2f} %")
    print(f"loss {metrics.loss:.4f}  calibration error {100 * metrics.calibration_error:.2f} %")
    width = max(len(score.name) for score in metrics.per_class)
    print(f"{'class':<{width}}  images  precision  recall     F1")
    for score in metrics.per_class:
        numbers = f"{score.count:6d}  {score.precision:9.3f}  {score.recall:6.3f}  {score.f1:5.3f}"
        print(f"{score.name:<{width}}  {numbers}")
    if damaged is not None:
        print("accuracy on damaged images, severity 1 to 5, and their mean")
        for corruption, shares in damaged.accuracy.items():
            each = "  ".join(f"{100 * share:5.1f}" for share in shares)
            print(f"{corruption:<{width}}  {each}  {100 * damaged.mean(corruption):5.1f} %")


def _probe(options: argparse.Namespace) -> None:
    import torch

    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.evaluation.probe import probe
    from vitrail.pretrained.hub import from_pretrained

    stored = from_pretrained(options.model)
    wanted = DataSection(
        name=options.dataset,
        root=options.root,
        train_fraction=options.train_fraction,
        frames=getattr(stored.model.config, "num_frames", None),
    )
    found = probe(
        stored.model,
        Preprocessing.from_dict(stored.preprocessing),
        _splits(wanted, stored.preprocessing),
        neighbours=options.neighbours,
        batch_size=options.batch_size,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(
        f"{found.train_images} training images, {found.test_images} test images, {found.dimensions} channels"
    )
    print(f"{found.neighbours} nearest neighbours  {found.knn.text()}")
    print(f"linear classifier      {found.linear.text()}, C {found.strength:g}")


def _adaptive(options: argparse.Namespace) -> None:
    from vitrail.adaptive import adaptive_curve
    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained.hub import from_pretrained

    stored = from_pretrained(options.model)
    if options.output is not None:  # what cannot be written is to be known before minutes of measuring
        options.output.mkdir(parents=True, exist_ok=True)
    curve = adaptive_curve(
        stored.model,
        Preprocessing.from_dict(stored.preprocessing),
        _splits(DataSection(name=options.dataset, root=options.root), stored.preprocessing),
        batch_size=options.batch_size,
    )
    print(json.dumps(curve.to_dict(), indent=2) if options.json else curve.text())
    if options.output is not None:
        from vitrail.adaptive.chart import curve_chart
        from vitrail.explain.draw import png
        from vitrail.files import write_whole

        write_whole(options.output / "adaptive.json", json.dumps(curve.to_dict(), indent=2) + "\n")
        write_whole(options.output / "adaptive.png", png(curve_chart(curve)))
        print(f"{options.output / 'adaptive.png'} and adaptive.json", file=sys.stderr)


def _test_images(data: DataSection, preprocessing: Mapping[str, Any]) -> Images:
    """The test images of a data section, as a model with this preprocessing takes them."""
    return _splits(data.model_copy(update={"val_fraction": 0.0, "synthetic": 0.0}), preprocessing).test


def _splits(data: DataSection, preprocessing: Mapping[str, Any]) -> Splits:
    """The images of a data section, as a model with this preprocessing takes them."""
    from vitrail.datasets import load_section

    return load_section(data, img_size=tuple(preprocessing["img_size"]), in_chans=preprocessing["in_chans"])


def _predict(options: argparse.Namespace) -> None:
    from vitrail.serving import Prediction, Predictor, find_files, predict_files

    files, broken = find_files(options.images)
    predictor = Predictor.from_source(options.run)
    if options.output is not None:
        if broken:
            raise ValueError("; ".join(map(str, broken)))
        _predict_to(predictor, files, options)
        return
    for batch in predict_files(predictor, files, top=options.top, batch_size=options.batch_size):
        for found in batch:
            if isinstance(found, Prediction):
                print(_prediction_line(found, as_json=options.json), flush=True)
            else:
                broken.append(found)
    if broken:
        raise ValueError("; ".join(map(str, broken)))


def _predict_to(predictor: Predictor, files: Sequence[Path], options: argparse.Namespace) -> None:
    from vitrail.serving import predict_to

    if options.json:
        raise ValueError("--json prints and --output writes: leave one out (--output FILE.jsonl writes JSON)")
    try:
        found = predict_to(predictor, files, options.output, top=options.top, batch_size=options.batch_size)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None
    print(found.text())
    if found.broken:
        raise ValueError(found.broken_text())


def _prediction_line(found: Prediction, *, as_json: bool) -> str:
    named = list(zip(found.classes, found.probabilities, strict=True))
    if as_json:
        predictions = [{"class": name, "confidence": share} for name, share in named]
        return json.dumps({"image": found.source, "predictions": predictions})
    return f"{found.source}  " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in named)


def _explain(options: argparse.Namespace) -> None:
    from vitrail.datasets.folder import image_files
    from vitrail.reporting.explanation import write_explanation
    from vitrail.serving import Predictor

    predictor = Predictor.from_source(options.model)
    found = write_explanation(
        options.output,
        [file for path in options.images for file in image_files(Path(path))],
        model=predictor.model,
        preprocessing=predictor.preprocessing,
        classes=predictor.classes,
        title=options.model,
        methods=options.method,
        target=None if options.target is None else predictor.class_number(options.target),
        layers=options.layers,
        heads=int(options.heads) if options.heads.isdigit() else options.heads,
    )
    if options.json:
        print(json.dumps([own.to_dict() for own in found.images], indent=2))
        return
    for own in found.images:
        print(own.table())
    print(f"page {found.page}")


def _analyze(options: argparse.Namespace) -> None:
    from vitrail.reporting.analysis_page import write_analysis

    names = (Path(name).resolve().name.replace(":", "-") for name in (options.model, options.dataset))
    found = write_analysis(
        options.output or Path("analysis") / "-".join(names),
        _subject(options.model, options),
        None if options.against is None else _subject(options.against, options),
        images=options.images,
        seed=options.seed,
    )
    print(found.found.text())
    if found.comparison is not None:
        print(f"{found.comparison.second.text()}\n{found.comparison.finding()}")
    print(f"page {found.page}")


def _subject(model: str, options: argparse.Namespace) -> Subject:
    """A model with the images of the set in its own size, on the device that is there."""
    import torch

    from vitrail.config import DataSection
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.reporting.analysis import Subject

    stored = from_pretrained(model)
    return Subject(
        title=model,
        model=stored.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        preprocessing=Preprocessing.from_dict(stored.preprocessing),
        classes=stored.classes,
        images=_test_images(DataSection(name=options.dataset, root=options.root), stored.preprocessing),
    )


def _report(options: argparse.Namespace) -> None:
    from vitrail.config import load_config
    from vitrail.datasets import Preprocessing
    from vitrail.pretrained import load_model
    from vitrail.reporting import write_report

    folder = Path(options.run)
    stored = load_model(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder (no config.yaml)")
    data = load_config(folder / "config.yaml").data
    report = write_report(
        folder,
        model=stored.model,
        preprocessing=Preprocessing.from_dict(stored.preprocessing),
        test=_test_images(data, stored.preprocessing),
    )
    print(f"report {report}")


def _data(options: argparse.Namespace) -> None:
    from vitrail.datasets import find_items
    from vitrail.datasets.inspect import contact_sheet, inspect_dataset
    from vitrail.files import write_whole

    if options.sheet is not None and options.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet writes a PNG: expected a name that ends in .png, got {options.sheet}")
    if options.sheet is not None and not options.sheet.parent.is_dir():
        raise ValueError(f"--sheet {options.sheet}: no folder {options.sheet.parent}")
    parts, ignored = find_items(options.dataset, root=options.root, label_column=options.label_column)
    found = inspect_dataset(parts, ignored)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if options.sheet is not None:
        write_whole(options.sheet, contact_sheet(next(iter(parts.values()))))
        if not options.json:
            print(f"sheet {options.sheet}")


def _models(options: argparse.Namespace) -> None:
    from vitrail.models.catalogue import find_variants, table
    from vitrail.pretrained.weights import weights_of

    found = find_variants(options.pattern)
    if options.json:
        listed = [variant.to_dict() | {"weights": weights_of(variant.name)} for variant in found]
        print(json.dumps(listed, indent=2))
        return
    print(table(found, _width()))
    lines = [f"  {source}" for variant in found for source in weights_of(variant.name)]
    if 0 < len(lines) <= _LISTED_WEIGHTS:
        print("\nweights, for --model.pretrained and `vitrail download`")
        print("\n".join(lines))
    elif lines:
        print("\n`vitrail models NAME` also lists a model's weights")


def _convert(options: argparse.Namespace) -> None:
    from vitrail.pretrained import export_model, import_model

    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std belong together: give both or neither")
    if options.target.exists() and (not options.target.is_dir() or any(options.target.iterdir())):
        raise ValueError(f"{options.target} is not an empty folder: choose another target")
    model, report = import_model(options.source, model=options.model, mean=options.mean, std=options.std)
    print(report.text())
    check = export_model(model, options.target, options.to)
    print(f"{options.target}: {options.to}; read back, its logits differ by {check.read_back:.2g}")
    if check.library is not None:
        print(f"loaded by {options.to}, they differ by {check.library:.2g}")
    elif options.to != "vitrail":
        print(f"{options.to} is not installed: that it can load this was not checked")


def _export(options: argparse.Namespace) -> None:
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


def _download(options: argparse.Namespace) -> None:
    from vitrail.pretrained import find_weights

    for source in options.source:
        found = find_weights(source)
        print(f"{source}: {found.file}")


def _summary(words: list[str]) -> None:
    own = _Parser(
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
    print(found.text(options.depth, _width()))


def _optimize(options: argparse.Namespace) -> None:
    from vitrail.config import DataSection
    from vitrail.pretrained.hub import from_pretrained
    from vitrail.shipping.optimize import optimize

    data = None
    if options.calibrate is not None:
        wanted = DataSection(name=options.calibrate, root=options.root)
        data = _splits(wanted, from_pretrained(options.model).preprocessing)
    found = optimize(
        options.model,
        options.output,
        precision=options.precision,
        data=data,
        batch=options.batch,
        agreement=options.agreement,
    )
    print(found.text())


def _bench(options: argparse.Namespace) -> None:
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


def _width() -> int:
    """Characters that a line of the terminal has."""
    return shutil.get_terminal_size().columns


def _recipes(_options: argparse.Namespace) -> None:
    from vitrail.config import list_recipes

    recipes = list_recipes()
    width = max(len(name) for name in recipes)
    for name, about in recipes.items():
        print(f"{name:<{width}}  {about}")


def _print_train_help(config: RunConfig) -> None:
    from vitrail.config import SHORT_KEYS

    short = ", ".join(f"--{name}" for name in SHORT_KEYS)
    print(_TRAIN_HELP.format(short=short), end="")
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        print(f"{section_name}: {(type(section).__doc__ or '').strip()}")
        for name, inner in type(section).model_fields.items():
            value = getattr(section, name)
            shown = "" if value is None or value == {} else f" [{value}]"
            print(f"  --{section_name}.{name}{shown}\n      {inner.description}")
        for name, value in (section.model_extra or {}).items():
            print(f"  --{section_name}.{name} [{value}]")
        print()


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest verb where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            import difflib

            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(action.choices)}"
            what = action.option_strings[0] if action.option_strings else "verb"
            raise ValueError(f"unknown {what} {value!r}: {hint}")


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"vitrail: {message}", file=sys.stderr)
    raise SystemExit(code)
