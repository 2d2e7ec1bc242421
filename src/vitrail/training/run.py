"""A run from config to model folder: data, model, task, loop, test, manifest.

runs/<name>/
  config.yaml        the resolved config; `vitrail train runs/<name>/config.yaml` repeats the run
  metrics.jsonl      one record a line, while the run goes
  augmented.npy      the first training images as the model saw them, uint8 [N, C, H, W]
      checkpoints/       last.pt, from which --train.resume goes on
  model/             the model folder
  evaluation/        accuracy, per-class numbers, probabilities on the test images
  manifest.json      versions, hardware, data, seeds, images seen, compute, time
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

from vitrail.config import RunConfig, TrainSection, steps
from vitrail.datasets import ImageSet, Preprocessing, Splits, batches, load_dataset, steps_per_epoch
from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.metrics import ClassificationMetrics, classification_metrics, write_evaluation
from vitrail.files import write_whole
from vitrail.models import Encoder
from vitrail.pretrained import create_model, save_model
from vitrail.tasks import Batch, Task, build_task
from vitrail.training.augment import Augment
from vitrail.training.average import MovingAverage
from vitrail.training.loop import Plan, fit, restore
from vitrail.training.mixing import Mix
from vitrail.training.optim import build_optimizer, learning_rate


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a config decides, built and ready."""

    config: RunConfig
    splits: Splits
    model: Encoder
    task: Task
    preprocessing: Preprocessing
    plan: Plan
    accelerator: Accelerator


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run found."""

    folder: Path
    model: Encoder
    preprocessing: Preprocessing
    test: ImageSet
    metrics: ClassificationMetrics


def prepare(config: RunConfig) -> Run:
    """Build data, model and task of a config.

    Raises:
        ValueError: Anything in the config that does not exist or does not fit, in one line.
    """
    train, data = config.train, config.data
    accelerator = _accelerator(train)
    splits = load_dataset(
        data.name,
        root=data.root,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        train_fraction=data.train_fraction,
    )
    torch.manual_seed(train.seed)
    options = config.model.options
    model = create_model(
        config.model.name,
        pretrained=config.model.pretrained,
        num_classes=options.pop("num_classes", len(splits.train.classes)),
        img_size=options.pop("img_size", splits.train.img_size),
        in_chans=options.pop("in_chans", splits.train.in_chans),
        **options,
    )
    config_of = model.config
    for option, own, needed in (
        ("num_classes", config_of.num_classes, len(splits.train.classes)),
        ("in_chans", config_of.in_chans, splits.train.in_chans),
    ):
        if own != needed:
            raise ValueError(
                f"model.{option} {own} does not fit {data.name}, which has {needed}; leave it out"
            )
    preprocessing = Preprocessing(
        img_size=config_of.image_shape,
        in_chans=config_of.in_chans,
        mean=splits.train.mean,
        std=splits.train.std,
    )
    task = build_task(config.task.name, model, **config.task.options)
    # Channels last: convolutional stems train 1.2 to 1.6 times as fast on a CPU, and nothing is slower.
    task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    per_epoch = steps_per_epoch(len(splits.train), train.batch_size)

    def count(duration: str, total: int | None = None) -> int:
        sizes = {"batch_size": train.batch_size, "steps_per_epoch": per_epoch}
        return max(1, steps(duration, total=total, **sizes))

    total = count(train.duration)
    plan = Plan(
        total=total,
        steps_per_epoch=per_epoch,
        log_every=min(count(train.log_every, total), total),
        eval_every=count(train.eval_every, total),
        save_every=count(train.save_every, total),
    )
    return Run(
        config=config,
        splits=splits,
        model=model,
        task=task,
        preprocessing=preprocessing,
        plan=plan,
        accelerator=accelerator,
    )


def train(config: RunConfig, folder: Path, *, command: str) -> Result:
    """Train, test and save into a run folder.

    Args:
        config: The resolved config.
        folder: The run folder; it must be empty or absent unless the config resumes or overwrites.
        command: What the manifest states as the command that repeats the run.

    Raises:
        ValueError: Anything that does not fit, before anything is written; a loss that is not finite.
    """
    _check_free(folder, config.train)
    run = prepare(config)
    _make_run_folder(folder, config.train)
    section, splits, plan = config.train, run.splits, run.plan
    device = run.accelerator.device
    began, cpu_began = time.time(), time.process_time()
    optimizer = build_optimizer(run.task, _without_decay(run), config.optim)
    average = MovingAverage(run.task.trained(), section.ema) if section.ema else None
    # Before anything is written: a config that does not fit the checkpoint must leave the run as it is.
    checkpoint = folder / "checkpoints" / "last.pt"
    start = restore(run.task, optimizer, average, checkpoint) if section.resume else 0
    # Where the run lies is part of it; whether it was resumed or replaced another one is not.
    again = {"output": folder, "resume": False, "overwrite": False}
    stored = config.model_copy(update={"train": config.train.model_copy(update=again)})
    write_whole(folder / "config.yaml", stored.to_yaml())
    write_whole(folder / "augmented.npy", _augmented_examples(run))

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert splits.val is not None
        logits = predict_logits(
            model, splits.val, run.preprocessing, batch_size=section.eval_batch_size, device=device
        )
        labels = torch.from_numpy(splits.val.labels)
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(dim=1) == labels).float().mean()),
        }

    fit(
        run.task,
        lambda start: training_batches(run, start),
        plan=plan,
        optimizer=optimizer,
        schedule=learning_rate(config.optim, plan.total, plan.steps_per_epoch, section.batch_size),
        accelerator=run.accelerator,
        clip_norm=config.optim.clip_norm,
        average=average,
        evaluate=evaluate if splits.val is not None else None,
        checkpoint=checkpoint,
        metrics=folder / "metrics.jsonl",
        start=start,
        compile=section.compile,
    )
    trained = time.time()

    model = run.task.trained() if average is None else average.model
    assert isinstance(model, Encoder)
    save_model(
        folder / "model",
        model,
        name=config.model.name,
        classes=splits.train.classes,
        preprocessing=run.preprocessing.to_dict(),
    )
    metrics = evaluate_and_write(
        folder, model, run.preprocessing, splits.test, batch_size=section.eval_batch_size, device=device
    )
    macs = count_macs(model, (model.config.in_chans, *model.config.image_shape))
    images_seen = plan.total * section.batch_size
    manifest = {
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": section.seed,
        "parameters": count_parameters(model),
        "macs_per_image": macs,
        "images_seen": images_seen,
        "training_petaflop": 3 * 2 * macs * images_seen / 1e15,
        "training_seconds": round(trained - began, 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),
        "resumed": section.resume,
        "test_accuracy": metrics.accuracy,
        "data": {
            name: {"images": len(part), "fingerprint": part.fingerprint}
            for name, part in (("train", splits.train), ("val", splits.val), ("test", splits.test))
            if part is not None
        },
        "hardware": hardware(device),
        "versions": versions(),
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return Result(
        folder=folder, model=model, preprocessing=run.preprocessing, test=splits.test, metrics=metrics
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would cost, before it is started."""

    parameters: int
    macs_per_image: int
    steps: int
    steps_per_epoch: int
    seconds_per_epoch: float
    """Measured over a few steps on this machine, at the size the run ends with."""


