"""ImageNet-1k (ILSVRC 2012): the order of its 1,000 classes, and the layouts of its folders.

Olga Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015). The classes are WordNet
synsets, and published models number them in the order of their sorted ids: n01440764 (tench) is 0, n15075141
(toilet tissue) is 999. A folder with a part of
the classes cannot tell that order, so the list is kept here.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path

from vitrail.datasets.folder import (
    Found,
    class_folders,
    images_in,
    labelled_files,
    make_items,
    split_folders,
)
from vitrail.datasets.tables import Labelled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of pixel / 255 that published models were trained with, a channel."""

_SYNSET = re.compile(r"n\d{8}")


@cache
def synsets() -> dict[str, str]:
    """Ids of the 1,000 synsets in the order of the classes, with the class names.

    A name is the synset's first word in WordNet. The two names that two synsets share (crane, maillot) have
    the id added.
    """
    lines = (resources.files("vitrail.datasets") / "imagenet_classes.txt").read_text().splitlines()
    found = dict(line.split(" ", 1) for line in lines)
    names = list(found.values())
    return {
        synset: name if names.count(name) == 1 else f"{name} ({synset})" for synset, name in found.items()
    }


def find_imagenet(folder: Path) -> Found | None:
    """The images of an ImageNet folder; None where it is none.

    Layouts: `train/` and `val/` (or one of them), or the images themselves; each with a folder a synset, or
    with files whose names begin with it (`n01440764_tench.JPEG`), as those of the training images do. All
    1,000 classes keep their numbers, whichever have images.

    Args:
        folder: The folder.

    Returns:
        The training images as train, and the validation images (which research takes for its tests), or
        images without a split, as test.

    Raises:
        ValueError: A file or folder belongs to no known synset.
    """
    places = split_folders(folder) or {"test": folder}
    if "val" in places:
        places["test"] = places.pop("val")
    ignored: Counter[str] = Counter()
    rows = {split: _labelled(path, ignored) for split, path in places.items()}
    if not any(rows.values()):
        return None
    names = synsets()
    for some in rows.values():
        for path, synset in some:
            if synset not in names:
                raise ValueError(f"{path}: expected one of the 1,000 synsets of ImageNet, got {synset!r}")
    labelled = {split: [(path, names[synset]) for path, synset in some] for split, some in rows.items()}
    return Found(parts=make_items(labelled, tuple(names.values()), "imagenet"), ignored=ignored)


def _labelled(folder: Path, ignored: Counter[str]) -> list[Labelled]:
    """Paths and synsets of the images of one split."""
    if any(_SYNSET.fullmatch(name) for name in class_folders(folder)):
        return labelled_files(folder, ignored)
    return [
        (str(folder / file), found[0])
        for file in images_in(folder, ignored)
        if (found := _SYNSET.match(file))
    ]
