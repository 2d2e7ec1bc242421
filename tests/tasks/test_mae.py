"""MAE: the loss is the paper's, the encoder sees what is visible, and the gallery tells no secrets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vitrail.components.tap import record
from vitrail.models import Encoder, build_model
from vitrail.tasks.mae import MAE
from vitrail.tasks.masking import Masking, hide, patchify, random_masking, take, unpatchify

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
DROPPING = {
    "vit_mnist_2blk": {},
    "vit_cifar": {"embed_dim": 32, "num_heads": 2},
    "diffvit_cifar": {"depth": 2},
    "deit_cifar": TINY,
    "cait_cifar": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "cct_2_3x2_32": {},
    "cvt_6_4_32": {"depth": 1},
}


def _vit(**changes: Any) -> Encoder:
    return build_model("vit_mnist_2blk", **{"img_size": 28, "patch_size": 7, **TINY, **changes})


def _mask_of(seed: int, images: Tensor, patches: int, ratio: float) -> Masking:
    torch.manual_seed(seed)
    return random_masking(len(images), patches, ratio)


def _loss(task: MAE, images: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return task({"images": images}, 0)["loss"]


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_loss_is_that_of_a_slow_loop(norm: str, normalise: bool, channels: int) -> None:
    torch.manual_seed(1)
    task = MAE(_vit(in_chans=channels), ratio=0.6, norm=norm, normalise_targets=normalise).double().eval()
    images = torch.randn(3, channels, 28, 35, dtype=torch.float64)
    masking = _mask_of(0, images, 20, 0.6)
    prediction = task.predict(images, masking)
    assert prediction.shape == (3, 12, channels * 49)
    total, count = 0.0, 0
    for image in range(3):
        for place, number in enumerate(masking.masked[image].tolist()):
            top, left = number // 5 * 7, number % 5 * 7
            patch = images[image, :, top : top + 7, left : left + 7].flatten().tolist()
            if normalise:
                mean = sum(patch) / len(patch)
                variance = sum((value - mean) ** 2 for value in patch) / (len(patch) - 1)
                patch = [(value - mean) / math.sqrt(variance + 1e-6) for value in patch]
            for value, guess in zip(patch, prediction[image, place].tolist(), strict=True):
                total += (guess - value) ** 2 if norm == "l2" else abs(guess - value)
                count += 1
    # the task compares in float32
    assert abs(float(_loss(task, images).detach()) - total / count) < 1e-6


def test_loss_does_not_move_with_the_targets_of_visible_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    task = MAE(_vit(), ratio=0.5).eval()
    images = torch.randn(2, 1, 28, 28)
    masking = _mask_of(0, images, 16, 0.5)
    before = _loss(task, images)
    truth = task.targets(images)
    changed = truth.scatter(1, masking.keep[:, :, None].expand(-1, -1, 49), 100.0)
    monkeypatch.setattr(task, "targets", lambda _: changed)
    assert torch.equal(_loss(task, images), before)
    wrong = truth.scatter(1, masking.masked[:, :1, None].expand(-1, -1, 49), 100.0)
    monkeypatch.setattr(task, "targets", lambda _: wrong)
    assert _loss(task, images) > before + 1


@pytest.mark.parametrize("name", DROPPING)
def test_prediction_does_not_depend_on_hidden_pixels(name: str) -> None:
    """Also behind convolutional stems, whose tokens overlap; outside training, where no batch is averaged."""
    model = build_model(name, **DROPPING[name])
    task = MAE(model).eval()
    images = torch.randn(2, model.config.in_chans, *model.config.image_shape)
    size = (task.patch_size, task.patch_size)
    masking = random_masking(2, patchify(images, size).shape[1], 0.75)
    prediction = task.predict(images, masking)
    hidden = torch.randn_like(images)
    mixed = patchify(hidden, size).scatter(
        1,
        masking.keep[:, :, None].expand(-1, -1, prediction.shape[2]),
        take(patchify(images, size), masking.keep),
    )
    other = unpatchify(mixed, size, (images.shape[2], images.shape[3]))
    assert not torch.equal(other, images)
    torch.testing.assert_close(task.predict(other, masking), prediction, atol=0, rtol=0)
    visible = images + hide(torch.randn_like(images), masking.keep, task.patch_size)
    assert not torch.allclose(task.predict(visible, masking), prediction)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.9, 2)])
def test_the_encoder_sees_exactly_the_visible_tokens(ratio: float, visible: int) -> None:
    task = MAE(_vit(), ratio=ratio)
    with record(task.model, "embed", "blocks.*.out") as seen:
        task({"images": torch.randn(3, 1, 28, 28)}, 0)
    assert {tuple(tokens.shape) for tokens in seen.values()} == {(3, 1 + visible, 32)}  # and the class token


def test_the_decoder_computes_hidden_places_only_in_its_last_block() -> None:
    task = MAE(_vit(), ratio=0.75, decoder_depth=2)
    rows = []
    for block in task.decoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: rows.append(output.shape[1]))
    task({"images": torch.randn(2, 1, 28, 28)}, 0)
    assert rows == [17, 12]


@pytest.mark.parametrize("name", DROPPING)
def test_every_parameter_learns_and_the_rest_is_frozen(name: str) -> None:
    """DDP waits for the gradient of each parameter that asks for one."""
    model = build_model(name, **DROPPING[name])
    task = MAE(model).train()
    output = task({"images": torch.randn(3, model.config.in_chans, *model.config.image_shape)}, 0)
    output["loss"].backward()
    without = [name for name, own in task.named_parameters() if own.requires_grad and own.grad is None]
    assert without == []
    frozen = {name for name, own in task.named_parameters() if not own.requires_grad}
    assert all("attention_pool" in name for name in frozen), frozen
    assert all(not value.requires_grad for key, value in output.items() if key != "loss")
    assert task.trained() is model
    assert model.config.num_classes == 0


@pytest.mark.parametrize("shape", [(28, 28), (30, 17), (8, 40)])
def test_images_of_any_size(shape: tuple[int, int]) -> None:
    task = MAE(_vit())
    assert _loss(task, torch.randn(2, 1, *shape)).isfinite()


def test_same_seed_same_loss_and_parts_of_a_batch_serve() -> None:
    task = MAE(_vit())
    images = torch.randn(5, 1, 28, 28)
    assert torch.equal(_loss(task, images, 7), _loss(task, images, 7))
    assert not torch.equal(_loss(task, images, 7), _loss(task, images, 8))
    for part in images.split(2):
        assert _loss(task, part).isfinite()


def test_explained_is_the_share_of_variance() -> None:
    task = MAE(_vit(), normalise_targets=False).eval()
    images = torch.randn(4, 1, 28, 28)
    masking = _mask_of(0, images, 16, 0.75)
    targets = take(task.targets(images), masking.masked)
    missed = (task.predict(images, masking) - targets).square().mean()
    torch.manual_seed(0)
    explained = task({"images": images}, 0)["explained"]
    torch.testing.assert_close(explained, 1 - missed / targets.var(correction=0))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", [(28, 28), (30, 23)])
def test_the_gallery_leaks_nothing(normalise: bool, shape: tuple[int, int]) -> None:
    task = MAE(_vit(in_chans=3), normalise_targets=normalise).train()
    images = torch.randn(3, 3, *shape)
    first = task.reconstruct(images, torch.Generator().manual_seed(5))
    assert task.training
    if shape == (28, 28):
        assert torch.equal(first.hidden.float().mean(dim=(1, 2, 3)), torch.full((3,), 0.75))
    assert torch.equal(first.masked, images * ~first.hidden)
    shown = ~first.hidden.expand_as(images)
    assert torch.equal(first.prediction[shown], images[shown])
    assert not torch.equal(first.prediction, first.masked)
    other = torch.where(first.hidden, 10 * torch.randn_like(images) + 3, images)
    second = task.reconstruct(other, torch.Generator().manual_seed(5))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.masked, second.masked)
    assert torch.equal(first.prediction, second.prediction)
    assert not first.prediction.requires_grad


def test_the_gallery_borrows_brightness_and_contrast_from_visible_neighbours() -> None:
    """Where all visible patches have the same mean and deviation, so have the predictions' units."""
    task = MAE(_vit(), normalise_targets=True)
    torch.nn.init.zeros_(task.decoder.head.weight)
    task.decoder.head.bias.data = torch.linspace(-1, 1, 49)
    patch = torch.randn(7, 7)
    patch = (patch - patch.mean()) / patch.std() * 0.5 + 3.0
    shown = task.reconstruct(patch.tile(4, 4)[None, None], torch.Generator().manual_seed(0))
    expected = torch.linspace(-1, 1, 49).unflatten(0, (7, 7)) * 0.5 + 3.0
    guess = patchify(shown.prediction, (7, 7))[0]
    hidden = patchify(shown.hidden.float(), (7, 7))[0, :, 0].bool()
    torch.testing.assert_close(guess[hidden], expected.flatten().expand(12, -1), atol=1e-5, rtol=0)


