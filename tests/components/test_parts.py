"""Residual helpers, feed-forward parts, patch embeddings and positions."""

from __future__ import annotations

import math

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.components.mlp import Mlp, SwiGLU
from vitrail.components.patch import (
    PATCH_EMBEDDINGS,
    ConvPatchEmbedding,
    LinearPatchEmbedding,
    OverlapPatchEmbedding,
    StemPatchEmbedding,
    patch_grid,
)
from vitrail.components.position import (
    LearnedPosition2d,
    RelativePositionBias,
    RotaryPosition2d,
    SinCosPosition1d,
    SinCosPosition2d,
    relative_index,
    resample_table,
    rotate,
    sincos,
    sincos_frequencies,
)
from vitrail.components.residual import DropPath, LayerScale, drop_path_rates


def test_drop_path_keeps_the_mean_and_drops_whole_images() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.3)
    y = drop(torch.ones(10_000, 2, 3))
    survived = y[:, 0, 0] > 0
    assert abs(survived.float().mean().item() - 0.7) < 0.02
    torch.testing.assert_close(y[survived], torch.full_like(y[survived], 1 / 0.7))
    assert torch.equal(drop.eval()(y), y)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        DropPath(1.0)


def test_drop_path_rates_grow_linearly() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]


def test_layer_scale_starts_at_its_value() -> None:
    assert torch.equal(LayerScale(4, 1e-5)(torch.ones(2, 4)), torch.full((2, 4), 1e-5))


def test_mlps_equal_timm() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    theirs = timm.layers.Mlp(16, 32)
    ours = Mlp(16, 32)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    theirs = timm.layers.SwiGLUPacked(16, 64, act_layer=torch.nn.SiLU, gate_last=False)
    gated = SwiGLU(16, 32)
    gated.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(gated(x), theirs(x))


def strided_convolution(embedding: ConvPatchEmbedding, images: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, D], by PyTorch's own convolution."""
    proj, images = embedding.proj, embedding.pad(images)
    maps = torch.nn.functional.conv2d(images, proj.weight, proj.bias, stride=embedding.patch_size)
    return maps.flatten(2).transpose(1, 2)


def test_manual_patching_equals_the_convolution() -> None:
    torch.manual_seed(0)
    conv, linear = ConvPatchEmbedding(16, 3, 768), LinearPatchEmbedding(16, 3, 768)
    assert sum(p.numel() for p in linear.parameters()) == 590_592
    state = conv.state_dict()
    linear.load_state_dict(state | {"proj.weight": state["proj.weight"].flatten(1)})
    for size in ((224, 224), (50, 37)):
        images = torch.randn(2, 3, *size)
        (a, grid), (b, other_grid) = conv(images), linear(images)
        assert grid == other_grid == patch_grid(*size, 16)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        strided = strided_convolution(conv, images)
        torch.testing.assert_close(a, strided, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("patch", "chans"), [(4, 3), (7, 1), (16, 3)])
def test_the_convolution_has_its_gradients_however_it_is_computed(patch: int, chans: int) -> None:
    torch.manual_seed(0)
    conv = ConvPatchEmbedding(patch, chans, 24)
    images = torch.randn(3, chans, 2 * patch + 3, 3 * patch, requires_grad=True)
    ours, _ = conv(images)
    strided = strided_convolution(conv, images)
    wanted = [images, *conv.parameters()]
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, cotangent),
        torch.autograd.grad(strided, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    patch=st.sampled_from([2, 4, 8]),
    chans=st.integers(1, 4),
)
def test_every_embedding_takes_every_size(height: int, width: int, patch: int, chans: int) -> None:
    for kind in PATCH_EMBEDDINGS.values():
        tokens, grid = kind(patch, chans, 16)(torch.randn(2, chans, height, width))
        assert grid == (math.ceil(height / patch), math.ceil(width / patch))
        assert tokens.shape == (2, grid[0] * grid[1], 16)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_empty_batch_stays_empty(kind: str) -> None:
    tokens, grid = PATCH_EMBEDDINGS[kind](8, 3, 16)(torch.zeros(0, 3, 24, 16))
    assert tokens.shape == (0, 6, 16)
    assert grid == (3, 2)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_exported_embedding_takes_any_batch(kind: str) -> None:
    embedding = PATCH_EMBEDDINGS[kind](8, 3, 16).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        embedding, (torch.randn(2, 3, 24, 16),), dynamic_shapes={"images": {0: batch}}
    ).module()
    images = torch.randn(5, 3, 24, 16)
    torch.testing.assert_close(exported(images)[0], embedding(images)[0], atol=1e-5, rtol=0)


