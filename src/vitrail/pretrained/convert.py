"""Models of any library as ours, and ours as models of any library, with a check of the result.

`import_model` reads; `export_model` writes and reads back what it wrote. Where the other library is
installed, it loads the result too and its logits are compared with ours.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from vitrail.files import write_whole
from vitrail.models import Encoder, build_model, model_config
from vitrail.models.video_vit import VideoViT
from vitrail.models.vit import ViTConfig
from vitrail.pretrained.fit import LoadReport, fit_state
from vitrail.pretrained.folder import ModelFolder, save_model
from vitrail.pretrained.formats import detect, timm, to_ours, to_theirs, torchvision, transformers
from vitrail.pretrained.image_to_video import to_video
from vitrail.pretrained.read import read_state
from vitrail.pretrained.sources import Weights, find_weights, usual_preprocessing

Target = Literal["vitrail", "timm", "transformers", "torchvision"]
TOLERANCE = 1e-4
"""Largest difference of logits between libraries."""


@dataclass(frozen=True)
class Check:
    """How far the logits of what was written are from those of the model, on the same random images."""

    read_back: float
    """Read again by us."""
    library: float | None
    """Loaded by the other library; None where it is not installed."""


def load_pretrained(model: Encoder, source: str | Path | Weights) -> LoadReport:
    """Load weights of anyone into a model; see `vitrail.pretrained.sources` for what a source may be.

    Positions are resampled for the model's image size, the stem's channels are summed or repeated, a head for
    other classes stays fresh, a video model takes an image model's (`vitrail.pretrained.image_to_video`);
    everything else must fit exactly.

    Args:
        model: Filled in place; untouched when anything does not fit.
        source: Where the weights are.

    Raises:
        ValueError: No such weights, or weights that do not fit; one line.
    """
    found = source if isinstance(source, Weights) else find_weights(source)
    state = read_state(found.file)
    layouts, theirs = None, model.config
    if found.name is not None:
        theirs = model_config(found.name, **found.changes)
        with torch.device("meta"):
            layouts = theirs.build().position_layouts()
    if isinstance(model, VideoViT) and isinstance(theirs, ViTConfig):
        ours, ignored = to_ours(state, detect(state), theirs)
        ours, changed = to_video(ours, theirs, model, found.origin)
        return fit_state(model, ours, found.origin, layouts=layouts, ignored=ignored, changed=changed)
    ours, ignored = to_ours(state, detect(state), model.config)
    return fit_state(model, ours, found.origin, layouts=layouts, ignored=ignored)


def import_model(
    source: str | Path | Weights,
    *,
    model: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[ModelFolder, LoadReport]:
    """Read a model of anyone, with its classes and preprocessing.

    Args:
        source: Where it is; see `vitrail.pretrained.sources`.
        model: The variant, for weights that do not tell.
        mean: A number for each channel, for weights that do not tell; `std` too.
        std: The same.

    Raises:
        ValueError: What cannot be read, does not fit or is not told; one line.
    """
    found = source if isinstance(source, Weights) else find_weights(source)
    name = found.name or model
    if name is None:
        raise ValueError(f"{found.origin} does not tell its architecture: add --model NAME")
    if found.name is not None and model not in (None, found.name):
        raise ValueError(f"{found.origin} holds a {found.name}, not a {model}; leave --model out")
    changes = dict(found.changes)
    form = detect(state := read_state(found.file))
    if "num_classes" not in changes:
        changes["num_classes"] = _classes_of_head(to_ours(state, form, model_config(name))[0], name)
    built = build_model(name, **changes)
    report = load_pretrained(built, found)
    shape, channels = built.config.image_shape, built.config.in_chans
    prepared = found.preprocessing or usual_preprocessing(name, form, shape)
    if mean is not None and std is not None:
        prepared = {"crop_ratio": 1.0, "interpolation": "bicubic", **(prepared or {})} | {
            "img_size": list(shape),
            "in_chans": channels,
            "mean": list(mean),
            "std": list(std),
        }
    if prepared is None:
        raise ValueError(
            f"{found.origin} does not tell how images are prepared: add --mean and --std (0.5 0.5 0.5 for "
            "Google's ViTs, 0.485 0.456 0.406 and 0.229 0.224 0.225 for most others)"
        )
    classes = found.classes or tuple(str(number) for number in range(built.config.num_classes))
    return ModelFolder(model=built.eval(), name=name, classes=classes, preprocessing=dict(prepared)), report


def export_model(stored: ModelFolder, target: Path, to: Target) -> Check:
    """Write a model in another library's form, read it back, and compare logits.

    | to | what is written into the folder `target` |
    |---|---|
    | vitrail | a model folder |
    | timm | config.json, model.safetensors: `timm.create_model("local-dir:TARGET", pretrained=True)` |
    | transformers | config.json, preprocessor_config.json, model.safetensors: `from_pretrained(TARGET)` |
    | torchvision | model.pth, for `load_state_dict` |

    Raises:
        ValueError: That library has no such model, or the logits differ; one line.
    """
    written = stored if to == "vitrail" else _with_convolution(stored)
    config = written.model.config
    state = {name: tensor.contiguous().clone() for name, tensor in written.model.state_dict().items()}
    if to == "vitrail":
        save_model(
            target,
            stored.model,
            name=stored.name,
            classes=stored.classes,
            preprocessing=stored.preprocessing,
        )
    elif to == "timm":
        described = timm.write_config(written.model, stored.name, stored.classes, stored.preprocessing)
        _write(target, {"config.json": described}, to_theirs(state, to, config))
    elif to == "transformers":
        files = {
            "config.json": transformers.write_config(config, stored.classes),
            "preprocessor_config.json": transformers.write_preprocessing(stored.preprocessing),
        }
        _write(target, files, to_theirs(state, to, config))
    else:
        theirs = to_theirs(state, to, config)
        target.mkdir(parents=True, exist_ok=True)
        torch.save(theirs, target / "model.pth.part")
        (target / "model.pth.part").replace(target / "model.pth")
    return _checked(written, target, to)


def _with_convolution(stored: ModelFolder) -> ModelFolder:
    """The same model with a convolution where patches were cut by hand, which no other library does."""
    config = stored.model.config
    if not isinstance(config, ViTConfig) or config.patch_embed != "linear":
        return stored
    model = replace(config, patch_embed="conv").build().eval()
    fit_state(model, stored.model.state_dict(), stored.name)
    return replace(stored, model=model)


def _write(target: Path, files: dict[str, Any], state: dict[str, Tensor]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_whole(target / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    for name, content in files.items():
        write_whole(target / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _checked(stored: ModelFolder, target: Path, to: Target) -> Check:
    config = stored.model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.in_chans, *config.image_shape, generator=generator)
    expected = stored.model.eval()(images)
    if to == "torchvision":
        again: Encoder = config.build().eval()
        load_pretrained(again, target / "model.pth")
    else:
        again = import_model(target)[0].model
    check = Check(
        read_back=_difference(expected, again(images)),
        library=_library_difference(expected, images, stored.model, target, to),
    )
    for reader, difference in (("we", check.read_back), (to, check.library)):
        if difference is not None and not difference < TOLERANCE:
            raise ValueError(
                f"{target}: what {reader} read from it gives logits that differ by {difference:.2g} (at most "
                f"{TOLERANCE:g} expected); do not use it"
            )
    return check


def _library_difference(
    expected: Tensor, images: Tensor, model: Encoder, target: Path, to: Target
) -> float | None:
    if to == "vitrail" or importlib.util.find_spec(to) is None:
        return None
    try:
        logits = _library_logits(images, model, target, to)
    except Exception as error:  # whatever the other library raises, it could not use what was written
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{target}: {to} cannot load what was written ({reason}); do not use it") from None
    return _difference(expected, logits)


def _library_logits(images: Tensor, model: Encoder, target: Path, to: Target) -> Tensor:
    if to == "timm":
        import vitrail.torchvision_ops  # noqa: F401, I001  (before timm, which imports torchvision)
        import timm as library  # beside our formats.timm

        return library.create_model(f"local-dir:{target}", pretrained=True).eval()(images)
    if to == "transformers":
        theirs = transformers.load_theirs(transformers.family_of(model.config).architecture, target)
        logits: Tensor = theirs.eval()(images).logits
        return logits
    peer = torchvision.build(model.config).eval()
    peer.load_state_dict(torch.load(target / "model.pth", weights_only=True))
    return peer(images)


def _difference(expected: Tensor, came: Tensor) -> float:
    return (expected - came).abs().max().item()


def _classes_of_head(state: dict[str, Tensor], name: str) -> int:
    """How many classes the head of a state dictionary has; 0: it has none."""
    with torch.device("meta"):
        heads = build_model(name).head_names
    for key in reversed(state):
        if key.startswith(heads) and state[key].ndim == 2:
            return state[key].shape[0]
    return 0
