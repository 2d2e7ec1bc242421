"""Values of options: of which kind they are, and in which range, for those that architectures share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

_ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)  # options may be modules
_LEAST = {
    "img_size": 1,
    "patch_size": 1,
    "kernel_size": 1,
    "num_convs": 1,
    "num_frames": 1,
    "tubelet": 1,
    "in_chans": 1,
    "num_classes": 0,
    "embed_dim": 1,
    "embed_dims": 1,
    "depth": 1,
    "depths": 1,
    "branch_depth": 1,
    "class_depth": 1,
    "num_heads": 1,
    "window_size": 1,
    "pretrained_window_sizes": 1,
    "sr_ratios": 1,
    "registers": 0,
    "top_k": 1,
    "reach": 0,
}
_POSITIVE = {"mlp_ratio", "mlp_ratios", "img_scale"}
_RATES = {"drop", "attn_drop", "drop_path"}


def fitted(owner: str, option: str, value: Any, annotation: Any) -> Any:
    """A value as the kind that an option takes; what a command line or a file says reaches its owner here.

    Args:
        owner: Whose option, for the message: `task mae`.
        option: Its name.
        value: As it came: text for a number, a list for a tuple.
        annotation: The kind.

    Raises:
        ValueError: It is of another kind.
    """
    try:
        return TypeAdapter(annotation, config=_ANY_CLASS).validate_python(value)
    except ValidationError as error:
        # "Input should be a valid number, unable to parse string as a number"
        expected = error.errors()[0]["msg"].replace("Input should be", "expected").partition(", unable")[0]
        raise ValueError(f"{owner}, option {option}: {expected}, got {value!r}") from None


def check_ranges(config: Any) -> None:
    """Refuse sizes, ratios and drop rates of which no model can be built.

    Args:
        config: A frozen config of an architecture; of a pair or a tuple each value counts.

    Raises:
        ValueError: The first field out of its range, with what came.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == ():
            raise ValueError(f"{name} needs at least one value, got ()")
        if (least := _LEAST.get(name)) is not None and any(own < least for own in values):
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if name in _POSITIVE and not all(0.0 < own < math.inf for own in values):
            raise ValueError(f"{name} must be positive, got {value}")
        if name in _RATES and not all(0.0 <= own < 1.0 for own in values):
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
