"""Images with labels: where they come from, how they are kept, read in batches and prepared for a model.

`load_dataset` takes a known name, a folder of images or a hub id, and `from_dataset` a Python object. What
comes out are image sets, decoded once and memory-mapped afterwards, or file sets, decoded when they are read.
`batches` reads either in an order that only the seed and the epoch decide; `Preprocessing` is what travels
with a model's weights, so that a photograph is prepared as the training images were.
"""

from vitrail.datasets.clips import side_by_side
from vitrail.datasets.file_set import FileSet, Images
from vitrail.datasets.images import ImageSet, stratified_split
from vitrail.datasets.loading import batches, steps_per_epoch
from vitrail.datasets.sources import SOURCES, Source
from vitrail.datasets.splits import (
    Splits,
    find_items,
    from_dataset,
    list_datasets,
    load_dataset,
    load_section,
)
from vitrail.datasets.transforms import BrokenImageError, Preprocessing

__all__ = [
    "SOURCES",
    "BrokenImageError",
    "FileSet",
    "ImageSet",
    "Images",
    "Preprocessing",
    "Source",
    "Splits",
    "batches",
    "find_items",
    "from_dataset",
    "list_datasets",
    "load_dataset",
    "load_section",
    "side_by_side",
    "steps_per_epoch",
    "stratified_split",
]
