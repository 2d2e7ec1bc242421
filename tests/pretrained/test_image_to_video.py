"""An image model's weights in a video model: a clip that stands still has the image's tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.config import load_config
from vitrail.models import Encoder, build_model
from vitrail.pretrained import find_weights, load_model, load_pretrained, save_model
from vitrail.training import prepare

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 7}
PREPARED = {
    "img_size": [14, 14],
    "in_chans": 1,
    "mean": [0.5],
    "std": [0.5],
    "interpolation": "bicubic",
    "crop_ratio": 1.0,
}


def image_model(folder: Path, **changes: Any) -> Encoder:
    """A plain ViT with weights that matter everywhere, in a model folder."""
    torch.manual_seed(0)
    options = {**TINY, "img_size": 14, "num_classes": 10, **changes}
    model = build_model("vit_mnist_2blk", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    prepared = PREPARED | {
        "in_chans": model.config.in_chans,
        **{name: [0.5] * model.config.in_chans for name in ("mean", "std")},
    }
    classes = tuple(map(str, range(model.config.num_classes)))
    save_model(folder, model, name="vit_mnist_2blk", classes=classes, preprocessing=prepared)
    return model


def video_model(**changes: Any) -> Encoder:
    options = {**TINY, "img_size": 14, "num_frames": 4, "class_token": True, "pool": "cls", **changes}
    return build_model("video_vit_28", **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("tubelet", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_frames_have_the_tokens_of_the_image(tubelet: int, channels: int, tmp_path: Path) -> None:
    plain = image_model(tmp_path, in_chans=channels)
    video = video_model(tubelet=tubelet, in_chans=channels)
    report = load_pretrained(video, find_weights(tmp_path))
    plain, video = plain.double(), video.double()
    images = torch.randn(3, channels, 14, 14, dtype=torch.float64)
    clips = images[:, None].expand(-1, 4, -1, -1, -1)
    own, grid = video.patch(clips)
    theirs, _ = plain.patch(images)
    assert grid == (4 // tubelet, 2, 2)
    torch.testing.assert_close(own, theirs.repeat(1, 4 // tubelet, 1), atol=1e-6, rtol=0)
    placed = video.place(own, grid)
    expected = plain.place(theirs, (2, 2))
    patches = torch.cat([expected[:, :1], expected[:, 1:].repeat(1, 4 // tubelet, 1)], dim=1)
    torch.testing.assert_close(placed, patches, atol=1e-6, rtol=0)
    # Attention over copies of the same tokens is attention over them, but for the class token, which counts
    # less; with one moment nothing differs.
    if tubelet == 4:
        torch.testing.assert_close(video(clips), plain(images), atol=1e-6, rtol=0)
    done = {"time_embed"} | ({"patch_embed.proj.weight"} if tubelet > 1 else set())
    assert set(report.resized) == done
    assert (report.fresh, dict(report.ignored)) == ((), {})
    assert set(report.matched) == set(video.state_dict()) - done
    assert f"time_embed: zero for {4 // tubelet} moments" in report.text()


@torch.no_grad()
def test_without_a_class_token_the_answer_is_the_same_for_any_number_of_moments(tmp_path: Path) -> None:
    options: dict[str, Any] = {"class_token": False, "pool": "mean"}
    plain, video = image_model(tmp_path, **options), video_model(**options)
    load_pretrained(video, find_weights(tmp_path))
    images = torch.randn(3, 1, 14, 14)
    torch.testing.assert_close(video(images), plain(images), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_sizes_channels_and_heads_are_made_to_fit(tmp_path: Path) -> None:
    plain = image_model(tmp_path, in_chans=3)
    video = video_model(tubelet=2, in_chans=1, img_size=28, num_classes=6)
    report = load_pretrained(video, find_weights(tmp_path))
    assert report.resized["pos_embed"] == "positions 2 x 2 resampled to 4 x 4"
    inflated = "3 channels made 1, repeated for the 2 frames of a tubelet, 1/2 each"
    assert report.resized["patch_embed.proj.weight"] == inflated
    assert report.fresh == ("head.weight", "head.bias")
    grey = torch.randn(2, 1, 28, 28)
    own, _ = video.patch(grey[:, None].expand(-1, 4, -1, -1, -1))
    theirs, _ = plain.patch(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(own, theirs.repeat(1, 2, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("image", "video", "message"),
    [
        ({}, {"num_heads": 4}, "image model with num_heads 2, this video model has 4; take num_heads 2"),
        ({}, {"patch_size": 2}, "image model with patch_size 7, this video model has 2; take patch_size 7"),
        ({}, {"position": "sincos_3d"}, "position learned, this video model has sincos_3d; take position"),
        ({"position": "rotary"}, {}, "has position 'rotary', and a video model starts from images with"),
        ({"registers": 2}, {}, "image model with registers 2, this video model has 0, and no video model"),
        ({"attention": "differential", "num_heads": 1}, {"num_heads": 1}, "with attention differential"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    image: dict[str, Any], video: dict[str, Any], message: str, tmp_path: Path
) -> None:
    image_model(tmp_path, **image)
    model = video_model(**video)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_pretrained(model, find_weights(tmp_path))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of four frames of two classes: a square goes to the right, or to the left."""
    place = tmp_path_factory.mktemp("films")
    for split, count in (("train", 8), ("test", 4)):
        for label in "ab":
            for clip in range(count):
                (place / split / label / f"{clip}").mkdir(parents=True)
                for frame in range(4):
                    pixels = np.zeros((14, 14), dtype=np.uint8)
                    column = 2 * (frame if label == "a" else 3 - frame)
                    pixels[clip : clip + 6, column : column + 5] = 200
                    Image.fromarray(pixels).save(place / split / label / f"{clip}" / f"{frame}.png")
    return place


