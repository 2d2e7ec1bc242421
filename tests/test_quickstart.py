"""The user's own lines, word for word, on small data; and each class against an independent reference."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vitrail.components.tap import record
from vitrail.config import load_config
from vitrail.datasets import ImageSet, Preprocessing, Splits, load_dataset
from vitrail.models import Encoder, build_model, model_config
from vitrail.pretrained import create_model, load_model, save_model
from vitrail.quickstart import (
    AttentionVisualizer,
    ViTClassifier,
    ViTConfig,
    ViTTrainer,
    ViTTransferLearning,
)
from vitrail.training import train

ROOT = Path(__file__).parent.parent

TRAINING = """\
from main import ViTTrainer, ViTConfig

# Configure model
config = ViTConfig(
    image_size=224,
    patch_size=16,
    num_classes=1000,
    dim=768,
    depth=12,
    heads=12,
    mlp_dim=3072
)

# Initialize trainer
trainer = ViTTrainer(config)

# Train model
trainer.train(
    train_loader=train_loader,
    val_loader=val_loader,
    epochs=100,
    learning_rate=1e-3
)
"""

TRANSFER = """\
from main import ViTTransferLearning

# Load pre-trained ViT
transfer = ViTTransferLearning(
    pretrained_model='vit_base_patch16_224',
    num_classes=10,  # Custom dataset classes
    freeze_backbone=True
)

# Fine-tune on custom dataset
transfer.fine_tune(
    dataset=custom_dataset,
    epochs=20,
    learning_rate=1e-4
)
"""

ATTENTION = """\
from main import AttentionVisualizer

# Initialize visualizer
visualizer = AttentionVisualizer(model)

# Generate attention maps
attention_maps = visualizer.generate_attention_maps(
    image=input_image,
    layers=[6, 9, 12],  # Which layers to visualize
    heads='mean'  # Average across attention heads
)

# Plot results
visualizer.plot_attention_maps(attention_maps)
"""

CLASSIFICATION = """\
from main import ViTClassifier

# Load pre-trained model
model = ViTClassifier.from_pretrained('vit_base_patch16_224')

# Classify image
predictions = model.predict('path/to/image.jpg')
print(f"Predicted class: {predictions['class']}")
print(f"Confidence: {predictions['confidence']:.3f}")
"""

SMALL = ViTConfig(
    image_size=8, patch_size=2, num_classes=10, dim=16, depth=2, heads=2, mlp_dim=32, channels=1
)


@pytest.fixture
def from_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from main import ...` as in the root of a checkout."""
    monkeypatch.syspath_prepend(ROOT)


def digits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 320 of scikit-learn's digits: [320, 1, 8, 8], 0 to 1 or 0 to 255, and labels."""
    bunch = load_digits()
    pixels = torch.tensor(bunch.images[:320]).unsqueeze(1) / 16
    images = (pixels * 255).round().to(dtype) if dtype == torch.uint8 else pixels.to(dtype)
    return images, torch.tensor(bunch.target[:320])


def loader(images: torch.Tensor, labels: torch.Tensor, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=64, **options)


class Pictures(Dataset):
    """A data set of the user's own: PIL images of unequal size with labels."""

    classes = tuple("0123456789")

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= 60:
            raise IndexError
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (20 + index % 3, 24, 3), dtype=np.uint8)
        pixels[:, :, index % 10 % 3] //= 1 + index % 10
        return Image.fromarray(pixels), index % 10


def write_model(folder: Path, name: str = "vit_digits", **changes: Any) -> Path:
    """A model folder with fresh weights, mean and standard deviation 0.5 as the ViT paper's."""
    torch.manual_seed(1)
    model = build_model(name, **changes)
    own = model.config
    preprocessing = Preprocessing(
        img_size=own.image_shape, in_chans=own.in_chans, mean=(0.5,) * own.in_chans, std=(0.5,) * own.in_chans
    )
    classes = tuple(f"class {number}" for number in range(own.num_classes))
    save_model(folder, model, name=name, classes=classes, preprocessing=preprocessing.to_dict())
    return folder


