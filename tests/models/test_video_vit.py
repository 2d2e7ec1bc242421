"""The video ViT: one sequence of all frames' patches; a ViT for one frame; VideoMAE's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel

from vitrail.components.space_time import SinCosPosition3d, frames, moments, places
from vitrail.components.tap import record
from vitrail.evaluation.cost import count_parameters
from vitrail.explain import attention_maps
from vitrail.models import Encoder, build_model
from vitrail.models.encoder import Features
from vitrail.models.video_vit import VARIANTS
from vitrail.pretrained import find_weights, load_pretrained, save_model

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 28, "patch_size": 7}
POSITIONS = ["learned", "sincos_1d", "sincos_3d"]

# Transformer blocks, patch embedding, positions and head, counted by hand.
PARAMETERS = {
    "video_vit_28": 3 * 33_472 + (49 * 64 + 64) + (16 + 3) * 64 + 128 + 650,
    "video_vit_small_patch16_224": 12 * 1_774_464 + (2 * 768 * 384 + 384) + 768 + 400 * 385,
    "video_vit_base_patch16_224": 12 * 7_087_872 + (2 * 768 * 768 + 768) + 1536 + 400 * 769,
}


def _tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_model("video_vit_28", **{**TINY, **changes}).eval()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        assert count_parameters(build_model(name)) == PARAMETERS[name]


@pytest.mark.parametrize(("count", "tubelet"), [(3, 1), (4, 2), (6, 3), (1, 1)])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (28, 35), (20, 30)])
def test_as_many_tokens_as_moments_times_patches(count: int, tubelet: int, height: int, width: int) -> None:
    model = _tiny(num_frames=count, tubelet=tubelet)
    seen = model.forward_features(torch.randn(2, count, 1, height, width), layers=[0])
    rows, columns = -(-height // 7), -(-width // 7)
    assert seen.grid == (count // tubelet, rows, columns)
    assert seen.patches.shape == (2, count // tubelet * rows * columns, 24)
    assert seen.prefix.shape == (2, 0, 24)
    assert seen.map().shape == (2, 24, count // tubelet, rows, columns)
    assert seen.layers[0].grid == seen.grid


def test_a_token_sees_its_own_tubelet_only() -> None:
    model = _tiny(num_frames=4, tubelet=2)
    clip = torch.randn(1, 4, 1, 28, 28)
    other = clip.clone()
    other[0, 3, 0, 7:14, 21:28] += 1  # the last moment, row 1, column 3
    before, after = (model.patch(own)[0] for own in (clip, other))
    assert (before != after).any(dim=2).nonzero().tolist() == [[0, 16 + 1 * 4 + 3]]


def test_frames_and_moments_are_inverses() -> None:
    clips = torch.arange(2 * 6 * 3 * 2 * 2).view(2, 6, 3, 2, 2)
    made = moments(clips, 2)
    assert made.shape == (2, 3, 6, 2, 2)
    assert torch.equal(made[:, 1], torch.cat([clips[:, 2], clips[:, 3]], dim=1))
    assert torch.equal(frames(made, 2), clips)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("img_size", [28, (28, 42)])
def test_one_frame_is_a_plain_vit(class_token: bool, img_size: Any) -> None:
    options = {
        **TINY,
        "img_size": img_size,
        "pool": "cls" if class_token else "mean",
        "class_token": class_token,
    }
    plain = build_model("vit_mnist_2blk", **options).eval()
    model = _tiny(num_frames=1, class_token=class_token, pool=options["pool"], img_size=img_size)
    model.load_state_dict({**plain.state_dict(), "time_embed": torch.zeros(1, 1, 24)})
    for shape in ((28, 28), (28, 42), (31, 50)):
        images = torch.randn(3, 1, *shape)
        torch.testing.assert_close(model(images[:, None]), plain(images), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(model(images), plain(images), atol=2e-6, rtol=1e-5)


def test_an_image_is_a_clip_that_stands_still() -> None:
    model, images = _tiny(), torch.randn(2, 1, 28, 28)
    assert torch.equal(model(images), model(images[:, None].expand(-1, 3, -1, -1, -1)))


@pytest.mark.parametrize("tubelet", [1, 2])
def test_transformers_video_mae(tubelet: int) -> None:
    """Their sine and cosine channels alternate, ours follow each other: the width is permuted."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, tubelet_size=tubelet, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-6, use_mean_pooling=False,
    )  # fmt: skip
    theirs = VideoMAEModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    width = {"embed_dim": 48, "num_heads": 4, "depth": 3, "mlp_ratio": 4.0}
    ours = build_model(
        "video_vit_base_patch16_224", img_size=32, patch_size=8, num_frames=4, tubelet=tubelet, num_classes=0,
        **width,
    ).eval()  # fmt: skip
    order = torch.cat([torch.arange(0, 48, 2), torch.arange(1, 48, 2)])
    ours.load_state_dict(_converted(theirs.state_dict(), order))
    clips = torch.randn(2, 4, 3, 32, 32)
    expected = theirs(pixel_values=clips).last_hidden_state[:, :, order]
    found = ours.forward_features(clips)
    assert (found.patches - expected).abs().max() < 1e-4 < expected.abs().max()
    keep = torch.stack([torch.randperm(32 // tubelet * 2)[:5].sort().values for _ in range(2)])
    hidden = torch.ones(2, 32 // tubelet * 2, dtype=torch.bool).scatter(1, keep, False)
    some = theirs(pixel_values=clips, bool_masked_pos=hidden).last_hidden_state[:, :, order]
    assert (ours.forward_features(clips, keep=keep).patches - some).abs().max() < 1e-4


def _converted(state: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """transformers' names and weights -> ours."""
    proj = state["embeddings.patch_embeddings.projection.weight"]  # [D, C, t, p, p]
    found = {
        "patch_embed.proj.weight": proj.transpose(1, 2).flatten(1, 2)[order],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"][order],
        "norm.weight": state["layernorm.weight"][order],
        "norm.bias": state["layernorm.bias"][order],
    }
    for layer in range(3):
        theirs, ours = f"encoder.layer.{layer}.", f"blocks.{layer}."
        attention = theirs + "attention."
        kinds = [state[f"{attention}attention.{kind}.weight"][:, order] for kind in ("query", "key", "value")]
        found[ours + "attn.qkv.weight"] = torch.cat(kinds)
        query, value = (state[f"{attention}attention.{kind}.bias"] for kind in ("query", "value"))
        found[ours + "attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        found[ours + "attn.proj.weight"] = state[attention + "output.dense.weight"][order]
        found[ours + "attn.proj.bias"] = state[attention + "output.dense.bias"][order]
        found[ours + "mlp.fc1.weight"] = state[theirs + "intermediate.dense.weight"][:, order]
        found[ours + "mlp.fc1.bias"] = state[theirs + "intermediate.dense.bias"]
        found[ours + "mlp.fc2.weight"] = state[theirs + "output.dense.weight"][order]
        found[ours + "mlp.fc2.bias"] = state[theirs + "output.dense.bias"][order]
        for end, own in (("before", "1"), ("after", "2")):
            for kind in ("weight", "bias"):
                found[f"{ours}norm{own}.{kind}"] = state[f"{theirs}layernorm_{end}.{kind}"][order]
    return found


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_tell_time_and_space_apart(position: str) -> None:
    """Every patch has its own; frames in another order give another answer."""
    model = _tiny(position=position)
    table = model.position_table((3 * 4, 4))
    assert table is not None
    assert table.shape == (48, 24)
    assert torch.cdist(table, table).add(torch.eye(48) * 9).min() > 1e-3
    clips = torch.randn(2, 3, 1, 28, 28)
    assert not torch.allclose(model(clips), model(clips.flip(1)), atol=1e-4)


def test_without_positions_in_time_the_order_of_frames_is_lost() -> None:
    model = _tiny(position="learned")
    torch.nn.init.zeros_(model.time_embed)
    clips = torch.randn(2, 3, 1, 28, 28)
    torch.testing.assert_close(model(clips), model(clips[:, [2, 0, 1]]))


def test_the_sine_table_is_that_of_each_axis() -> None:
    table = SinCosPosition3d(20)((2, 3, 4))[0].unflatten(0, (2, 3, 4))
    assert table.shape == (2, 3, 4, 20)
    assert torch.equal(table[:, 1:, :, :8], table[:, :1, :, :8].expand(-1, 2, -1, -1))  # time alone
    assert torch.equal(table[:1, :1, :, 8:14].expand(2, 3, -1, -1), table[..., 8:14])  # columns alone
    assert torch.equal(table[:1, :, :1, 14:].expand(2, -1, 4, -1), table[..., 14:])  # rows alone
    assert places((2, 3, 4))[13].tolist() == [1, 0, 1]
    for width in (4, 21):
        with pytest.raises(ValueError, match=f"even width of 6 or more, got {width}"):
            SinCosPosition3d(width)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape", [(5, 28, 28), (3, 42, 21), (2, 20, 50)])
def test_clips_of_other_lengths_and_sizes(position: str, shape: tuple[int, int, int]) -> None:
    model = _tiny(position=position)
    assert model(torch.randn(2, shape[0], 1, *shape[1:])).isfinite().all()


def test_learned_positions_are_resampled_in_time_and_space_when_weights_are_loaded(
    tmp_path: Path,
) -> None:
    model = _tiny()
    longer = _tiny(num_frames=6, img_size=42)
    save_model(tmp_path, model, name="video_vit_28", classes=(), preprocessing={})
    report = load_pretrained(longer, find_weights(tmp_path))
    assert set(report.resized) == {"pos_embed", "time_embed"}
    assert longer.time_embed.shape == (1, 6, 24)
    torch.testing.assert_close(
        longer.position_table((6 * 6, 6)), model._positions((6, 6, 6))[0], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_kept_patches_are_encoded_as_if_the_others_were_not_there(class_token: bool, position: str) -> None:
    model = _tiny(class_token=class_token, position=position, num_frames=4, tubelet=2)
    clips = torch.randn(2, 4, 1, 28, 28)
    whole = model.forward_features(clips)
    everything = torch.arange(32).flip(0).expand(2, -1)
    seen = model.forward_features(clips, keep=everything)
    torch.testing.assert_close(seen.patches.flip(1), whole.patches)
    torch.testing.assert_close(seen.prefix, whole.prefix)
    few = model.forward_features(clips, keep=torch.tensor([[0, 31, 5], [1, 2, 3]]))
    assert few.patches.shape == (2, 3, 24)
    with pytest.raises(ValueError, match="3 of 32 patches were kept"):
        few.map()


def test_fill_replaces_patches_before_positions() -> None:
    model = _tiny()
    clips, mask = torch.randn(1, 3, 1, 28, 28), torch.zeros(1, 48, dtype=torch.bool)
    mask[0, 20] = True
    token = torch.randn(24)
    other = clips.clone()
    other[0, 1, 0, 7:14, :7] = 5.0  # patch 20: moment 1, row 1, column 0
    first, second = (model.forward_features(own, fill=(mask, token)).patches for own in (clips, other))
    assert torch.equal(first, second)


def test_taps_and_attention_maps_cover_all_moments() -> None:
    model, clips = _tiny(), torch.randn(2, 3, 1, 28, 28)
    with record(model, "blocks.1.attn.weights") as seen:
        model(clips)
    assert seen["blocks.1.attn.weights"].shape == (2, 2, 48, 48)
    images = torch.randn(2, 1, 28, 28)
    drawn = attention_maps(model, images)
    assert [own.values.shape for own in drawn] == [(2, 12, 4)] * 2
    assert drawn[0].cells.paint(drawn[0].values).shape == (2, 28, 28)
    torch.testing.assert_close(drawn[0].values.sum(dim=(1, 2)), torch.ones(2))


def test_every_parameter_has_a_gradient_and_a_depth() -> None:
    model = _tiny(class_token=True).train()
    model(torch.randn(2, 3, 1, 28, 28)).sum().backward()
    assert [name for name, own in model.named_parameters() if own.grad is None] == []
    assert model.layer_of("time_embed") == 0
    assert model.layer_of("head.weight") == 3
    assert model.no_weight_decay() == {"cls_token", "pos_embed", "time_embed"}


def test_features_of_the_pool() -> None:
    model = _tiny()
    model.reset_classifier(0)
    clips = torch.randn(2, 3, 1, 28, 28)
    features = model.forward_features(clips)
    assert isinstance(features, Features)
    torch.testing.assert_close(model(clips), features.patches.mean(dim=1))
    assert not model.has_head


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 28, 28), r"expected clips \[B, T, 1, H, W\], got \[2, 3, 3, 28, 28\]"),
        ((2, 3, 3, 28, 28), r"expected clips \[B, T, 1, H, W\], got \[2, 3, 3, 28, 28\]"),
        ((28, 28), r"expected clips \[B, T, 1, H, W\] or images \[B, 1, H, W\], got \[28, 28\]"),
    ],
)
def test_wrong_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny()(torch.randn(shape))


def test_wrong_numbers_of_frames() -> None:
    with pytest.raises(
        ValueError, match="3 frames do not make whole tubelets of 2; take a multiple of 2 frames"
    ):
        _tiny(num_frames=4, tubelet=2)(torch.randn(1, 3, 1, 28, 28))
    with pytest.raises(ValueError, match="num_frames 3 is not divisible by tubelet 2"):
        _tiny(tubelet=2)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        _tiny(num_frames=0)
    with pytest.raises(ValueError, match="embed_dim 24 is not divisible by num_heads 5"):
        _tiny(num_heads=5)
    with pytest.raises(ValueError, match="pool 'cls' needs class_token=True"):
        _tiny(pool="cls")
