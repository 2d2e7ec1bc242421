"""The page of `vitrail explain`: complete, self-contained, and with the right numbers in it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.explain.test_attention import lively

from vitrail.cli import main
from vitrail.datasets import Preprocessing
from vitrail.explain.attention import PatchAttention, patch_attention
from vitrail.explain.methods import METHODS
from vitrail.models import Encoder
from vitrail.pretrained import save_model
from vitrail.reporting.explanation import write_explanation

CLASSES = tuple(f"class {n}" for n in range(10))


def prepared(model: Encoder) -> Preprocessing:
    C = model.config.in_chans
    return Preprocessing(img_size=model.config.image_shape, in_chans=C, mean=(0.5,) * C, std=(0.25,) * C)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / "my <b>picture.png"
    Image.fromarray(pixels).save(path)
    return path


def data_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r"const DATA = (.*);\n", page)
    assert found is not None
    return json.loads(found[1])


def unpacked(layer: dict[str, Any], kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps [H, class token + R, cells] that the page holds, and the largest size of each."""
    packed = layer["maps"][kind]
    with Image.open(io.BytesIO(base64.b64decode(packed["rows"].partition(",")[2]))) as rows:
        levels = torch.tensor(np.asarray(rows)).float() / 255
    shares = 2 * levels - 1 if packed["signed"] else levels
    tops = torch.tensor(packed["top"])[:, None]
    return (shares * tops).unflatten(0, (layer["heads"], -1)), tops.unflatten(0, (layer["heads"], -1))


def maps_of(own: PatchAttention) -> torch.Tensor:
    maps = own.values.flatten(2)
    if own.class_token is not None:
        maps = torch.cat([own.class_token.flatten(1)[:, None], maps], dim=1)
    return maps


def test_differential_attention_shows_both_maps_and_lambda(picture: Path, tmp_path: Path) -> None:
    model = lively("diffvit_cifar", {})
    preprocessing = prepared(model)
    found = write_explanation(
        tmp_path, [picture], model=model, preprocessing=preprocessing, classes=CLASSES, title="t", layers=[2]
    )
    (page,) = data_of(found.page.read_text())
    (layer,) = page["layers"]
    assert layer["number"] == 2
    image = preprocessing.open_image(picture)[None]
    (used, _), (first, _), (second, tops) = (unpacked(layer, kind) for kind in range(3))
    assert ((used - (first - layer["lambda"] * second)).abs() <= 0.05 * tops).all()
    expected = patch_attention(model, image, tap="weights2")[1]
    assert ((second - maps_of(expected)).abs() <= 0.01 * tops + 1e-9).all()


def test_a_model_without_a_head_shows_its_attention(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively("vit_cifar", {"num_classes": 0})
    folder = str(tmp_path / "model")
    save_model(folder, model, name="vit_cifar", classes=(), preprocessing=prepared(model).to_dict())
    line = ["explain", folder, str(picture), "--output", str(tmp_path / "out")]
    for wrong, message in (
        (["--method", "relevance"], "relevance explains the score of a class, and this model has no head"),
        (["--target", "3"], "no class '3' among the 0 of the model"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*line, *wrong])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([*line, "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] is None
    assert [set(own) for own in found["methods"]] == [{"method", "seconds"}]
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "model"), str(picture)])
    assert "the model has no head, so it predicts nothing" in capsys.readouterr().err


def test_classes_without_names_are_called_by_their_numbers(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively("vit_cifar", {})
    save_model(
        tmp_path / "model", model, name="vit_cifar", classes=(), preprocessing=prepared(model).to_dict()
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture.rename(folder / "a.png")
    line = ["explain", str(tmp_path / "model"), str(folder), "--output", str(tmp_path / "out")]
    main([*line, "--target", "7", "--layers", "1", "--heads", "all", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] == "7"
    assert {own["class"] for own in found["predictions"]} < set(map(str, range(10)))
    for wrong, message in (
        (["--layers", "9"], "no layer 9: ViT has layers 1 to "),
        (["--heads", "99"], "no head 99 in layer 1, which has heads 1 to "),
        (["--heads", "some"], "heads: expected 'mean', 'max', 'min', 'all' or"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*line[:-1], str(tmp_path / "wrong"), *wrong])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "name",
    ["vit_cifar", "swin_cifar", "pvt_cifar", "cait_cifar", "crossvit_cifar", "diffvit_cifar", "deit_cifar"],
)
def test_the_page_holds_the_attention_of_every_patch(name: str, picture: Path, tmp_path: Path) -> None:
    model = lively(name, {})
    preprocessing = prepared(model)
    found = write_explanation(
        tmp_path / "out",
        [picture, picture],
        model=model,
        preprocessing=preprocessing,
        classes=CLASSES,
        title="my model",
        methods=["rollout"],
    )
    page = found.page.read_text()
    assert found.page.stat().st_size < 5_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "<b>picture" not in page
    first, second = data_of(page)
    assert first["layers"] == second["layers"]
    expected = patch_attention(model, preprocessing.open_image(picture)[None])
    for layer, own in zip(first["layers"], expected, strict=True):
        values, tops = unpacked(layer, 0)
        assert ((values - maps_of(own)).abs() <= 0.01 * tops + 1e-9).all()
        assert layer["classToken"] == (own.class_token is not None)
    names = {own.name for own in (tmp_path / "out").iterdir()}
    assert names == {
        "explanation.html",
        *(f"my <b>picture{more}-{kind}.png" for more in ("", "-2") for kind in ("attention", "rollout")),
    }


def test_every_method_in_the_command(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively("vit_cifar", {})
    save_model(
        tmp_path / "model", model, name="vit_cifar", classes=CLASSES, preprocessing=prepared(model).to_dict()
    )
    line = ["explain", str(tmp_path / "model"), str(picture), "--output", str(tmp_path / "out")]
    main([*line, "--method", "all", "--target", "class 3", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] == "class 3"
    assert [own["method"] for own in found["methods"]] == list(METHODS)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1 + len(METHODS)
    main(line)
    printed = capsys.readouterr().out
    assert "Grad-CAM" in printed
    assert f"page {tmp_path / 'out' / 'explanation.html'}" in printed
    for wrong, message in (
        (["--target", "clas 3"], "no class 'clas 3' among the 10 of the model; the nearest are class"),
        (["--method", "gradcam"], "no method 'gradcam': expected one of rollout"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*line, *wrong])
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_a_bad_image_stops_before_anything_is_written(tmp_path: Path) -> None:
    model = lively("vit_cifar", {})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        write_explanation(
            tmp_path / "out",
            [tmp_path / "text.png"],
            model=model,
            preprocessing=prepared(model),
            classes=CLASSES,
            title="t",
        )
    assert not (tmp_path / "out").exists()
