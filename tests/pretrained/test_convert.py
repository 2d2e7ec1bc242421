"""Weights of other libraries: the same logits in both directions, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file

from vitrail.datasets import Preprocessing
from vitrail.models import build_model
from vitrail.pretrained import (
    create_model,
    export_model,
    find_weights,
    import_model,
    load_pretrained,
    save_model,
)
from vitrail.pretrained.folder import ModelFolder

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
# One small model of each kind, and who else has it.
KINDS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 48}, {"timm", "transformers", "torchvision"}),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 48}, {"timm", "transformers"}),
    "deit3": (
        "deit3_small_patch16_224",
        {"depth": 2, "img_size": 48, "embed_dim": 48, "num_heads": 3},
        {"timm"},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24, "img_size": 64, "window_size": 4},
        {"timm", "transformers", "torchvision"},
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24, "img_size": 64, "window_size": 4},
        {"timm", "transformers", "torchvision"},
    ),
    "swinv2, windows larger than the last grid": (
        "swinv2_tiny_window8_256",
        {"depths": (2, 1, 1), "num_heads": (3, 6, 6), "embed_dim": 24, "img_size": 64},
        {"timm", "transformers"},
    ),
    "pvt": (
        "pvt_tiny",
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)},
        {"transformers"},
    ),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, {"timm", "transformers"}),
    "pvt_v2_li": (
        "pvt_v2_b2_li",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)},
        {"timm", "transformers"},
    ),
    "cait": ("cait_xxs24_224", {"depth": 2, "img_size": 48, "embed_dim": 48}, {"timm"}),
    "crossvit": ("crossvit_9_240", {}, {"timm"}),
    "cct": ("cct_2_3x2_32", {}, set()),
}  # fmt: skip


def _stored(kind: str, num_classes: int = 5) -> ModelFolder:
    name, changes, _ = KINDS[kind]
    torch.manual_seed(0)
    model = build_model(name, num_classes=num_classes, **changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return ModelFolder(
        model=model,
        name=name,
        classes=tuple(f"class {number}" for number in range(num_classes)),
        preprocessing={
            "img_size": list(model.config.image_shape),
            "in_chans": 3,
            **HALF,
            "interpolation": "bicubic",
            "crop_ratio": 0.875,
        },
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["vitrail", "timm", "transformers", "torchvision"])
def test_there_and_back(kind: str, to: Any, tmp_path: Path) -> None:
    stored = _stored(kind)
    if to not in KINDS[kind][2] | {"vitrail"}:
        with pytest.raises(ValueError, match=f"{to} has no|logits that differ") as error:
            export_model(stored, tmp_path / "out", to)
        assert "\n" not in str(error.value)
        return
    check = export_model(stored, tmp_path / "out", to)
    assert check.read_back == 0.0
    if to != "vitrail":
        assert check.library is not None
        assert check.library < 1e-4  # loaded by the library itself
    if to == "torchvision":
        again = build_model(stored.name, **KINDS[kind][1], num_classes=5)
        load_pretrained(again, tmp_path / "out" / "model.pth")
    else:
        found, report = import_model(tmp_path / "out")
        again = found.model
        assert found.classes == stored.classes
        prepared = Preprocessing.from_dict(found.preprocessing)
        assert prepared.crop_ratio == pytest.approx(0.875, abs=0.01)  # theirs is in whole pixels
        assert replace(prepared, crop_ratio=0.875) == Preprocessing.from_dict(stored.preprocessing)
        assert (report.resized, report.fresh) == ({}, ())
    expected = stored.model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_heads_for_other_classes_are_fresh_and_the_rest_is_bit_identical(tmp_path: Path) -> None:
    for kind, (name, changes, _) in KINDS.items():
        stored = _stored(kind)
        path = tmp_path / f"{kind}.safetensors"
        save_file(stored.model.state_dict(), path)
        model = build_model(name, **changes, num_classes=9)
        report = load_pretrained(model, path)
        assert report.fresh, kind
        assert all(key.startswith(model.head_names) for key in report.fresh), kind
        assert set(report.ignored) == set(report.fresh)
        assert report.text().count("head.weight") <= 1, kind
        assert "left out" not in report.text(), kind
        assert "(the source has a head for other classes)" in report.text(), kind
        own = stored.model.state_dict()
        for key, tensor in model.state_dict().items():
            assert key in report.fresh or torch.equal(tensor, own[key]), key
        without = create_model(name, pretrained=path, **changes, num_classes=0)
        assert not [key for key in without.state_dict() if key.startswith(model.head_names)]


POSITIONED = [
    ("vit_tiny_patch16_224", {"depth": 1, "img_size": 64}, "pos_embed"),
    ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 64}, "pos_embed"),
    ("vit_cifar_plain", {"position": "learned_2d"}, "pos_embed.row"),
    (
        "vit_cifar_plain",
        {"position": "relative", "depth": 1},
        "blocks.0.rel_pos.relative_position_bias_table",
    ),
    ("cait_cifar", {"depth": 1}, "pos_embed"),
    ("crossvit_cifar", {}, "pos_embed_1"),
    ("pvt_cifar", {}, "pos_embed2"),
    ("cct_2_3x2_32", {}, "classifier.positional_emb"),
]


@pytest.mark.parametrize(("name", "changes", "table"), POSITIONED)
@pytest.mark.parametrize("shape", [(48, 96), (96, 64)])
def test_positions_are_resampled_as_in_the_forward_pass(
    name: str, changes: dict[str, Any], table: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    square = build_model(name, **changes).eval()
    save_file(square.state_dict(), tmp_path / "w.safetensors")
    model = build_model(name, **changes | {"img_size": shape}).eval()
    report = load_pretrained(model, tmp_path / "w.safetensors")
    assert table in report.resized
    assert "resampled to" in report.text()
    images = torch.randn(2, square.config.in_chans, *shape)
    with torch.no_grad():
        torch.testing.assert_close(model(images), square(images), atol=1e-5, rtol=0)


def test_a_folder_tells_the_grid_of_its_tables(tmp_path: Path) -> None:
    # 3 x 8 = 24 patches are no square, and 4 x 6 is the shape of the model wanted: only the folder knows.
    wide = _stored("vit")
    model = build_model("vit_tiny_patch16_224", depth=1, img_size=(48, 128), num_classes=5)
    stored = ModelFolder(
        model=model,
        name=wide.name,
        classes=wide.classes,
        preprocessing=wide.preprocessing | {"img_size": [48, 128]},
    )
    export_model(stored, tmp_path / "wide", "vitrail")
    other = build_model("vit_tiny_patch16_224", depth=1, img_size=(64, 96), num_classes=5)
    report = load_pretrained(other, tmp_path / "wide")
    assert "3 x 8 resampled to 4 x 6" in report.resized["pos_embed"]


def test_a_swin_for_other_windows_resamples_its_tables(tmp_path: Path) -> None:
    stored = _stored("swin")
    save_file(stored.model.state_dict(), tmp_path / "w.safetensors")
    model = build_model(stored.name, **KINDS["swin"][1] | {"window_size": 6}, num_classes=5)
    report = load_pretrained(model, tmp_path / "w.safetensors")
    assert set(report.resized) == set(model.position_layouts())
    assert "7 x 7 resampled to 11 x 11" in report.text()


@pytest.mark.parametrize("kind", ["vit", "swin", "pvt_v2", "crossvit", "cct", "cait"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_channels_are_summed_or_repeated(kind: str, channels: int, tmp_path: Path) -> None:
    stored = _stored(kind)
    save_file(stored.model.state_dict(), tmp_path / "w.safetensors")
    name, changes, _ = KINDS[kind]
    model = build_model(name, **changes, num_classes=5, in_chans=channels).eval()
    report = load_pretrained(model, tmp_path / "w.safetensors")
    assert bool(report.resized) == (channels != 3)
    if channels == 2:
        return  # two of three channels cannot give the same
    grey = torch.randn(1, 1, *model.config.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(
            model(grey.expand(-1, channels, -1, -1)),
            stored.model(grey.expand(-1, 3, -1, -1)),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision"])
def test_patches_cut_by_hand_are_a_convolution_for_others_and_back(to: Any, tmp_path: Path) -> None:
    stored = _stored("vit")
    name, changes, _ = KINDS["vit"]
    by_hand = build_model(name, **changes, num_classes=5, patch_embed="linear").eval()
    save_file(stored.model.state_dict(), tmp_path / "w.safetensors")
    report = load_pretrained(by_hand, tmp_path / "w.safetensors")
    assert report.resized == {"patch_embed.proj.weight": "a matrix, with the same numbers"}
    images = torch.randn(2, 3, *by_hand.config.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(images), stored.model(images), atol=1e-4, rtol=1e-4)
    check = export_model(replace(stored, model=by_hand), tmp_path / "out", to)
    assert check.library is not None
    assert check.library < 1e-4
    again = build_model(name, **changes, num_classes=5)
    load_pretrained(again, tmp_path / "out" / ("model.pth" if to == "torchvision" else "model.safetensors"))
    for part, tensor in again.state_dict().items():
        assert torch.equal(tensor, stored.model.state_dict()[part]), part


def _google_arrays(
    width: int = 48, heads: int = 3, depth: int = 2, classes: int = 7
) -> dict[str, np.ndarray]:
    """Random arrays with the names and shapes of google-research's files."""
    rng = np.random.default_rng(0)
    head = width // heads

    def array(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    arrays = {
        "cls": array(1, 1, width),
        "embedding/kernel": array(16, 16, 3, width),
        "embedding/bias": array(width),
        "Transformer/posembed_input/pos_embedding": array(1, 10, width),
        "Transformer/encoder_norm/scale": array(width),
        "Transformer/encoder_norm/bias": array(width),
        "pre_logits/kernel": array(width, width),
        "pre_logits/bias": array(width),
        "head/kernel": array(width, classes),
        "head/bias": array(classes),
    }
    for number in range(depth):
        block = f"Transformer/encoderblock_{number}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{block}/{norm}/scale": array(width), f"{block}/{norm}/bias": array(width)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays |= {
                f"{attention}/{part}/kernel": array(width, heads, head),
                f"{attention}/{part}/bias": array(heads, head),
            }
        arrays |= {
            f"{attention}/out/kernel": array(heads, head, width),
            f"{attention}/out/bias": array(width),
        }
        mlp = f"{block}/MlpBlock_3"
        arrays |= {
            f"{mlp}/Dense_0/kernel": array(width, 4 * width), f"{mlp}/Dense_0/bias": array(4 * width),
            f"{mlp}/Dense_1/kernel": array(4 * width, width), f"{mlp}/Dense_1/bias": array(width),
        }  # fmt: skip
    return arrays


def test_npz_files_of_google_research_load_as_timm_loads_them(tmp_path: Path) -> None:
    arrays = _google_arrays()
    np.savez(tmp_path / "vit.npz", **arrays)
    changes = {"depth": 2, "img_size": 48, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    del arrays["pre_logits/kernel"], arrays["pre_logits/bias"]  # timm's would build a layer for them
    np.savez(tmp_path / "timm.npz", **arrays)
    peer = timm.create_model("vit_base_patch16_224", **changes).eval()
    peer.load_pretrained(str(tmp_path / "timm.npz"))
    ours = build_model("vit_base_patch16_224", **changes).eval()
    report = load_pretrained(ours, tmp_path / "vit.npz")
    assert set(report.ignored) == {"pre_logits/kernel", "pre_logits/bias"}
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-5, rtol=0)


def test_preprocessing_comes_with_the_weights_and_is_not_mixed_up(tmp_path: Path) -> None:
    changes = {"depth": 1}
    peer = timm.create_model("vit_tiny_patch16_224", **changes)
    save_file(peer.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="does not tell its architecture: add --model"):
        import_model(tmp_path / "vit.safetensors")
    deit = timm.create_model("deit_tiny_patch16_224")
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    found, _ = import_model(tmp_path / "deit.pth", model="deit_tiny_patch16_224")
    assert found.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert len(found.classes) == 1000
    whole = timm.create_model("vit_tiny_patch16_224")
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="does not tell how images are prepared: add --mean and --std"):
        import_model(tmp_path / "vit.safetensors", model="vit_tiny_patch16_224")
    found, _ = import_model(
        tmp_path / "vit.safetensors", model="vit_tiny_patch16_224", mean=[0.5] * 3, std=[0.5] * 3
    )
    assert found.preprocessing["mean"] == [0.5] * 3


