"""From a config to everything that a run needs: data, model, task, plan; and the batches of its steps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config import RunConfig, TrainSection, steps
from vitrail.datasets import (
    FileSet,
    ImageSet,
    Preprocessing,
    Splits,
    load_section,
    steps_per_epoch,
)
from vitrail.datasets.loading import BatchReader
from vitrail.datasets.sources import find_source
from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.models import Encoder, build_model, model_config
from vitrail.models.video_vit import VideoViTConfig
from vitrail.models.vit import ViTConfig
from vitrail.pretrained import LoadReport, Weights, find_weights, load_pretrained, load_program
from vitrail.pretrained.hub import from_pretrained
from vitrail.pretrained.image_to_video import video_options
from vitrail.processes import rank, world
from vitrail.tasks import Batch, Distill, Task, Views, build_task, find_task
from vitrail.tasks.distill import Prepare, check_same_classes
from vitrail.training.augment import Augment, luminance
from vitrail.training.distort import distort
from vitrail.training.loop import Plan
from vitrail.training.mixing import Mix
from vitrail.training.optim import build_optimizer, freeze

DEFAULT_MODEL = "vit_mnist_2blk"
_FLAT = 1e-3
"""A channel whose values spread less than this, a quarter of a byte's step, is the same in all images."""


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
    loaded: LoadReport | None
    """What was done with the weights that it starts from; None: it starts from fresh ones."""


def prepare(config: RunConfig, splits: Splits | None = None) -> Run:
    """Build data, model and task of a config.

    A model that starts from somebody's weights takes over their architecture and preprocessing, where they
    tell; what else the `model` section says changes it.

    Args:
        config: The resolved config.
        splits: Data at hand, in place of what the `data` section names.

    Raises:
        ValueError: Anything in the config that does not exist or does not fit, in one line.
    """
    train = config.train
    accelerator = build_accelerator(train)
    if train.batch_size % world():
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be shared by {world()} processes; take a multiple"
        )
    kind = find_task(config.task.name)
    name, options, weights = architecture(config)
    prepared = None if weights is None else weights.preprocessing
    default = model_config(name, **options)
    model_frames = getattr(default, "num_frames", None)
    if splits is None:
        splits = _load(config, default.image_shape, prepared, config.data.frames or model_frames)
    clip_frames = splits.train.frames if isinstance(splits.train, ImageSet) else None
    if clip_frames is not None:
        _check_clips(config, name, model_frames, splits.train.name)
        options["num_frames"] = clip_frames
        config = config.model_copy(update={"data": config.data.model_copy(update={"frames": clip_frames})})
    _check_enough(splits, kind)
    num_classes = len(splits.train.classes) if kind.classifies else 0
    torch.manual_seed(train.seed)
    if prepared is None:
        options.setdefault("img_size", splits.train.img_size)
    options.setdefault("in_chans", splits.train.in_chans)
    options.setdefault("num_classes", num_classes)
    model = build_model(name, **options)
    loaded = None if weights is None else load_pretrained(model, weights)
    for option, needed in (("num_classes", num_classes), ("in_chans", splits.train.in_chans)):
        if (own := getattr(model.config, option)) != needed:
            what = (
                splits.train.name if kind.classifies or option == "in_chans" else f"task {config.task.name}"
            )
            raise ValueError(f"model.{option} {own} does not fit {what}, which has {needed}; leave it out")
    model.recompute = train.recompute
    freeze(model, config.optim.freeze)
    if prepared is not None:
        preprocessing = Preprocessing.from_dict(prepared)
        if "img_size" in config.model.options:
            preprocessing = replace(preprocessing, img_size=model.config.image_shape)
    else:
        preprocessing = Preprocessing(
            img_size=model.config.image_shape,
            in_chans=model.config.in_chans,
            mean=splits.train.mean,
            std=tuple(own if own > _FLAT else 1.0 for own in splits.train.std),
        )
    task_options = dict(config.task.options)
    if kind is Distill:
        task_options |= _teacher(task_options.get("teacher"), splits.train, preprocessing)
    task = build_task(config.task.name, model, **task_options)
    if train.parallel == "fsdp" and sum(isinstance(part, Encoder) for part in task.modules()) > 1:
        raise ValueError(
            f"task {config.task.name} keeps a second encoder beside the one that learns, which "
            "train.parallel fsdp cannot share out; take ddp"
        )
    if task.views.full > 1 and (config.augment.mixup or config.augment.cutmix):
        raise ValueError(f"task {config.task.name} compares views of one image: leave mixup and cutmix out")
    # Channels last: convolutional stems train 1.2 to 1.6 times as fast on a CPU, and nothing is slower.
    task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Run(
        config=config.model_copy(update={"model": config.model.model_copy(update={"name": name})}),
        splits=splits,
        model=model,
        task=task,
        preprocessing=preprocessing,
        plan=make_plan(train, len(splits.train)),
        accelerator=accelerator,
        loaded=loaded,
    )


