"""Where weights come from: paths, addresses, hubs; and what each source says of its model.

| written | what it is |
|---|---|
| `runs/mnist`, `folder/` | a run folder, a model folder, or a folder saved by transformers or timm |
| `file.pth`, `.safetensors`, `.npz` | weights alone |
| `https://...`, `file://...` | a file, downloaded once (`vitrail.pretrained.download`) |
| `timm:NAME.TAG` | timm's weights, from the hub |
| `torchvision:NAME` or `torchvision:NAME.TAG` | torchvision's weights |
| `owner/name` | a hub repository of ours, of transformers or of timm |

Mean, standard deviation, size and crop come with every source that has them; those of a bare file are told
only where its form leaves no doubt. What speaks to the network is imported where it is needed: it takes a
tenth as long as importing torch, and most models lie on the disk.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.models import SHORT_NAMES, VARIANTS
from vitrail.pretrained.folder import read_folder_config
from vitrail.pretrained.formats import Format, timm, torchvision, transformers

HUB_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(r"(https?|file)://")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that are on this disk, with what is known of their model."""

    origin: str
    """As the user wrote it."""
    file: Path
    """With the tensors."""
    name: str | None = None
    """The variant that it is; None: nothing tells, as for a bare file."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields in which the model differs from its variant."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the logits; empty where nobody tells."""
    preprocessing: Mapping[str, Any] | None = None
    """As `vitrail.datasets.Preprocessing.to_dict` gives it; None where nobody tells."""


def find_weights(text: str | Path, *, revision: str | None = None) -> Weights:
    """Find weights, downloading them where they are not on this disk yet.

    Args:
        text: See the table above.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ValueError: Nothing there, or a model that we do not have; one line.
    """
    origin = str(text)
    on_hub = _hub_name(origin)
    if revision is not None and on_hub is None:
        raise ValueError(f"{origin} is not a hub repository: it has no revision ({revision!r})")
    if on_hub is not None:
        return _folder(_fetch(on_hub, revision, origin), origin)
    if origin.startswith("torchvision:"):
        return _torchvision(origin)
    if _ADDRESS.match(origin):
        return Weights(origin=origin, file=_download(origin))
    path = Path(text)
    if path.is_file():
        return Weights(origin=origin, file=path)
    if not path.exists() and (origin in VARIANTS or origin in SHORT_NAMES):
        raise ValueError(
            f"{origin} is an architecture, and its weights are not at hand: give a run or model folder, "
            f"timm:{SHORT_NAMES.get(origin, origin)}.TAG, torchvision:NAME, a hub repository as owner/name, "
            "or a file"
        )
    return _folder(path, origin)


def usual_preprocessing(name: str, form: Format, img_size: tuple[int, int]) -> dict[str, Any] | None:
    """How the authors of a model prepare images, where its form and name leave no doubt; None: they do not.

    google-research's files want values from -1 to 1, the other papers' ImageNet statistics. timm's ViTs
    exist with either, so a bare file with their names does not tell.
    """
    known = name.startswith(("deit", "swin", "pvt", "cait", "crossvit")) and min(img_size) >= 128
    if form == "google":
        statistics = HALF
    elif known or form == "authors":
        statistics = IMAGENET
    else:
        return None
    return {
        "img_size": list(img_size),
        "in_chans": 3,
        **statistics,
        "interpolation": "bicubic",
        "crop_ratio": 1.0 if name.startswith("cait") or form == "google" else 0.875,
    }


def _hub_name(origin: str) -> str | None:
    """The hub repository that is meant; None: something else."""
    if origin.startswith("timm:"):
        return f"timm/{origin.removeprefix('timm:')}"
    if Path(origin).exists() or not _REPOSITORY.fullmatch(origin) or Path(origin).suffix in (".pth", ".npz"):
        return None
    return origin


