"""Rollout and relevance against products of full matrices, written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.explain.test_attention import ALL, full_matrices, images, lively, recorded, tiny
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.flow import Flow, MergeStep
from vitrail.components.tap import edit, record, taps
from vitrail.explain.rollout import attention_flow, attention_rollout, gradient_rollout, relevance
from vitrail.models import build_model


def test_three_layers_by_hand() -> None:
    """Abnar and Zuidema's product on weights that are put in, and its class-token row."""
    model = tiny(registers=1)
    weights = torch.rand(3, 3, 2, 18, 18, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)
    edits = {f"blocks.{n}.attn.weights": lambda _, n=n: weights[n] for n in range(3)}
    with edit(model, edits):
        found = attention_rollout(model, images())
    product = torch.eye(18)
    for layer in weights:
        mixed = layer.mean(dim=1) + torch.eye(18)
        product = mixed / mixed.sum(dim=-1, keepdim=True) @ product
    torch.testing.assert_close(found.values.flatten(1), product[:, 0, 2:])
    torch.testing.assert_close(found.prefix, product[:, 0, :2].sum(dim=1))
    torch.testing.assert_close(found.values.sum(dim=(1, 2)) + found.prefix, torch.ones(3))


def brute_force(flow: Flow, fused: dict[str, Tensor], shares: dict[str, Tensor], divide: bool) -> Tensor:
    """Products of matrices over all tokens of all branches, from the first layer on; [B, all start tokens].

    Args:
        flow: Of the model.
        fused: As a tap gives it, but with the heads fused to one: [B, 1, Q, K], of windows [B * W, 1, n, n].
        shares: Of sequence pooling.
        divide: Rows of A + I by one plus the sums of A's absolute values.
    """
    tokens = list(flow.start)
    B = shares[next(iter(shares))].shape[0] if shares else None
    state: Tensor | None = None  # [B, tokens of all branches now, tokens of all branches at the start]

    def at(branch: int) -> slice:
        first = sum(own.count for own in tokens[:branch])
        return slice(first, first + tokens[branch].count)

    for step in flow.steps:
        if isinstance(step, MergeStep):
            assert state is not None
            after, before = step.after, step.before
            matrix = state.new_zeros(after.count, before.count)
            matrix[: before.prefix, : before.prefix] = torch.eye(before.prefix)
            assert step.cells.side == 2
            cell = after.prefix
            for top, bottom in step.cells.rows:
                for left, right in step.cells.columns:
                    for row in range(top, bottom):
                        for column in range(left, right):
                            place = before.prefix + row * before.grid[1] + column
                            matrix[cell, place] = 1 / 4  # where one is missing, zeros fill its place
                    cell += 1
            state, tokens[step.branch] = matrix @ state, after
            continue
        parts = full_matrices(step, fused[step.name])
        B = next(iter(parts.values())).shape[0]
        total = sum(own.count for own in tokens)
        if state is None:
            state = torch.eye(total).expand(B, -1, -1)
        layer = torch.eye(total).repeat(B, 1, 1)
        for branch, part in parts.items():
            layer[:, at(step.branch), at(branch)] += part[:, 0]
        if divide:
            if step.keys is None:
                sizes = sum(part[:, 0].abs().sum(dim=2) for part in parts.values())
            else:  # padding included, which the matrices leave out
                sizes = fused[step.name][:, 0].abs().sum(dim=2)
            layer[:, at(step.branch)] /= 1 + sizes[:, :, None]
        state = layer @ state
    assert state is not None
    answer = state.new_zeros(len(state), state.shape[2])
    for head in flow.reads:
        own = state[:, at(head.branch)]
        prefix = tokens[head.branch].prefix
        if head.prefix:
            row = own[:, : head.prefix].mean(dim=1)
        elif head.shares:
            row = (shares[head.shares] * own[:, prefix:]).sum(dim=1)
        else:
            row = own[:, prefix:].mean(dim=1)
        answer = answer + row / len(flow.reads)
    return answer


