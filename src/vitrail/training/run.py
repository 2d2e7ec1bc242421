"""A run from config to model folder: data, model, task, loop, test, manifest.

runs/<name>/
  config.yaml        the resolved config; `vitrail train runs/<name>/config.yaml` repeats the run
  metrics.jsonl      one record a line, while the run goes
  augmented.npy      the first training images as the model saw them, uint8 [N, C, H, W]; of clips, frame
                     beside frame
  checkpoints/       last.pt, from which --resume goes on, and previous.pt
  model/             the model folder
  evaluation/        accuracy, per-class numbers, probabilities on the test images; or what features are worth
  reconstructed.npy  test images as a task saw them, guessed them, and as they are, where it hides pixels
  manifest.json      versions, hardware, data, seeds, images seen, compute, time
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from vitrail.config import RunConfig
from vitrail.datasets import Images, Preprocessing, Splits, side_by_side
from vitrail.evaluation.cost import count_parameters
from vitrail.evaluation.metrics import ClassificationMetrics
from vitrail.files import write_whole
from vitrail.models import Encoder
from vitrail.pretrained import save_model
from vitrail.processes import is_main, world
from vitrail.tasks import Reconstructs
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import TrainingState, restore_checkpoint
from vitrail.training.diagnose import first_nonfinite
from vitrail.training.judge import Judge, Metrics
from vitrail.training.log import records_until
from vitrail.training.loop import NotFiniteError, fit, is_over
from vitrail.training.manifest import manifest
from vitrail.training.optim import build_optimizer, learning_rate
from vitrail.training.run_folder import check_free, claimed
from vitrail.training.setup import Run, prepare, training_batches
from vitrail.training.sharding import shard_model, unsharded_state
from vitrail.training.watch import Watch

_SMALL_INPUT = 100
"""Height and width in pixels below which a model is one for small pictures."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run found."""

    folder: Path
    model: Encoder
    preprocessing: Preprocessing
    test: Images
    metrics: Metrics | None
    """Of the test images; None where there are none."""
    already_finished: bool = False
    """It was resumed after its end: nothing was trained, and nothing written."""


def train(config: RunConfig, folder: str | Path, *, command: str, splits: Splits | None = None) -> Result:
    """Train, test and save into a run folder.

    Args:
        config: The resolved config.
        folder: The run folder; it must be empty or absent unless the config resumes or overwrites.
        command: What the manifest states as the command that repeats the run.
        splits: Data at hand, in place of what the config's `data` section names.

    Raises:
        ValueError: Anything that does not fit, before anything is written; a loss that is not finite; memory
            or disk that does not suffice.
        KeyboardInterrupt: Ctrl-C; the run was saved.
    """
    folder = Path(folder)
    check_free(folder, config.train)
    run = prepare(config, splits)
    with claimed(folder, config.train):
        return _train(run, folder, command)


def _train(run: Run, folder: Path, command: str) -> Result:
    config, section, splits = run.config, run.config.train, run.splits
    cpu_began = time.process_time()
    average = MovingAverage(run.task.trained(), section.ema) if section.ema else None
    sharded = section.parallel == "fsdp" and world() > 1
    if sharded:
        for sharing in (run.model, None if average is None else average.model):
            if isinstance(sharing, Encoder):
                shard_model(sharing)
    state = TrainingState(
        task=run.task,
        optimizer=build_optimizer(run.task, run.model, config.optim),
        average=average,
        scaler=run.accelerator.scaler,
    )
    # Before anything is written: a config that does not fit the checkpoint must leave the run as it is.
    if section.resume:
        restore_checkpoint(folder / "checkpoints", state)
    resumed_at = state.step
    # Where the run lies is part of it; whether it was resumed or replaced another one is not.
    again = {"output": folder, "resume": False, "overwrite": False}
    stored = config.model_copy(update={"train": section.model_copy(update=again)})
    finished = is_over(state, section.patience, run.plan) and _finished_at(folder) == state.step
    if is_main():
        for line in _about(run, folder):
            print(line, file=sys.stderr)
        if resumed_at and (others := _differences(folder / "config.yaml", stored)):
            what = "without effect on a finished run" if finished else f"goes on after step {resumed_at} with"
            print(f"{what}: {', '.join(others)}", file=sys.stderr)

    run.task.begin(run.plan.total)
    judge = Judge(run)
    if finished:
        model = _finished_model(state, sharded)
        return Result(
            folder=folder,
            model=model,
            preprocessing=run.preprocessing,
            test=splits.test,
            metrics=judge.test(state.model()),
            already_finished=True,
        )
    if is_main():
        write_whole(folder / "config.yaml", stored.to_yaml())
        write_whole(folder / "augmented.npy", _augmented_examples(run))
        if run.loaded is not None:
            print(run.loaded.text())

    watch = Watch(
        total=run.plan.total,
        clip_norm=config.optim.clip_norm,
        num_classes=len(splits.train.classes) if config.task.name == "classify" else None,
    )
    for record in records_until(folder / "metrics.jsonl", state.step) if state.step else ():
        watch.observe(record)  # what was said before the run was interrupted is not said again
    try:
        fit(
            state,
            lambda start: training_batches(run, start),
            plan=run.plan,
            schedule=learning_rate(
                config.optim, run.plan.total, run.plan.steps_per_epoch, section.batch_size
            ),
            accelerator=run.accelerator,
            clip_norm=config.optim.clip_norm,
            metrics=folder / "metrics.jsonl",
            seed=section.seed,
            evaluate=None if splits.val is None else judge.validate,
            checkpoints=folder / "checkpoints",
            micro_batch=None if section.micro_batch == "auto" else section.micro_batch,
            split_on_out_of_memory=section.micro_batch == "auto",
            patience=section.patience,
            score=judge.score,
            sharded=sharded,
            compile=section.compile,
            watch=watch.observe,
        )
    except NotFiniteError as error:
        found = first_nonfinite(run.task, error.batch, error.step)
        advice = (
            "the same batch gave finite numbers when it was tried again" if found is None else found.advice()
        )
        raise ValueError(f"{error}: {advice}; the checkpoint before it is kept") from None

    model = _finished_model(state, sharded)
    if is_main():
        assert config.model.name is not None
        save_model(
            folder / "model",
            model,
            name=config.model.name,
            classes=splits.train.classes if run.task.classifies else (),
            preprocessing=run.preprocessing.to_dict(),
        )
    # A sharded model needs every process; the finished copy is whole.
    metrics = judge.test(state.model(), folder if is_main() else None)
    if is_main():
        if isinstance(run.task, Reconstructs):
            write_whole(folder / "reconstructed.npy", _reconstructed_examples(run))
        content = manifest(
            run,
            state,
            model,
            measured=_measured(metrics),
            command=command,
            cpu_seconds=time.process_time() - cpu_began,
            resumed_at=resumed_at,
        )
        write_whole(folder / "manifest.json", json.dumps(content, indent=2) + "\n")
    return Result(
        folder=folder, model=model, preprocessing=run.preprocessing, test=splits.test, metrics=metrics
    )