def test_overlapping_patches_see_their_neighbours_only() -> None:
    embedding = OverlapPatchEmbedding(4, 1, 8)
    images = torch.zeros(1, 1, 16, 16, requires_grad=True)
    tokens, _ = embedding(images)
    tokens[0, 5].sum().backward()  # row 1, column 1: its centre is pixel (4, 4)
    seen = images.grad[0, 0].abs() > 0
    assert seen[1:8, 1:8].all()
    assert seen.sum() == 49


def test_stem_refuses_sizes_that_are_no_power_of_two() -> None:
    with pytest.raises(ValueError, match="got 7"):
        StemPatchEmbedding(7, 1, 16)


def test_wrong_channels_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected images \[B, 3, H, W\], got \[2, 1, 8, 8\].*another in_chans"
    ):
        ConvPatchEmbedding(4, 3, 8)(torch.zeros(2, 1, 8, 8))


def test_sincos_follows_the_formula() -> None:
    table = sincos(torch.arange(6), sincos_frequencies(8))
    for position in range(6):
        for i in range(4):
            angle = position / 10_000 ** (i / 4)
            assert table[position, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)
    assert torch.equal(SinCosPosition1d(8)((2, 3))[0], table)
    both, half = SinCosPosition2d(16)((2, 3))[0], sincos_frequencies(8)
    assert torch.equal(both[4, :8], sincos(torch.tensor([1.0]), half)[0])  # patch 4 is row 1, column 1
    assert torch.equal(
        both[5], torch.cat([sincos(torch.tensor([2.0]), half)[0], sincos(torch.tensor([1.0]), half)[0]])
    )
    assert not list(SinCosPosition2d(16).parameters())


def test_learned_2d_counts_rows_and_columns() -> None:
    position = LearnedPosition2d((3, 5), 8)
    assert sum(p.numel() for p in position.parameters()) == (3 + 5) * 8
    table = position((3, 5)).reshape(3, 5, 8)
    torch.testing.assert_close(table[2, 4] - table[2, 1], table[0, 4] - table[0, 1])
    assert position((6, 2)).shape == (1, 12, 8)


def test_resampling_keeps_a_constant_and_knows_rows_from_columns() -> None:
    assert torch.allclose(
        resample_table(torch.ones(1, 12, 4), (3, 4), (7, 5)), torch.ones(1, 35, 4), atol=1e-5
    )
    rows = torch.arange(3.0).repeat_interleave(4).reshape(1, 12, 1)
    resampled = resample_table(rows, (3, 4), (6, 4)).reshape(6, 4)
    assert torch.allclose(resampled, resampled[:, :1].expand(6, 4), atol=1e-5)
    assert (resampled[1:, 0] > resampled[:-1, 0]).all()


def test_relative_index_is_that_of_swin() -> None:
    index = relative_index((3, 4))
    assert index.shape == (12, 12)
    assert index.unique().numel() == 5 * 7
    assert torch.equal(index + index.T, torch.full((12, 12), 5 * 7 - 1))  # opposite offsets mirror
    for i in range(12):
        for j in range(12):
            same = (i // 4 - j // 4, i % 4 - j % 4)
            assert index[i, j] == (same[0] + 2) * 7 + same[1] + 3


def test_relative_bias_has_swins_table_and_a_prefix() -> None:
    assert RelativePositionBias((7, 7), 3, 0).relative_position_bias_table.shape == (169, 3)
    bias = RelativePositionBias((2, 3), 4, 2)
    full = bias((2, 3))
    assert full.shape == (1, 4, 8, 8)
    table = bias.relative_position_bias_table
    assert torch.equal(full[0, :, 0, 5], table[-3])  # prefix to patch
    assert torch.equal(full[0, :, 5, 1], table[-2])  # patch to prefix
    assert torch.equal(full[0, :, 0, 1], table[-1])  # within the prefix
    assert torch.equal(full[0, :, 2, 2], full[0, :, 7, 7])
    assert bias((4, 5)).shape == (1, 4, 22, 22)


def test_rotation_keeps_lengths_and_depends_on_offsets_only() -> None:
    cosine, sine = RotaryPosition2d(8, 1)((3, 4))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned_q, turned_k = (
        rotate(q.expand(1, 1, 13, 8), cosine, sine),
        rotate(k.expand(1, 1, 13, 8), cosine, sine),
    )
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 13))
    torch.testing.assert_close(turned_q[0, 0, 0], q[0, 0, 0])  # the prefix is not turned
    scores = (turned_q @ turned_k.transpose(-2, -1))[0, 0, 1:, 1:].reshape(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    assert not torch.isclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])