# The user's lines.


@pytest.mark.usefixtures("from_main")
def test_the_config_is_vit_base() -> None:
    found: dict[str, Any] = {}
    exec(TRAINING.split("# Train model")[0], found)
    model = found["trainer"].model
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656
    assert model.config == model_config("vit_base_patch16_224")


@pytest.mark.usefixtures("from_main")
def test_the_training_lines(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = digits()
    small = TRAINING.replace("=224", "=8").replace("=16", "=2").replace("=1000", "=10").replace("=768", "=16")
    small = small.replace("=12", "=2").replace("=3072", "=32,\n    channels=1")
    found: dict[str, Any] = {
        "train_loader": loader(images[:64], labels[:64], shuffle=True),
        "val_loader": loader(images[64:128], labels[64:128]),
    }
    torch.manual_seed(0)
    exec(small.replace("trainer.train(", "history = trainer.train("), found)
    history = found["history"]
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("train_loss", "learning_rate", "val_loss", "val_accuracy"), 100
    )
    assert history["train_loss"][-1] < 0.8 * history["train_loss"][0]
    assert max(history["learning_rate"]) == pytest.approx(1e-3)
    assert "val accuracy" in capsys.readouterr().err


@pytest.mark.usefixtures("from_main")
def test_the_transfer_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "vit_base_patch16_224", "vit_cifar_plain", depth=1, num_classes=7)
    found: dict[str, Any] = {"custom_dataset": Pictures()}
    exec(TRANSFER, found)
    assert found["transfer"].model.head.out_features == 10


@pytest.mark.usefixtures("from_main")
def test_the_attention_lines() -> None:
    found: dict[str, Any] = {"model": build_model("vit_tiny_patch16_224")}
    for image in (torch.rand(3, 224, 224), ROOT / "examples" / "sample.jpg"):
        found["input_image"] = image
        exec(ATTENTION.replace("visualizer.plot", "figure = visualizer.plot"), found)
        assert {layer: tuple(one.shape) for layer, one in found["attention_maps"].maps.items()} == {
            6: (14, 14),
            9: (14, 14),
            12: (14, 14),
        }
        content = io.BytesIO()
        found["figure"].savefig(content)
        assert content.tell() > 10_000


@pytest.mark.usefixtures("from_main")
def test_the_classification_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "vit_base_patch16_224", "vit_cifar")
    (tmp_path / "path" / "to").mkdir(parents=True)
    Image.open(ROOT / "examples" / "sample.jpg").save("path/to/image.jpg")
    exec(CLASSIFICATION, {})
    assert re.fullmatch(r"Predicted class: class \d\nConfidence: 0\.\d{3}\n", capsys.readouterr().out)


@pytest.mark.parametrize("line", [TRANSFER, CLASSIFICATION])
@pytest.mark.usefixtures("from_main")
def test_a_name_without_weights_says_what_to_give(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="vit_base_patch16_224 is an architecture, and its weights are not"):
        exec(line, {})


# ViTConfig and ViTTrainer.


def test_mlp_dim_is_kept_exactly() -> None:
    for dim in range(8, 200, 4):
        for mlp_dim in (1, 7, 49, 3 * dim - 1, 4 * dim + 1):
            config = ViTConfig(dim=dim, mlp_dim=mlp_dim, heads=1).model_config()
            assert int(config.embed_dim * config.mlp_ratio) == mlp_dim
    model = ViTTrainer(ViTConfig(image_size=16, dim=49, mlp_dim=147, heads=7, depth=1)).model
    assert model.blocks[0].mlp.fc1.out_features == 147
    with pytest.raises(ValueError, match="mlp_dim must be at least 1"):
        ViTConfig(mlp_dim=0).model_config()
    with pytest.raises(ValueError, match="not divisible"):
        ViTTrainer(ViTConfig(heads=7))


