"""What is minimised, one method a file, and the table of their names."""

from __future__ import annotations

import inspect
from typing import Any

from vitrail.config import nearest
from vitrail.models.encoder import Encoder
from vitrail.tasks.classify import Classify
from vitrail.tasks.task import Batch, Task, Views

__all__ = ["TASKS", "Batch", "Classify", "Task", "Views", "build_task"]

TASKS: dict[str, type[Task]] = {"classify": Classify}


def build_task(name: str, model: Encoder, **options: Any) -> Task:
    """A task around a model.

    Raises:
        ValueError: Unknown task or option; the message names the nearest.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    known = [key for key in inspect.signature(TASKS[name]).parameters if key != "model"]
    for key in options:
        if key not in known:
            raise ValueError(f"task {name} has no option {key!r}: {nearest(key, known)}")
    return TASKS[name](model, **options)