def test_what_timm_and_transformers_save_is_read_with_their_preprocessing(tmp_path: Path) -> None:
    theirs = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=32,
        patch_size=8, id2label={0: "cat", 1: "dog", 2: "owl"}, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.ViTForImageClassification(theirs).eval()
    peer.save_pretrained(tmp_path / "hf")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "hf")
    found, report = import_model(tmp_path / "hf")
    assert found.classes == ("cat", "dog", "owl")
    assert found.model.config.mlp_ratio == 2.0
    assert found.preprocessing["img_size"] == [32, 32]
    assert found.preprocessing["mean"] == [0.5, 0.5, 0.5]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), peer(images).logits, atol=1e-5, rtol=0)
    assert report.fresh == ()


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_of_transformers(registers: int, tmp_path: Path) -> None:
    options = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 42,
        "patch_size": 14, "layerscale_value": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    if registers:
        peer = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=registers)
        )
    else:
        peer = transformers.Dinov2Model(transformers.Dinov2Config(**options))
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer.eval().save_pretrained(tmp_path / "dino")
    ours = create_model(
        "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2",
        pretrained=tmp_path / "dino", embed_dim=48, depth=2, num_heads=3, img_size=42, registers=registers,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = peer(images).last_hidden_state
        features = ours.forward_features(images)
    torch.testing.assert_close(torch.cat([features.prefix, features.patches], 1), expected, atol=1e-4, rtol=0)


def _official_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the authors' file of a two-stage Swin looks like."""
    moved = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value
        for key, value in state.items()
    }
    return moved | {
        "layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16),
    }