def test_every_kind_of_batch_is_the_same() -> None:
    images, labels = digits()
    bytes_, _ = digits(torch.uint8)

    def first_loss(batches: Any) -> float:
        torch.manual_seed(0)
        return ViTTrainer(SMALL).train(batches, None, 1, 1e-3)["train_loss"][0]

    expected = first_loss(loader(images, labels))
    assert first_loss([[images[k : k + 64], labels[k : k + 64]] for k in range(0, 320, 64)]) == expected
    for first, second in (("image", "label"), ("pixel_values", "labels"), ("images", "targets")):
        found = [{first: images[k : k + 64], second: labels[k : k + 64]} for k in range(0, 320, 64)]
        assert first_loss(found) == expected
    assert first_loss(loader(bytes_, labels)) == pytest.approx(expected, rel=1e-3)  # sixteenths in bytes
    assert first_loss(loader(images.double(), labels.int())) == pytest.approx(expected, rel=1e-6)


def test_the_loop_is_adamw_with_warmup_and_cosine() -> None:
    images, labels = digits()
    torch.manual_seed(0)
    trainer = ViTTrainer(SMALL)
    torch.manual_seed(0)
    other = SMALL.model_config().build()
    history = trainer.train(loader(images, labels), None, epochs=4, learning_rate=2e-3)

    exempt = {"cls_token", "pos_embed"}
    groups = [
        {"params": [p for n, p in other.named_parameters() if (p.ndim > 1 and n not in exempt) == decays]}
        | {"weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    losses = []
    for step in range(20):
        rate = 2e-3 if step == 0 else 1e-3 * (1 + np.cos(np.pi * (step - 1) / 19))
        k = step % 5 * 64
        loss = nn.functional.cross_entropy(other(images[k : k + 64]), labels[k : k + 64])
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history["train_loss"] == pytest.approx(np.reshape(losses, (4, 5)).mean(axis=1).tolist(), rel=1e-4)
    # Not weight by weight: the gradient of a key's bias is rounding error only, which AdamW enlarges.
    torch.testing.assert_close(trainer.model(images), other(images), rtol=1e-3, atol=1e-4)
    assert not trainer.model.training


def test_validation_is_over_all_batches() -> None:
    images, labels = digits()
    trainer = ViTTrainer(SMALL)
    history = trainer.train(loader(images[:64], labels[:64]), loader(images[64:164], labels[64:164]), 2, 1e-3)
    with torch.no_grad():
        logits = trainer.model(images[64:164])
    accuracy = float((logits.argmax(dim=1) == labels[64:164]).float().mean())
    assert history["val_accuracy"][-1] == pytest.approx(accuracy)
    loss = float(nn.functional.cross_entropy(logits, labels[64:164]))
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def test_the_seed_decides_the_order() -> None:
    images, labels = digits()

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = ViTTrainer(SMALL)
        torch.rand(seed)
        trainer.train(loader(images, labels, shuffle=True), None, 2, 1e-3, seed=seed)
        return trainer.model.head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    images, labels = digits()

    def trainer() -> ViTTrainer:
        torch.manual_seed(0)
        return ViTTrainer(ViTConfig(**(vars(SMALL) | {"dropout": 0.1})))

    class Stopping:
        """A loader after whose seventh batch somebody presses Ctrl-C."""

        def __init__(self) -> None:
            self.inner, self.given = loader(images, labels, shuffle=True), 0

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Iterator[Any]:
            for batch in self.inner:
                if self.given == 7:
                    raise KeyboardInterrupt
                self.given += 1
                yield batch

    whole, cut, resumed = trainer(), trainer(), trainer()
    expected = whole.train(loader(images, labels, shuffle=True), None, 3, 1e-3)
    with pytest.raises(KeyboardInterrupt):
        cut.train(Stopping(), None, 3, 1e-3, output=tmp_path / "run")
    assert not cut.model.training
    with pytest.raises(ValueError, match="not empty"):
        resumed.train(loader(images, labels, shuffle=True), None, 3, 1e-3, output=tmp_path / "run")
    found = resumed.train(
        loader(images, labels, shuffle=True), None, 3, 1e-3, output=tmp_path / "run", resume=True
    )
    assert found == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="resume needs output"):
        resumed.train(loader(images, labels), None, 3, 1e-3, resume=True)


def test_a_saved_model_prepares_pictures_as_it_was_trained(tmp_path: Path) -> None:
    preprocessing = Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.3,), std=(0.4,))
    trainer = ViTTrainer(SMALL, preprocessing=preprocessing)
    folder = trainer.save(tmp_path / "model", classes=[f"digit {k}" for k in range(10)])
    images, _ = digits(torch.uint8)
    found = ViTClassifier.from_pretrained(folder).predict(Image.fromarray(images[0, 0].numpy()), top=10)
    with torch.no_grad():
        expected = trainer.model((images[:1] / 255 - 0.3) / 0.4).softmax(dim=1)[0]
    for name, share in zip(found["classes"], found["probabilities"], strict=True):
        assert share == pytest.approx(float(expected[int(name.split()[1])]), abs=1e-6)
    with pytest.raises(ValueError, match="expected 10 names, got 2"):
        trainer.save(tmp_path / "other", classes=["a", "b"])
    plain = load_model(ViTTrainer(SMALL).save(tmp_path / "plain"))
    assert plain.classes == tuple("0123456789")
    assert (plain.preprocessing["mean"], plain.preprocessing["std"]) == ([0.0], [1.0])


