"""Attention maps against the attention equation worked out from the block's own input, and slow loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.components.flow import AttentionStep, Flow, squares
from vitrail.components.tap import record, taps
from vitrail.explain import attention_layers, attention_maps, keep_mass
from vitrail.explain.attention import patch_attention
from vitrail.models import Encoder, build_model


def tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    model = build_model("vit_digits", **({"embed_dim": 16, "depth": 3, "num_heads": 2} | changes)).eval()
    for parameter in model.parameters():  # fresh weights attend almost evenly, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def images(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(3, 1, height, width, generator=torch.Generator().manual_seed(1))


def weights_by_hand(model: Encoder, layer: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) [B, H, L, L] from what enters the attention of a block."""
    block = model.get_submodule(f"blocks.{layer}")
    seen = []
    handle = block.get_submodule("norm1").register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(images())
        handle.remove()
        D = seen[0].shape[2]
        q, k, _ = block.get_submodule("attn.qkv")(seen[0]).split(D, dim=2)
        d = D // 2
        rows = []
        for head in range(2):
            own = slice(head * d, (head + 1) * d)
            rows.append((q[:, :, own] @ k[:, :, own].transpose(1, 2) / d**0.5).softmax(dim=2))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("layer", "number"), [(-1, 2), (0, 0), (1, 1)])
@pytest.mark.parametrize("registers", [0, 2])
def test_class_token_rows(layer: int, number: int, registers: int) -> None:
    model = tiny(registers=registers)
    weights = weights_by_hand(model, number)
    expected = weights[:, :, 0, 1 + registers :].reshape(3, 2, 4, 4)
    (found,) = attention_maps(model, images(), layers=[layer], heads="all")
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.prefix, weights[:, :, 0, : 1 + registers].sum(dim=2))
    assert (found.layer, found.asks) == (f"blocks.{number}.attn", "class token")
    for heads, fused in (
        ("mean", expected.mean(dim=1)),
        ("max", expected.amax(dim=1)),
        ("min", expected.amin(dim=1)),
        (1, expected[:, 1]),
    ):
        (found,) = attention_maps(model, images(), layers=[layer], heads=heads)  # type: ignore[arg-type]
        torch.testing.assert_close(found.values, fused)


def test_a_patch_asks() -> None:
    model = tiny(registers=1)
    expected = weights_by_hand(model, 1)[:, :, 2 + 6, 2:].reshape(3, 2, 4, 4)  # row 1, column 2
    (found,) = attention_maps(model, images(), layers=[1], heads="all", point=(3, 4))
    torch.testing.assert_close(found.values, expected)
    assert found.asks == "patch"
    pixels = found.in_pixels()
    assert pixels.shape == (3, 2, 8, 8)
    torch.testing.assert_close(pixels[:, :, 3, 4], expected[:, :, 1, 2])
    with pytest.raises(ValueError, match="row 8 lies outside: expected 0 to 7"):
        attention_maps(model, images(), point=(8, 0))


@pytest.mark.parametrize("registers", [0, 1])
def test_without_class_token_what_patches_receive(registers: int) -> None:
    model = tiny(class_token=False, pool="mean", registers=registers)
    weights = weights_by_hand(model, 2)[:, :, registers:, registers:]
    (found,) = attention_maps(model, images(), layers=[-1], heads="all")
    torch.testing.assert_close(found.values, weights.mean(dim=2).reshape(3, 2, 4, 4))
    assert found.asks == "mean of the patches"


def test_bad_layer_and_head() -> None:
    with pytest.raises(ValueError, match="no layer 3: expected -3 to 2"):
        attention_maps(tiny(), images(), layers=[3])
    with pytest.raises(ValueError, match="-2 to 1, got 2"):
        attention_maps(tiny(), images(), heads=2)
    with pytest.raises(ValueError, match="got 'median'"):
        attention_maps(tiny(), images(), heads="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in layer 9 .* only the class token asks"):
        attention_maps(build_model("cait_cifar"), torch.randn(1, 3, 32, 32), layers=[9], point=(0, 0))
    assert not any(tap.watched for tap in taps(tiny()).values())


