"""Training, transfer, prediction and attention maps in a few lines each, for scripts and notebooks.

    trainer = ViTTrainer(ViTConfig(image_size=32, patch_size=4, num_classes=10, dim=192, depth=6, heads=3,
                                   mlp_dim=768))
    history = trainer.train(train_loader=train_loader, val_loader=val_loader, epochs=10, learning_rate=1e-3)

The classes string together what the package has, with its defaults: AdamW, linear warm-up over 5 % of the
steps, a cosine to zero, weight decay 0.05, gradients clipped at norm 1. `vitrail train` and its recipes add
options (augmentation, moving averages, several processes) and write reports.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast, overload

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config import OptimSection, TrainSection
from vitrail.datasets import (
    FileSet,
    ImageSet,
    Preprocessing,
    Splits,
    batches,
    load_dataset,
    steps_per_epoch,
    stratified_split,
)
from vitrail.evaluation.features import cached_features, has_one_head
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.metrics import ClassificationMetrics, classification_metrics
from vitrail.explain.attention import Heads, attention_layers, attention_maps
from vitrail.explain.draw import image_grid
from vitrail.models import Encoder, vit
from vitrail.pretrained import create_model, find_weights, save_model
from vitrail.pretrained.compiled import load_compiled
from vitrail.pretrained.hub import from_pretrained
from vitrail.serving import Predictor
from vitrail.tasks import Batch, Classify
from vitrail.training import optim
from vitrail.training.checkpoint import TrainingState, restore_checkpoint
from vitrail.training.loop import Plan, fit
from vitrail.training.run_folder import check_free, claimed
from vitrail.training.setup import build_accelerator

__all__ = [
    "AttentionMaps",
    "AttentionVisualizer",
    "FineTuning",
    "ViTClassifier",
    "ViTConfig",
    "ViTTrainer",
    "ViTTransferLearning",
]

History = dict[str, list[float]]
"""Lists with one number an epoch: `train_loss`, `learning_rate`; where images are held out for it,
`val_loss` and `val_accuracy` (0 to 1)."""

Picture = str | Path | Image.Image
"""An image file, or an image of PIL."""

_VIT = "vit_base_patch16_224"
_EVAL_BATCH_SIZE = 256
_KEYS = ("images", "image", "pixel_values"), ("labels", "label", "targets")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a Vision Transformer, by the names that vit-pytorch uses; the defaults are ViT-B/16."""

    image_size: int | tuple[int, int] = 224
    """Pixels, or height and width; the model takes other sizes too."""
    patch_size: int = 16
    num_classes: int = 1000
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    """Width of the hidden layer in each MLP."""
    channels: int = 3
    dropout: float = 0.0

    def model_config(self) -> vit.ViTConfig:
        """The same as the architecture's own config, whose names are timm's.

        Raises:
            ValueError: Sizes that do not fit together.
        """
        if min(self.dim, self.mlp_dim) < 1:
            raise ValueError(f"dim and mlp_dim must be at least 1, got {self.dim} and {self.mlp_dim}")
        mlp_ratio = self.mlp_dim / self.dim
        if int(self.dim * mlp_ratio) != self.mlp_dim:  # the division was rounded down
            mlp_ratio = math.nextafter(mlp_ratio, math.inf)
        return vit.ViTConfig(
            img_size=self.image_size,
            patch_size=self.patch_size,
            in_chans=self.channels,
            num_classes=self.num_classes,
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=mlp_ratio,
            drop=self.dropout,
        )