def architecture(config: RunConfig) -> tuple[str, dict[str, Any], Weights | None]:
    """Name and options of a config's model, and the weights that it starts from, if it does.

    A video model may start from an image model: it then has that one's options, where none are given.
    """
    section = config.model
    if section.pretrained is None:
        return section.name or DEFAULT_MODEL, section.options, None
    found = find_weights(section.pretrained)
    if found.name is None:
        if section.name is None:
            raise ValueError(f"{section.pretrained} does not tell its architecture: add --model.name NAME")
        return section.name, section.options, found
    if section.name not in (None, found.name):
        image = model_config(found.name, **found.changes)
        if isinstance(image, ViTConfig) and isinstance(model_config(section.name), VideoViTConfig):
            return section.name, video_options(image) | section.options, found
        raise ValueError(
            f"{section.pretrained} holds a {found.name}, not a {section.name}; leave model.name out"
        )
    kept = {key: value for key, value in found.changes.items() if key != "num_classes"}
    return found.name, kept | section.options, found


def _teacher(
    source: Any, data: ImageSet | FileSet, preprocessing: Preprocessing
) -> dict[str, nn.Module | Prepare | None]:
    """A teacher, and how it wants the student's images: options of `Distill`.

    Raises:
        ValueError: No teacher was named, its classes are others, it has no head, or it cannot take the data.
    """
    if not isinstance(source, str):
        raise ValueError(
            "task distill needs a teacher: --task.teacher with a run or model folder, timm:NAME.TAG, "
            "torchvision:NAME, a hub repository, or FILE.pt2 (any network: vitrail.pretrained.save_program)"
        )
    teacher: nn.Module
    if Path(source).suffix == ".pt2":
        if isinstance(data, ImageSet) and data.frames is not None:
            raise ValueError(f"the teacher {source} takes images, and {data.name} has clips")
        teacher = program = load_program(source)
        names, wanted = program.classes, _preprocessing(program.preprocessing, f"{source}.json")
    else:
        stored = from_pretrained(source)
        if not stored.model.has_head:
            raise ValueError(f"the teacher {source} has no head, so it has no answers to learn from")
        teacher, names, wanted = stored.model, stored.classes, Preprocessing.from_dict(stored.preprocessing)
    if names:
        check_same_classes(data.classes, names)
    # Our models take the other sizes of progressive resizing as they come, an exported graph does not.
    if wanted == preprocessing and isinstance(teacher, Encoder):
        return {"teacher": teacher, "prepare": None}
    mean, std = (torch.tensor(own).view(1, -1, 1, 1) for own in (preprocessing.mean, preprocessing.std))

    def prepare(images: Tensor) -> Tensor:
        pixels = images * std.to(images) + mean.to(images)  # 0 to 1
        if wanted.in_chans == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        elif pixels.shape[1] == 3:
            pixels = luminance(pixels)
        return wanted.normalise(wanted.resize(pixels))

    return {"teacher": teacher, "prepare": prepare}


