"""Many files on all cores: the answers of `Predictor.predict`, in the order of the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.datasets import BrokenImageError
from vitrail.models import build_model
from vitrail.pretrained.compiled import CompiledModel
from vitrail.serving import Prediction, Predictor, find_files, predict_files
from vitrail.serving.pipeline import _open_reduced


@pytest.fixture(scope="module", params=["eager", "compiled"])
def predictor(request: pytest.FixtureRequest, model_folder: Path) -> Predictor:
    """The other way through the files is taken for compiled code, whatever its answers are made by."""
    eager = Predictor.from_source(model_folder)
    compiled = CompiledModel(eager.model, (eager.model.config.in_chans, *eager.preprocessing.img_size))
    return Predictor(
        eager.model, eager.preprocessing, eager.classes, compiled if request.param == "compiled" else None
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_every_kind(folder: Path) -> list[Path]:
    """Pictures of many kinds, no JPEG three times as large as the model takes."""
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (60, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    colours.save(folder / "a.jpg")
    colours.save(folder / "b.jpeg", exif=turned)
    colours.convert("CMYK").save(folder / "c.jpg")
    colours.convert("L").save(folder / "d.jpg")
    colours.convert("P").save(folder / "e.gif")
    colours.convert("RGBA").save(folder / "f.png")
    Image.fromarray(random.integers(0, 65536, (30, 50), dtype=np.uint16)).save(folder / "g.png")
    for suffix in ("bmp", "tif", "webp", "ppm"):
        colours.save(folder / f"h.{suffix}")
    return sorted(folder.iterdir())


def together(found: Iterator[list[Prediction | BrokenImageError]]) -> list[Prediction | BrokenImageError]:
    return [own for batch in found for own in batch]


def test_every_kind_of_file_has_the_answer_of_predict(
    predictor: Predictor, tmp_path: Path, threads: None
) -> None:
    files = write_every_kind(tmp_path)
    torch.set_num_threads(1)  # the last bits of some products depend on it
    found = together(predict_files(predictor, files, top=10, batch_size=len(files)))
    assert found == predictor.predict(files, top=10)
    assert len({own.probabilities for own in found}) >= 8  # not all alike


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(predictor: Predictor, tmp_path: Path) -> None:
    ramps = np.linspace(0, 1, 400)[:, None, None] * np.linspace(0, 1, 600)[None, :, None]
    waves = 255 * (0.5 + 0.5 * np.sin(20 * ramps * np.array([1.0, 2.0, 3.0])))
    picture = Image.fromarray(waves.astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 8
    levels = 255 * 0.31
    for name, options in (("a.jpg", {}), ("b.jpg", {"exif": turned}), ("c.png", {})):
        picture.save(tmp_path / name, **options)
        reduced = _open_reduced(tmp_path / name, predictor.preprocessing)
        assert isinstance(reduced, torch.Tensor)
        difference = (reduced - predictor.preprocessing.open_image(tmp_path / name)).abs().mean() * levels
        assert (difference > 0) == name.endswith("jpg")
        assert difference < 1.0


def test_neither_threads_nor_broken_neighbours_change_a_bit(
    predictor: Predictor, tmp_path: Path, threads: None
) -> None:
    files = write_every_kind(tmp_path)
    runs = []
    # A compiled model computes with all threads, on whose number the last bits may depend.
    for count in (1, 3) if predictor.compiled is None else (3, 3):
        torch.set_num_threads(count)
        runs.append(together(predict_files(predictor, files * 3, batch_size=4)))
        assert torch.get_num_threads() == count
    assert runs[0] == runs[1]
    assert [own.source for own in runs[0]] == [str(path) for path in files * 3]


def test_compiled_code_runs_on_all_threads(predictor: Predictor, tmp_path: Path, threads: None) -> None:
    seen = set()

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.add((len(images), torch.get_num_threads()))
        return predictor.model(images)

    shape = predictor.model.config.in_chans, *predictor.preprocessing.img_size
    compiled = Predictor(predictor.model, predictor.preprocessing, (), CompiledModel(run, shape))
    torch.set_num_threads(3)
    found = together(predict_files(compiled, write_every_kind(tmp_path), batch_size=2))
    assert len(found) == 11
    assert seen == {(2, 3), (1, 3)}


def test_broken_files_stand_in_their_places(predictor: Predictor, tmp_path: Path) -> None:
    files = write_every_kind(tmp_path)
    (tmp_path / "cut.jpg").write_bytes(files[0].read_bytes()[:-300])
    (tmp_path / "note.png").write_text("not an image")
    mixed = [tmp_path / "note.png", tmp_path / "missing.png", files[0], tmp_path / "cut.jpg", files[1]]
    found = together(predict_files(predictor, mixed, batch_size=2))
    assert [own.source for own in found] == [str(path) for path in mixed]
    assert [isinstance(own, BrokenImageError) for own in found] == [True, True, False, True, False]
    assert [own.reason for own in found[:2]] == [
        "expected an image, got a file of another kind",
        "no such image file",
    ]
    assert "truncated" in found[3].reason


def test_folders_give_the_images_directly_in_them(tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "notes.txt", "deeper/c.png"):
        (tmp_path / "in" / name).touch()
    files, empty = find_files([tmp_path / "single.png", tmp_path / "in", tmp_path])
    assert files == [tmp_path / "single.png", tmp_path / "in" / "a.JPG", tmp_path / "in" / "b.png"]
    assert [str(own) for own in empty] == [f"{tmp_path}: no image files in this folder"]


def test_bad_numbers_and_a_model_without_a_head(predictor: Predictor, tmp_path: Path, threads: None) -> None:
    files = write_every_kind(tmp_path)
    with pytest.raises(ValueError, match=r"^top: expected at least 1, got 0$"):
        predict_files(predictor, files, top=0)
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 1, got -8$"):
        predict_files(predictor, files, batch_size=-8)
    torch.set_num_threads(2)
    headless = Predictor(
        build_model("vit_mnist_2blk", in_chans=3, num_classes=0), predictor.preprocessing, ("a",)
    )
    with pytest.raises(ValueError, match="no head"):
        together(predict_files(headless, files))
    assert torch.get_num_threads() == 2
