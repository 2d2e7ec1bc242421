"""Images with labels: where they come from, how they are kept, read in batches and prepared for a model.

`load_dataset("mnist")` gives the splits as image sets that are decoded once and memory-mapped afterwards;
`batches` reads an image set in an order that only the seed and the epoch decide; `Preprocessing` is what
travels with a model's weights, so that a photograph is prepared as the training images were.
"""

from vitrail.datasets.images import ImageSet, stratified_split
from vitrail.datasets.loading import batches, steps_per_epoch
from vitrail.datasets.sources import SOURCES, Source, Splits, list_datasets, load_dataset
from vitrail.datasets.transforms import Preprocessing

__all__ = [
    "SOURCES",
    "ImageSet",
    "Preprocessing",
    "Source",
    "Splits",
    "batches",
    "list_datasets",
    "load_dataset",
    "steps_per_epoch",
    "stratified_split",
]