def _about(run: Run, folder: Path) -> list[str]:
    """What is said before a run begins, a line each: what it is, and what is surprising in its data."""
    splits, model = run.splits, run.model
    counts = ", ".join(
        f"{len(part):,} {name}"
        for name, part in (("train", splits.train), ("val", splits.val), ("test", splits.test))
        if part is not None
    )
    lines = [
        f"{run.config.model.name}, {count_parameters(model):,} parameters, on {splits.train.name} ({counts} "
        f"images); {run.accelerator.device}; into {folder}"
    ]
    if splits.skipped:
        source, reason = splits.skipped[0]
        several = (
            "1 broken image is" if len(splits.skipped) == 1 else f"{len(splits.skipped):,} broken images are"
        )
        lines.append(f"{several} left out ({source}: {reason})")
    if len(splits.train.classes) == 1 and not run.task.classifies:
        lines.append(
            f"{splits.train.name} has one class, so neighbours always agree: k-NN accuracy says nothing, "
            "rank and spread of the features do"
        )
    (height, width), original = run.preprocessing.img_size, splits.original_size
    # Photographs of thousands of pixels at the usual 224 are no surprise.
    if original is not None and min(height, width) < min(_SMALL_INPUT, min(original) / 4):
        lines.append(
            f"pictures of about {min(original)} pixels are seen at {height} x {width}: choose a larger model "
            "or --model.img_size"
        )
    return lines


def _measured(metrics: Metrics | None) -> dict[str, float]:
    """The number that the manifest states."""
    if metrics is None:
        return {}
    if isinstance(metrics, ClassificationMetrics):
        return {"test_accuracy": metrics.accuracy}
    return {"knn_accuracy": metrics.knn_accuracy}


def _finished_at(folder: Path) -> int | None:
    """The step at which a run in this folder was finished; None: none was."""
    path = folder / "manifest.json"
    return int(json.loads(path.read_text())["steps"]) if path.is_file() else None


def _differences(path: Path, config: RunConfig) -> list[str]:
    """The options in which a config differs from the one in a file, with both values."""
    before, now = (_flat(yaml.safe_load(text)) for text in (path.read_text(), config.to_yaml()))
    return [
        f"{key} {now.get(key)} (it was {before.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "train.output"
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _finished_model(state: TrainingState, sharded: bool) -> Encoder:
    """The model of the run's end, or the best one where the run could stop early; whole."""
    model = state.model()
    assert isinstance(model, Encoder)
    if state.best_weights is not None:
        set_model_state_dict(
            model, dict(state.best_weights), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    if not sharded:
        return model
    weights = unsharded_state(model)
    whole = model.config.build()
    if is_main():  # the others were given nothing
        whole.load_state_dict(weights)
    return whole


def _augmented_examples(run: Run, most: int = 20) -> bytes:
    """The first training images after augmentation, all views of each, as an .npy: uint8 [N, C, H, W]."""
    batch = next(training_batches(run, 0))
    images = batch["images"] if "images" in batch else batch["views"].flatten(0, 1)
    content = io.BytesIO()
    np.save(content, side_by_side(run.preprocessing.denormalise(images[:most].cpu())).numpy())
    return content.getvalue()


def _reconstructed_examples(run: Run, most: int = 8) -> bytes:
    """What the task makes of some images that it has not learnt from, as an .npy file.

    uint8 [3, N, C, H, W]: what the model saw (hidden pixels in the mean colour), its guess, the original.
    """
    assert isinstance(run.task, Reconstructs)
    images = run.splits.test if len(run.splits.test) else run.splits.train
    device = run.accelerator.device
    pixels = run.preprocessing.prepare(images.pixels(np.arange(min(len(images), most))).to(device))
    found = run.task.reconstruct(pixels, torch.Generator(device).manual_seed(0))
    seen = [
        side_by_side(run.preprocessing.denormalise(own))
        for own in (found.masked, found.prediction, found.images)
    ]
    content = io.BytesIO()
    np.save(content, torch.stack(seen).cpu().numpy())
    return content.getvalue()
