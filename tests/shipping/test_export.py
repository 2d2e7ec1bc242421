"""Exported files give the model's numbers, on any batch, and say what they need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.datasets import Preprocessing
from vitrail.models import VARIANTS, build_model
from vitrail.pretrained import ModelFolder, save_model
from vitrail.serving import Predictor
from vitrail.shipping import write_export

pytestmark = pytest.mark.usefixtures("own_cache")

TINY_PVT: dict[str, Any] = {
    "embed_dims": (8, 16),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "sr_ratios": (2, 1),
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_cifar", {"embed_dim": 16, "num_heads": 2}),
    "vit_relative": ("vit_cifar", {"embed_dim": 16, "num_heads": 2, "position": "relative"}),
    "deit": (
        "deit_tiny_distilled_patch16_224",
        {"embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 10},
    ),
    "diffvit": (
        "diffvit_tiny_patch16_224",
        {"embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 10},
    ),
    "cait": ("cait_cifar", {"embed_dim": 16, "num_heads": 2, "class_depth": 1}),
    "cct": ("cct_2_3x2_32", {"embed_dim": 16, "num_heads": 2}),
    "cvt": ("cvt_6_4_32", {"embed_dim": 16, "num_heads": 2}),
    "crossvit": (
        "crossvit_cifar",
        {
            "embed_dim": (8, 16),
            "branch_depth": (1, 1),
            "img_size": 40,
            "img_scale": (1.0, 0.8),
            "patch_size": (4, 8),
        },
    ),
    # 12 cells a side in windows of 5: shifted, padded and masked, before a merging.
    "swin": ("swin_cifar", {"depths": (2, 1), "embed_dim": 8, "img_size": 24, "window_size": 5}),
    "swin_v2": ("swinv2_cifar", {"depths": (2, 1), "embed_dim": 8, "img_size": 24, "window_size": 5}),
    "pvt": ("pvt_cifar", TINY_PVT),
    "pvt_v2": ("pvt_v2_cifar", TINY_PVT),
    "pvt_v2_li": ("pvt_v2_cifar", TINY_PVT | {"linear": True}),
    "video_vit": ("video_vit_28", {"embed_dim": 16, "num_heads": 2}),
}


def stored_model(architecture: str, **changes: Any) -> ModelFolder:
    """A tiny model with weights so large that logits differ between images, and each part counts."""
    variant, tiny = TINY[architecture]
    if hasattr(VARIANTS[variant], "depth"):
        tiny = {"depth": 1} | tiny
    torch.manual_seed(0)
    model = build_model(variant, **(tiny | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    config = model.config
    preprocessing = Preprocessing(
        img_size=config.image_shape,
        in_chans=config.in_chans,
        mean=(0.5,) * config.in_chans,
        std=(0.5,) * config.in_chans,
    )
    return ModelFolder(
        model=model,
        name=variant,
        classes=tuple(f"class {number}" for number in range(config.num_classes)),
        preprocessing=preprocessing.to_dict(),
    )


def draw(stored: ModelFolder, batch: int, size: tuple[int, int]) -> torch.Tensor:
    config = stored.model.config
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return torch.randn(batch, *frames, config.in_chans, *size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def difference(file: Path, stored: ModelFolder, batch: int, size: tuple[int, int]) -> float:
    """Between ONNX Runtime and the model."""
    images = draw(stored, batch, size)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    expected = stored.model(images)
    assert expected.std(dim=0).max() > 0.01  # else equal numbers would show nothing
    return (torch.from_numpy(logits) - expected).abs().max().item()


def test_every_architecture_is_here() -> None:
    covered = {type(VARIANTS[variant]).__module__ for variant, _ in TINY.values()}
    assert covered == {type(config).__module__ for config in VARIANTS.values()}


@pytest.mark.parametrize("architecture", TINY)
def test_onnx(architecture: str, tmp_path: Path) -> None:
    stored = stored_model(architecture)
    found = write_export(tmp_path / "model.onnx", stored, "onnx")
    assert found.description["largest_difference"] < 1e-4
    assert [shape[0] for shape in found.description["checked_shapes"]] == [1, 2, 5]
    for batch in (3, 7):
        assert difference(found.file, stored, batch, stored.model.config.image_shape) < 1e-4


@pytest.mark.parametrize("architecture", TINY)
def test_torch_export(architecture: str, tmp_path: Path) -> None:
    stored = stored_model(architecture)
    found = write_export(tmp_path / "model.pt2", stored, "torch-export")
    read = torch.export.load(found.file).module()
    images = draw(stored, 4, stored.model.config.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(read(images), stored.model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_openvino(architecture: str, tmp_path: Path) -> None:
    stored = stored_model(architecture)
    found = write_export(tmp_path / "model.xml", stored, "openvino")
    assert {path.name for path in tmp_path.iterdir()} == {"model.xml", "model.bin", "model.xml.json"}
    compiled = openvino.Core().compile_model(found.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = draw(stored, 3, stored.model.config.image_shape)
    with torch.no_grad():
        expected = stored.model(images)
    torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), expected, atol=1e-4, rtol=0)


def test_images_of_every_size(tmp_path: Path) -> None:
    stored = stored_model("vit")
    found = write_export(tmp_path / "model.onnx", stored, "onnx", size="dynamic")
    assert found.description["input"]["shape"] == ["batch", 3, "height", "width"]
    assert found.description["input"]["multiples_of"] == stored.model.stages[0].stride
    assert len({tuple(shape[2:]) for shape in found.description["checked_shapes"]}) == 3
    for batch, size in ((2, (32, 32)), (3, (16, 44)), (4, (60, 8))):
        assert difference(found.file, stored, batch, size) < 1e-4


@pytest.mark.parametrize("architecture", ["swin", "pvt_v2", "crossvit"])
def test_architectures_of_one_size_say_so(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot take images of every size .*--size H W"):
        write_export(tmp_path / "model.pt2", stored_model(architecture), "torch-export", size="dynamic")
    assert not list(tmp_path.iterdir())


def test_the_file_describes_itself(tmp_path: Path) -> None:
    stored = stored_model("vit")
    found = write_export(tmp_path / "model.onnx", stored, "onnx", batch=3, size=(20, 24))
    about = json.loads((tmp_path / "model.onnx.json").read_text())
    assert about == found.description
    assert about["input"] == {"name": "images", "type": "float32", "shape": [3, 3, 20, 24]}
    assert about["output"] == {"name": "logits", "type": "float32", "shape": [3, 10]}
    assert about["classes"] == list(stored.classes)
    assert about["preprocessing"] == stored.preprocessing | {"img_size": [20, 24]}
    assert about["checked_shapes"] == [[3, 3, 20, 24]] * 3
    inside = {entry.key: entry.value for entry in onnx.load(found.file).metadata_props}
    assert json.loads(inside["classes"]) == about["classes"]
    assert json.loads(inside["preprocessing"]) == about["preprocessing"]
    (taken,) = onnxruntime.InferenceSession(found.file).get_inputs()
    assert (taken.name, taken.shape) == ("images", [3, 3, 20, 24])


def test_a_model_without_head_gives_its_features(tmp_path: Path) -> None:
    stored = stored_model("vit", num_classes=0)
    found = write_export(tmp_path / "model.pt2", stored, "torch-export")
    assert found.description["output"] == {"name": "features", "type": "float32", "shape": ["batch", 16]}
    assert found.description["classes"] == []


def test_results_that_differ_leave_nothing(tmp_path: Path) -> None:
    stored = stored_model("vit")
    (tmp_path / "model.pt2").write_text("an older file")
    calls = 0

    def drift(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return logits + 1e-3 * (calls > 1)  # the first call is the trace

    with (
        stored.model.register_forward_hook(drift),
        pytest.raises(ValueError, match=r"was not written: .* differ by 0\.001"),
    ):
        write_export(tmp_path / "model.pt2", stored, "torch-export")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("model.pb", {}, r"onnx files end in \.onnx, got .*model\.pb"),
        ("none/model.onnx", {}, r"no folder .*none; make it"),
        ("model.onnx", {"batch": 0}, r"batch: expected a number from 1 on, or dynamic, got 0"),
        (
            "model.onnx",
            {"size": (0, 4)},
            r"size: expected height and width in pixels, or dynamic, got \(0, 4\)",
        ),
        (
            "model.onnx",
            {"form": "tflite"},
            r"expected one of onnx, torch-export, openvino as form, got 'tflite'",
        ),
    ],
)
def test_wrong_requests(name: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        write_export(tmp_path / name, stored_model("vit"), **({"form": "onnx"} | options))
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as Python marks what cannot be imported
    with pytest.raises(ValueError, match=r"onnx needs onnxscript, .* pip install 'vitrail\[export\]'"):
        write_export(tmp_path / "model.onnx", stored_model("vit"), "onnx")


def test_command_line_and_the_example_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent.parent
    stored = stored_model("vit")
    save_model(
        tmp_path / "runs" / "demo",
        stored.model,
        name=stored.name,
        classes=stored.classes,
        preprocessing=stored.preprocessing,
    )
    monkeypatch.chdir(tmp_path)
    main(["export", "runs/demo", "--to", "onnx"])
    said = capsys.readouterr().out
    assert "demo.onnx: images [batch, 3, 32, 32] -> logits [batch, 10]" in said
    for words, says in (
        (["--batch", "many"], "--batch: expected a number or dynamic, got 'many'"),
        (["--size", "1", "2", "3"], "--size: expected one number, height and width, or dynamic, got 1 2 3"),
    ):
        with pytest.raises(SystemExit):
            main(["export", "runs/demo", "--to", "onnx", *words])
        assert says in capsys.readouterr().err

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("photo.png")
    example = re.search(r"```python\n(.*?)```", (root / "docs" / "shipping.md").read_text(), re.DOTALL)
    assert example is not None
    printed = subprocess.run([sys.executable, "-c", example[1]], check=True, capture_output=True, text=True)
    (expected,) = Predictor.from_source("runs/demo").predict(["photo.png"], top=1)
    assert printed.stdout == f"{expected.classes[0]} {expected.probabilities[0]:.3f}\n"
