"""DINO: the loss, the schedules, the centre and the teacher are those of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.models import build_model
from vitrail.tasks.dino import DINO, Prototypes, dino_loss

TINY: dict[str, Any] = {"out_dim": 16, "crops": 2, "crop_size": 4}


def _task(**options: Any) -> DINO:
    torch.manual_seed(0)
    return DINO(build_model("vit_digits", depth=1, patch_embed="conv"), **{**TINY, **options})


def _batch(count: int = 3, crops: int = 2) -> dict[str, Tensor]:
    batch = {"views": torch.randn(count, 2, 1, 8, 8)}
    return batch | ({"crops": torch.randn(count, crops, 1, 4, 4)} if crops else {})


@pytest.mark.parametrize("crops", [0, 3])
def test_loss_is_the_papers_loop(crops: int) -> None:
    """Algorithm 1 with multi-crop (equation 3): a teacher's view against all other views of the student."""
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 5, dtype=torch.float64).softmax(dim=2)
    student = torch.randn(2 + crops, 4, 5, dtype=torch.float64).log_softmax(dim=2)
    terms = []
    for t in range(2):
        for s in range(2 + crops):
            if s != t:
                for b in range(4):
                    terms.append(-sum(float(teacher[t, b, k] * student[s, b, k]) for k in range(5)))
    assert float(dino_loss(student, teacher)) == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_forward_is_centring_sharpening_and_the_loss() -> None:
    task = _task(student_temperature=0.2, teacher_temperature=0.05, temperature_warmup=0.0)
    task.centre.normal_()
    batch = _batch()
    with torch.no_grad():
        shares = torch.stack(
            [
                ((task.teacher_head(task.teacher(view)) - task.centre) / 0.05).softmax(dim=1)
                for view in batch["views"].unbind(1)
            ]
        )
        seen = [*batch["views"].unbind(1), *batch["crops"].unbind(1)]
        logs = torch.stack([(task.head(task.model(one)) / 0.2).log_softmax(dim=1) for one in seen])
        expected = dino_loss(logs, shares)
        entropy = -(shares * shares.log()).sum(dim=2).mean()
    output = task(batch, 0)
    torch.testing.assert_close(output["loss"], expected)
    torch.testing.assert_close(output["teacher_entropy"], entropy / math.log(16))
    torch.testing.assert_close(output["kl"], expected - entropy)