IMAGES, LABELS = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([(IMAGES, LABELS + 7)], {}, "num_classes is 10: expected .* 0 to 9, got .* from 7 to 10"),
        ([(IMAGES, LABELS - 1)], {}, "from -1 to 2"),
        ([(IMAGES, LABELS / 2)], {}, "got torch.float32"),
        ([(IMAGES.expand(-1, 3, -1, -1), LABELS)], {}, r"images \[B, 1, height, width\] .* \[4, 3, 8, 8\]"),
        ([(IMAGES[0], LABELS)], {}, r"got \[1, 8, 8\] and \[4\]"),
        ([(IMAGES, LABELS[:3])], {}, r"got \[4, 1, 8, 8\] and \[3\]"),
        ([(IMAGES[:0], LABELS[:0])], {}, r"got \[0, 1, 8, 8\] and \[0\]"),
        ([IMAGES], {}, r"expected batches of two tensors \(images, labels\), .* got Tensor"),
        ([{"picture": IMAGES, "label": LABELS}], {}, "one of images, image, pixel_values .* picture, label"),
        ([], {}, "train_loader is empty"),
        (iter([(IMAGES, LABELS)]), {}, "train_loader: expected a loader with a length, got list_iterator"),
        ([(IMAGES, LABELS)], {"val_loader": []}, "val_loader is empty"),
        ([(IMAGES, LABELS)], {"epochs": 0}, "epochs and learning_rate must be above 0, got 0"),
        ([(IMAGES, LABELS)], {"learning_rate": -1.0}, "must be above 0, got 1 and -1.0"),
        ([(IMAGES * float("nan"), LABELS)], {}, "the loss became nan"),
    ],
)  # fmt: skip
def test_mistakes_with_loaders_get_one_line(batches: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ViTTrainer(SMALL).train(**({"train_loader": batches, "epochs": 1} | options))
    assert "\n" not in str(error.value)


def test_images_of_any_size_train() -> None:
    batches = [(torch.rand(4, 1, 12, 10), LABELS), (torch.rand(4, 1, 8, 8), LABELS)]
    assert len(ViTTrainer(SMALL).train(batches, batches, 2, 1e-3)["val_loss"]) == 2


# ViTTransferLearning.


def test_another_number_of_classes_changes_the_head_only(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", depth=2)
    stored = load_model(folder).model.state_dict()
    for num_classes, kept in ((10, True), (3, False)):
        model = ViTTransferLearning(folder, num_classes).model
        assert model.config.num_classes == num_classes
        for name, value in model.state_dict().items():
            if not name.startswith("head."):
                assert torch.equal(value, stored[name])
        assert torch.equal(model.head.weight[:3], stored["head.weight"][:3]) == kept


def test_a_weight_file_needs_its_architecture(tmp_path: Path) -> None:
    file = write_model(tmp_path / "model") / "model.safetensors"
    transfer = ViTTransferLearning(file, 3, model="vit_digits")
    assert transfer.preprocessing == Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.5,), std=(0.5,))
    own = Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.1,), std=(0.2,))
    assert ViTTransferLearning(file, 3, model="vit_digits", preprocessing=own).preprocessing == own
    with pytest.raises(ValueError, match=r"does not tell its architecture: add model="):
        ViTTransferLearning(file, 3)
    with pytest.raises(ValueError, match="does not fit this model"):
        ViTTransferLearning(file, 3, model="vit_mnist_2blk")
    with pytest.raises(ValueError, match="holds a vit_digits: leave model out"):
        ViTTransferLearning(tmp_path / "model", 3, model="vit_digits")


