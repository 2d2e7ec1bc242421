"""From image files to named probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.datasets import Preprocessing
from vitrail.models import build_model
from vitrail.pretrained import save_model
from vitrail.serving import Predictor


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    preprocessing = Preprocessing(img_size=(28, 28), in_chans=1, mean=(0.13,), std=(0.31,))
    save_model(
        tmp_path / "model",
        build_model("vit_mnist_2blk"),
        name="vit_mnist_2blk",
        classes=tuple("0123456789"),
        preprocessing=preprocessing.to_dict(),
    )
    return Predictor.from_source(tmp_path / "model")


def test_files_and_pictures_of_every_kind(predictor: Predictor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(pixels).convert("RGB").resize((60, 40)).save(tmp_path / "colour.jpg")
    found = predictor.predict(
        [tmp_path / "grey.png", str(tmp_path / "colour.jpg"), Image.fromarray(pixels)], top=10
    )
    assert [prediction.source for prediction in found] == [
        str(tmp_path / "grey.png"), str(tmp_path / "colour.jpg"), "image",
    ]  # fmt: skip
    for prediction in found:
        assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
        assert set(prediction.classes) == set("0123456789")
    assert found[0].probabilities == pytest.approx(found[2].probabilities)
    images = torch.from_numpy((pixels / 255.0 - 0.13) / 0.31).float()[None, None]
    expected = predictor.model(images).softmax(1).sort(descending=True).values[0]
    assert found[0].probabilities == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_file_that_is_no_image_is_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not an image")
    for path in (tmp_path / "note.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            predictor.predict([path])
