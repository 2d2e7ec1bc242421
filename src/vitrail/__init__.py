"""Build, train, measure and look inside Vision Transformers.

The public names are loaded when they are first used: `import vitrail` alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "create_model": "vitrail.pretrained",
    "Splits": "vitrail.datasets",
    "edit": "vitrail.components.tap",
    "from_dataset": "vitrail.datasets",
    "list_datasets": "vitrail.datasets",
    "list_models": "vitrail.models",
    "list_recipes": "vitrail.config",
    "load_config": "vitrail.config",
    "load_dataset": "vitrail.datasets",
    "load_model": "vitrail.pretrained",
    "Predictor": "vitrail.serving",
    "record": "vitrail.components.tap",
    "taps": "vitrail.components.tap",
    "train": "vitrail.training",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
