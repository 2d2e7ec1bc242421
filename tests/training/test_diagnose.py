"""The first thing that is not finite is named, whatever it is, and looking for it changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitrail.models import build_model
from vitrail.tasks import Batch, Classify, Task
from vitrail.training.diagnose import NonFinite, first_nonfinite


def _task(**options: object) -> Classify:
    torch.manual_seed(0)
    return Classify(build_model("vit_mnist_2blk", drop=0.1, drop_path=0.1, **options)).train()


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return {"images": torch.randn(6, 1, 28, 28, generator=generator), "targets": torch.arange(6)}


class _OwnLoss(Task):
    """A model whose output a function makes into the loss."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.loss = loss

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": self.loss(self.model(batch["images"]))}

    def trained(self) -> nn.Module:
        return self.model


def _snapshot(task: Task) -> list[Tensor]:
    state = [value.clone() for value in task.state_dict().values()]
    return [*state, *(own.grad.clone() for own in task.parameters() if own.grad is not None)]


@pytest.mark.parametrize("broken", [False, True])
def test_looking_changes_nothing_and_leaves_no_hook(broken: bool) -> None:
    torch.manual_seed(0)
    task = _OwnLoss(lambda x: x.sum() * (float("nan") if broken else 1.0)).train()
    batch = {"images": torch.randn(5, 4)}
    task.model(batch["images"]).sum().backward()
    before, random = _snapshot(task), torch.get_rng_state()
    assert (first_nonfinite(task, batch, 0) is not None) == broken
    after = _snapshot(task)
    assert len(before) == len(after) == 6 + 3 + 6  # parameters, buffers, gradients
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in task.modules())
    assert not any(own._backward_hooks for own in task.parameters())


def test_a_healthy_step_has_nothing_to_find() -> None:
    assert first_nonfinite(_task(), _batch(), 0) is None


def test_bad_pixels_are_named_by_image() -> None:
    batch = _batch()
    batch["images"][3, 0, 5, 5] = float("nan")
    batch["images"][5, 0, 0, 0] = float("inf")
    found = first_nonfinite(_task(), batch, 0)
    assert found == NonFinite(kind="input", name="images", dtype=torch.float32, images=(3, 5))
    assert "image 3, 5 of the batch" in found.advice()
    soft = _batch() | {"targets": torch.full((6, 10), 0.1)}
    soft["targets"][2, 4] = float("nan")
    found = first_nonfinite(_task(), soft, 0)
    assert found is not None
    assert (found.kind, found.name, found.images) == ("input", "targets", (2,))


def test_weights_that_are_not_finite_are_named_before_what_follows_from_them() -> None:
    task = _task()
    with torch.no_grad():
        task.model.blocks[1].mlp.fc2.bias[7] = float("nan")
        task.model.head.weight.fill_(float("nan"))
    found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert (found.kind, found.name) == ("weight", "model.blocks.1.mlp.fc2.bias")
    with torch.no_grad():
        for own in task.parameters():
            own.fill_(float("nan"))  # what an update with a gradient of nan leaves
    found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert (found.kind, found.name) == ("weight", next(name for name, _ in task.named_parameters()))
    assert "checkpoint" in found.advice()


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("patch_embed.proj", "model.patch_embed.proj"),
        ("blocks.1.mlp.fc1", "model.blocks.1.mlp.fc1"),
        ("head", "model.head"),
    ],
)
def test_the_innermost_module_that_overflows_is_named(layer: str, name: str) -> None:
    task = _task()
    with torch.no_grad():
        task.model.get_submodule(layer).weight.fill_(3e38)
    found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert (found.kind, found.name) == ("activation", name)


def test_attention_that_overflows_is_named_in_the_fused_kernel() -> None:
    task = _task()
    attention = task.model.blocks[1].attn
    with torch.no_grad():
        attention.qkv.weight[:128] *= 1e22  # queries and keys are finite, their product is not
    found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert (found.kind, found.name) == ("activation", "model.blocks.1.attn.mixed")
    assert "qk_norm" in found.advice()


def test_the_loss_itself() -> None:
    found = first_nonfinite(_OwnLoss(lambda x: (x * 0).log().sum()), {"images": torch.randn(5, 4)}, 0)
    assert found is not None
    assert (found.kind, found.name) == ("loss", "loss")
    assert "logarithm of 0" in found.advice()


def test_a_gradient_that_is_not_finite_is_named_from_the_loss_on() -> None:
    found = first_nonfinite(_OwnLoss(lambda x: (x * 0).sum().sqrt()), {"images": torch.randn(5, 4)}, 0)
    assert found is not None
    assert found.kind == "gradient"
    assert found.name in {"model.2.weight", "model.2.bias"}  # not of the layers below
    assert "clip_norm" in found.advice()


def test_advice_fits_the_precision() -> None:
    advice = {
        precision: NonFinite(kind="activation", name="model.head", dtype=precision).advice()
        for precision in (torch.float16, torch.bfloat16, torch.float32)
    }
    assert "--train.precision bf16" in advice[torch.float16]
    assert "--train.precision fp32" in advice[torch.bfloat16]
    assert "--train.precision" not in advice[torch.float32]
    assert all("\n" not in line and "optim.lr" in line for line in advice.values())


def test_autocast_tells_the_precision() -> None:
    task = _task()
    with torch.no_grad():
        task.model.head.weight.fill_(3e38)
    with torch.autocast("cpu", torch.bfloat16):
        found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert found.dtype == torch.bfloat16


def test_a_real_divergence_is_traced_to_its_layer() -> None:
    """Plain gradient descent with a rate far too high, until the loss is not finite."""
    task = _task()
    with torch.no_grad():
        while bool(task(_batch(), 0)["loss"].isfinite()):
            with torch.enable_grad():
                loss = task(_batch(), 0)["loss"]
                gradients = torch.autograd.grad(loss, list(task.parameters()), allow_unused=True)
            for own, gradient in zip(task.parameters(), gradients, strict=True):
                if gradient is not None:
                    own -= 1e12 * gradient
    found = first_nonfinite(task, _batch(), 0)
    assert found is not None
    assert found.kind in {"weight", "activation"}
    assert found.name in {name for name, _ in (*task.named_parameters(), *task.named_modules())}
