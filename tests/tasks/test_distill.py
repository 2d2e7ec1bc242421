"""Distillation: the losses are the formulas, the teacher stays as it is, no label is read without need."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from vitrail.models import build_model
from vitrail.models.encoder import Encoder
from vitrail.tasks.distill import (
    Distill,
    check_same_classes,
    feature_loss,
    hard_loss,
    soft_loss,
    teacher_logits,
)

STUDENT = {"depth": 1, "embed_dim": 32}


def _student(seed: int = 0, name: str = "vit_mnist_2blk", **changes: Any) -> Encoder:
    torch.manual_seed(seed)
    return build_model(name, **{**STUDENT, **changes})


def _batch(count: int = 5, channels: int = 1, size: int = 28) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {"images": torch.randn(count, channels, size, size), "targets": torch.arange(count) % 3}


class NoLabels(dict):
    """A batch whose labels nobody may touch, not even to see whether they are there."""

    def __getitem__(self, key: str) -> Tensor:
        assert key != "targets", "a label was read"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        assert key != "targets", "a label was read"
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        assert key != "targets", "a label was asked for"
        return super().__contains__(key)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_soft_loss_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = 3.0 * torch.randn(2, 4, 6, dtype=torch.float64)
    total = 0.0
    for b in range(4):
        shares = []
        for logits in (teacher[b], student[b]):
            powers = [math.exp(float(value) / temperature) for value in logits]
            shares.append([power / sum(powers) for power in powers])
        total += sum(p * math.log(p / q) for p, q in zip(*shares, strict=True))
    expected = temperature**2 * total / 4
    assert float(soft_loss(student, teacher, temperature)) == pytest.approx(expected, abs=1e-6)


def test_soft_loss_by_hand() -> None:
    # Shares (3/4, 1/4) against (1/2, 1/2) at T = 2: 4 (3/4 ln(3/2) + 1/4 ln(1/2)).
    teacher, student = torch.tensor([[2.0 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 4.0 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(soft_loss(student, teacher, 2.0)) == pytest.approx(expected, abs=1e-6)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    """Hinton et al. 2015, section 2.1: at high T the gradient is that of half the squared difference / K."""
    torch.manual_seed(0)
    student = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(soft_loss(student, teacher, 1e4), student)
    expected = ((student - student.mean()) - (teacher - teacher.mean())) / 5
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    (sharp,) = torch.autograd.grad(soft_loss(student, teacher, 1.0), student)
    torch.testing.assert_close(sharp, student.softmax(dim=1) - teacher.softmax(dim=1))


def test_equal_answers_cost_nothing() -> None:
    logits = torch.randn(4, 10, requires_grad=True)
    loss = soft_loss(logits, logits.detach().clone(), 4.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
    model = _student().eval()
    task = Distill(model, teacher=_student(), alpha=1.0).eval()
    output = task(_batch(), 0)
    assert float(output["loss"].detach()) == pytest.approx(0.0, abs=1e-5)  # rounding, times T^2 = 16
    assert float(output["agreement"]) == 1.0


def test_hard_loss_is_cross_entropy_with_the_largest() -> None:
    student, teacher = torch.randn(2, 4, 6)
    expected = -sum(float(student[b].log_softmax(0)[int(teacher[b].argmax())]) for b in range(4)) / 4
    assert float(hard_loss(student, teacher)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum(alpha: float, hard: bool) -> None:
    model, teacher, batch = _student(0), _student(1), _batch()
    task = Distill(model, teacher=teacher, alpha=alpha, hard=hard, label_smoothing=0.1)
    assert task.temperature == 4.0
    logits, answer = model(batch["images"]), teacher(batch["images"])
    by_label = F.cross_entropy(logits, batch["targets"], label_smoothing=0.1)
    by_teacher = hard_loss(logits, answer) if hard else soft_loss(logits, answer, 4.0)
    output = task(batch, 0)
    torch.testing.assert_close(output["loss"], (1 - alpha) * by_label + alpha * by_teacher)
    torch.testing.assert_close(output["teacher_loss"], by_teacher)
    assert ("label_loss" in output) == (alpha < 1.0) == task.needs_labels
    assert task.trained() is model


def test_without_labels_none_is_read() -> None:
    batch = _batch()
    for options in ({}, {"hard": True}, {"features": "l2"}):
        task = Distill(_student(), teacher=_student(1), alpha=1.0, **options)
        task({"images": batch["images"]}, 0)
        guarded = task(NoLabels(batch), 0)["loss"]
        torch.testing.assert_close(guarded, task(batch | {"targets": batch["targets"] + 1}, 0)["loss"])
    with pytest.raises(AssertionError, match="a label was read"):
        Distill(_student(), teacher=_student(1), alpha=0.99)(NoLabels(batch), 0)


def test_the_teacher_stays_as_it_is_and_out_of_the_way() -> None:
    teacher = resnet18(num_classes=10)
    teacher.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = _student()
    task = Distill(model, teacher=teacher, alpha=1.0)
    own = {f"model.{name}" for name in model.state_dict()}
    assert task.state_dict().keys() == own == {name for name, _ in task.named_parameters()}
    task.train()
    assert not any(part.training for part in teacher.modules())
    task(_batch(), 0)["loss"].backward()
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=0.0, rtol=0.0)
    assert [name for name, value in task.named_parameters() if value.grad is None] == []
    task.to(torch.float64)
    assert next(task.teacher.parameters()).dtype == torch.float64


def test_a_teacher_may_want_other_images() -> None:
    """Student: 28 pixels, one channel, mean 0.13, deviation 0.31; teacher: 32 pixels, three, halves."""
    torch.manual_seed(0)
    teacher = build_model("vit_cifar_plain", depth=1)

    def prepare(images: Tensor) -> Tensor:
        pixels = (images * 0.31 + 0.13).expand(-1, 3, -1, -1)
        return (F.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True) - 0.5) / 0.5

    model, batch = _student(), _batch()
    task = Distill(model, teacher=teacher, prepare=prepare, alpha=1.0)
    answer = teacher_logits(teacher, batch["images"], prepare)
    assert not answer.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(answer, teacher(prepare(batch["images"])))
    expected = soft_loss(model(batch["images"]), answer, 4.0)
    torch.testing.assert_close(task(batch, 0)["loss"], expected)


def test_deits_two_heads_learn_from_two_masters() -> None:
    model = _student(name="deit_cifar", num_classes=10, num_heads=2)
    teacher = _student(1, name="vit_cifar_plain", num_heads=2)
    batch = _batch(channels=3, size=32)
    by_class, by_token = model.forward_heads(model.forward_features(batch["images"]))
    answer = teacher_logits(teacher, batch["images"])
    task = Distill(model, teacher=teacher, alpha=0.4, hard=True)
    output = task(batch, 0)
    expected = 0.6 * F.cross_entropy(by_class, batch["targets"]) + 0.4 * hard_loss(by_token, answer)
    torch.testing.assert_close(output["loss"], expected)

    # The token's head and the token itself learn from the teacher only; the class head from the labels only.
    output["label_loss"].backward(retain_graph=True)
    assert model.head_dist.weight.grad is None
    assert model.head.weight.grad.abs().sum() > 0
    task.zero_grad()
    output["teacher_loss"].backward()
    assert model.head.weight.grad is None
    assert model.head_dist.weight.grad.abs().sum() > 0
    assert model.dist_token.grad.abs().sum() > 0

    # Without labels no head is left behind: the model answers with the mean of both.
    label_free = Distill(model, teacher=teacher, alpha=1.0)
    task.zero_grad()
    output = label_free(NoLabels(batch), 0)
    both = (soft_loss(by_class, answer, 4.0) + soft_loss(by_token, answer, 4.0)) / 2
    torch.testing.assert_close(output["loss"], both)
    output["loss"].backward()
    assert [name for name, value in label_free.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_feature_loss_is_the_formula(kind: Any) -> None:
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    terms = []
    for b in range(3):
        for n in range(4):
            u, v = student[b, n], teacher[b, n]
            terms.append(
                float(((u - v) ** 2).mean()) if kind == "l2" else 1 - float(u @ v / (u.norm() * v.norm()))
            )
    assert float(feature_loss(student, teacher, kind)) == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_features_of_an_encoder_with_another_grid() -> None:
    """Student 4 x 4 of width 32, teacher 7 x 7 of width 64; both have a class token."""
    model = _student()
    torch.manual_seed(1)
    teacher = build_model("vit_mnist_2blk", patch_size=4).eval()
    batch = _batch()
    task = Distill(model, teacher=teacher, alpha=0.5, features="l2", feature_weight=0.7)
    plain = Distill(model, teacher=teacher, alpha=0.5)
    own, other = (one.forward_features(batch["images"]) for one in (model, teacher))
    resized = F.interpolate(own.map(), size=(7, 7), mode="bilinear", antialias=True)
    tokens = torch.cat([own.prefix[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    wanted = torch.cat([other.prefix[:, :1], other.patches], dim=1)
    expected = ((task.projection(tokens) - wanted) ** 2).mean()
    output = task(batch, 0)
    torch.testing.assert_close(output["feature_loss"], expected)
    torch.testing.assert_close(output["loss"], plain(batch, 0)["loss"] + 0.7 * expected)
    output["loss"].backward()
    assert [name for name, value in task.named_parameters() if value.grad is None] == []


def test_features_of_somebody_elses_cnn() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("resnet18", num_classes=10, in_chans=1)
    model, batch = _student(), _batch(size=28)
    task = Distill(model, teacher=teacher, features="cosine")
    output = task(batch, 0)
    maps = teacher.forward_features(batch["images"])
    own = F.interpolate(
        model.forward_features(batch["images"]).map(), size=maps.shape[2:], mode="bilinear", antialias=True
    )
    similarity = F.cosine_similarity(
        task.projection(own.permute(0, 2, 3, 1)), maps.permute(0, 2, 3, 1), dim=3
    )
    torch.testing.assert_close(output["feature_loss"], 1 - similarity.mean())
    torch.testing.assert_close(
        output["teacher_loss"], soft_loss(model(batch["images"]), teacher(batch["images"]), 4.0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"features": "l3"}, "features must be l2 or cosine, got 'l3'"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0, got -1.0"),
    ],
)
def test_bad_options_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Distill(_student(), teacher=_student(1), **options)


def test_bad_teachers_are_told_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"the teacher's answer .* \[1, 7\], the student's \[1, 10\]: they need"
    ):
        Distill(_student(), teacher=_student(1, num_classes=7))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    assert Distill(_student(), teacher=flat).projection is None
    with pytest.raises(ValueError, match="Sequential gives no features to learn from: leave features out"):
        Distill(_student(), teacher=flat, features="l2")
    tokens = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, in_chans=1)
    with pytest.raises(ValueError, match=r"must be maps \[B, E, rows, columns\], got \[1, 5, 192\]"):
        Distill(_student(img_size=32, patch_size=8), teacher=tokens, features="l2")


def test_classes_must_mean_the_same() -> None:
    check_same_classes(("cat", "dog"), ["cat", "dog"])
    with pytest.raises(ValueError, match="the teacher knows 3 classes, the data has 2"):
        check_same_classes(("cat", "dog"), ("cat", "dog", "cow"))
    with pytest.raises(ValueError, match="class 1 is 'dog' in the data, 'cow' for the teacher"):
        check_same_classes(("cat", "dog"), ("cat", "cow"))
