"""Looking and intervening: exact, reversible, with clear refusals."""

from __future__ import annotations

import pytest
import torch

from vitrail.components.tap import edit, record, taps
from vitrail.models import build_model


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("vit_mnist_2blk").eval()


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(tap._forward_hooks) for tap in taps(model).values())


def test_record_gives_named_tensors_in_forward_order(model: torch.nn.Module) -> None:
    with record(model, "blocks.*.attn.weights", "embed", "blocks.*.out") as seen:
        model(torch.randn(3, 1, 28, 28))
    assert list(seen) == [
        "embed", "blocks.0.attn.weights", "blocks.0.out", "blocks.1.attn.weights", "blocks.1.out",
    ]  # fmt: skip
    assert seen["blocks.0.attn.weights"].shape == (3, 4, 17, 17)
    torch.testing.assert_close(seen["blocks.1.attn.weights"].sum(-1), torch.ones(3, 4, 17))


def test_recorded_output_equals_the_fused_one(model: torch.nn.Module) -> None:
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad(), record(model, "*"):
        watched = model(x)
    with torch.no_grad():
        torch.testing.assert_close(watched, model(x), atol=1e-5, rtol=0)


def test_gradients_reach_what_was_recorded(model: torch.nn.Module) -> None:
    with record(model, "blocks.0.attn.weights") as seen:
        logits = model(torch.randn(2, 1, 28, 28))
    (grad,) = torch.autograd.grad(logits[:, 3].sum(), seen["blocks.0.attn.weights"])
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(taps(build_model("vit_mnist_2blk"))))
def test_editing_any_tap_changes_the_output(model: torch.nn.Module, name: str) -> None:
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        plain = model(x)
        with edit(model, {name: lambda t: t * torch.linspace(0, 2, t.shape[-1])}):
            changed = model(x)
        assert not torch.allclose(plain, changed)
        assert torch.equal(plain, model(x))


def test_no_hook_stays_after_an_exception(model: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match="boom"), record(model, "*"), edit(model, {"embed": lambda t: t}):
        raise RuntimeError("boom")
    assert _hooks(model) == 0


def test_taps_leave_no_trace_in_the_state_dictionary(model: torch.nn.Module) -> None:
    assert not any(name in key for key in model.state_dict() for name in ("weights", "scores", "hidden"))


def test_unknown_tap_names_the_nearest(model: torch.nn.Module) -> None:
    expected = r"no tap matches 'blocks.0.attn.weigths'.*blocks.0.attn.weights"
    with pytest.raises(ValueError, match=expected), record(model, "blocks.0.attn.weigths"):
        pass
    assert _hooks(model) == 0


def test_edit_refuses_another_shape(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="changed the shape"), edit(model, {"embed": lambda t: t[:, 1:]}):
        model(torch.randn(1, 1, 28, 28))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_models_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="compiled"), record(torch.compile(model), "*"):
        pass