def _fetch(repository: str, revision: str | None, origin: str) -> Path:
    """A hub repository's folder here; what was downloaded before is used where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    here = f"no folder {origin} here" if origin == repository else f"{origin} is not here"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{here}, it is not in the hub's local cache, and the hub cannot be reached; where there is a "
            f"network, `vitrail download {origin}` fetches it"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{here}, and the hub has no public repository {repository}") from None
    except Exception as error:  # the errors of the hub's HTTP client have no common kind
        reason = textwrap.shorten(str(error).strip().partition("\n")[0], 160, placeholder=" ...")
        raise ValueError(f"{here}, and the hub did not give it ({reason})") from None


def _download(address: str) -> Path:
    from vitrail.pretrained.download import download

    return download(address)


def _folder(folder: Path, origin: str) -> Weights:
    """What a folder with a config.json says."""
    config = _read_json(folder / "config.json")
    if "architecture" in config:
        name, changes = timm.read_config(config)
        return Weights(
            origin=origin,
            file=_weights_in(folder),
            name=name,
            changes=changes,
            classes=_class_names(config.get("label_names"), changes["num_classes"]),
            preprocessing=timm.read_preprocessing(config["pretrained_cfg"])
            if "pretrained_cfg" in config
            else None,
        )
    if "model_type" in config:
        name, changes = transformers.read_config(config)
        prepared = _read_json(folder / "preprocessor_config.json")
        labels = config.get("id2label") or {}
        return Weights(
            origin=origin,
            file=_weights_in(folder),
            name=name,
            changes=changes,
            classes=tuple(labels[str(number)] for number in range(len(labels))),
            preprocessing=transformers.read_preprocessing(prepared, changes.get("in_chans", 3))
            if prepared
            else None,
        )
    try:
        stored = read_folder_config(folder)
    except ValueError as error:
        if str(folder) == origin:
            raise
        raise ValueError(f"{origin} on the hub is not a model that we know ({error})") from None
    home = folder if (folder / "config.json").is_file() else folder / "model"
    return Weights(
        origin=origin,
        file=home / "model.safetensors",
        name=stored.name,
        changes=stored.changes,
        classes=stored.classes,
        preprocessing=stored.preprocessing,
    )


def _torchvision(origin: str) -> Weights:
    """torchvision's own tables say where the file is, its digest, its classes and its preprocessing."""
    import vitrail.torchvision_ops  # noqa: F401, I001  (before torchvision)
    from torchvision.models import get_model_weights

    name, _, tag = origin.removeprefix("torchvision:").partition(".")
    if name not in torchvision.VARIANTS:
        raise ValueError(f"torchvision:{name} is not one of {', '.join(torchvision.VARIANTS)}")
    known = get_model_weights(name)
    if tag and tag not in known.__members__:
        raise ValueError(f"torchvision:{name} has the weights {', '.join(known.__members__)}, got {tag!r}")
    weights = known[tag] if tag else known.DEFAULT
    prepared = weights.transforms()
    crop, resized = prepared.crop_size[0], prepared.resize_size[0]
    return Weights(
        origin=origin,
        file=_download(weights.url),
        name=torchvision.VARIANTS[name],
        changes={"num_classes": len(weights.meta["categories"]), "img_size": crop},
        classes=tuple(weights.meta["categories"]),
        preprocessing={
            "img_size": [crop, crop],
            "in_chans": 3,
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "interpolation": prepared.interpolation.value,
            "crop_ratio": crop / resized,
        },
    )


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no weights (expected model.safetensors or pytorch_model.bin)")


def _class_names(labels: Any, num_classes: int) -> tuple[str, ...]:
    """What a source says, else ImageNet's names where there are 1,000 classes."""
    if isinstance(labels, list) and len(labels) == num_classes:
        return tuple(map(str, labels))
    if num_classes != 1000:
        return ()
    import vitrail.torchvision_ops  # noqa: F401, I001  (before torchvision)
    from torchvision.models import Swin_T_Weights

    return tuple(Swin_T_Weights.IMAGENET1K_V1.meta["categories"])


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing where there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return content if isinstance(content, dict) else {}
