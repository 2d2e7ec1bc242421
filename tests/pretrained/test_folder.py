"""Model folders: a round trip, and clear refusals of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitrail.models import build_model
from vitrail.pretrained import create_model, load_model, save_model

PREPROCESSING = {"img_size": [28, 28], "mean": [0.1]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build_model("vit_mnist_2blk", depth=1, num_classes=3)
    save_model(
        tmp_path / "run" / "model",
        model,
        name="vit_mnist_2blk",
        classes=("a", "b", "c"),
        preprocessing=PREPROCESSING,
    )
    return tmp_path / "run" / "model"


def test_a_model_comes_back_with_all_that_belongs_to_it(folder: Path) -> None:
    for path in (folder, folder.parent):
        stored = load_model(path)
        assert stored.name == "vit_mnist_2blk"
        assert stored.classes == ("a", "b", "c")
        assert stored.preprocessing == PREPROCESSING
        assert stored.model.config == build_model("vit_mnist_2blk", depth=1, num_classes=3).config
        assert not stored.model.training
    again = load_model(folder).model
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(stored.model(images), again(images))
    assert not list(folder.glob("*.part"))


def test_other_classes_get_a_fresh_head_and_the_same_body(folder: Path) -> None:
    model = create_model("vit_mnist_2blk", depth=1, num_classes=7, pretrained=folder)
    stored = load_model(folder).model.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, stored[name])
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 7)
    same = create_model("vit_mnist_2blk", depth=1, num_classes=3, pretrained=folder)
    assert torch.equal(same.head.weight, stored["head.weight"])


def test_timm_weights_load_from_a_file(tmp_path: Path) -> None:
    peer = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    save_file(peer.state_dict(), tmp_path / "timm.safetensors")
    ours = create_model("vit_tiny_patch16_224", depth=2, pretrained=tmp_path / "timm.safetensors").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images), atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit this model: \d+ tensors missing"):
        create_model("vit_mnist_2blk", depth=2, num_classes=3, pretrained=folder)
    with pytest.raises(ValueError, match="no run or model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged or of another kind"):
            load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["classes"]
    for text in ("{", "[]", json.dumps(config)):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            load_model(folder)
