"""Tasks joined on one encoder: a weighted sum, each part as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models import build_model
from vitrail.models.encoder import Encoder
from vitrail.tasks.classify import Classify
from vitrail.tasks.combined import Combined, MAEInfoNCE
from vitrail.tasks.contrastive import InfoNCE
from vitrail.tasks.dino import DINO
from vitrail.tasks.mae import MAE
from vitrail.tasks.task import Batch, Task, Views


class Brightness(Task):
    """A task that keeps what it was given."""

    def __init__(self, model: Encoder, views: Views | None = None) -> None:
        super().__init__()
        self.model = self.saved = model
        self.views = Views() if views is None else views
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: Batch = {}
        self.calls: list[object] = []

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.seen = batch
        return {"loss": self.gain * batch["images" if self.views.full == 1 else "views"].mean()}

    def begin(self, total_steps: int) -> None:
        self.calls.append(total_steps)

    def after_step(self) -> None:
        self.calls.append("after")

    def trained(self) -> Encoder:
        return self.saved


def _digits(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_model("vit_digits", **{"depth": 1, "patch_embed": "conv", **changes})


def test_the_loss_is_the_weighted_sum_and_each_part_is_logged() -> None:
    model = _digits()
    task = MAEInfoNCE(model, decoder_dim=32, decoder_depth=1)
    assert task.weights == {"mae": 0.8, "infonce": 0.2}
    assert task.views == Views(full=2)
    assert not task.needs_labels
    assert not task.classifies
    assert task.trained() is task.model is model
    views = torch.randn(6, 2, 1, 8, 8)
    torch.manual_seed(3)
    output = task({"views": views}, 0)
    torch.manual_seed(3)
    mae = task.parts["mae"]({"images": views[:, 0]}, 0)
    infonce = task.parts["infonce"]({"views": views}, 0)
    torch.testing.assert_close(output["loss"], 0.8 * mae["loss"] + 0.2 * infonce["loss"])
    expected = {f"mae_{key}": value for key, value in mae.items()}
    expected |= {f"infonce_{key}": value for key, value in infonce.items()}
    assert output.keys() == {"loss"} | expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(output[key], value)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (3.0, 0.5)])
def test_gradients_are_those_of_the_parts(weights: tuple[float, float]) -> None:
    views = torch.randn(6, 2, 1, 8, 8)

    def gradients(task: Task, model: Encoder, batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        task(batch, 0)["loss"].backward()
        return {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }

    model = _digits()
    task = MAEInfoNCE(model, mae_weight=weights[0], infonce_weight=weights[1], decoder_depth=1)
    of_mae = gradients(task.parts["mae"], model, {"images": views[:, 0]})
    of_infonce = gradients(task.parts["infonce"], model, {"views": views})
    together = gradients(task, model, {"views": views})
    assert together.keys() == {name for name, _ in model.named_parameters()}
    for name, value in together.items():
        expected = weights[0] * of_mae[name] + weights[1] * of_infonce[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


def test_what_only_infonce_reaches_is_trained() -> None:
    """MAE alone freezes sequence pooling; what the user froze stays frozen."""
    seqpool = {"class_token": False, "pool": "seqpool"}
    alone = _digits(**seqpool)
    MAE(alone)
    assert not alone.attention_pool.weight.requires_grad
    model = _digits(**seqpool)
    model.patch_embed.requires_grad_(False)
    task = MAEInfoNCE(model)
    task({"views": torch.randn(4, 2, 1, 8, 8)}, 0)["loss"].backward()
    free = {name for name, value in task.named_parameters() if value.requires_grad}
    assert free == {name for name, value in task.named_parameters() if value.grad is not None}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("patch_embed")}
    assert frozen


def test_each_part_sees_what_it_asked_for() -> None:
    model = _digits(patch_embed="stem")
    one, two = Brightness(model), Brightness(model, Views(full=2))
    dino = DINO(model, out_dim=8, crops=3, crop_size=4, momentum=1.0)
    task = Combined({"one": (one, 1.0), "two": (two, 0.5)})
    batch = {"views": torch.randn(4, 2, 1, 8, 8), "targets": torch.arange(4)}
    output = task(batch, 0)
    torch.testing.assert_close(output["loss"], batch["views"][:, 0].mean() + 0.5 * batch["views"].mean())
    assert one.seen.keys() == {"images", "targets"}
    assert one.seen["images"].equal(batch["views"][:, 0])
    assert two.seen is batch
    assert Combined({"one": (one, 1.0), "other": (Brightness(model), 1.0)}).views == Views()

    three = Brightness(model, Views(full=3))
    three.saved = dino.trained()
    task = Combined({"three": (three, 1.0), "dino": (dino, 1.0)})
    assert task.views == Views(full=3, crops=3, crop_size=(4, 4))
    views, crops = torch.randn(2, 3, 1, 8, 8), torch.randn(2, 3, 1, 4, 4)
    together = task({"views": views, "crops": crops}, 0)
    alone = dino({"views": views[:, :2], "crops": crops}, 0)
    torch.testing.assert_close(together["dino_loss"], alone["loss"], atol=1e-3, rtol=1e-3)

    task.begin(12)
    task.after_step()
    assert three.calls == [12, "after"]


def test_labels_are_asked_for_by_whoever_needs_them() -> None:
    model = _digits()
    contrastive = Brightness(model, Views(full=2))
    task = Combined({"classify": (Classify(model), 1.0), "bright": (contrastive, 0.1)})
    assert task.needs_labels
    assert task.classifies
    output = task({"views": torch.randn(4, 2, 1, 8, 8), "targets": torch.arange(4)}, 0)
    assert output.keys() == {"loss", "classify_loss", "bright_loss"}


def test_a_saved_state_is_the_same_task_again() -> None:
    task = MAEInfoNCE(_digits())
    state = {name: value.clone() for name, value in task.state_dict().items()}
    other = MAEInfoNCE(build_model("vit_digits", depth=1, patch_embed="conv"))
    other.load_state_dict(state)
    batch = {"views": torch.randn(4, 2, 1, 8, 8)}
    losses = []
    for each in (task, other):
        torch.manual_seed(5)
        losses.append(each(batch, 0)["loss"])
    torch.testing.assert_close(*losses, atol=0.0, rtol=0.0)
    names = [name for name, _ in task.named_parameters()]
    assert len(names) == len({id(value) for value in task.parameters()})


@pytest.mark.parametrize("weights", [(-0.1, 1.0), (float("nan"), 1.0), (0.0, 0.0)])
def test_bad_weights_are_told_in_one_line(weights: tuple[float, float]) -> None:
    with pytest.raises(
        ValueError, match=r"^(the weight of mae must be|a weight above 0 is needed), .*$|^the wei"
    ):
        MAEInfoNCE(_digits(), mae_weight=weights[0], infonce_weight=weights[1])


def test_what_does_not_fit_together_is_told_in_one_line() -> None:
    with pytest.raises(ValueError, match="one and two train different models: they cannot be combined"):
        Combined({"one": (InfoNCE(_digits()), 1.0), "two": (InfoNCE(_digits()), 1.0)})
    model = _digits()
    small, smaller = (Brightness(model, Views(full=2, crops=2, crop_size=(n, n))) for n in (4, 6))
    with pytest.raises(ValueError, match="a and b want different small crops: they cannot be combined"):
        Combined({"a": (small, 1.0), "b": (smaller, 1.0)})
    with pytest.raises(ValueError, match="task mae leaves patches out, which Swin"):
        MAEInfoNCE(build_model("swin_tiny_patch4_window7_224", img_size=32, depths=(1, 1), num_heads=(2, 4)))
