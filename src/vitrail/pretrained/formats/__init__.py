"""The formats in which others keep Vision Transformers: one file each, told apart by the tensors' names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vitrail.pretrained.formats import authors, google, torchvision, transformers
from vitrail.pretrained.names import translate

Format = Literal["vitrail", "timm", "transformers", "torchvision", "authors", "google"]

_IGNORED: dict[Format, Mapping[str, str]] = {
    "transformers": transformers.IGNORED,
    "torchvision": torchvision.IGNORED,
    "google": google.IGNORED,
    "authors": authors.IGNORED,
}


def detect(state: Mapping[str, Tensor]) -> Format:
    """Whose names these are; `timm` where nothing tells otherwise: its names are ours."""
    if any(name.endswith(transformers.MARKS) for name in state):
        return "transformers"
    if any(mark in state for mark in google.MARKS):
        return "google"
    if any(mark in state for mark in torchvision.MARKS):
        return "torchvision"
    return "authors" if any(mark in state for mark in authors.MARKS) else "timm"


def to_ours(
    state: Mapping[str, Tensor], form: Format, config: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Translate a state dictionary to the names of our models.

    Args:
        state: In the names of `form`.
        form: What `detect` gave.
        config: Of the model that the tensors are for.

    Returns:
        Our names and tensors, and what was left out on purpose: name -> why.

    Raises:
        ValueError: That library has no such model.
    """
    if form == "transformers":
        state = transformers.with_prefix(state, transformers.reading_family(state, config).model_type)
        rules = transformers.reading_family(state, config).rules(config)
    elif form == "torchvision":
        rules = torchvision.rules(config)
    elif form == "google":
        rules = google.rules(config)
    else:
        rules = authors.rules(config) if form == "authors" else []
    translated = translate(state, rules, to_ours=True)
    ignored = {
        name: why
        for name in translated
        for pattern, why in _IGNORED.get(form, {}).items()
        if fnmatch.fnmatchcase(name, pattern)
    }
    return {name: tensor for name, tensor in translated.items() if name not in ignored}, ignored


def to_theirs(state: Mapping[str, Tensor], form: Format, config: Any) -> dict[str, Tensor]:
    """Translate a state dictionary of ours to the names of another library.

    Raises:
        ValueError: That library has no such model.
    """
    if form == "transformers":
        return translate(state, transformers.family_of(config).rules(config), to_ours=False)
    if form == "torchvision":
        return torchvision.write(state, config)
    return dict(state)