def test_the_paper_s_decoder_for_vit_b_and_smaller_ones_for_smaller_encoders() -> None:
    def sizes(task: MAE) -> tuple[int, int, int]:
        block = task.decoder.blocks[0]
        return task.decoder.embed.out_features, len(task.decoder.blocks), block.attn.num_heads

    with torch.device("meta"):
        base = build_model("vit_base_patch16_224")
    base = base.to_empty(device="cpu")
    task = MAE(base)
    assert sizes(task) == (512, 8, 16)
    count = sum(own.numel() for own in task.decoder.parameters())
    # The paper's decoder has 26,109,184 parameters, the fixed positions [197, 512] counted.
    assert count == 26_109_184 - 197 * 512
    assert sizes(MAE(build_model("vit_cifar", embed_dim=192, num_heads=3, depth=6))) == (128, 4, 4)
    assert sizes(MAE(_vit())) == (32, 1, 1)
    assert sizes(MAE(_vit(), decoder_dim=48, decoder_depth=3, decoder_heads=4)) == (48, 3, 4)


@pytest.mark.parametrize(
    "name", ["swin_cifar", "swinv2_cifar", "pvt_cifar", "pvt_v2_cifar", "crossvit_cifar"]
)
def test_who_cannot_drop_patches_is_sent_to_simmim(name: str) -> None:
    model = build_model(name)
    with pytest.raises(ValueError, match=r"task mae leaves patches out, which \w+ cannot: use task simmim"):
        MAE(model)
    assert model.config.num_classes == 10  # untouched
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio must lie between 0 and 1, got 1.0"),
        ({"ratio": 0.0}, "ratio must lie between 0 and 1"),
        ({"norm": "l3"}, "norm must be l2 or l1, got 'l3'"),
        ({"decoder_dim": 30}, "multiple of 4 and of its heads.*got width 30"),
        ({"decoder_dim": 32, "decoder_heads": 5}, "got width 32, 5 heads, 1 blocks"),
        ({"decoder_depth": 0}, "got width 32, default heads, 0 blocks"),
    ],
)
def test_bad_options_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAE(_vit(), **options)