def _preprocessing(stored: Mapping[str, Any], file: str) -> Preprocessing:
    """What a file that people may write by hand says of its images."""
    try:
        return Preprocessing.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_clips(config: RunConfig, model: str, model_frames: int | None, data: str) -> None:
    """Refuse what is for images only."""
    if model_frames is None:
        raise ValueError(f"{model} takes images, and {data} has clips: choose a model video_vit_*")
    for option in ("randaugment", "jitter", "grayscale", "blur"):
        if getattr(config.augment, option):
            raise ValueError(f"augment.{option} is for images, and {data} has clips: leave it out")


def _check_enough(splits: Splits, kind: type[Task]) -> None:
    """Refuse data from which nothing can be learnt, or with which nothing can be tested."""
    name, classes = splits.train.name, splits.train.classes
    if not len(splits.train):
        raise ValueError(f"{name} has no training images")
    if not kind.classifies:
        return
    if not len(splits.test):
        raise ValueError(
            f"{name} has too few images: {len(splits.train)} for training and none to test with; expected 5 "
            "or more of each class, or a folder test"
        )
    if len(classes) < 2:
        raise ValueError(
            f"{name} has one class only ({classes[0]}): expected two or more to tell apart, a folder each or "
            "in a table labels.csv"
        )


def _load(
    config: RunConfig, model_size: tuple[int, int], prepared: Mapping[str, Any] | None, frames: int | None
) -> Splits:
    """The data; photographs of any size come at the model's size, the small sets at their own."""
    data = config.data
    wanted = config.model.options.get("img_size")
    in_chans = config.model.options.get("in_chans")
    if prepared is not None:
        model_size = tuple(prepared["img_size"])
        in_chans = prepared["in_chans"]
    return load_section(
        data.model_copy(update={"frames": frames}),
        img_size=wanted or model_size,
        in_chans=in_chans if prepared is not None or find_source(data.name) is None else None,
    )