def test_files_of_the_authors(tmp_path: Path) -> None:
    swin = _stored("swin").model.state_dict()
    pvt = {
        key.replace("patch_embed.", "patch_embed1.").replace("dwconv.", "dwconv.dwconv."): value
        for key, value in _stored("pvt_v2").model.state_dict().items()
    }
    for stage in range(4):
        ours, theirs = f"stages.{stage}", f"{stage + 1}"
        pvt = {
            key.replace(f"{ours}.blocks", f"block{theirs}")
            .replace(f"{ours}.norm", f"norm{theirs}")
            .replace(f"{ours}.downsample", f"patch_embed{theirs}"): value
            for key, value in pvt.items()
        }
    crossvit = {
        key.replace("cls_token_", "cls_token.").replace("pos_embed_", "pos_embed."): value
        for key, value in _stored("crossvit").model.state_dict().items()
    }
    vit = _stored("vit").model.state_dict()
    mae = {key: value for key, value in vit.items() if not key.startswith("head")}
    mae |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 8)}
    dino = {f"module.backbone.{key}": value for key, value in mae.items() if "decoder" not in key}
    dino |= {"module.head.mlp.0.weight": torch.zeros(4, 4)}
    wrapped = {f"module.{key}": value for key, value in vit.items()}
    for kind, content, fresh in (
        ("swin", {"model": _official_swin(swin), "optimizer": {}, "epoch": 3}, False),
        ("pvt_v2", pvt, False),
        ("crossvit", {"state_dict": crossvit}, False),
        ("vit", {"model": mae}, True),
        ("vit", {"student": {}, "teacher": dino, "epoch": 100}, True),
        ("vit", {"state_dict": wrapped}, False),
    ):
        torch.save(content, tmp_path / "w.pth")
        stored = _stored(kind)
        model = build_model(stored.name, **KINDS[kind][1], num_classes=5)
        report = load_pretrained(model, tmp_path / "w.pth")
        assert bool(report.fresh) == fresh, kind
        for key, tensor in model.state_dict().items():
            assert key in report.fresh or torch.equal(tensor, stored.model.state_dict()[key]), key


