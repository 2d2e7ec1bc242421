"""Out of memory: how to recognise it, what would fit, and what to tell.

A Linux process that asks for more than the machine has is usually killed without an error; what can be
caught is a GPU's limit, and on a CPU a limit of the process or its container (`ulimit -v`, Slurm).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from vitrail.tasks import Batch, Task

_MESSAGES = (
    "out of memory",  # CUDA, ROCm, XPU and MPS, also where they raise a plain RuntimeError
    "can't allocate memory",  # torch's CPU allocator on Linux and macOS
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS asks for its workspace past torch's allocator
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN
    "std::bad_alloc",
)
_NO_ROOM_FOR_CODE = "could not create a primitive"
"""oneDNN, where the machine code that it generates finds no room; longer messages that begin so are about
shapes that it does not support."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory on the device or in the machine did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return text == _NO_ROOM_FOR_CODE or any(part in text for part in _MESSAGES)


def largest_micro_batch(try_step: Callable[[int], None], start: int) -> int:
    """Halve a number of images until a step of that many fits.

    Args:
        try_step: Makes a step with so many images and leaves nothing behind; raises where memory does not
            suffice.
        start: The number to begin with, at least 1.

    Returns:
        The first of start, start / 2, start / 4, ... (rounded up) that fits.

    Raises:
        ValueError: Not even one image fits.
    """
    size = start
    while True:
        try:
            try_step(size)
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Out here the error is gone, and with it the frames that kept the tensors of the failed step alive.
        _release()
        if size == 1:
            raise ValueError(
                "out of memory with a single image: take --train.recompute true, a smaller model or smaller "
                "images"
            )
        size = -(-size // 2)


def fitting_micro_batch(task: Task, batch: Batch, optimizer: torch.optim.Optimizer) -> int:
    """Find by trial how many images of a batch go through forward and backward at a time.

    Gradients stay allocated while the next micro-batch runs, and AdamW keeps two averages of every weight
    from its first step on: both count as used. A quarter more images than are reported must fit, because free
    memory lies in pieces that differ from step to step. Afterwards there are no gradients; weights stay as
    they are. Call it under the autocast of the run, and after the `except` block that caught the first error:
    the error keeps the tensors of the failed step alive.

    Args:
        task: In training mode, on its device.
        batch: A batch that did not fit.
        optimizer: Of the run; where it has made no step yet, room for its averages is held free.

    Returns:
        A number of images from 1 to the batch's.

    Raises:
        ValueError: Not even one image fits.
    """
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    count = len(next(iter(batch.values())))

    def try_step(size: int) -> None:
        averages = [torch.empty_like(own) for own in parameters if own not in optimizer.state for _ in "mv"]
        images = torch.arange(size + size // 4) % count
        try:
            for _ in range(2):  # the second with the first one's gradients in memory
                part = {name: value[images.to(value.device)] for name, value in batch.items()}
                task(part, 0)["loss"].backward()
        finally:
            averages.clear()
            for parameter in parameters:
                parameter.grad = None

    _release()
    return largest_micro_batch(try_step, count)


def out_of_memory_message(batch_size: int, micro_batch: int, fits: int | None = None) -> str:
    """What to do, in one line.

    Args:
        batch_size: Images a step that a process has.
        micro_batch: Images it took at a time.
        fits: Images that would fit at a time, where that is known.
    """
    tried = f"a batch of {batch_size} images"
    if micro_batch != batch_size:
        tried += f", {micro_batch} at a time"
    ways = ["--train.recompute true (activation checkpointing)", "a smaller model or smaller images"]
    if fits is not None:
        ways.insert(0, f"--train.micro_batch {fits}, which fits (or auto)")
    elif micro_batch > 1:
        ways.insert(0, f"--train.micro_batch {-(-micro_batch // 2)} (or auto)")
    return f"out of memory with {tried}: take {'; or '.join(ways)}"


def _release() -> None:
    """Give cached memory back, so that the next trial does not fail for what the last one left in pieces."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