@pytest.mark.parametrize("changes", [{}, {"head": "mlp", "attn_drop": 0.3, "drop_path": 0.3}])
def test_kept_features_train_the_head_as_the_images_do(changes: dict, tmp_path: Path) -> None:
    """Against `vitrail train` with a frozen backbone, which passes every image in every epoch."""
    folder = write_model(tmp_path / "model", depth=2, **changes)
    overrides = {
        "model.pretrained": str(folder),
        "optim.freeze": "!head.*",
        "optim.lr": 1e-2,
        "train.duration": "4 epochs",
        "train.batch_size": 64,
        "train.device": "cpu",
        "data.train_fraction": 0.3,
    }
    expected = train(load_config(None, overrides), tmp_path / "run", command="")

    transfer = ViTTransferLearning(folder, 10, freeze_backbone=True)
    backbone = {name: value.clone() for name, value in transfer.model.state_dict().items()}
    with passes(transfer.model) as images:
        splits = load_dataset("digits", train_fraction=0.3)
        found = transfer.fine_tune(splits, epochs=4, learning_rate=1e-2, cache=tmp_path / "cache")
    assert sum(images) == len(splits.train) + len(splits.val) + len(splits.test)

    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(transfer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        if not name.startswith("head."):
            assert torch.equal(transfer.model.state_dict()[name], backbone[name])
    assert found.test.accuracy == expected.metrics.accuracy
    assert found.test.loss == pytest.approx(expected.metrics.loss, rel=1e-4)
    assert not torch.equal(transfer.model.head.state_dict().popitem()[1], backbone.popitem()[1])

    # The second time nothing passes the backbone, and the result is the same.
    again = ViTTransferLearning(folder, 10, freeze_backbone=True)
    with passes(again.model) as images:
        found_again = again.fine_tune(splits, epochs=4, learning_rate=1e-2, cache=tmp_path / "cache")
    assert images == []
    assert found_again.history == found.history


class passes:  # noqa: N801
    """Sizes of the batches that pass a model's first block."""

    def __init__(self, model: Encoder) -> None:
        self.model = model

    def __enter__(self) -> list[int]:
        seen: list[int] = []
        first = self.model.get_submodule(self.model.block_names()[0])
        self.handle = first.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
        return seen

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def test_only_a_frozen_backbone_is_frozen(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", depth=1)
    frozen = ViTTransferLearning(folder, 4, freeze_backbone=True).model
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    free = ViTTransferLearning(folder, 10)
    assert all(parameter.requires_grad for parameter in free.model.parameters())
    before = {name: value.clone() for name, value in free.model.state_dict().items()}
    found = free.fine_tune("digits", epochs=1, learning_rate=1e-3)
    assert all(not torch.equal(value, before[name]) for name, value in free.model.named_parameters())
    assert found.test.count == 359
    assert found.test.accuracy > 0.15
    stored = load_model(free.save(tmp_path / "tuned"))
    assert torch.equal(stored.model.head.weight, free.model.head.weight)
    assert stored.preprocessing["mean"] == [0.5]


def test_two_heads_are_trained_on_the_images(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "crossvit_cifar", branch_depth=(1, 1), depth=1)
    transfer = ViTTransferLearning(folder, 10, freeze_backbone=True)
    trained = {name for name, parameter in transfer.model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    with passes(transfer.model) as images:
        transfer.fine_tune(Pictures(), epochs=2, learning_rate=1e-3)
    # Training and validation in both epochs, then the test: one picture of each class in the last two.
    assert images == [40, 10, 40, 10, 10]


def test_every_kind_of_data_set(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "vit_cifar_plain", depth=1, embed_dim=16, num_heads=2)
    for index in range(60):
        picture, label = Pictures()[index]
        place = tmp_path / "folder" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{index}.png")
    arrays = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    images = ImageSet.from_arrays(arrays, np.arange(60) % 10, classes=Pictures.classes)

    import torchvision

    kinds: dict[str, Any] = {
        "torch": Pictures(),
        "path": tmp_path / "folder",
        "text": str(tmp_path / "folder"),
        "ImageFolder": torchvision.datasets.ImageFolder(tmp_path / "folder"),
        "ImageSet": images,
        "Splits": Splits(train=images, val=None, test=images),
        "grey": "digits",
    }
    for kind, dataset in kinds.items():
        transfer = ViTTransferLearning(folder, 10, freeze_backbone=True)
        found = transfer.fine_tune(dataset, epochs=1, learning_rate=1e-3)
        assert found.test.count == {"Splits": 60, "grey": 359}.get(kind, 10), kind
        assert ("val_loss" in found.history) == (kind != "Splits"), kind
        assert transfer.classes == Pictures.classes, kind


def test_another_number_of_classes_in_the_data_is_said(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", depth=1)
    with pytest.raises(ValueError, match="num_classes is 3, and digits has 10 classes"):
        ViTTransferLearning(folder, 3).fine_tune("digits")
    with pytest.raises(ValueError, match="no folder and no data set 'digit'; did you mean digits"):
        ViTTransferLearning(folder, 3).fine_tune("digit")


# ViTClassifier.


def test_the_stored_preprocessing_is_used(tmp_path: Path) -> None:
    """Mean and standard deviation 0.5, as the weights of the ViT paper want it, against PIL by hand."""
    model = ViTClassifier.from_pretrained(write_model(tmp_path / "model", "vit_tiny_patch16_224", depth=1))
    assert model.preprocessing.mean == model.preprocessing.std == (0.5, 0.5, 0.5)
    sample = ROOT / "examples" / "sample.jpg"
    with Image.open(sample) as picture:  # 320 x 240: the shorter side to 224, the centre of the other
        resized = picture.resize((298, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
    pixels = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = model.model((pixels - 0.5) / 0.5).softmax(dim=1)[0]
    found = model.predict(sample, top=1000)
    shares = dict(zip(found["classes"], found["probabilities"], strict=True))
    assert [shares[f"class {k}"] for k in range(1000)] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["class"] == f"class {int(expected.argmax())}"
    assert found["confidence"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert found["source"] == str(sample)


def test_one_picture_or_several(tmp_path: Path) -> None:
    model = ViTClassifier.from_pretrained(write_model(tmp_path / "model"))
    picture = Image.new("L", (30, 20), 120)
    single = model.predict(picture)
    for found in model.predict([picture, picture]):
        assert found["class"] == single["class"]
        assert found["probabilities"] == pytest.approx(single["probabilities"], rel=1e-5)
    assert len(single["classes"]) == len(single["probabilities"]) == 5
    assert model.predict([]) == []
    with pytest.raises(ValueError, match=r"nothing\.jpg: no such image file"):
        model.predict("nothing.jpg")


# AttentionVisualizer.


def tiny(name: str = "vit_digits", **changes: Any) -> Encoder:
    torch.manual_seed(0)
    model = create_model(name, **changes)
    for parameter in model.parameters():  # fresh weights attend almost evenly, which would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model


def recorded(model: Encoder, images: torch.Tensor, block: str) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of one block, worked out from what enters its attention, [H, L, L]."""
    entered: list[torch.Tensor] = []
    attention = model.get_submodule(f"{block}.attn")
    handle = attention.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model.eval().forward_features(images)
        handle.remove()
        D, H = entered[0].shape[2], attention.num_heads
        q, k, _ = attention.qkv(entered[0])[0].split(D, dim=1)
        q, k = (part.unflatten(1, (H, D // H)).transpose(0, 1) for part in (q, k))  # [H, L, d]
        return (q @ k.transpose(1, 2) / (D // H) ** 0.5).softmax(dim=2)


@pytest.mark.parametrize("registers", [0, 2])
def test_maps_are_the_attention_of_the_class_token(registers: int) -> None:
    model = tiny(registers=registers, drop=0.5).train()
    image = torch.rand(1, 8, 12)
    visualizer = AttentionVisualizer(model)
    for layer in (1, 3, 4):
        weights = recorded(model, image[None], f"blocks.{layer - 1}")
        model.train()
        rows = weights[:, 0, 1 + registers :].reshape(4, 4, 6)
        for heads, expected in {
            "all": rows,
            "mean": rows.mean(dim=0),
            "max": rows.amax(dim=0),
            "min": rows.amin(dim=0),
            2: rows[2],
        }.items():
            found = visualizer.generate_attention_maps(image, [layer], heads)
            torch.testing.assert_close(found.maps, {layer: expected})
            assert found.asking == {layer: "class token"}
    assert model.training


def test_without_class_token_the_map_is_what_patches_receive() -> None:
    model = tiny(class_token=False, pool="mean", registers=1)
    image = torch.rand(1, 1, 8, 8)
    found = AttentionVisualizer(model).generate_attention_maps(image, layers=[2])
    weights = recorded(model, image, "blocks.1")[:, 1:, 1:]
    torch.testing.assert_close(found.maps[2], weights.mean(dim=(0, 1)).reshape(4, 4))
    assert found.asking == {2: "mean of the patches"}


@pytest.mark.parametrize(
    ("name", "changes", "grids"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 64}, [(4, 4)] * 2),
        ("cct_2_3x2_32", {}, [(8, 8)] * 2),
        ("diffvit_cifar", {}, [(8, 8)] * 2),
        ("pvt_cifar", {}, [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 2),
        ("cait_cifar", {"depth": 1}, [(8, 8)] * 3),
        # Blocks of the small branch, of the large one, then the two exchanges.
        (
            "crossvit_cifar",
            {"depth": 1},
            [(16, 16), (8, 8), (8, 8), (8, 8), (16, 16)],
        ),
    ],
)
def test_every_architecture_gives_maps(name: str, changes: dict, grids: list) -> None:
    model = create_model(name, **changes)
    visualizer = AttentionVisualizer(model)
    found = visualizer.generate_attention_maps(torch.rand(3, *model.config.image_shape))
    assert [tuple(own.shape) for own in found.maps.values()] == grids
    assert visualizer.plot_attention_maps(found).get_figwidth() > 5


def test_windows_give_maps_of_the_whole_image() -> None:
    """Swin, with padding, shifts and windows that shrink: a patch gets what its window gives."""
    swin = pytest.importorskip("vitrail.models.swin")
    config = swin.SwinConfig(
        img_size=24, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=5
    )
    model = config.build()
    image = torch.rand(3, 24, 22)
    visualizer = AttentionVisualizer(model)
    found = visualizer.generate_attention_maps(image, heads="all")
    assert [tuple(own.shape) for own in found.maps.values()] == [(1, 12, 11)] * 2 + [(2, 6, 6)] * 2
    assert set(found.asking.values()) == {"mean of the patches"}
    for own in found.maps.values():
        torch.testing.assert_close(own.sum(dim=(1, 2)), torch.ones(len(own)))
    with record(model.eval(), "layers.0.blocks.0.attn.weights") as seen:
        model.forward_features(image[None])
    (weights,) = seen.values()  # 3 x 3 windows; the first one is the top left corner
    corner = weights[0, 0].sum(dim=0).reshape(5, 5) / (12 * 11)
    torch.testing.assert_close(found.maps[1][0, :5, :5], corner.detach())
    assert visualizer.plot_attention_maps(found).get_figwidth() > 5


def test_pictures_are_prepared_as_the_model_wants_them(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "vit_tiny_patch16_224", depth=1)
    model = ViTClassifier.from_pretrained(folder)
    sample = ROOT / "examples" / "sample.jpg"
    for visualizer in (AttentionVisualizer(model), AttentionVisualizer(model.model)):
        found = visualizer.generate_attention_maps(sample)
        expected = visualizer.generate_attention_maps(model.preprocessing.open_image(sample))
        torch.testing.assert_close(found.maps, expected.maps)
        with Image.open(sample) as picture:
            resized = picture.resize((298, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
        assert torch.equal(found.image, torch.tensor(np.asarray(resized)).permute(2, 0, 1))
        bytes_ = visualizer.generate_attention_maps(found.image)
        torch.testing.assert_close(bytes_.maps, expected.maps)
        assert torch.equal(bytes_.image, found.image)


def test_the_figure_has_a_panel_for_the_image_and_each_map() -> None:
    visualizer = AttentionVisualizer(tiny())
    image = torch.rand(1, 8, 8)
    figure = visualizer.plot_attention_maps(visualizer.generate_attention_maps(image, [1, 4]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["image", "layer 1", "layer 4"]
    assert len(figure.axes[0].images) == 1 + 2 * 2
    figure = visualizer.plot_attention_maps(visualizer.generate_attention_maps(image, [2], "all"))
    assert [text.get_text() for text in figure.axes[0].texts] == [
        f"layer 2\nhead {head}" for head in range(4)
    ]


@pytest.mark.parametrize(
    ("image", "layers", "heads", "message"),
    [
        (torch.rand(1, 8, 8), [0], "mean", "no layer 0: ViT has layers 1 to 4"),
        (torch.rand(1, 8, 8), [5], "mean", "no layer 5"),
        (torch.rand(1, 8, 8), [1], "median", "expected 'mean', 'max', 'min', 'all' or -4 to 3, got 'median'"),
        (torch.rand(1, 8, 8), [1], 4, "got 4"),
        (torch.rand(3, 8, 8), [1], "mean", r"expected one image \[1, height, width\], got \[3, 8, 8\]"),
        (torch.rand(2, 1, 8, 8), [1], "mean", r"got \[2, 1, 8, 8\]"),
        (torch.rand(8, 8), [1], "mean", r"got \[8, 8\]"),
        ("nothing.png", [1], "mean", "nothing.png: no such image file"),
    ],
)  # fmt: skip
def test_mistakes_with_maps_get_one_line(image: Any, layers: list, heads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AttentionVisualizer(tiny()).generate_attention_maps(image, layers, heads)
    assert "\n" not in str(error.value)


def test_a_model_without_attention_is_said() -> None:
    model = tiny()
    model.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="ViT has no attention to show"):
        AttentionVisualizer(model)