def estimate(config: RunConfig, timed_steps: int = 5) -> Estimate:
    """Build a run and time a few of its steps; nothing is written.

    Raises:
        ValueError: As `train` would.
    """
    run = prepare(config)
    optimizer = build_optimizer(run.task, _without_decay(run), config.optim)
    run.task.train()
    began = time.perf_counter()
    last = run.plan.total
    warmup = 2
    for count, batch in enumerate(training_batches(run, max(0, last - timed_steps - warmup))):
        if count == warmup:
            began = time.perf_counter()
        with run.accelerator.autocast():
            loss = run.task(batch, count)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # wait for the device
    timed = max(min(last, timed_steps + warmup) - warmup, 1)
    model = run.model
    return Estimate(
        parameters=count_parameters(model),
        macs_per_image=count_macs(model, (model.config.in_chans, *model.config.image_shape)),
        steps=run.plan.total,
        steps_per_epoch=run.plan.steps_per_epoch,
        seconds_per_epoch=(time.perf_counter() - began) / timed * run.plan.steps_per_epoch,
    )


def evaluate_and_write(
    folder: Path,
    model: Encoder,
    preprocessing: Preprocessing,
    images: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
) -> ClassificationMetrics:
    """Test a classifier on an image set and keep the numbers in `folder/evaluation/`."""
    logits = predict_logits(model, images, preprocessing, batch_size=batch_size, device=device)
    probabilities = logits.softmax(dim=1).numpy()
    metrics = classification_metrics(probabilities, images.labels, images.classes)
    write_evaluation(
        folder / "evaluation", f"{images.name}-{images.split}", metrics, probabilities, images.labels
    )
    return metrics