def on_finest(flow: Flow, answer: Tensor) -> Tensor:
    """What comes from each patch, [B, rows, columns] of the finest start grid, pixel by pixel."""
    whole = flow.start[0].cells
    height, width = whole.rows[-1][1], whole.columns[-1][1]
    pixels = answer.new_zeros(len(answer), height, width)
    first = 0
    for own in flow.start:
        patches = answer[:, first + own.prefix : first + own.count].unflatten(1, own.grid)
        for i, (top, bottom) in enumerate(own.cells.rows):
            for j, (left, right) in enumerate(own.cells.columns):
                part = patches[:, i, j, None, None] / (bottom - top) / (right - left)
                pixels[:, top:bottom, left:right] += part
        first += own.count
    finest = max(flow.start, key=lambda own: own.count).cells
    return torch.stack(
        [
            torch.stack([pixels[:, a:b, c:d].sum(dim=(1, 2)) for c, d in finest.columns], dim=1)
            for a, b in finest.rows
        ],
        dim=1,
    )


def padded(flow: Flow) -> bool:
    """Whether zeros fill up a square of patches somewhere."""
    used = [step.cells if isinstance(step, MergeStep) else step.keys for step in flow.steps]
    spans = [(cells.side, span) for cells in used if cells for span in (*cells.rows, *cells.columns)]
    return any(side is not None and stop - start < side for side, (start, stop) in spans)


# Full matrices of pyramids at odd sizes; CrossViT where its cells divide the image, so that none overlap.
@pytest.mark.parametrize(("name", "changes"), ALL)
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rollout_equals_the_product_of_full_matrices(name: str, changes: dict[str, Any], heads: Any) -> None:
    model = lively(name, changes)
    size = (24, 32) if name == "crossvit_cifar" else (22, 36)
    pixels = torch.randn(2, model.config.in_chans, *size)
    flow, weights, shares = recorded(model, pixels)
    fused = {
        layer: own.mean(dim=1, keepdim=True) if heads == "mean" else own.amax(dim=1, keepdim=True)
        for layer, own in weights.items()
    }
    answer = brute_force(flow, fused, shares, divide=True)
    found = attention_rollout(model, pixels, heads=heads)
    torch.testing.assert_close(found.values, on_finest(flow, answer), atol=1e-6, rtol=1e-5)
    if not any((own < 0).any() for own in fused.values()):
        total = found.values.sum(dim=(1, 2)) + found.prefix
        if padded(flow):
            assert ((total > 0.5) & (total < 1)).all()
        else:
            torch.testing.assert_close(total, torch.ones(2))
    assert found.in_pixels().shape == (2, *size)


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_relevance_equals_its_equations(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)
    pixels = torch.randn(2, model.config.in_chans, 24, 32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    target = torch.tensor([3, 1])
    flow = model.flow((24, 32))
    names = [f"{step.name}.weights" for step in flow.attentions]
    taken = [head.shares for head in flow.reads if head.shares]
    with record(model, *names, *taken) as seen:
        logits = model(pixels.requires_grad_())
    score = logits[0, 3] + logits[1, 1]
    gradients = torch.autograd.grad(score, [seen[own] for own in names])
    fused = {
        own.removesuffix(".weights"): F.relu(gradient * seen[own]).mean(dim=1, keepdim=True).detach()
        for own, gradient in zip(names, gradients, strict=True)
    }
    shares = {own: seen[own].detach() for own in taken}
    for method, divide in ((relevance, False), (gradient_rollout, True)):
        expected = on_finest(flow, brute_force(flow, fused, shares, divide))
        found = method(model, pixels.detach(), target)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.values / scale, expected / scale, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tap.watched for tap in taps(model).values())