def test_old_names_of_torchvision(tmp_path: Path) -> None:
    peer = torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in peer.state_dict().items()
    }
    torch.save(old, tmp_path / "old.pth")
    ours = create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_heads=3, embed_dim=48, mlp_ratio=2.0,
        num_classes=5, pretrained=tmp_path / "old.pth",
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-5, rtol=0)


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    stored = _stored("vit")
    path = tmp_path / "w.safetensors"
    whole = stored.model.state_dict()
    for content, message in (
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"\d+ tensors missing, 2 unexpected"),
        ({k: v for k, v in whole.items() if "blocks.1" not in k}, "12 tensors missing, 0 unexpected"),
        ({**whole, "extra": torch.zeros(1)}, r"0 tensors missing, 1 unexpected.*for instance extra"),
        ({**whole, "norm.weight": torch.zeros(7)}, r"1 of another shape.*norm.weight: \[7\] for \[192\]"),
        ({**whole, "pos_embed": torch.zeros(1, 8, 192)}, "which grid they belong to cannot be told"),
    ):
        save_file(content, path)
        model = build_model(stored.name, **KINDS["vit"][1], num_classes=5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(model, path)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"model": {"w": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 nothing more")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "w.bin").write_bytes(b"")
    (tmp_path / "w.txt").write_text("")
    for name, message in (
        ("evil.pth", "wants to run code"),
        ("empty.pth", "holds no weights"),
        ("text.pth", "damaged or of another kind"),
        ("cut.npz", "damaged or of another kind"),
        ("objects.npz", "damaged or of another kind"),
        ("w.bin", "damaged or of another kind"),
        ("w.txt", "expected a file .safetensors"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            create_model("vit_mnist_2blk", pretrained=tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_models_of_others_that_we_do_not_have(tmp_path: Path) -> None:
    for config, message in (
        ({"model_type": "convnext"}, "transformers' convnext is not one of our models"),
        ({"model_type": "vit", "hidden_act": "relu"}, "vit with hidden_act 'relu'"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "dinov2 with use_swiglu_ffn True"),
        ({"architecture": "resnet50", "pretrained_cfg": {}}, "timm's resnet50 is not one of our models"),
        (
            {
                "architecture": "vit_tiny_patch16_224",
                "pretrained_cfg": {},
                "model_args": {"norm_layer": "rms"},
            },
            "with norm_layer 'rms'",
        ),
        ({"model": 3}, "config.json is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message) as error:
            find_weights(tmp_path)
        assert "\n" not in str(error.value)


def test_what_is_written_for_others_says_where_it_came_from(tmp_path: Path) -> None:
    export_model(_stored("vit"), tmp_path / "hf", "transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"]["4"] == "class 4"
    assert "vit.encoder.layer.1.attention.attention.query.weight" in load_file(
        tmp_path / "hf/model.safetensors"
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert list(processor.image_mean) == [0.5] * 3


@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision"])
def test_other_libraries_are_read_back_in_a_process_of_its_own(to: str, tmp_path: Path) -> None:
    # Here torchvision is imported already, with its operators mended where they need it.
    model = build_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=24, num_heads=2)
    prepared = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    save_model(
        tmp_path / "model", model, name="vit_tiny_patch16_224", classes=(), preprocessing=prepared.to_dict()
    )
    words = ["convert", str(tmp_path / "model"), str(tmp_path / "converted"), "--to", to]
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"loaded by {to}, they differ by" in done.stdout


def test_torchvisions_own_tables_are_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = (
        "from vitrail.pretrained import find_weights\n"
        "try: find_weights('torchvision:vit_b_16.NONE')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torchvision:vit_b_16 has the weights IMAGENET1K_V1")
