"""The run config: one typed tree that a recipe, the command line, a sweep and the log share.

A recipe is a YAML file that holds values only. Dotted keys change single values (`optim.lr=3e-4`); an
unknown key is an error that names the nearest one. The options of a model, and those of a task, belong to
that model or task: the sections `model` and `task` carry them along, and whoever builds from the section
checks them. This module knows no model and imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kM]?)\s*(epochs?|steps?|images?|%)\s*$")


def _duration(text: Any) -> str:
    if not isinstance(text, str) or not _DURATION.match(text):
        raise ValueError(
            f"expected a number with a unit ('5 epochs', '500 steps', '1M images', '10%'), got {text!r}"
        )
    return text


SHORT_KEYS = {
    "model": "model.name",
    "dataset": "data.name",
    "epochs": "train.duration",
    "batch_size": "train.batch_size",
    "learning_rate": "optim.lr",
    "seed": "train.seed",
    "output": "train.output",
    "resume": "train.resume",
    "overwrite": "train.overwrite",
}
"""What people expect some options to be called on the command line."""

Duration = Annotated[str, BeforeValidator(_duration)]
Patterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """Which model; every further key is an option of that architecture (`--model.depth 4`)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str | None = None
    """A name that `vitrail models` lists; when not given, the pretrained model's, else vit_mnist_2blk."""
    pretrained: str | None = None
    """Run folder, model folder or .safetensors file whose weights to start from; of a folder the architecture
    and the preprocessing are taken over too."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the architecture."""
        return dict(self.model_extra or {})


class TaskSection(_Section):
    """What is minimised; every further key is an option of that task (`--task.label_smoothing 0.1`)."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "classify"
    """The task's name; `classify` is supervised classification."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the task."""
        return dict(self.model_extra or {})


class DataSection(_Section):
    """Which images, and how they are split."""

    name: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, a folder of images, or a hub id; drawn ones:
    shapes, textures, fractals; of clips: moving_mnist, or a folder of them."""
    root: Path | None = None
    """Folder with data sets in the hubs' layouts; else VITRAIL_DATA, then the cache, then the hub."""
    val_fraction: FractionBelowOne = 0.1
    """Share of the training images held out, stratified by class, where the set has no validation split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of that split: independent of `train.seed`, so that runs with different seeds share it."""
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the remaining training images to use, stratified by class."""
    synthetic: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Synthetic images to add for each training image, 0.5: one for every two; made of the training images,
    over textures and with fragments of others. Drawn by split_seed."""
    label_column: str | None = None
    """Column of the label, in tables and parquet files that do not tell or have several."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What to do with image files that cannot be decoded: stop and name them, or leave them out."""
    storage: Literal["auto", "memory", "files"] = "auto"
    """Decode all images once into memory, or anew whenever they are read; auto decides by size."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images with storage `files`; when not given, the number of cores, 8 at most."""
    frames: Annotated[int, Field(ge=1)] | None = None
    """Frames of a clip; when not given, as many as the model takes."""
    frame_stride: Annotated[int, Field(ge=1)] = 1
    """Every how many frames of a video one is taken; 1: consecutive ones."""
    shuffle_frames: bool = False
    """The frames of each clip in a random order: a control, which takes the direction of motion away."""