def test_discard_keeps_the_largest() -> None:
    model = tiny()
    flow, weights, shares = recorded(model, images())
    fused = {}
    for layer, own in weights.items():
        mean = own.mean(dim=1, keepdim=True)
        kept = mean.clone()
        for image in range(3):
            flat = kept[image].flatten()
            order = sorted(range(len(flat)), key=lambda n: float(flat[n]))
            for place in order[: int(0.7 * len(flat))]:
                flat[place] = 0.0
            kept[image] = flat.reshape(kept[image].shape)
        fused[layer] = kept
    expected = on_finest(flow, brute_force(flow, fused, shares, divide=True))
    found = attention_rollout(model, images(), discard=0.7)
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.values.sum(dim=(1, 2)) + found.prefix, torch.ones(3))


def test_where_a_patch_comes_from() -> None:
    model = tiny()
    _, weights, _ = recorded(model, images())
    product = torch.eye(17)
    for own in weights.values():
        mixed = own.mean(dim=1) + torch.eye(17)
        product = mixed / mixed.sum(dim=-1, keepdim=True) @ product
    found = attention_rollout(model, images(), point=(2, 5))  # row 1, column 2
    torch.testing.assert_close(found.values.flatten(1), product[:, 1 + 6, 1:])


def test_mistakes() -> None:
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="discard: expected 0 to below 1"):
            attention_rollout(tiny(), images(), discard=bad)
    with pytest.raises(ValueError, match="heads: expected 'mean', 'max' or 'min'"):
        attention_rollout(tiny(), images(), heads="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class"):
        relevance(build_model("vit_digits"), images(), 11)


def test_flow_through_three_layers_equals_a_linear_programme() -> None:
    from scipy.optimize import linprog

    model = tiny()
    _, weights, _ = recorded(model, images())
    pipes = []
    for own in weights.values():
        mixed = own[0].mean(dim=0) + torch.eye(17)
        pipes.append(mixed / mixed.sum(dim=-1, keepdim=True))
    found = attention_flow(model, images()[:1])
    for patch in (0, 7, 15):
        # One variable a pipe: how much flows from a token to one before it.
        widths = torch.stack(pipes).flatten().tolist()
        inside = torch.zeros(3 * 17, len(widths))
        wanted = torch.zeros(len(widths))
        for layer in range(3):
            for asks in range(17):
                for asked in range(17):
                    pipe = (layer * 17 + asks) * 17 + asked
                    if layer < 2:
                        inside[layer * 17 + asks, pipe] -= 1.0  # leaves the token after layer + 1
                    if layer == 2 and asks != 0:
                        inside[2 * 17 + asks, pipe] = 1.0  # nothing comes from tokens that are not read
                    if layer > 0:
                        inside[(layer - 1) * 17 + asked, pipe] += 1.0  # reaches the token after layer
                    if layer == 0:
                        wanted[pipe] = -1.0 if asked == patch + 1 else 0.0
                        if asked != patch + 1:
                            widths[pipe] = 0.0
        solved = linprog(
            wanted.numpy(), A_eq=inside.numpy(), b_eq=[0.0] * 51, bounds=[(0.0, width) for width in widths]
        )
        assert found.values.flatten()[patch] == pytest.approx(-solved.fun, abs=1e-4)


def test_flow_is_for_small_cases() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    found = attention_flow(lively("swin_cifar", {"depths": (1, 1)}), pixels[:, :, :8, :8])
    assert found.values.shape == (1, 4, 4)
    assert 0 < float(found.values.min()) <= float(found.values.max()) <= 1
    with pytest.raises(ValueError, match="no negative weights"):
        attention_flow(lively("diffvit_cifar", {}), pixels)
    with pytest.raises(ValueError, match="for one branch"):
        attention_flow(lively("crossvit_cifar", {}), pixels)
    with pytest.raises(ValueError, match="at most 4,000 tokens"):
        attention_flow(build_model("vit_cifar").eval(), torch.randn(1, 3, 160, 160))
