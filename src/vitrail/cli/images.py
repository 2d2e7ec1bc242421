"""The images of a data section, as several verbs give them to a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.config import DataSection
    from vitrail.datasets import Images, Splits


def load_splits(data: DataSection, preprocessing: Mapping[str, Any]) -> Splits:
    """The images of a data section, as a model with this preprocessing takes them."""
    from vitrail.datasets import load_section

    return load_section(data, img_size=tuple(preprocessing["img_size"]), in_chans=preprocessing["in_chans"])


def load_test_images(data: DataSection, preprocessing: Mapping[str, Any]) -> Images:
    """The test images of a data section, as a model with this preprocessing takes them."""
    wanted = data.model_copy(update={"val_fraction": 0.0, "synthetic": 0.0})
    return load_splits(wanted, preprocessing).test