def test_a_run_on_clips_starts_from_a_run_on_images(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the image model decides is taken over; what is asked for on the command line stays."""
    plain = image_model(tmp_path / "images" / "model")
    asked = {
        "model.pretrained": str(tmp_path / "images"),
        "model.tubelet": "2",
        "model.num_frames": "4",
        "model.img_size": "14",
        "model.patch_size": "7",
        "data.name": str(films),
        "data.frames": "4",
        "data.frame_stride": "1",
        "train.duration": "2 epochs",
        "train.device": "cpu",
    }
    run = prepare(load_config("clips-vit", asked))
    assert (run.config.model.name, run.model.config.num_frames) == ("video_vit_28", 4)
    assert (run.model.config.pool, run.model.config.num_heads) == ("cls", 2)
    own, theirs = run.model.state_dict(), plain.state_dict()
    assert torch.equal(own["blocks.1.mlp.fc1.weight"], theirs["blocks.1.mlp.fc1.weight"])
    assert torch.equal(own["pos_embed"], theirs["pos_embed"])
    assert run.loaded is not None
    assert set(run.loaded.fresh) == {"head.weight", "head.bias"}
    assert run.preprocessing.mean == (0.5,)
    options = [word for key, value in asked.items() for word in (f"--{key}", value)]
    main(["train", "clips-vit", *options, "--train.output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert "patch_embed.proj.weight: repeated for the 2 frames of a tubelet, 1/2 each" in said.out + said.err
    assert load_model(tmp_path / "run").classes == ("a", "b")


def test_other_models_stay_refused(films: Path, tmp_path: Path) -> None:
    image_model(tmp_path / "model")
    asked = {"model.name": "swin_mnist_2blk", "model.pretrained": str(tmp_path), "data.name": str(films)}
    with pytest.raises(
        ValueError, match=r"holds a vit_mnist_2blk, not a swin_mnist_2blk; leave model\.name out"
    ):
        prepare(load_config(None, asked))
    with pytest.raises(ValueError, match=r"with patch_size 7, this video model has 8; take patch_size 7"):
        prepare(
            load_config(
                "clips-vit",
                {"model.pretrained": str(tmp_path), "data.name": str(films), "data.frame_stride": 1},
            )
        )
