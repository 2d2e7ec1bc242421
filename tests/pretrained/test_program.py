"""Any network as a file that can teach: written, read back, refused; nothing in a stranger's file runs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.models import build_model
from vitrail.pretrained import ModelFolder, load_program, save_program, trust_program
from vitrail.shipping import write_export

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ["cat", "cow", "dog"]
PREPARED: dict[str, Any] = {
    "img_size": [8, 10],
    "in_chans": 1,
    "mean": [0.5],
    "std": [0.5],
    "interpolation": "bilinear",
    "crop_ratio": 1.0,
}


class SmallCNN(nn.Module):
    """Two convolutions with what changes in training, and a view that needs contiguous memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.second, self.drop, self.head = nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Linear(4 * 4 * 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.norm(self.first(images)).relu())
        return self.head(self.drop(maps.view(images.shape[0], -1)))


class MakesTensors(nn.Module):
    """A graph with a device written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean(dim=(1, 2)) + torch.arange(10, device=images.device))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    network = SmallCNN()
    network(torch.randn(16, 1, 8, 10))  # running statistics that are not 0 and 1
    file = tmp_path_factory.mktemp("networks") / "cnn.pt2"
    save_program(file, network, classes=CLASSES, preprocessing=PREPARED)
    return file, network


@pytest.fixture
def copied(written: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    for name in ("cnn.pt2", "cnn.pt2.json"):
        shutil.copy(written[0].with_name(name), tmp_path)
    return tmp_path / "cnn.pt2"


def describe(file: Path, **changes: Any) -> None:
    about = file.with_name(f"{file.name}.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))


@torch.no_grad()
def test_it_answers_as_the_network_does(written: tuple[Path, nn.Module]) -> None:
    file, network = written
    assert {path.name for path in file.parent.iterdir()} == {"cnn.pt2", "cnn.pt2.json"}
    program = load_program(file)
    assert (program.classes, program.preprocessing) == (tuple(CLASSES), PREPARED)
    # What a run does to its teacher; a view would fail behind a convolution in another layout.
    program.eval().requires_grad_(False).train().to("cpu", memory_format=torch.channels_last)
    assert (list(program.parameters()), program.state_dict()) == ([], {})
    for count in (1, 2, 7):
        images = torch.randn(count, 1, 8, 10)
        torch.testing.assert_close(program(images), network(images))
        torch.testing.assert_close(program(images.double()), network(images))
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(program(images), expected)


def test_constants_of_the_graph_move_to_the_device(tmp_path: Path) -> None:
    network = MakesTensors().requires_grad_(False)
    save_program(tmp_path / "net.pt2", network, classes=CLASSES, preprocessing=PREPARED)
    program = load_program(tmp_path / "net.pt2")
    copied = copy.deepcopy(program).to("meta")
    (graph,) = copied._graph
    assert graph(torch.randn(5, 1, 8, 10, device="meta")).device.type == "meta"
    images = torch.randn(5, 1, 8, 10)
    torch.testing.assert_close(program(images), network(images))


def test_what_export_writes_is_such_a_file(tmp_path: Path) -> None:
    model = build_model("vit_digits", depth=1, embed_dim=16, num_heads=2, num_classes=3).eval()
    prepared = PREPARED | {"img_size": [8, 8]}
    stored = ModelFolder(model=model, name="vit_digits", classes=tuple(CLASSES), preprocessing=prepared)
    write_export(tmp_path / "any.pt2", stored, "torch-export")
    program, images = load_program(tmp_path / "any.pt2"), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images))
    assert (program.classes, program.preprocessing) == (tuple(CLASSES), prepared)
    write_export(tmp_path / "one.pt2", stored, "torch-export", batch=1)
    with pytest.raises(ValueError, match=r"one\.pt2 does not take batches of any size of images \[1, 8, 8\]"):
        load_program(tmp_path / "one.pt2")


class Intruder:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_nothing_in_a_strangers_file_runs(copied: Path, tmp_path: Path) -> None:
    """torch itself runs what is in it: the seal is all that stands between."""
    trace, hostile = tmp_path / "it ran", tmp_path / "hostile.pt2"
    inputs = io.BytesIO()
    torch.save(Intruder(trace), inputs, pickle_module=pickle)
    with zipfile.ZipFile(copied) as source, zipfile.ZipFile(hostile, "w") as target:
        for entry in source.infolist():
            own = entry.filename.endswith("sample_inputs/model.pt")
            target.writestr(entry, inputs.getvalue() if own else source.read(entry))
    shutil.copy(f"{copied}.json", f"{hostile}.json")
    with pytest.raises(ValueError, match=r"hostile\.pt2 is not from here or changed since") as error:
        load_program(hostile)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    with contextlib.suppress(Exception):  # what comes of it afterwards does not matter
        torch.export.load(hostile)
    assert trace.exists()


def test_what_is_trusted_runs_until_it_changes(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(ValueError, match="not from here or changed since"):
        load_program(copied)
    trust_program(copied)
    assert load_program(copied).classes == tuple(CLASSES)
    describe(copied, classes=["cow", "cat", "dog"])
    with pytest.raises(ValueError, match=r"call vitrail\.pretrained\.trust_program\('.*cnn\.pt2'\)"):
        load_program(copied)
    describe(copied, seal="é")
    with pytest.raises(ValueError, match="not from here or changed since"):
        load_program(copied)


def test_what_cannot_teach_is_refused_in_one_line(copied: Path) -> None:
    about = copied.with_name("cnn.pt2.json")
    good, program = about.read_text(), copied.read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classes": ["a", "b"]}, r"answers to 3 images with \[3, 3\], and its description names 2 classes"),
        ({"classes": []}, r"cnn\.pt2\.json: expected the names of the classes as classes, got \[\]"),
        ({"classes": [1, 2, 3]}, r"expected the names of the classes as classes, got \[1, 2, 3\]"),
        ({"preprocessing": None}, r"expected in_chans and img_size \[height, width\] in preprocessing"),
        ({"preprocessing": {"in_chans": 1, "img_size": 8}}, r"expected in_chans and img_size \[height"),
        ({"preprocessing": {"in_chans": 1, "img_size": [8, "8"]}}, r"expected in_chans and img_size"),
        (
            {"preprocessing": PREPARED | {"img_size": [9, 9]}},
            r"does not take batches of any size of images \[1, 9, 9\]",
        ),
    ]
    for changes, message in cases:
        about.write_text(good)
        describe(copied, **changes)
        with pytest.raises(ValueError, match=message) as error:  # noqa: PT012  (either may find it)
            trust_program(copied)
            load_program(copied)
        assert "\n" not in str(error.value)
    about.write_text("{")
    with pytest.raises(ValueError, match=r"cnn\.pt2\.json is damaged"):
        load_program(copied)
    about.write_text("[]")
    with pytest.raises(ValueError, match=r"cnn\.pt2\.json: expected \{\"classes\""):
        load_program(copied)
    about.write_text(good)
    copied.write_bytes(program[:-100])
    with pytest.raises(ValueError, match="not from here or changed since"):
        load_program(copied)
    about.unlink()
    with pytest.raises(ValueError, match=r"does not tell its .*: expected cnn\.pt2\.json beside it"):
        load_program(copied)
    copied.unlink()
    with pytest.raises(ValueError, match=r"no file .*cnn\.pt2$"):
        load_program(copied)


def test_a_damaged_file_that_was_trusted_is_one_line(copied: Path) -> None:
    copied.write_bytes(copied.read_bytes()[:-100])
    trust_program(copied)
    with pytest.raises(ValueError, match=r"cnn\.pt2 cannot be read by torch .*; write it again$") as error:
        load_program(copied)
    assert "\n" not in str(error.value)


def test_a_network_that_was_exported_in_training_mode_is_refused(copied: Path) -> None:
    for part in ("norm", "drop"):
        network = SmallCNN().eval()
        getattr(network, part).train()
        program = torch.export.export(
            network, (torch.randn(2, 1, 8, 10),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, copied)
        trust_program(copied)
        with pytest.raises(ValueError, match="put the network into evaluation mode before it is exported"):
            load_program(copied)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] * float(images.sum())

    cases: list[tuple[str, nn.Module, list[str], str]] = [
        ("net.pth", MakesTensors(), CLASSES, r"expected a file \.pt2, got .*net\.pth"),
        ("none/net.pt2", MakesTensors(), CLASSES, r"no folder .*none; make it"),
        ("net.pt2", MakesTensors(), ["a", "b"], r"\[3, 3\], and its description names 2 classes"),
        ("net.pt2", nn.Conv2d(1, 3, 3), CLASSES, r"answers to 3 images with \[3, 3, 6, 8\]"),
        ("net.pt2", nn.Linear(3, 3), CLASSES, "Linear cannot be exported for batches of any size"),
        ("net.pt2", Stubborn(), CLASSES, "Stubborn cannot be exported for batches of any size"),
    ]
    for name, network, classes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            save_program(tmp_path / name, network, classes=classes, preprocessing=PREPARED)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
