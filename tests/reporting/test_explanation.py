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
from vitrail.explain.attention import patch_attention
from vitrail.explain.methods import METHODS, find_methods
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
        with Image.open(io.BytesIO(base64.b64decode(layer["rows"].partition(",")[2]))) as rows:
            levels = torch.tensor(np.asarray(rows)).float() / 255
        shares = 2 * levels - 1 if layer["signed"] else levels
        values = (shares * torch.tensor(layer["top"])[:, None]).unflatten(0, (layer["heads"], -1))
        tops = torch.tensor(layer["top"]).unflatten(0, (layer["heads"], -1))[:, :, None]
        maps = own.values.flatten(2)
        if layer["classToken"]:
            assert own.class_token is not None
            maps = torch.cat([own.class_token.flatten(1)[:, None], maps], dim=1)
        assert ((values - maps).abs() <= 0.01 * tops + 1e-9).all()
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
            methods=find_methods(None),
        )
    assert not (tmp_path / "out").exists()