class AugmentSection(_Section):
    """Augmentation of whole batches on the device; 0 or false switches a part off."""

    flip: bool = False
    """Mirror left to right with probability one half."""
    crop: Annotated[int, Field(ge=0)] = 0
    """Random crop after padding every side with this many pixels (zeros)."""
    resized_crop: FractionBelowOne = 0.0
    """Random resized crop: smallest share of the area to keep, e.g. 0.08; aspect 3/4 to 4/3."""
    rotate: NotNegative = 0.0
    """Random rotation by up to this many degrees."""
    translate: FractionBelowOne = 0.0
    """Random shift by up to this share of the width and height."""
    scale: FractionBelowOne = 0.0
    """Random scaling by a factor between 1 - scale and 1 + scale."""
    shear: NotNegative = 0.0
    """Random shear by up to this many degrees."""
    randaugment: Annotated[int, Field(ge=0)] = 0
    """Number N of RandAugment operations an image."""
    randaugment_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 9.0
    """Magnitude M of RandAugment, 0 to 10 (the paper's scale for CIFAR and ImageNet)."""
    erase: Fraction = 0.0
    """Probability of random erasing."""
    jitter: NotNegative = 0.0
    """Strength of colour jitter (brightness, contrast, saturation, hue): SimCLR's s, 0.5 to 1."""
    grayscale: Fraction = 0.0
    """Share of the images that lose their colours."""
    blur: Fraction = 0.0
    """Share of the images that are blurred, by up to 1 % of their size."""
    mixup: NotNegative = 0.0
    """Mixup's alpha."""
    cutmix: NotNegative = 0.0
    """CutMix's alpha; where both are on, each batch draws one of the two."""
    mix_probability: Fraction = 1.0
    """Share of the batches that are mixed at all."""
    stop_at: Duration = "100%"
    """When Mixup, CutMix, RandAugment and erasing end; the last part of a run then sees plain images."""


class OptimSection(_Section):
    """The optimiser and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices follow their orthogonalised momentum, the rest follows AdamW; learns in fewer steps, at
    two to four times AdamW's learning rate."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd is warm-up, stable, decay (the last fifth)."""
    warmup: Duration = "5%"
    """Linear warm-up from zero."""
    final_lr: FractionBelowOne = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay; biases, norms, tokens, positions and LayerScale have none."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """AdamW's betas."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's epsilon."""
    clip_norm: NotNegative = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of each block as a share of that of the block after it; 0.65 to 0.8 for fine-tuning."""
    freeze: Patterns = ()
    """Parameters that stay as they are: one or more patterns, e.g. ["patch_embed.*", "blocks.[0-5].*"], or
    "!head.*" for all but the head. A part that is wholly frozen stays in evaluation mode, without dropout."""


class TrainSection(_Section):
    """How long, how, and where the result goes."""

    duration: Duration = "20 epochs"
    """Length of the run."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all processes."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Images that a process takes at a time; their gradients add up to those of its part of the batch. auto:
    all of them, halved when memory does not suffice."""
    recompute: bool = False
    """Activation checkpointing: keep only the blocks' inputs and compute the rest again going backward."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 500
    """Images a step in evaluation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bfloat16 on a GPU that has it, and float32 elsewhere; fp16 needs a GPU."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a GPU where there is one."""
    ema: FractionBelowOne = 0.0
    """Decay of the moving average of the weights that is evaluated and saved; 0 switches it off."""
    progressive: dict[str, int] = Field(default_factory=dict)
    """Image size from a point on, e.g. {"0%": 20, "60%": 28} (progressive resizing)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: whole copies (DDP), or sharded weights and optimiser (FSDP2)."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time (on a GPU they are slower; a CPU needs none)."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without a better accuracy and keep the best weights; 0: never."""
    compile: bool = False
    """Compile the task with torch.compile (needs a C++ compiler on a CPU)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the weights, the order of the images and the augmentation."""
    log_every: Duration = "50 steps"
    """How often loss, learning rate and gradient norms are written; at least twenty times in a short run."""
    eval_every: Duration = "1 epoch"
    """How often the validation split is evaluated."""
    save_every: Duration = "1 epoch"
    """How often a checkpoint is written, from which `resume` goes on."""
    output: Path | None = None
    """Run folder; runs/<recipe> when not given."""
    resume: bool = False
    """Go on from the run folder's last checkpoint; from the start where it has none yet."""
    overwrite: bool = False
    """Replace what lies in the run folder."""


