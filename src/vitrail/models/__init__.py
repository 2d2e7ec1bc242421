"""The architectures, and the table of their variants.

`build_model("vit_base_patch16_224", num_classes=10, depth=6)` takes a variant's config, replaces fields and
builds it. Weights come in one storey higher, in `vitrail.pretrained.create_model`.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any, get_type_hints

from vitrail.models import cait, cct, crossvit, deit, diffvit, pvt, pvt_v2, swin, swin_v2, video_vit, vit
from vitrail.models.encoder import Encoder, Features, Stage
from vitrail.models.options import fitted

__all__ = [
    "SHORT_NAMES",
    "VARIANTS",
    "Encoder",
    "Features",
    "Stage",
    "build_model",
    "list_models",
    "model_config",
]

VARIANTS: dict[str, Any] = {
    **cait.VARIANTS,
    **cct.VARIANTS,
    **crossvit.VARIANTS,
    **deit.VARIANTS,
    **diffvit.VARIANTS,
    **pvt.VARIANTS,
    **pvt_v2.VARIANTS,
    **swin.VARIANTS,
    **swin_v2.VARIANTS,
    **video_vit.VARIANTS,
    **vit.VARIANTS,
}

SHORT_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "cait_xxs24": "cait_xxs24_224",
    "cait_xxs36": "cait_xxs36_224",
    "cait_s24": "cait_s24_224",
    "crossvit_tiny": "crossvit_tiny_240",
    "crossvit_small": "crossvit_small_240",
    "crossvit_base": "crossvit_base_240",
    "diffvit_tiny": "diffvit_tiny_patch16_224",
    "diffvit_small": "diffvit_small_patch16_224",
    "diffvit_base": "diffvit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "swinv2_tiny": "swinv2_tiny_window8_256",
    "swinv2_small": "swinv2_small_window8_256",
    "swinv2_base": "swinv2_base_window8_256",
    "video_vit_small": "video_vit_small_patch16_224",
    "video_vit_base": "video_vit_base_patch16_224",
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def model_config(name: str, **changes: Any) -> Any:
    """The frozen config of a variant with some fields replaced.

    Raises:
        ValueError: Unknown name or field (the message names the nearest), or a value that does not fit.
    """
    name = SHORT_NAMES.get(name, name)
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}: {_nearest(name, VARIANTS)}")
    config = VARIANTS[name]
    fields = get_type_hints(type(config))
    for key in changes:
        if key not in fields:
            raise ValueError(f"model {name} has no option {key!r}: {_nearest(key, fields)}")
    fitting = {key: fitted(f"model {name}", key, value, fields[key]) for key, value in changes.items()}
    return dataclasses.replace(config, **fitting)


def build_model(name: str, **changes: Any) -> Encoder:
    """A freshly initialised model; see `model_config` for the arguments and errors."""
    return model_config(name, **changes).build()


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else "`vitrail models` lists all"
