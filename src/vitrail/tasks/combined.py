"""Several tasks on one encoder: the weighted sum of their losses, each logged under its name.

`MAEInfoNCE` is one of them: 80 % masked autoencoder, 20 % InfoNCE. Others who join a masked objective and one
on whole images: Huang et al. 2022 (contrastive masked autoencoders), Zhou et al. 2022 (iBOT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import InfoNCE
from vitrail.tasks.mae import MAE
from vitrail.tasks.task import Batch, Reconstruction, Task, Views


class Combined(Task):
    """The sum of weight x loss over tasks that train the same model.

    Batches carry the views of the most demanding task; one that wants fewer sees the first.
    """

    def __init__(self, parts: Mapping[str, tuple[Task, float]]) -> None:
        """Join tasks.

        Args:
            parts: Name in the log -> task and weight.

        Raises:
            ValueError: Weights that are negative or all zero, tasks on different models, or two that want
                different small crops.
        """
        super().__init__()
        self._tasks = {name: task for name, (task, _) in parts.items()}
        self.parts = nn.ModuleDict(self._tasks)
        self.weights = {name: weight for name, (_, weight) in parts.items()}
        for name, weight in self.weights.items():
            if not weight >= 0.0:
                raise ValueError(f"the weight of {name} must be at least 0, got {weight}")
        if not any(self.weights.values()):
            raise ValueError(f"a weight above 0 is needed, got 0 for {' and '.join(parts)}")
        tasks = list(self._tasks.values())
        if len({(id(task.model), id(task.trained())) for task in tasks}) > 1:
            raise ValueError(f"{' and '.join(parts)} train different models: they cannot be combined")
        self.model = tasks[0].model
        self.classifies = any(task.classifies for task in tasks)
        self.needs_labels = any(task.needs_labels for task in tasks)
        wanted = [task.views for task in tasks]
        crops = {(one.crops, one.crop_size, one.crop_scale) for one in wanted if one.crops}
        if len(crops) > 1:
            raise ValueError(f"{' and '.join(parts)} want different small crops: they cannot be combined")
        count, size, scale = crops.pop() if crops else (0, Views.crop_size, Views.crop_scale)
        full = max(one.full for one in wanted)
        self.views = Views(full=full, crops=count, crop_size=size, crop_scale=scale)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `views` or `images`, whatever the tasks need -> "loss", and "<name>_..." of each."""
        seen: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for name, task in self._tasks.items():
            result = task(self._part(batch, task), step)
            total = total + self.weights[name] * result["loss"]
            seen |= {f"{name}_{key}": value for key, value in result.items()}
        assert isinstance(total, Tensor)
        return {"loss": total, **seen}

    def begin(self, total_steps: int) -> None:
        """Every task begins."""
        for task in self._tasks.values():
            task.begin(total_steps)

    def after_step(self) -> None:
        """Every task does what it does after a step."""
        for task in self._tasks.values():
            task.after_step()

    def trained(self) -> Encoder:
        """The model that all of them train, or the teacher that follows it."""
        return next(iter(self._tasks.values())).trained()

    def _part(self, batch: Batch, task: Task) -> Batch:
        """The batch as one of the tasks expects it."""
        if self.views.full == 1 or task.views.full == self.views.full:
            return batch
        own = {name: value for name, value in batch.items() if name != "views"}
        first = batch["views"][:, : task.views.full]
        return own | ({"images": first[:, 0]} if task.views.full == 1 else {"views": first})


class MAEInfoNCE(Combined):
    """A masked autoencoder and InfoNCE: the one learns what is where, the other what an image is as a whole.

    MAE hides patches of the first view; InfoNCE compares both views, with all their patches.
    """

    def __init__(
        self,
        model: Encoder,
        *,
        mae_weight: float = 0.8,
        infonce_weight: float = 0.2,
        ratio: float = 0.75,
        normalise_targets: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        temperature: float = 0.1,
        projection_dim: int = 128,
    ) -> None:
        """Both tasks around one encoder.

        Args:
            model: An encoder that can drop patches; loses its classifier.
            mae_weight: What MAE's loss counts.
            infonce_weight: What InfoNCE's counts.
            ratio: As in `MAE`.
            normalise_targets: As in `MAE`.
            decoder_dim: As in `MAE`.
            decoder_depth: As in `MAE`.
            temperature: As in `InfoNCE`.
            projection_dim: As in `InfoNCE`.

        Raises:
            ValueError: As `MAE`, `InfoNCE` and `Combined`.
        """
        free = [parameter for parameter in model.parameters() if parameter.requires_grad]
        mae = MAE(
            model,
            ratio=ratio,
            normalise_targets=normalise_targets,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
        )
        infonce = InfoNCE(model, temperature=temperature, projection_dim=projection_dim)
        # MAE freezes what it does not reach, such as sequence pooling; InfoNCE reaches all that is left.
        for parameter in free:
            parameter.requires_grad_(True)
        super().__init__({"mae": (mae, mae_weight), "infonce": (infonce, infonce_weight)})

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """What the masked autoencoder makes of images of which it sees a part; see `MAE.reconstruct`."""
        mae = self._tasks["mae"]
        assert isinstance(mae, MAE)
        return mae.reconstruct(images, generator)