class ViTTrainer:
    """Trains a Vision Transformer on your own loaders.

    Args:
        config: The model's sizes.
        preprocessing: How the loaders' images were prepared, to be stored by `save`; uint8 images are
            normalised with it here. When not given: values 0 to 1, not normalised.
    """

    model: Encoder
    """The model; trained in place, in evaluation mode between trainings."""

    def __init__(self, config: ViTConfig, *, preprocessing: Preprocessing | None = None) -> None:
        self.model = config.model_config().build().eval()
        self.preprocessing = preprocessing or _preprocessing(self.model, mean=0.0, std=1.0)

    def train(
        self,
        train_loader: Any,
        val_loader: Any = None,
        epochs: int = 100,
        learning_rate: float = 1e-3,
        *,
        output: str | Path | None = None,
        resume: bool = False,
        seed: int = 0,
    ) -> History:
        """Train the model, from the weights it has.

        A loader is a torch DataLoader, or anything that has a length and can be iterated again and again. Its
        batches are pairs (images, labels), or mappings with `images`, `image` or `pixel_values` and `labels`,
        `label` or `targets`. Images are [B, C, height, width] of any size: floating point is taken as it is,
        uint8 is scaled to 0..1 (and normalised, where the trainer has a preprocessing). Labels are whole
        numbers [B] below `num_classes`.

        Args:
            train_loader: The images to learn from, one pass an epoch.
            val_loader: Images to measure on after each epoch; None measures nothing.
            epochs: Passes over the training images.
            learning_rate: Peak.
            output: Folder for `metrics.jsonl` and `checkpoints/`, written after each epoch and on Ctrl-C;
                None keeps nothing.
            resume: Go on from the checkpoint in `output`.
            seed: Decides dropout, and the order of the images where the loader draws it from torch's global
                random state.

        Returns:
            Lists with one number an epoch; see `History`.

        Raises:
            ValueError: A loader, a batch or a number that does not fit, or a loss that is not finite.
            KeyboardInterrupt: Ctrl-C; `model` is as far as it came.
        """
        accelerator = build_accelerator(TrainSection())
        self.model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = _length(train_loader, "train_loader")
        if val_loader is not None:
            _length(val_loader, "val_loader")

        def training_batches(start: int) -> Iterator[Batch]:
            for epoch in range(start // steps, epochs):
                torch.manual_seed(seed * 1_000_003 + epoch)
                count = 0
                for count, batch in enumerate(train_loader, start=1):
                    if epoch * steps + count > start:
                        yield self._batch(batch, accelerator.device)
                if count != steps:
                    raise ValueError(f"train_loader: expected the {steps} batches of its length, got {count}")

        @torch.inference_mode()
        def evaluate(model: nn.Module) -> dict[str, float]:
            logits, labels = [], []
            with _evaluating(model):
                for batch in val_loader:
                    own = self._batch(batch, accelerator.device)
                    logits.append(model(own["images"]))
                    labels.append(own["targets"])
            return _scores(torch.cat(logits), torch.cat(labels))

        section = TrainSection(output=None if output is None else Path(output), resume=resume, seed=seed)
        return _fit(
            self.model,
            self.model,
            training_batches,
            steps_per_epoch=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            section=section,
            accelerator=accelerator,
            evaluate=None if val_loader is None else evaluate,
        )

    def save(self, folder: str | Path, *, classes: Sequence[str] | None = None) -> Path:
        """Write a model folder, which `ViTClassifier.from_pretrained` and `vitrail predict` take.

        Args:
            folder: Made when it does not exist.
            classes: Names in the order of the labels; "0", "1", ... when not given.

        Raises:
            ValueError: Another number of names than the model has classes.
        """
        names = _numbered(self.model.config.num_classes) if classes is None else tuple(classes)
        return _save(folder, self.model, _VIT, names, self.preprocessing)

    def _batch(self, batch: Any, device: torch.device) -> Batch:
        """A loader's batch, checked, as the task takes it, on the device."""
        images, labels = _images_and_labels(batch)
        C, K = self.model.config.in_chans, self.model.config.num_classes
        if images.ndim != 4 or images.shape[1] != C or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"expected images [B, {C}, height, width] and labels [B], got {list(images.shape)} and "
                f"{list(labels.shape)}"
            )
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < K:
            raise ValueError(
                f"num_classes is {K}: expected whole labels from 0 to {K - 1}, got {labels.dtype} from "
                f"{labels.min()} to {labels.max()}"
            )
        images = images.to(device, non_blocking=True)
        if not images.is_floating_point():
            images = self.preprocessing.normalise(images)
        return {
            "images": images.float().contiguous(memory_format=torch.channels_last),
            "targets": labels.to(device, torch.int64, non_blocking=True),
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class FineTuning:
    """What a fine-tuning found."""

    history: History
    test: ClassificationMetrics
    """Measured on the test images after the last epoch."""


class ViTTransferLearning:
    """Adapts trained weights to other images.

    With a frozen backbone only the head learns. The backbone stays in evaluation mode (no dropout, stored
    statistics in its norms), so every image passes it once and the head trains on the kept features: the
    result is the same as from passing the images in every epoch, which takes many times as long.
    Architectures with two heads (CrossViT, distilled DeiTs) do pass them in every epoch.

    Args:
        pretrained_model: Run folder, model folder, hub repository (owner/name), `timm:NAME.TAG`,
            `torchvision:NAME`, or a file; see `vitrail.pretrained.sources`.
        num_classes: Classes of the new images. Where the weights have a head for as many it is kept, else
            the head is fresh. All other weights are, bit for bit, those of the file.
        freeze_backbone: Train the head only.
        model: For a file alone: its architecture, as `vitrail models` lists it.
        preprocessing: For a file alone, which does not tell what its images were normalised with; mean and
            standard deviation 0.5 when not given, those of the ViT paper.

    Raises:
        ValueError: No such weights, or weights that do not fit; in one line.
    """

    model: Encoder
    """The model; trained in place, in evaluation mode between trainings."""

    def __init__(
        self,
        pretrained_model: str | Path,
        num_classes: int,
        freeze_backbone: bool = False,
        *,
        model: str | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        weights = find_weights(pretrained_model)
        if weights.name is None and model is None:
            raise ValueError(f"{pretrained_model} does not tell its architecture: add model='{_VIT}'")
        if weights.name is not None and model is not None:
            raise ValueError(f"{pretrained_model} holds a {weights.name}: leave model out")
        if weights.preprocessing is not None and preprocessing is not None:
            raise ValueError(f"{pretrained_model} has its own preprocessing: leave preprocessing out")
        self.name = weights.name or cast(str, model)
        self.model = create_model(
            self.name, pretrained=weights, **({**weights.changes, "num_classes": num_classes})
        )
        if weights.preprocessing is not None:
            self.preprocessing = Preprocessing.from_dict(weights.preprocessing)
        else:
            self.preprocessing = preprocessing or _preprocessing(self.model, mean=0.5, std=0.5)
        self.model.eval()
        self.keeps_features = freeze_backbone and has_one_head(self.model)
        self.classes = _numbered(num_classes)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not freeze_backbone or name.startswith(self.model.head_names))

    def fine_tune(
        self,
        dataset: Any,
        epochs: int = 20,
        learning_rate: float = 1e-4,
        *,
        batch_size: int = 64,
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> FineTuning:
        """Train without augmentation, and test.

        Args:
            dataset: A name or a folder (`vitrail.load_dataset`), a torch or hub data set of pictures and
                labels, an `ImageSet`, or `Splits`. Where it has no test images, a stratified fifth of its
                images are; where none are held out, a tenth of the rest is measured after each epoch.
            epochs: Passes over the training images.
            learning_rate: Peak. 1e-3 is usual for a head alone, 1e-5 to 1e-4 for the whole model.
            batch_size: Images a step.
            cache: Folder that keeps the features of a frozen backbone for the next time.
            seed: Decides the order of the images, and dropout.

        Raises:
            ValueError: Images that do not fit the model, or a loss that is not finite; in one line.
        """
        splits = _splits(dataset, self.preprocessing)
        K = self.model.config.num_classes
        if len(splits.train.classes) != K:
            raise ValueError(
                f"num_classes is {K}, and {splits.train.name} has {len(splits.train.classes)} classes"
            )
        self.classes = splits.train.classes
        accelerator = build_accelerator(TrainSection())
        device = accelerator.device
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        train, val, test = (
            self._part(part, device, cache) for part in (splits.train, splits.val, splits.test)
        )
        steps = steps_per_epoch(len(train), batch_size)

        def training_batches(start: int) -> Iterator[Batch]:
            for epoch in range(start // steps, epochs):
                for inputs, labels in batches(train, batch_size, seed=seed, epoch=epoch):
                    yield {"images": self._prepare(inputs.to(device)), "targets": labels.to(device)}

        def evaluate(_: nn.Module) -> dict[str, float]:
            return _scores(self._logits(val, device), torch.from_numpy(val.labels))

        history = _fit(
            self.model.get_submodule("head") if self.keeps_features else self.model,
            self.model,
            training_batches,
            steps_per_epoch=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            section=TrainSection(seed=seed),
            accelerator=accelerator,
            evaluate=None if val is None else evaluate,
        )
        shares = self._logits(test, device).softmax(dim=1)
        return FineTuning(history=history, test=classification_metrics(shares, test.labels, self.classes))

    def save(self, folder: str | Path) -> Path:
        """Write a model folder, which `ViTClassifier.from_pretrained` and `vitrail predict` take."""
        return _save(folder, self.model, self.name, self.classes, self.preprocessing)

    def _part(self, images: ImageSet | FileSet | None, device: torch.device, cache: str | Path | None) -> Any:
        """What stands for a split: the images, or the features that are kept of them."""
        if images is None or not self.keeps_features:
            return images
        return cached_features(
            self.model,
            images,
            self.preprocessing,
            batch_size=_EVAL_BATCH_SIZE,
            device=device,
            folder=None if cache is None else Path(cache),
        )

    def _prepare(self, inputs: Tensor) -> Tensor:
        """Features [B, D] as they are, images [B, C, H, W] normalised."""
        if self.keeps_features:
            return inputs
        return self.preprocessing.prepare(inputs).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _logits(self, part: Any, device: torch.device) -> Tensor:
        """Logits [N, K] of a part, on the CPU."""
        if self.keeps_features:
            return self.model.get_submodule("head")(part.features.to(device)).cpu()
        return predict_logits(
            self.model, part, self.preprocessing, batch_size=_EVAL_BATCH_SIZE, device=device
        )


class ViTClassifier:
    """Classifies pictures with a trained model, prepared as its training images were.

    Args:
        predictor: The model with its preprocessing and class names; `from_pretrained` makes one.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.model, self.preprocessing, self.classes = (
            predictor.model,
            predictor.preprocessing,
            predictor.classes,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> Self:
        """Load a run folder, a model folder, or a model of a hub or of another library.

        Args:
            name_or_path: See `vitrail.pretrained.sources`: a path, `owner/name`, `timm:NAME.TAG`, ...
            revision: Branch, tag or commit of a hub repository.

        Raises:
            ValueError: Nothing there, or a damaged model; in one line.
        """
        stored = from_pretrained(name_or_path, revision=revision)
        prepared, compiled = Preprocessing.from_dict(stored.preprocessing), load_compiled(name_or_path)
        return cls(Predictor(stored.model, prepared, stored.classes, compiled))

    # To the type checker a str is a sequence of str too; the first signature comes first.
    @overload
    def predict(self, images: Picture, top: int = 5) -> dict[str, Any]: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[Picture], top: int = 5) -> list[dict[str, Any]]: ...
    def predict(self, images: Any, top: int = 5) -> Any:
        """Classify a picture, or several.

        Args:
            images: A file or a PIL image, of any size and mode; or a list of them.
            top: How many classes to name.

        Returns:
            A dictionary, or for a list a list of them: `class` and `confidence` (0 to 1) of the most probable
            class, `classes` and `probabilities` of the `top` most probable ones, `source`.

        Raises:
            ValueError: An image that cannot be read; the message names it.
        """
        single = isinstance(images, str | Path | Image.Image)
        found = [
            {
                "class": one.classes[0],
                "confidence": one.probabilities[0],
                "classes": list(one.classes),
                "probabilities": list(one.probabilities),
                "source": one.source,
            }
            for one in self.predictor.predict([images] if single else list(images), top=top)
        ]
        return found[0] if single else found


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMaps:
    """Attention of some layers over one image."""

    maps: dict[int, Tensor]
    """Layer, counted from 1, to its map [rows, columns], or with `heads="all"` [H, rows, columns]."""
    image: Tensor
    """What the model saw, without normalisation: uint8 [C, height, width]."""
    asking: dict[int, str]
    """Layer to whose attention it is: "class token", "patch", or "mean of the patches" where no class token
    takes part."""


class AttentionVisualizer:
    """Shows where a model looks: the attention weights that it used, as maps over the image.

    The maps are those of the class token. Where no class token takes part, a map tells how much each patch is
    attended to, averaged over the patches that ask. The weights are the model's own, not scaled: over the map
    of one head they sum to at most one, and what is missing went to the class token and the registers.

    Args:
        model: Any model of Vitrail, or a `ViTClassifier`, which knows its preprocessing.
        preprocessing: How pictures are prepared; when neither it nor a classifier is given, mean and standard
            deviation are 0.5, those of the ViT paper.

    Raises:
        ValueError: The model has no attention to show.
    """

    def __init__(self, model: Encoder | ViTClassifier, *, preprocessing: Preprocessing | None = None) -> None:
        if isinstance(model, ViTClassifier):
            preprocessing = preprocessing or model.preprocessing
        self.model: Encoder = model.model if isinstance(model, ViTClassifier) else model
        self.preprocessing = preprocessing or _preprocessing(self.model, mean=0.5, std=0.5)
        self.layers = attention_layers(self.model)
        """The attention modules, in order."""
        if not self.layers:
            raise ValueError(f"{type(self.model).__name__} has no attention to show")

    def generate_attention_maps(
        self,
        image: Picture | Tensor,
        layers: Sequence[int] | None = None,
        heads: Heads = "mean",
        point: tuple[int, int] | None = None,
    ) -> AttentionMaps:
        """Record the attention of some layers while the model looks at an image.

        Args:
            image: A file or PIL image, which is resized and cropped as the model wants it; or a tensor
                [C, height, width] or [1, C, height, width] of any size: uint8, or normalised floating point.
            layers: Counted from 1, so that 12 is the last of 12; all when not given.
            heads: "mean", "max" or "min" over the heads, "all" of them, or the index of one, from 0.
            point: Row and column of a pixel of what the model sees; the attention of the patch there.

        Raises:
            ValueError: No such layer, head or pixel, or an image that cannot be read; in one line.
        """
        depth = len(self.layers)
        wanted = list(range(1, depth + 1)) if layers is None else list(layers)
        for layer in wanted:
            if not 1 <= layer <= depth:
                raise ValueError(f"no layer {layer}: {type(self.model).__name__} has layers 1 to {depth}")
        pixels = self._open(image).to(next(self.model.parameters()).device)
        with _evaluating(self.model):
            found = attention_maps(
                self.model, pixels, layers=[layer - 1 for layer in wanted], heads=heads, point=point
            )
        maps = {layer: own.values[0].cpu() for layer, own in zip(wanted, found, strict=True)}
        asking = {layer: own.asks for layer, own in zip(wanted, found, strict=True)}
        shown = self.preprocessing.denormalise(pixels.cpu())[0]
        return AttentionMaps(maps=maps, image=shown, asking=asking)

    def plot_attention_maps(self, attention_maps: AttentionMaps) -> Figure:
        """Draw the image, and over it each map, scaled to its own maximum.

        Returns:
            A matplotlib figure that belongs to no window: show it in a notebook, or `figure.savefig(...)`.
        """
        maps = attention_maps.maps
        captions, columns = ["image"], min(1 + len(maps), 4)
        heat: list[Tensor | None] = [None]
        if all(own.ndim == 2 for own in maps.values()):
            captions += [f"layer {layer}" for layer in maps]
            heat += maps.values()
        else:  # a row or two of heads for each layer
            captions = [
                f"layer {layer}\nhead {head}" for layer, own in maps.items() for head in range(len(own))
            ]
            heat = [one for own in maps.values() for one in own]
            columns = min(len(next(iter(maps.values()))), 6)
        images = attention_maps.image.expand(len(heat), -1, -1, -1)
        return image_grid(images, captions, columns=columns, heat=heat)

    def _open(self, image: Picture | Tensor) -> Tensor:
        """What the model takes, [1, C, height, width]."""
        if not isinstance(image, Tensor):
            return self.preprocessing.open_image(image)[None]
        pixels = image if image.ndim == 4 else image[None]
        C = self.model.config.in_chans
        if pixels.ndim != 4 or pixels.shape[:2] != (1, C):
            raise ValueError(f"expected one image [{C}, height, width], got {list(image.shape)}")
        return pixels.float() if pixels.is_floating_point() else self.preprocessing.normalise(pixels)


def _fit(
    trained: nn.Module,
    model: Encoder,
    batches: Callable[[int], Iterator[Batch]],
    *,
    steps_per_epoch: int,
    epochs: int,
    learning_rate: float,
    section: TrainSection,
    accelerator: Accelerator,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
) -> History:
    """Run the package's loop on the model, or on its head, and read its log."""
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(f"epochs and learning_rate must be above 0, got {epochs} and {learning_rate}")
    section_of_optimiser = OptimSection(lr=learning_rate)
    total = epochs * steps_per_epoch
    task = Classify(cast(Encoder, trained))
    state = TrainingState(
        task=task,
        optimizer=optim.build_optimizer(task, model, section_of_optimiser),
        scaler=accelerator.scaler,
    )
    with _folder(section) as folder:
        if section.resume:
            restore_checkpoint(folder / "checkpoints", state)
        try:
            fit(
                state,
                batches,
                plan=Plan(
                    total=total,
                    steps_per_epoch=steps_per_epoch,
                    log_every=steps_per_epoch,
                    eval_every=steps_per_epoch,
                    save_every=steps_per_epoch,
                ),
                schedule=optim.learning_rate(section_of_optimiser, total, steps_per_epoch, batch_size=1),
                accelerator=accelerator,
                clip_norm=section_of_optimiser.clip_norm,
                metrics=folder / "metrics.jsonl",
                seed=section.seed,
                evaluate=evaluate,
                checkpoints=None if section.output is None else folder / "checkpoints",
            )
        finally:
            model.eval()
        return _history(folder / "metrics.jsonl")


@contextmanager
def _folder(section: TrainSection) -> Iterator[Path]:
    """Where a training writes: the folder that was asked for, claimed, or one that is gone afterwards."""
    if section.output is None:
        if section.resume:
            raise ValueError("resume needs output: the folder whose checkpoint to go on from")
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    check_free(section.output, section)
    with claimed(section.output, section):
        yield section.output


def _history(metrics: Path) -> History:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    history = {
        "train_loss": [record["loss"] for record in train],
        "learning_rate": [record["lr"] for record in train],
    }
    if val:
        history |= {f"val_{name}": [record[name] for record in val] for name in ("loss", "accuracy")}
    return history


def _splits(dataset: Any, preprocessing: Preprocessing) -> Splits:
    """The parts of whatever holds labelled images, with the channels that the model takes."""
    if isinstance(dataset, Splits):
        return dataset
    if isinstance(dataset, ImageSet | FileSet):
        rest, held_out = stratified_split(dataset.labels, 0.2, seed=0)
        learning, test = dataset.subset(rest), dataset.subset(held_out, split="test")
        rest, held_out = stratified_split(learning.labels, 0.1, seed=0)
        return Splits(train=learning.subset(rest), val=learning.subset(held_out, split="val"), test=test)
    sizes: dict[str, Any] = {"img_size": preprocessing.img_size, "in_chans": preprocessing.in_chans}
    if isinstance(dataset, str | Path):
        return load_dataset(dataset, **sizes)
    return Splits.from_datasets(dataset, **sizes)


def _length(loader: Any, name: str) -> int:
    """Batches a pass."""
    try:
        batches = len(loader)
    except TypeError:
        raise ValueError(
            f"{name}: expected a loader with a length, got {type(loader).__name__}; a DataLoader over a data "
            "set with a length has one"
        ) from None
    if batches == 0:
        raise ValueError(f"{name} is empty: it has no batch")
    return batches


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of a loader's batch."""
    if isinstance(batch, Mapping):
        images, labels = (next((batch[key] for key in keys if key in batch), None) for keys in _KEYS)
        came = f"a mapping with {', '.join(map(str, batch))}"
    else:
        images, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        came = type(batch).__name__
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "expected batches of two tensors (images, labels), or mappings with one of "
            f"{', '.join(_KEYS[0])} and one of {', '.join(_KEYS[1])}, got {came}"
        )
    return images, labels


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "loss": float(F.cross_entropy(logits.float(), labels)),
        "accuracy": float((logits.argmax(dim=1) == labels).float().mean()),
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _preprocessing(model: Encoder, *, mean: float, std: float) -> Preprocessing:
    C = model.config.in_chans
    return Preprocessing(img_size=model.config.image_shape, in_chans=C, mean=(mean,) * C, std=(std,) * C)


def _numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(num_classes))


def _save(
    folder: str | Path, model: Encoder, name: str, classes: tuple[str, ...], preprocessing: Preprocessing
) -> Path:
    if len(classes) != model.config.num_classes:
        raise ValueError(f"classes: expected {model.config.num_classes} names, got {len(classes)}")
    save_model(Path(folder), model, name=name, classes=classes, preprocessing=preprocessing.to_dict())
    return Path(folder)
