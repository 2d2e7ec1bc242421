"""timm: the same names as ours; here are its configs and preprocessing.

Files and hub repositories of timm hold `config.json` with the architecture's name, the changes of its
arguments (`model_args`) and `pretrained_cfg`, which says how images are prepared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.models import VARIANTS, Encoder
from vitrail.models.cait import CaiTConfig
from vitrail.models.crossvit import CrossViTConfig
from vitrail.models.pvt_v2 import PVTv2Config
from vitrail.models.swin import SwinConfig
from vitrail.models.swin_v2 import SwinV2Config
from vitrail.models.vit import ViTConfig

IGNORED: dict[str, str] = {}
MARKS: tuple[str, ...] = ()

_VIT = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "layer_scale": "init_values",
    "class_token": "class_token",
    "registers": "reg_tokens",
    "fc_norm": "fc_norm",
}
_PYRAMID = ("img_size", "patch_size", "in_chans", "num_classes", "depths", "num_heads")
_SWIN = (*_PYRAMID, "embed_dim", "window_size", "mlp_ratio", "qkv_bias")
_PVT_V2 = (
    *("in_chans", "num_classes", "embed_dims", "depths"),
    *("num_heads", "mlp_ratios", "sr_ratios", "linear"),
)
_CAIT = (
    *("img_size", "patch_size", "in_chans", "num_classes"),
    *("embed_dim", "depth", "num_heads", "mlp_ratio"),
)
_FAMILIES: dict[type, tuple[str, dict[str, str]]] = {
    SwinConfig: ("swin_tiny_patch4_window7_224", {name: name for name in _SWIN}),
    SwinV2Config: ("swinv2_tiny_window8_256", {name: name for name in _SWIN}),
    PVTv2Config: ("pvt_v2_b1", {name: name for name in _PVT_V2}),
    CaiTConfig: (
        "cait_xxs24_224",
        {name: name for name in _CAIT} | {"layer_scale": "init_values", "class_depth": "depth_token_only"},
    ),
}
_PLAIN_VIT = {
    "attention": "full",
    "mlp": "gelu",
    "patch_embed": "conv",
    "position": "learned",
    "head": "linear",
}


def read_config(theirs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant that a config.json names, and the fields in which it differs.

    Raises:
        ValueError: A model, or an argument, that we do not have.
    """
    name = theirs["architecture"]
    if name not in VARIANTS:
        raise ValueError(f"timm's {name} is not one of our models; `vitrail models` lists them")
    fields = {theirs: ours for ours, theirs in _fields(VARIANTS[name])[1].items()}
    changes: dict[str, Any] = {"num_classes": theirs.get("num_classes", VARIANTS[name].num_classes)}
    for argument, value in (theirs.get("model_args") or {}).items():
        if argument == "no_embed_class":
            changes["prefix_position"] = not value
        elif argument == "global_pool" and value in ("token", "avg"):
            changes["pool"] = {"token": "cls", "avg": "mean"}[value]
        elif argument in fields or argument == "pretrained_window_sizes":
            changes[fields.get(argument, argument)] = tuple(value) if isinstance(value, list) else value
        else:
            raise ValueError(f"timm's {name} with {argument} {value!r} is not one of our models")
    return name, changes


def write_config(
    model: Encoder, name: str, classes: Sequence[str], preprocessing: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a model of ours.

    Args:
        model: The model.
        name: Its variant.
        classes: Names of its classes; none for none.
        preprocessing: How its images are prepared.

    Raises:
        ValueError: timm has no such model.
    """
    config = model.config
    base, fields = _fields(config)
    arguments = {}
    if name in VARIANTS and _is_timms(name):
        base = name
    elif isinstance(config, CrossViTConfig):
        raise ValueError(f"timm has no CrossViT like {name}")
    for ours, theirs in fields.items():
        value = getattr(config, ours)
        arguments[theirs] = list(value) if isinstance(value, tuple) else value
    if isinstance(config, ViTConfig):
        wrong = [field for field, value in _PLAIN_VIT.items() if getattr(config, field) != value]
        if wrong or config.pool == "seqpool":
            field = wrong[0] if wrong else "pool"
            raise ValueError(f"timm has no ViT with {field} {getattr(config, field)!r}")
        arguments |= {
            "no_embed_class": not config.prefix_position,
            "global_pool": {"cls": "token", "mean": "avg"}[config.pool],
        }
    if isinstance(config, SwinV2Config):
        arguments["pretrained_window_sizes"] = list(config.trained_windows)
    rows, columns = preprocessing["img_size"]
    return {
        "architecture": base,
        "num_classes": config.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "architecture": base,
            "num_classes": config.num_classes,
            "input_size": [preprocessing["in_chans"], rows, columns],
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "interpolation": preprocessing["interpolation"],
            "crop_pct": preprocessing["crop_ratio"],
            "crop_mode": "center",
        },
        **({"label_names": list(classes)} if classes else {}),
    }


def read_preprocessing(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What `pretrained_cfg` says, in our fields (`vitrail.datasets.Preprocessing`)."""
    channels, rows, columns = theirs["input_size"]
    return {
        "img_size": [rows, columns],
        "in_chans": channels,
        "mean": list(theirs["mean"]),
        "std": list(theirs["std"]),
        "interpolation": theirs.get("interpolation", "bicubic"),
        "crop_ratio": theirs.get("crop_pct") or 1.0,
    }


def _fields(config: Any) -> tuple[str, dict[str, str]]:
    """An architecture of timm with arguments for all of a config, and its fields -> those arguments."""
    if type(config) in _FAMILIES:
        return _FAMILIES[type(config)]
    if isinstance(config, ViTConfig):
        if config.distillation:
            return "deit_base_distilled_patch16_224", {
                ours: theirs for ours, theirs in _VIT.items() if ours not in ("registers", "class_token")
            }
        return "vit_base_patch16_224", _VIT
    if isinstance(config, CrossViTConfig):
        return "crossvit_9_240", {name: name for name in ("img_size", "in_chans", "num_classes")}
    raise ValueError(f"timm has no {type(config).__name__.removesuffix('Config')}")


def _is_timms(name: str) -> bool:
    """Whether a variant's name is one of timm's: those for small images are ours."""
    return not any(part in name for part in ("cifar", "mnist", "digits"))