class RunConfig(_Section):
    """Everything that decides a run."""

    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()

    def to_yaml(self) -> str:
        """The resolved tree as YAML; `load_config` of a file with it gives it back exactly."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def steps(duration: str, *, batch_size: int, steps_per_epoch: int, total: int | None = None) -> int:
    """Convert a duration with its unit into optimiser steps (rounded to the nearest).

    Args:
        duration: Such as "5 epochs", "500 steps", "1M images" or "10%".
        batch_size: Images a step.
        steps_per_epoch: Steps of one pass over the training images.
        total: Steps of the whole run; percentages are of this.

    Raises:
        ValueError: The text has no number and unit, or a percentage is given where the whole is not known.
    """
    match = _DURATION.match(_duration(duration))
    assert match is not None
    amount = float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    unit = match[3].rstrip("s")
    if unit == "%":
        if total is None:
            raise ValueError(f"{duration!r}: the length of the run cannot be a percentage of itself")
        return round(amount / 100 * total)
    return round(amount * {"epoch": steps_per_epoch, "step": 1, "image": 1 / batch_size}[unit])


def list_recipes() -> dict[str, str]:
    """Recipe names with the first line of their header comment."""
    return {name: text.split("\n", 1)[0].lstrip("# ") for name, text in shipped_yaml("configs").items()}


def shipped_yaml(folder: str) -> dict[str, str]:
    """Names and texts of the YAML files in a folder of the package, sorted by name."""
    entries = sorted((resources.files("vitrail") / folder).iterdir(), key=lambda entry: entry.name)
    return {
        entry.name.removesuffix(".yaml"): entry.read_text()
        for entry in entries
        if entry.name.endswith(".yaml")
    }


def read_yaml(name: str | Path, folder: str, kind: str) -> dict[str, Any]:
    """Read a YAML file: a path that ends in .yaml or .yml, or the name of one in a folder of the package.

    Args:
        name: The path or the name.
        folder: Where the package keeps its own.
        kind: What to call it in an error, such as "recipe".

    Raises:
        ValueError: No such file or name (the nearest is named), or its content is not a mapping.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ValueError(f"no {kind} file {path}")
        text = path.read_text()
    elif str(name) in (known := shipped_yaml(folder)):
        text = known[str(name)]
    else:
        raise ValueError(f"unknown {kind} {str(name)!r}: {nearest(str(name), known)}")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: expected names with values below them, got {type(tree).__name__}")
    return tree


def load_config(recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config of a recipe (a name, or a path to a YAML file) with dotted overrides.

    Args:
        recipe: A name that `list_recipes()` has, a path to a YAML file, or None for the defaults.
        overrides: Dotted key to value, e.g. `{"optim.lr": 3e-4}`; text is read as YAML reads it.

    Raises:
        ValueError: Unknown recipe or key (with the nearest ones), or a value that does not fit, in one line.
    """
    tree = {} if recipe is None else read_yaml(recipe, "configs", "recipe")
    for key, value in (overrides or {}).items():
        _set(tree, key, parse_value(value) if isinstance(value, str) else value)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def parse_value(text: str) -> Any:
    """Read a value as YAML does, and numbers such as 3e-4 too (YAML 1.1 takes them for text)."""
    try:
        return float(text) if re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", text) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the nearest known names, for error messages."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    if section not in RunConfig.model_fields or not name:
        raise ValueError(_unknown(key))
    branch = tree.setdefault(section, {})
    *parents, leaf = name.split(".")
    for parent in parents:
        branch = branch.setdefault(parent, {})
    branch[leaf] = value


def _keys() -> list[str]:
    return [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
        for name in field.annotation.model_fields
    ]


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*SHORT_KEYS, *_keys()], n=3, cutoff=0.4)
    meant = f"did you mean {' or '.join(f'--{own}' for own in near)}?" if near else "see vitrail train --help"
    return f"unknown option --{key}: {meant}"


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(where)
    if first["type"] == "value_error":  # our own validators say what came
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    # "Input should be a valid number, unable to parse string as a number"
    expected = first["msg"].replace("Input should be", "expected").partition(", unable")[0]
    given, known = first.get("input"), re.findall(r"'(\w+)'", str(first.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"{where}: {expected}, got {given!r}" + (f"; did you mean {near[0]}?" if near else "")
