"""Classification: the loss is the formula, and its parts are what they say."""

from __future__ import annotations

import pytest
import torch

from vitrail.models import build_model
from vitrail.tasks import build_task


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_is_smoothed_cross_entropy_of_labels_and_of_mixtures(smoothing: float) -> None:
    torch.manual_seed(0)
    model = build_model("vit_mnist_2blk").eval()
    task = build_task("classify", model, label_smoothing=smoothing)
    images, labels = torch.randn(6, 1, 28, 28), torch.tensor([3, 1, 4, 1, 5, 9])
    log_shares = model(images).log_softmax(dim=1)
    shares = torch.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    expected = -(shares * log_shares).sum(dim=1).mean()
    torch.testing.assert_close(task({"images": images, "targets": labels}, 0)["loss"], expected)
    torch.testing.assert_close(
        task({"images": images, "targets": torch.eye(10)[labels]}, 0)["loss"], expected
    )
    mixed = 0.3 * torch.eye(10)[labels] + 0.7 * torch.eye(10)[labels.roll(1)]
    by_hand = -((mixed * (1 - smoothing) + smoothing / 10) * log_shares).sum(dim=1).mean()
    torch.testing.assert_close(task({"images": images, "targets": mixed}, 0)["loss"], by_hand)


def test_a_task_gives_back_its_model() -> None:
    model = build_model("vit_mnist_2blk")
    task = build_task("classify", model)
    assert task.trained() is model
    task.after_step()