def test_patches_of_one_value_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="normalise_targets needs patches of more than one value"):
        MAE(_vit(img_size=4, patch_size=1))
    assert _loss(MAE(_vit(img_size=4, patch_size=1), normalise_targets=False), torch.randn(2, 1, 4, 4)) > 0


def test_state_goes_round() -> None:
    images = torch.randn(2, 1, 28, 28)
    torch.manual_seed(0)
    first, second = MAE(_vit()).eval(), MAE(_vit()).eval()
    assert not torch.equal(_loss(first, images), _loss(second, images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(_loss(first, images), _loss(second, images))


def _from_transformers(theirs: dict[str, Tensor], patch: int, channels: int) -> dict[str, Tensor]:
    """Names of `ViTMAEForPreTraining` -> those of the task."""
    ours = {
        "model.cls_token": theirs["vit.embeddings.cls_token"],
        "model.pos_embed": theirs["vit.embeddings.position_embeddings"],
        "decoder.mask_token": theirs["decoder.mask_token"].flatten(),
    }
    for end in ("weight", "bias"):
        ours[f"model.patch_embed.proj.{end}"] = theirs[f"vit.embeddings.patch_embeddings.projection.{end}"]
        ours[f"model.norm.{end}"] = theirs[f"vit.layernorm.{end}"]
        ours[f"decoder.embed.{end}"] = theirs[f"decoder.decoder_embed.{end}"]
        ours[f"decoder.norm.{end}"] = theirs[f"decoder.decoder_norm.{end}"]
        head = theirs[f"decoder.decoder_pred.{end}"].unflatten(0, (patch, patch, channels))
        ours[f"decoder.head.{end}"] = head.movedim(2, 0).flatten(0, 2)  # channels first
        for mine, other in (("model.blocks", "vit.layers"), ("decoder.blocks", "decoder.decoder_layers")):
            layers = {name.split(".")[2] for name in theirs if name.startswith(other)}
            for layer in layers:
                own, given = f"{mine}.{layer}", f"{other}.{layer}"
                parts = [theirs[f"{given}.attention.{part}_proj.{end}"] for part in "qkv"]
                ours[f"{own}.attn.qkv.{end}"] = torch.cat(parts)
                ours[f"{own}.attn.proj.{end}"] = theirs[f"{given}.attention.o_proj.{end}"]
                ours[f"{own}.norm1.{end}"] = theirs[f"{given}.layernorm_before.{end}"]
                ours[f"{own}.norm2.{end}"] = theirs[f"{given}.layernorm_after.{end}"]
                for fc in ("mlp.fc1", "mlp.fc2"):
                    ours[f"{own}.{fc}.{end}"] = theirs[f"{given}.{fc}.{end}"]
    return ours


@pytest.mark.parametrize("normalise", [True, False])
def test_same_weights_and_mask_same_loss_as_transformers(normalise: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=normalise,
        mask_ratio=0.75,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    for own in theirs.parameters():
        own.data = torch.randn_like(own) * 0.1
    model = build_model(
        "vit_cifar_plain", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=4.0
    )
    task = MAE(model, normalise_targets=normalise, decoder_dim=32, decoder_depth=2, decoder_heads=4).eval()
    task.load_state_dict(_from_transformers(theirs.state_dict(), 8, 3))
    theirs.decoder.decoder_pos_embed.data.zero_()  # its class token has no position
    theirs.decoder.decoder_pos_embed.data[:, 1:] = task.position((4, 4))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    order = noise.argsort(dim=1)
    masking = Masking(order[:, :4], order[:, 4:])
    targets = take(task.targets(images), masking.masked)
    ours = torch.nn.functional.mse_loss(task.predict(images, masking), targets)
    expected = theirs(pixel_values=images, noise=noise).loss
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_it_learns_to_fill_in_digits() -> None:
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:, None]).float()
    images = (images - images.mean()) / images.std()
    model = build_model("vit_digits", img_size=8, patch_size=2, **TINY)
    task = MAE(model, ratio=0.5, normalise_targets=False).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        output = task({"images": images[torch.randint(len(images), (64,))]}, step)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(float(output["loss"].detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert float(output["explained"]) > 0.3