ALL = [
    ("vit_cifar", {}),
    ("vit_cifar", {"attention": "linear"}),
    ("vit_cifar", {"attention": "sparse_local"}),
    ("vit_cifar", {"attention": "sparse_topk"}),
    ("deit_cifar", {"depth": 2, "registers": 1}),
    ("diffvit_cifar", {}),
    ("cct_2_3x2_32", {}),
    ("cait_cifar", {"depth": 2}),
    ("crossvit_cifar", {"depth": 2}),
    ("pvt_cifar", {}),
    ("pvt_v2_cifar", {}),
    ("pvt_v2_cifar", {"linear": True}),
    ("swin_cifar", {}),
    ("swinv2_cifar", {}),
    ("swin_mnist_2blk", {}),
]


def lively(name: str, changes: dict[str, Any]) -> Encoder:
    """A model whose attention is neither uniform nor on one token."""
    torch.manual_seed(0)
    model = build_model(name, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def full_matrices(step: AttentionStep, weights: Tensor) -> dict[int, Tensor]:
    """Attention of a step among all tokens, token by token: branch -> [B, H, T, T of that branch].

    Rows of tokens that do not ask are zero. Independent of `draw`: loops over windows and cells.
    """
    tokens, first = step.tokens, step.skipped
    rows, columns = tokens.grid
    if step.windows is not None:
        W = step.windows.num_windows[0] * step.windows.num_windows[1]
        order = step.windows.order().reshape(W, -1).tolist()
        wide = step.windows.padded[1]
        B = len(weights) // W
        full = weights.new_zeros(B, weights.shape[1], tokens.count, tokens.count)
        for image in range(B):
            for window, places in enumerate(order):
                real = [
                    (own, place // wide * columns + place % wide)
                    for own, place in enumerate(places)
                    if place // wide < rows and place % wide < columns
                ]
                for own, asks in real:
                    for other, asked in real:
                        full[image, :, asks, asked] = weights[image * W + window, :, own, other]
        return {step.branch: full}
    B, H, Q, _ = weights.shape
    full = weights.new_zeros(B, H, tokens.count, tokens.count)
    if step.asked is not None:
        other, theirs = step.asked
        cross = weights.new_zeros(B, H, tokens.count, theirs.count)
        full[:, :, 0, 0], cross[:, :, 0, theirs.prefix :] = weights[:, :, 0, 0], weights[:, :, 0, 1:]
        return {step.branch: full, other: cross}
    if step.keys is None:
        full[:, :, first : first + Q, first:] = weights
        return {step.branch: full}
    key = 0
    for top, bottom in step.keys.rows:
        for left, right in step.keys.columns:
            for row in range(top, bottom):
                for column in range(left, right):
                    parts = step.keys.side**2 if step.keys.side else (bottom - top) * (right - left)
                    share = weights[..., key] / parts
                    full[:, :, :, tokens.prefix + row * columns + column] += share
            key += 1
    return {step.branch: full}


def recorded(model: Encoder, pixels: Tensor) -> tuple[Flow, dict[str, Tensor], dict[str, Tensor]]:
    """The flow, what the taps of all attentions hold, and the shares of sequence pooling."""
    flow = model.flow((pixels.shape[2], pixels.shape[3]))
    shares = [head.shares for head in flow.reads if head.shares]
    names = [f"{step.name}.weights" for step in flow.attentions]
    with torch.no_grad(), record(model, *names, *shares) as seen:
        model(pixels)
    return (
        flow,
        {name.removesuffix(".weights"): seen[name] for name in names},
        {own: seen[own] for own in shares},
    )


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_every_layer_of_every_architecture(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)
    pixels = torch.randn(2, model.config.in_chans, 30, 44)
    with torch.no_grad():
        before = model(pixels)
    flow, weights, _ = recorded(model, pixels)
    assert set(attention_layers(model)) == set(weights)  # no attention is left out
    assert {f"{layer}.weights" for layer in weights} == {
        own for own in taps(model) if own.endswith(".weights")
    }
    found = attention_maps(model, pixels, heads="all")
    points = {own.layer: own for own in attention_maps(model, pixels, heads="all", point=(17, 30))}
    for step, own in zip(flow.attentions, found, strict=True):
        matrices = full_matrices(step, weights[step.name])
        branch, tokens = step.asked or (step.branch, step.tokens)
        full = matrices[branch]
        asks = full[:, :, :1] if own.asks == "class token" else full[:, :, step.tokens.prefix :]
        expected = asks.mean(dim=2)
        torch.testing.assert_close(
            own.values.flatten(2), expected[:, :, tokens.prefix :], atol=1e-6, rtol=1e-5
        )
        everything = sum(part[:, :, 0].sum(dim=2) for part in matrices.values())
        if own.asks == "class token":
            torch.testing.assert_close(own.values.sum(dim=(2, 3)) + own.prefix, everything)
        if step.name in points:
            row, column = tokens.cells.find(17, 30)
            place = tokens.prefix + row * tokens.grid[1] + column
            asked = full[:, :, place, tokens.prefix :]
            torch.testing.assert_close(points[step.name].values.flatten(2), asked, atol=1e-6, rtol=1e-5)
        else:
            assert step.class_only
        assert own.in_pixels().shape[2:] == (30, 44)
    with torch.no_grad():
        assert torch.equal(model(pixels), before)


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_blocks_are_means_and_sums_of_patches(name: str, changes: dict[str, Any]) -> None:
    model = lively(name, changes)
    pixels = torch.randn(1, model.config.in_chans, 24, 44)
    every = patch_attention(model, pixels, most=99)
    assert [own.layer for own in every] == attention_layers(model)
    for own, token in zip(every, attention_maps(model, pixels, heads="all"), strict=True):
        if token.asks == "class token":
            assert own.class_token is not None
            torch.testing.assert_close(own.class_token, token.values[0])
        else:
            torch.testing.assert_close(own.values.mean(dim=1), token.values[0], atol=1e-6, rtol=1e-5)
    for own in attention_maps(model, pixels, heads="all", point=(9, 20)):
        found = next(each for each in every if each.layer == own.layer)
        row, column = own.cells.find(9, 20)
        torch.testing.assert_close(found.values[:, row * found.asking[1] + column], own.values[0])
    for fine, own in zip(every, patch_attention(model, pixels, most=4), strict=True):
        assert max(own.values.shape[2:]) <= 4
        side = -(-max(fine.asking) // 4)
        if own.asking != (0, 0) and fine.values.shape[2:] == fine.asking:
            corner = fine.values.unflatten(1, fine.asking)[:, :side, :side, :side, :side]
            expected = corner.sum(dim=(3, 4)).mean(dim=(1, 2))
            torch.testing.assert_close(own.values[:, 0, 0, 0], expected)


def test_softmax_rows_sum_to_one() -> None:
    for name in ("vit_cifar", "swin_cifar", "pvt_cifar", "crossvit_cifar", "cct_2_3x2_32"):
        model = lively(name, {})
        for own in attention_maps(model, torch.randn(1, 3, 32, 32), heads="all"):
            torch.testing.assert_close(own.values.sum(dim=(2, 3)) + own.prefix, torch.ones_like(own.prefix))


def test_both_maps_of_differential_attention() -> None:
    model = lively("diffvit_cifar", {})
    pixels = torch.randn(2, 3, 32, 32)
    first, second = (
        attention_maps(model, pixels, layers=[1], heads="all", tap=tap)[0].values
        for tap in ("weights1", "weights2")
    )
    (signed,) = attention_maps(model, pixels, layers=[1], heads="all")
    share = model.get_submodule("blocks.1.attn").lambda_now()
    torch.testing.assert_close(signed.values, first - share * second)
    torch.testing.assert_close(first.sum(dim=(2, 3)), torch.ones(2, first.shape[1]))
    with pytest.raises(ValueError, match="no tap matches"):
        attention_maps(tiny(), images(), tap="weights1")


def test_keep_mass() -> None:
    values = torch.tensor([[[0.5, 0.1], [0.3, 0.1]]])
    assert keep_mass(values, 0.5).tolist() == [[[True, False], [False, False]]]
    assert keep_mass(values, 0.6).tolist() == [[[True, False], [True, False]]]
    assert keep_mass(values, 1.0).all()
    with pytest.raises(ValueError, match="mass: expected above 0 to 1"):
        keep_mass(values, 0.0)


def test_footprints() -> None:
    cells = squares((5, 4), 2)
    assert cells.rows == ((0, 2), (2, 4), (4, 5))
    values = torch.arange(6.0)
    spread = cells.spread(values).reshape(5, 4)
    assert spread.sum() == values.sum()
    assert spread[4, 2] == 5 / 2
    painted = cells.paint(values.reshape(3, 2))
    assert painted[4, 2] == 5
    torch.testing.assert_close(cells.collect(spread).flatten(), values)
    assert cells.centres()[5].tolist() == [4.5, 3.0]
    assert cells.find(4, 3) == (2, 1)


def test_looking_leaves_the_model_as_it_is() -> None:
    model = tiny().train()
    attention_layers(model)
    with pytest.raises(RuntimeError):
        attention_maps(model, images()[:, :, :, :0])
    assert model.training
    assert not any(tap.watched for tap in taps(model).values())
