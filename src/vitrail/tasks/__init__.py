"""What is minimised, one method a file, and the table of their names."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from vitrail.config import nearest
from vitrail.models.encoder import Encoder
from vitrail.models.options import fitted
from vitrail.tasks.classify import Classify
from vitrail.tasks.combined import MAEInfoNCE
from vitrail.tasks.contrastive import ClassifyInfoNCE, InfoNCE, SupCon
from vitrail.tasks.dino import DINO
from vitrail.tasks.distill import Distill
from vitrail.tasks.jepa import JEPA
from vitrail.tasks.jigsaw import Jigsaw
from vitrail.tasks.mae import MAE
from vitrail.tasks.simmim import SimMIM
from vitrail.tasks.task import Batch, Reconstructs, Task, Views
from vitrail.tasks.video_mae import VideoMAE

__all__ = [
    "DINO",
    "JEPA",
    "MAE",
    "TASKS",
    "Batch",
    "Classify",
    "ClassifyInfoNCE",
    "Distill",
    "InfoNCE",
    "Jigsaw",
    "MAEInfoNCE",
    "Reconstructs",
    "SimMIM",
    "SupCon",
    "Task",
    "VideoMAE",
    "Views",
    "build_task",
    "find_task",
]

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "classify_infonce": ClassifyInfoNCE,
    "distill": Distill,
    "mae": MAE,
    "video_mae": VideoMAE,
    "simmim": SimMIM,
    "jepa": JEPA,
    "jigsaw": Jigsaw,
    "infonce": InfoNCE,
    "supcon": SupCon,
    "dino": DINO,
    "mae_infonce": MAEInfoNCE,
}


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: Unknown task; the message names the nearest.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    return TASKS[name]


def build_task(name: str, model: Encoder, **options: Any) -> Task:
    """A task around a model.

    Raises:
        ValueError: Unknown task or option (the message names the nearest), or a value that does not fit.
    """
    kind: Any = find_task(name)
    known = [key for key in inspect.signature(kind).parameters if key != "model"]
    for key in options:
        if key not in known:
            raise ValueError(f"task {name} has no option {key!r}: {nearest(key, known)}")
    kinds = get_type_hints(kind.__init__)
    task: Task = kind(
        model, **{key: fitted(f"task {name}", key, own, kinds[key]) for key, own in options.items()}
    )
    return task