def make_plan(train: TrainSection, images: int) -> Plan:
    """When things happen in a run over so many training images."""
    per_epoch = steps_per_epoch(images, train.batch_size)

    def count(duration: str, total: int | None = None) -> int:
        sizes = {"batch_size": train.batch_size, "steps_per_epoch": per_epoch}
        return max(1, steps(duration, total=total, **sizes))

    total = count(train.duration)
    return Plan(
        total=total,
        steps_per_epoch=per_epoch,
        # At least twenty records, so that there is something to see of a short run.
        log_every=min(count(train.log_every, total), max(1, total // 20)),
        eval_every=count(train.eval_every, total),
        save_every=count(train.save_every, total),
    )


def training_batches(run: Run, start: int) -> Iterator[Batch]:
    """Augmented, normalised batches from step `start` to the end of the run, this process's part of each.

    The order is a function of seed and epoch, the augmentation one of seed and step: whoever starts in the
    middle gets the batches that would have come.
    """
    return augmented_batches(run, read_batches(run, start), start)


def read_batches(run: Run, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, uint8 [B, C, H, W], and labels, int64 [B], as they are stored, from step `start` to the end.

    Labels are empty, [0], and none is touched, where the task needs none.
    """
    images, data, augment = run.splits.train, run.config.data, run.config.augment
    from_files = isinstance(images, FileSet)
    reader = BatchReader(
        images,
        run.config.train.batch_size,
        seed=run.config.train.seed,
        shard=(rank(), world()),
        workers=_workers(data.workers) if from_files else 0,
        # Original pictures are cropped as they are decoded, stored ones in the augmentation of the batch.
        resized_crop=augment.resized_crop or None if from_files and run.task.views == Views() else None,
        labels=run.task.needs_labels,
    )
    step = start
    while step < run.plan.total:
        epoch, first = divmod(step, run.plan.steps_per_epoch)
        for batch in reader.epoch(epoch, first):
            if step == run.plan.total:
                return
            yield batch
            step += 1


def augmented_batches(run: Run, raw: Iterator[tuple[Tensor, Tensor]], start: int) -> Iterator[Batch]:
    """Augment and normalise batches, the first of which belongs to step `start`, on the device."""
    config, section, device, views = run.config, run.config.train, run.accelerator.device, run.task.views
    cropped = isinstance(run.splits.train, FileSet) and views == Views()
    changes = {"resized_crop": 0.0} if cropped else {}
    augment = Augment(config.augment.model_copy(update=changes))
    mix = Mix(config.augment, len(run.splits.train.classes))
    sizes = {"batch_size": section.batch_size, "steps_per_epoch": run.plan.steps_per_epoch}
    stop_at = steps(config.augment.stop_at, total=run.plan.total, **sizes)
    progressive = sorted(
        (steps(at, total=run.plan.total, **sizes), size) for at, size in section.progressive.items()
    )
    generator = torch.Generator()

    def view(images: Tensor, size: int | None, strong: bool) -> Tensor:
        clips = images.shape[1:-3]  # (T,), or () of images
        images = images.flatten(1, -3)  # the frames of a clip as channels, so that all change alike
        pixels = distort(augment(images, generator, strong=strong), config.augment, generator)
        if size is not None and size != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        elif size is None:
            pixels = run.preprocessing.resize(pixels)
        if clips:
            return run.preprocessing.normalise(pixels.unflatten(1, (*clips, -1)))
        return run.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)

    def crop(images: Tensor, strong: bool) -> Tensor:
        clips = images.shape[1:-3]
        pixels = augment(images.flatten(1, -3), generator, strong=strong, area=views.crop_scale)
        pixels = distort(pixels, config.augment, generator)
        pixels = F.interpolate(pixels, size=views.crop_size, mode="bilinear", antialias=True)
        return run.preprocessing.normalise(pixels.unflatten(1, (*clips, -1)))

    for step, (images, labels) in enumerate(raw, start=start):
        generator.manual_seed(section.seed * 1_000_003 + step + rank() * 500_009)
        strong = step < stop_at
        images = images.to(device, non_blocking=True)
        size = next((size for begin, size in reversed(progressive) if begin <= step), None)
        batch: Batch = {}
        targets = labels.to(device, non_blocking=True)
        if views.full == 1:
            pixels = view(images, size, strong)
            if strong:
                some = targets if run.task.needs_labels else targets.new_zeros(len(images))
                mixed, targets = mix(pixels.flatten(1, -3), some, generator)
                pixels = mixed.reshape(pixels.shape)
            batch["images"] = pixels
        else:
            batch["views"] = torch.stack([view(images, size, strong) for _ in range(views.full)], dim=1)
        if views.crops:
            batch["crops"] = torch.stack([crop(images, strong) for _ in range(views.crops)], dim=1)
        if run.task.needs_labels:
            batch["targets"] = targets
        yield batch


def _workers(wanted: int | None) -> int:
    """Processes that decode: as asked, else one a core of this process's share, 8 at most."""
    return min(8, max(1, (os.cpu_count() or 1) // world())) if wanted is None else wanted


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
    optimizer = build_optimizer(run.task, run.model, config.optim)
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
        macs_per_image=count_macs(model, (model.config.in_chans, *run.preprocessing.img_size)),
        steps=run.plan.total,
        steps_per_epoch=run.plan.steps_per_epoch,
        seconds_per_epoch=(time.perf_counter() - began) / timed * run.plan.steps_per_epoch,
    )


def build_accelerator(section: TrainSection) -> Accelerator:
    """accelerate, on the device and in the precision that were asked for."""
    if section.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # accelerate keeps the first precision of a process for good; a notebook may train twice.
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    # Without `cpu`, accelerate starts several processes on a CPU but leaves their gradients apart.
    cpu = section.device == "cpu" or (section.device == "auto" and not torch.accelerator.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision=_precision(section.precision, section.device))
    if section.device not in {"auto", accelerator.device.type}:
        raise ValueError(
            f"train.device {section.device} is not here: accelerate offers {accelerator.device.type}"
        )
    return accelerator


def _precision(wanted: str, device: str) -> str:
    """accelerate's name of the precision."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if wanted == "auto":
        # Measured: bfloat16 autocast is slower on CPUs without AMX; and a recipe gives the same on any CPU.
        wanted = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and not cuda:
        raise ValueError(
            "train.precision fp16 needs a GPU: on a CPU it is a hundred times slower than float32; "
            "take bf16, the CPU's half precision"
        )
    return "no" if wanted == "fp32" else wanted