def test_gradients_reach_the_student_alone() -> None:
    task = _task(hold_prototypes=0.0)
    task.begin(10)
    task(_batch(), 0)["loss"].backward()
    for name, parameter in task.named_parameters():
        if name.startswith("teacher"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_prototypes_are_held_at_the_beginning() -> None:
    task = _task(hold_prototypes=0.1)
    task.begin(20)
    for step, held in ((0, True), (1, True), (2, False)):
        task.zero_grad()
        task(_batch(), step)["loss"].backward()
        assert task.head.directions.grad is not None
        assert bool((task.head.directions.grad == 0).all()) == held, step
        assert task.head.mlp[0].weight.grad.abs().sum() > 0


def test_centre_and_teacher_move_by_the_formula() -> None:
    task = _task(momentum=0.9, centre_momentum=0.8)
    task.begin(10)
    task.centre.normal_()
    centre = task.centre.clone()
    before = {name: value.clone() for name, value in task.teacher.named_parameters()}
    heads = {name: value.clone() for name, value in task.teacher_head.named_parameters()}
    parts = [_batch(3), _batch(2)]
    for part in parts:  # a batch in two micro-batches
        task(part, 4)["loss"].backward()
    torch.testing.assert_close(task.centre, centre, atol=0.0, rtol=0.0)
    with torch.no_grad():
        for parameter in (*task.model.parameters(), *task.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
        views = torch.cat([part["views"] for part in parts]).flatten(0, 1)
        answers = task.teacher_head(task.teacher(views))
    task.after_step()
    torch.testing.assert_close(task.centre, 0.8 * centre + 0.2 * answers.mean(dim=0))
    momentum = 1.0 - 0.1 * (math.cos(math.pi * 4 / 10) + 1.0) / 2.0
    for teacher, student, old in (
        (task.teacher, task.model, before),
        (task.teacher_head, task.head, heads),
    ):
        now = dict(student.named_parameters())
        for name, value in teacher.named_parameters():
            torch.testing.assert_close(value, momentum * old[name] + (1.0 - momentum) * now[name])


def test_running_statistics_of_a_stem_follow_too() -> None:
    torch.manual_seed(0)
    task = DINO(build_model("vit_digits", depth=1), **TINY, momentum=0.5)
    task.train()
    assert not task.teacher.training
    own = {name: value.clone() for name, value in task.teacher.named_buffers()}
    task(_batch(), 0)["loss"].backward()
    for name, value in task.teacher.named_buffers():
        torch.testing.assert_close(value, own[name], atol=0.0, rtol=0.0)
    task.after_step()
    student = dict(task.model.named_buffers())
    name = next(name for name in own if name.endswith("running_mean"))
    torch.testing.assert_close(task.teacher.get_buffer(name), 0.5 * own[name] + 0.5 * student[name])


def test_evaluation_leaves_the_centre_alone() -> None:
    task = _task(centre_momentum=0.0, momentum=1.0)
    task.begin(10)
    batch = _batch()
    task(batch, 0)
    task.eval()
    task({key: value + 1.0 for key, value in batch.items()}, 0)
    task.train().after_step()
    with torch.no_grad():
        answers = task.teacher_head(task.teacher(batch["views"].flatten(0, 1)))
    torch.testing.assert_close(task.centre, answers.mean(dim=0))


def test_schedules_begin_and_end_as_told() -> None:
    task = _task(temperature_warmup=0.3)
    task.begin(100)
    assert task.momentum_at(0) == pytest.approx(0.996)
    assert task.momentum_at(50) == pytest.approx(0.998)
    assert task.momentum_at(100) == pytest.approx(1.0)
    temperatures = [task.teacher_temperature_at(step) for step in (0, 15, 30, 100)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert _task(temperature_warmup=0.0).teacher_temperature_at(0) == 0.07


def test_head_gives_cosines() -> None:
    torch.manual_seed(0)
    head = Prototypes(8, 32, 6, 10)
    x = torch.randn(5, 8)
    cosines = F.cosine_similarity(head.mlp(x)[:, None], head.directions[None], dim=2)
    torch.testing.assert_close(head(x), cosines)
    torch.testing.assert_close(head(x, hold=True), cosines)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, (96, 96)),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": (224, 448)}, (96, 192)),
        ("vit_mnist_2blk", {}, (14, 14)),
        ("vit_digits", {}, (4, 4)),
        ("pvt_v2_b0", {}, (96, 96)),
    ],
)
def test_crops_are_three_sevenths_of_the_image(
    name: str, changes: dict[str, Any], expected: tuple[int, int]
) -> None:
    task = DINO(build_model(name, **changes))
    assert (task.views.full, task.views.crops, task.views.crop_size) == (2, 8, expected)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cct_2_3x2_32"])
def test_small_crops_pass_other_architectures(name: str) -> None:
    torch.manual_seed(0)
    small = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16} if "swin" in name else {}
    model = build_model(name, img_size=32, **small)
    task = DINO(model, out_dim=8, crops=2)
    output = task(
        {"views": torch.randn(2, 2, 3, 32, 32), "crops": torch.randn(2, 2, 3, *task.views.crop_size)}, 0
    )
    output["loss"].backward()
    assert all(value.isfinite() for value in output.values())
    assert [name for name, own in task.named_parameters() if own.requires_grad and own.grad is None] == []
    task.after_step()


def test_without_crops_and_from_a_saved_state() -> None:
    task = _task(crops=0)
    task.begin(10)
    batch = _batch(crops=0)
    task(batch, 0)["loss"].backward()
    task.after_step()
    again = _task(crops=0)
    again.begin(10)
    again.load_state_dict(task.state_dict())
    torch.testing.assert_close(again(batch, 1)["loss"], task(batch, 1)["loss"], atol=0.0, rtol=0.0)
    assert task.trained() is task.teacher
    assert not task.needs_labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_dim": 1}, "out_dim must be at least 2, got 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"bottleneck_dim": -4}, "bottleneck_dim must be at least 1, got -4"),
        ({"crops": -1}, "crops must be at least 0, got -1"),
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1.5"),
        ({"centre_momentum": -0.1}, r"centre_momentum must lie in \[0, 1\], got -0.1"),
        ({"temperature_warmup": 30}, r"temperature_warmup must lie in \[0, 1\], got 30"),
        ({"hold_prototypes": 2}, r"hold_prototypes must lie in \[0, 1\], got 2"),
        ({"student_temperature": 0.0}, "student_temperature must be above 0, got 0.0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature must be above 0, got -1.0"),
        ({"first_teacher_temperature": math.nan}, "first_teacher_temperature must be above 0, got nan"),
    ],
)
def test_bad_options_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        _task(**options)
