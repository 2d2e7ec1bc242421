"""The one training loop: batch, loss, backward, clip, step, average, log, evaluate, save.

It knows no model, no data set and no task. Nothing in a step waits for a GPU: losses are summed there, and
numbers are read only when a record is written. (On a CPU every number is at hand, and a loss that is not
finite stops the run before it reaches the weights.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitrail.processes import any_process, mean_over_processes, rank, world
from vitrail.tasks import Batch
from vitrail.training.checkpoint import TrainingState, save_checkpoint
from vitrail.training.interrupt import Interruption
from vitrail.training.log import RunLog
from vitrail.training.memory import is_out_of_memory, out_of_memory_message
from vitrail.training.optim import Schedule, gradient_norms
from vitrail.training.sharding import unsharded_state, whole


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When things happen, in optimiser steps."""

    total: int
    steps_per_epoch: int
    log_every: int
    eval_every: int
    save_every: int


class NotFiniteError(ValueError):
    """The loss or the gradient is not finite; the weights are those before the step."""

    def __init__(self, step: int, rate: float, found: str, batch: Batch) -> None:
        super().__init__(f"{found} in step {step + 1} (learning rate {rate:.2e})")
        self.step, self.batch = step, batch


def fit(
    state: TrainingState,
    batches: Callable[[int], Iterator[Batch]],
    *,
    plan: Plan,
    schedule: Schedule,
    accelerator: Accelerator,
    clip_norm: float,
    metrics: Path,
    seed: int,
    evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
    checkpoints: Path | None = None,
    micro_batch: int | None = None,
    split_on_out_of_memory: bool = False,
    patience: int = 0,
    score: str = "accuracy",
    sharded: bool = False,
    compile: bool = False,  # noqa: A002  (the field's word)
    watch: Callable[[dict[str, Any]], list[str]] | None = None,
) -> None:
    """Train a task in place, from the step that its state is at to the end of the plan.

    Args:
        state: Task, optimiser and what else changes; on the accelerator's device.
        batches: Given the first step, yields this process's batches from there to the end of the run.
        plan: Length of the run, and when to log, evaluate and save.
        schedule: Step -> learning rate; a parameter group's `lr_scale` multiplies it.
        accelerator: Device, precision, backward, data-parallel copies.
        clip_norm: Largest gradient norm; 0: no clipping.
        metrics: The `metrics.jsonl` to write.
        seed: Decides dropout, together with step and process.
        evaluate: Model -> numbers, among them `score`; or None without validation images.
        checkpoints: Folder to save into; None: nothing is saved.
        micro_batch: Images that a process takes at a time; the gradients of a batch are added up.
        split_on_out_of_memory: Halve `micro_batch` when memory does not suffice, and go on.
        patience: Stop after so many evaluations without a better one; 0: never.
        score: The number of an evaluation by which it is better or not.
        sharded: The task's model is sharded (FSDP2); else several processes hold copies (DDP).
        compile: Run the task through torch.compile.
        watch: Given each record, returns warnings to print.

    Raises:
        NotFiniteError: The loss or the gradient is not finite (checkpoints stay as they are).
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state was saved.
        ValueError: Out of memory, in one line that says what would fit.
    """
    task, optimizer, average = state.task, state.optimizer, state.average
    replica = task if sharded else accelerator.prepare(task)
    step_task = torch.compile(replica) if compile else replica
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    on_cpu = accelerator.device.type == "cpu"
    task.train()
    losses: dict[str, Tensor] = {}
    since, images, counted = time.perf_counter(), 0, 0
    began = time.perf_counter() - state.seconds

    def gradients(batch: Batch, size: int) -> dict[str, Tensor]:
        """Forward and backward of one batch, `size` images at a time; the mean of what the task returned."""
        count = len(next(iter(batch.values())))
        sums: dict[str, Tensor] = {}
        for first in range(0, count, size):
            part = {name: value[first : first + size] for name, value in batch.items()}
            share = min(size, count - first) / count
            last = first + size >= count
            with nullcontext() if last or world() == 1 or sharded else accelerator.no_sync(replica):
                with accelerator.autocast():
                    output = step_task(part if share < 1 else batch, state.step)
                accelerator.backward(output["loss"] * share if share < 1 else output["loss"])
            for name, value in output.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * share
        return sums

    def save() -> None:
        state.seconds = time.perf_counter() - began
        if checkpoints is not None:
            save_checkpoint(checkpoints, state)

    with RunLog(metrics, total=plan.total, start=state.step) as log, Interruption() as interruption:
        for batch in () if is_over(state, patience, plan) else batches(state.step):
            # Loss and gradients.
            count = len(next(iter(batch.values())))
            size = min(micro_batch or count, count)
            while True:
                torch.manual_seed(_step_seed(seed, state.step))
                try:
                    output = gradients(batch, size)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    optimizer.zero_grad()
                    if not split_on_out_of_memory or size == 1 or world() > 1:
                        raise ValueError(out_of_memory_message(count, size)) from None
                micro_batch = size = -(-size // 2)
                log.say(f"out of memory: going on with micro-batches of {size} images")
            rate = schedule(state.step)
            if on_cpu and not math.isfinite(output["loss"]):
                raise NotFiniteError(state.step, rate, f"the loss became {float(output['loss'])}", batch)
            done = state.step + 1
            logging = done % plan.log_every == 0 or done == plan.total
            if accelerator.scaler is not None:
                accelerator.scaler.unscale_(optimizer)
            layer_norms = gradient_norms(task.model) if logging else {}
            if clip_norm:
                grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            elif logging or on_cpu:
                grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if on_cpu and not math.isfinite(whole(grad_norm)):
                raise NotFiniteError(state.step, rate, "the gradient is not finite", batch)

            # The step itself.
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            if accelerator.scaler is None:
                optimizer.step()
            else:
                accelerator.scaler.step(optimizer)
                accelerator.scaler.update()
            optimizer.zero_grad()
            task.after_step()
            if average is not None:
                average.update()
            state.step = done

            # Numbers: summed on the device, read only when a record is due.
            images += count * world()
            counted += 1
            for name, value in output.items():
                losses[name] = losses[name] + value if name in losses else value
            evaluating = evaluate is not None and (done % plan.eval_every == 0 or done == plan.total)
            saving = done % plan.save_every == 0 or done == plan.total
            if logging:
                means = _means(losses, counted)
                seconds = time.perf_counter() - since
                record: dict[str, Any] = {
                    "kind": "train",
                    "step": done,
                    "epoch": round(done / plan.steps_per_epoch, 4),
                    **means,
                    "lr": rate,
                    "images_per_second": images / seconds,
                    "grad_norm": float(whole(grad_norm)),
                    "grad_norms": {name: float(whole(norm)) for name, norm in layer_norms.items()},
                }
                if not on_cpu and not math.isfinite(means["loss"]):
                    raise NotFiniteError(state.step - 1, rate, f"the loss became {means['loss']}", batch)
                log.write(record)
                for warning in watch(record) if watch is not None else ():
                    log.say(f"warning: {warning}")
                losses, images, counted = {}, 0, 0
            elif (saving or evaluating) and not on_cpu and not math.isfinite(output["loss"]):
                # Nothing good may be overwritten by what came after a loss that is not finite.
                raise NotFiniteError(state.step - 1, rate, "the loss is not finite", batch)
            log.step(done)

            # Evaluate and save; their time is not part of the throughput.
            stopping = False
            if evaluating and evaluate is not None:
                paused = time.perf_counter()
                record = {"kind": "val", "step": done, "epoch": round(done / plan.steps_per_epoch, 4)}
                record |= evaluate(state.model())
                log.write(record)
                for warning in watch(record) if watch is not None else ():
                    log.say(f"warning: {warning}")
                if patience and (state.best is None or record[score] > state.best):
                    state.best, state.best_step = record[score], done
                    state.best_weights = unsharded_state(state.model())
                stopping = _no_longer_better(state, patience, plan)
                since += time.perf_counter() - paused
            if (logging or world() == 1) and any_process(interruption.asked, accelerator.device):
                save()
                raise KeyboardInterrupt(f"stopped after step {done} of {plan.total}, saved")
            if saving or stopping:
                paused = time.perf_counter()
                save()
                since += time.perf_counter() - paused
            if logging:
                since = time.perf_counter()
            if stopping:
                log.say(f"no better validation in {patience} evaluations: stopped after step {done}")
                break
        if any_process(interruption.asked, accelerator.device):  # while the last step was being saved
            raise KeyboardInterrupt(f"stopped after step {state.step} of {plan.total}, saved")
    state.seconds = time.perf_counter() - began


def is_over(state: TrainingState, patience: int, plan: Plan) -> bool:
    """Whether a run has made all its steps, or has stopped early."""
    return state.step >= plan.total or _no_longer_better(state, patience, plan)


def _no_longer_better(state: TrainingState, patience: int, plan: Plan) -> bool:
    """Whether the last `patience` evaluations were all no better than the best."""
    return bool(patience) and (state.step - state.best_step) // plan.eval_every >= patience


def _step_seed(seed: int, step: int) -> int:
    """Seed of dropout and DropPath in one step of this process, independent of all others."""
    return int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0])


def _means(sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """Means over steps and processes, with one wait for the device."""
    values = mean_over_processes(torch.stack([value.float() for value in sums.values()]) / count)
    return dict(zip(sums, values.tolist(), strict=True))