def training_batches(run: Run, start: int) -> Iterator[Batch]:
    """Augmented, normalised batches from step `start` to the end of the run.

    The order is a function of seed and epoch, the augmentation one of seed and step: whoever starts in the
    middle gets the batches that would have come.
    """
    config, section, device = run.config, run.config.train, run.accelerator.device
    augment, mix = Augment(config.augment), Mix(config.augment, len(run.splits.train.classes))
    sizes = {"batch_size": section.batch_size, "steps_per_epoch": run.plan.steps_per_epoch}
    stop_at = steps(config.augment.stop_at, total=run.plan.total, **sizes)
    progressive = sorted(
        (steps(at, total=run.plan.total, **sizes), size) for at, size in section.progressive.items()
    )
    generator = torch.Generator()
    step = start
    while step < run.plan.total:
        epoch, first = divmod(step, run.plan.steps_per_epoch)
        for images, labels in batches(
            run.splits.train, section.batch_size, seed=section.seed, epoch=epoch, start=first
        ):
            if step == run.plan.total:
                return
            generator.manual_seed(section.seed * 1_000_003 + step)
            strong = step < stop_at
            pixels = augment(images.to(device, non_blocking=True), generator, strong=strong)
            targets = labels.to(device, non_blocking=True)
            size = next((size for begin, size in reversed(progressive) if begin <= step), None)
            if size is not None and size != pixels.shape[-1]:
                pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
            elif size is None:
                pixels = run.preprocessing.resize(pixels)
            pixels = run.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)
            if strong:
                pixels, targets = mix(pixels, targets, generator)
            yield {"images": pixels, "targets": targets}
            step += 1


def _augmented_examples(run: Run, most: int = 20) -> bytes:
    """The first training images after augmentation, before normalisation, as an .npy file."""
    images = next(training_batches(run, 0))["images"][:most].cpu()
    mean, std = (
        torch.tensor(own).view(1, -1, 1, 1) for own in (run.preprocessing.mean, run.preprocessing.std)
    )
    content = io.BytesIO()
    np.save(content, ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return content.getvalue()


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the commit where there is one."""
    found = {name: metadata.version(name) for name in ("vitrail", "torch", "torchvision", "numpy")}
    found["python"] = platform.python_version()
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


def _check_free(folder: Path, section: TrainSection) -> None:
    """Refuse a run folder that holds something, before anything is built."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another run folder with --train.output")
    if section.resume or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not section.overwrite:
        raise ValueError(
            f"run folder {folder} is not empty: go on with --resume, replace it with --overwrite, "
            "or choose another with --output"
        )
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is not a run folder (no config.yaml): it is not replaced")


def _make_run_folder(folder: Path, section: TrainSection) -> None:
    """Make the run folder, empty unless the run resumes; `_check_free` has agreed."""
    try:
        if folder.exists() and not section.resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be made: {error.strerror}") from None


def _accelerator(section: TrainSection) -> Accelerator:
    """accelerate, on the device and in the precision that were asked for."""
    # accelerate keeps the first precision of a process for good; a notebook may train twice.
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=section.device == "cpu", mixed_precision=_precision(section.precision, section.device)
    )
    if section.device not in {"auto", accelerator.device.type}:
        raise ValueError(
            f"train.device {section.device} is not here: accelerate offers {accelerator.device.type}"
        )
    return accelerator


def _precision(wanted: str, device: str) -> str:
    """accelerate's name of the precision."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if wanted == "auto":
        # Measured: on CPUs the small models of the recipes are slower under bfloat16 autocast.
        wanted = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and not cuda:
        raise ValueError(
            "train.precision fp16 needs a GPU: on a CPU it is a hundred times slower than float32; "
            "take bf16, the CPU's half precision"
        )
    return "no" if wanted == "fp32" else wanted


def _without_decay(run: Run) -> set[str]:
    """Names in the task of the parameters that the model wants without weight decay."""
    exempt = {id(run.model.get_parameter(name)) for name in run.model.no_weight_decay()}
    return {name for name, parameter in run.task.named_parameters() if id(parameter) in exempt}


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
