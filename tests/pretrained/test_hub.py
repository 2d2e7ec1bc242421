"""Sharing models: the folder that goes to the hub, and what comes from it, without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from vitrail.models import build_model
from vitrail.pretrained import load_model, save_model
from vitrail.pretrained.hub import from_pretrained, push_to_hub, save_pretrained

PREPROCESSING = {
    "img_size": [28, 28],
    "in_chans": 1,
    "mean": [0.5],
    "std": [0.25],
    "interpolation": "bicubic",
    "crop_ratio": 0.875,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, classes: tuple[str, ...] = tuple("0123456789")) -> Path:
    model = build_model("vit_mnist_2blk", num_classes=len(classes))
    save_model(folder, model, name="vit_mnist_2blk", classes=classes, preprocessing=PREPROCESSING)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with the files that a card quotes."""
    folder = tmp_path / "run"
    write_model(folder / "model")
    (folder / "evaluation").mkdir()
    numbers = {
        "count": 10_000,
        "accuracy": 0.98765,
        "accuracy_interval": [0.985, 0.99],
        "loss": 0.04321,
        "macro_f1": 0.9876,
    }
    (folder / "evaluation" / "fashion-mnist-test.json").write_text(json.dumps(numbers))
    manifest = {"command": "vitrail train mnist-vit --optim.lr 1e-3", "seed": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network: the hub's client is in offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached_repository(cache: Path, repo_id: str) -> Path:
    """Where the hub's client keeps the main branch of a repository."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_the_folder_is_a_model_folder_with_a_card(run_folder: Path, tmp_path: Path) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared", repo_id="me/digits")
    assert sorted(path.name for path in shared.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (shared / name).read_bytes() == (run_folder / "model" / name).read_bytes()
    assert load_model(shared).classes == tuple("0123456789")


def test_the_card_tells_the_hub_what_it_is(run_folder: Path, tmp_path: Path) -> None:
    card = ModelCard.load(save_pretrained(run_folder, tmp_path / "shared") / "README.md")
    assert card.data.library_name == "vitrail"
    assert card.data.pipeline_tag == "image-classification"
    assert {"vitrail", "image-classification"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("fashion-mnist", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.98765)


def test_the_card_tells_people_what_it_is(run_folder: Path, tmp_path: Path) -> None:
    text = (
        save_pretrained(run_folder, tmp_path / "shared", repo_id="me/digits")
        .joinpath("README.md")
        .read_text()
    )
    assert text.split("---\n")[2].startswith("\n# digits\n\nA ViT (vit_mnist_2blk) with 105,098 parameters")
    assert "105,098 parameters for grey images of 28 x 28 pixels," in text
    assert 'ViTClassifier.from_pretrained("me/digits")' in text
    assert "minus mean 0.5, divided by standard deviation 0.25; resized (bicubic)" in text
    assert "(0.875 of the shorter side)" in text
    assert "| fashion-mnist | test | 10,000 | 98.77 % | 98.50 to 99.00 | 0.0432 | 0.9876 |" in text
    assert "    vitrail train mnist-vit --optim.lr 1e-3\n\nSeed 3." in text


def test_the_example_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    save_pretrained(write_model(tmp_path / "plain"), "digits-vit")
    Image.new("L", (40, 30), 90).save("image.jpg")
    code = re.search(r"```python\n(.*?)```", Path("digits-vit/README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], {})


def test_a_model_folder_without_a_run_has_no_numbers(tmp_path: Path) -> None:
    text = (save_pretrained(write_model(tmp_path / "plain"), tmp_path / "shared") / "README.md").read_text()
    assert "## Measured" not in text
    assert "## Training" not in text
    assert "model-index" not in text


def test_names_of_classes_cannot_leave_their_place(tmp_path: Path) -> None:
    names = ("a\n---\nlicense: mit", "```", "# b", *(f"class {k}" for k in range(30)))
    text = (save_pretrained(write_model(tmp_path / "m", names), tmp_path / "s") / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert "A ViT (vit_mnist_2blk with num_classes 33) with" in text
    assert "license" not in header
    (listed,) = [line for line in text.splitlines() if "class 3" in line]
    assert json.loads(listed) == list(names[:20])
    assert listed.startswith("    ")
    assert "The first 20 of 33, in the order of the outputs" in text


def test_a_path_comes_first(run_folder: Path, tmp_path: Path, hub_cache: Path) -> None:
    expected = load_model(run_folder).model.state_dict()
    for path in (run_folder, run_folder / "model", str(run_folder)):
        found = from_pretrained(path).model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match="is not a hub repository: it has no revision"):
        from_pretrained(run_folder, revision="main")


def test_what_the_hub_gave_before_is_used_without_network(run_folder: Path, hub_cache: Path) -> None:
    save_pretrained(run_folder, cached_repository(hub_cache, "me/digits"))
    for revision in (None, "main", COMMIT):
        found = from_pretrained("me/digits", revision=revision)
        assert found.name == "vit_mnist_2blk"
        assert torch.equal(found.model.head.weight, load_model(run_folder).model.head.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224 is an architecture, and its weights are not at hand"),
        ("vit_base", "is an architecture"),
        (
            "me/digits",
            "^no folder me/digits here, it is not in the hub's local cache, and the hub cannot be reached; "
            "where there is a network, `vitrail download me/digits` fetches it$",
        ),
        ("timm:vit_tiny_patch16_224.own", "^timm:vit_tiny_patch16_224.own is not here, it is not in the hub"),
        ("digits", "no run or model folder digits"),
        ("runs/a/model", "no run or model folder runs/a/model"),
    ],
)
def test_without_network_the_message_is_one_line(name: str, message: str, hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(name)
    assert "\n" not in str(error.value)


def test_what_is_no_model_that_we_have_is_refused(hub_cache: Path) -> None:
    folder = cached_repository(hub_cache, "timm/vit")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    for config, message in (
        ('{"architecture": "resnet50", "num_classes": 1000}', "timm's resnet50 is not one of our models"),
        ('{"architecture": "vit_base_patch16_224"}', "model.safetensors is damaged"),
        ('{"model_type": "bert"}', "transformers' bert is not one of our models"),
        ('{"layers": 3}', "timm/vit on the hub is not a model that we know"),
    ):
        (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            from_pretrained("timm/vit")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not a model that we know"):
        from_pretrained("timm/vit")


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("me/digits", r"the hub did not take me/digits \(.*\); check the network"),
        ("digits", "expected owner/name"),
    ],
)
def test_an_upload_that_cannot_be_is_one_line(
    repo_id: str, message: str, run_folder: Path, hub_cache: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        push_to_hub(run_folder, repo_id, token="hf_none")
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        push_to_hub(tmp_path, "me/digits")
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        save_pretrained(tmp_path / "m", tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
