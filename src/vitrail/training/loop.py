"""The one training loop: batch, loss, backward, clip, step, average, log, evaluate, save.

It knows no model, no data set and no task. Nothing in a step waits for the device: losses are summed there,
and numbers are read only when a record is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vitrail.tasks import Batch, Task
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from vitrail.training.log import RunLog
from vitrail.training.optim import Schedule, gradient_norms


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When things happen, in optimiser steps."""

    total: int
    steps_per_epoch: int
    log_every: int
    eval_every: int
    save_every: int


def fit(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    *,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    accelerator: Accelerator,
    clip_norm: float,
    average: MovingAverage | None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    checkpoint: Path,
    metrics: Path,
    start: int = 0,
    compile: bool = False,  # noqa: A002  (the field's word)
) -> None:
    """Train a task in place.

    Args:
        task: On the accelerator's device.
        batches: Given the first step, yields the batches from there to the end of the run.
        plan: Length of the run, and when to log, evaluate and save.
        optimizer: Over the task's parameters.
        schedule: Step -> learning rate.
        accelerator: Device, precision, backward, clipping.
        clip_norm: Largest gradient norm; 0: no clipping.
        average: Moving average of the trained model, or None; it is what is evaluated.
        evaluate: Model -> {"loss", "accuracy"}, or None without validation images.
        checkpoint: Where to save.
        metrics: The `metrics.jsonl` to write.
        start: Steps that are done already, as `restore` told.
        compile: Run the task through torch.compile.

    Raises:
        ValueError: The loss is not finite (the last checkpoint stays).
    """
    prepared, optimizer = accelerator.prepare(task, optimizer)
    step_task = torch.compile(prepared) if compile else prepared
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    task.train()
    losses: dict[str, torch.Tensor] = {}
    since, images, counted = time.perf_counter(), 0, 0

    with RunLog(metrics, total=plan.total, start=start) as log:
        for step, batch in enumerate(batches(start), start=start):
            # Loss and gradients.
            with accelerator.autocast():
                output = step_task(batch, step)
            accelerator.backward(output["loss"])
            done = step + 1
            logging = done % plan.log_every == 0 or done == plan.total
            layer_norms = gradient_norms(task.trained()) if logging else {}
            if clip_norm:
                grad_norm = accelerator.clip_grad_norm_(parameters, clip_norm)
            elif logging:
                grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

            # The step itself.
            rate = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            task.after_step()
            if average is not None:
                average.update()

            # Numbers: summed on the device, read only when a record is due.
            images += len(next(iter(batch.values())))
            counted += 1
            for name, value in output.items():
                losses[name] = losses[name] + value.detach() if name in losses else value.detach()
            if logging:
                seconds = time.perf_counter() - since
                means = {name: float(value) / counted for name, value in losses.items()}
                if not math.isfinite(means["loss"]):
                    raise ValueError(
                        f"the loss became {means['loss']} before step {done} (learning rate {rate:.2e}); "
                        f"the checkpoint before it is kept: lower optim.lr, lengthen optim.warmup, or lower "
                        "optim.clip_norm"
                    )
                record: dict[str, Any] = {
                    "kind": "train",
                    "step": done,
                    "epoch": round(done / plan.steps_per_epoch, 4),
                    **means,
                    "lr": rate,
                    "images_per_second": images / seconds,
                    "grad_norm": float(grad_norm),
                    "grad_norms": {name: float(norm) for name, norm in layer_norms.items()},
                }
                log.write(record)
                losses, images, counted = {}, 0, 0
            log.step(done)

            # Evaluate and save; their time is not part of the throughput.
            if evaluate is not None and (done % plan.eval_every == 0 or done == plan.total):
                model = task.trained() if average is None else average.model
                record = {"kind": "val", "step": done, "epoch": round(done / plan.steps_per_epoch, 4)}
                log.write(record | evaluate(model))
            if done % plan.save_every == 0 or done == plan.total:
                save_checkpoint(
                    checkpoint,
                    {
                        "step": done,
                        "task": task.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": None if average is None else average.state_dict(),
                        "random": random_state(),
                    },
                )
            if logging:
                since = time.perf_counter()


def restore(
    task: Task, optimizer: torch.optim.Optimizer, average: MovingAverage | None, checkpoint: Path
) -> int:
    """Load a checkpoint into everything, the random state included.

    Returns:
        The number of steps done, for `fit`.

    Raises:
        ValueError: No checkpoint, a damaged one, or one of another model or optimiser.
    """
    state = load_checkpoint(checkpoint)
    try:
        task.load_state_dict(state["task"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another model or optimiser ({first}); "
            "resume with the config it was made with (config.yaml beside it)"
        ) from None
    restore_random_state(state["random"])
    return int(state["step"])
