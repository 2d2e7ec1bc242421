"""The known small data sets: what they hold, and where their files lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vitrail.datasets.hub import Files, hub_files, parquet_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set, as data."""

    name: str
    hub_id: str | None
    """Owner and repository on the Hugging Face hub; None for a set that comes with a library."""
    folder: str
    """Name of its folder under a data root."""
    image_column: str
    label_column: str
    shape: tuple[int, int, int]
    """Channels, height and width."""
    train_size: int
    test_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean of pixel / 255 over the training images, a channel."""
    std: tuple[float, ...]


# The hub's order, which is alphabetical.
# fmt: off
_CIFAR100_FINE = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
    "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo",
    "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree",
    "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree",
    "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit",
    "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
    "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe",
    "whale", "willow_tree", "wolf", "woman", "worm",
)
_CIFAR100_COARSE = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_electrical_devices", "household_furniture", "insects", "large_carnivores",
    "large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores",
    "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees",
    "vehicles_1", "vehicles_2",
)
# fmt: on
_DIGITS = tuple("0123456789")


def _cifar100(name: str, label_column: str, classes: tuple[str, ...]) -> Source:
    return Source(
        name=name,
        hub_id="uoft-cs/cifar100",
        folder="cifar100",
        image_column="img",
        label_column=label_column,
        shape=(3, 32, 32),
        train_size=50_000,
        test_size=10_000,
        classes=classes,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="digits",
            hub_id=None,
            folder="digits",
            image_column="image",
            label_column="label",
            shape=(1, 8, 8),
            train_size=1_438,
            test_size=359,
            classes=_DIGITS,
            mean=(0.3053,),
            std=(0.3759,),
        ),
        Source(
            name="mnist",
            hub_id="ylecun/mnist",
            folder="mnist",
            image_column="image",
            label_column="label",
            shape=(1, 28, 28),
            train_size=60_000,
            test_size=10_000,
            classes=_DIGITS,
            mean=(0.1307,),
            std=(0.3081,),
        ),
        Source(
            name="fashion_mnist",
            hub_id="zalando-datasets/fashion_mnist",
            folder="fashion_mnist",
            image_column="image",
            label_column="label",
            shape=(1, 28, 28),
            train_size=60_000,
            test_size=10_000,
            classes=(
                "T - shirt / top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            mean=(0.2860,),
            std=(0.3530,),
        ),
        Source(
            name="cifar10",
            hub_id="uoft-cs/cifar10",
            folder="cifar10",
            image_column="img",
            label_column="label",
            shape=(3, 32, 32),
            train_size=50_000,
            test_size=10_000,
            classes=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        _cifar100("cifar100", "fine_label", _CIFAR100_FINE),
        _cifar100("cifar100_coarse", "coarse_label", _CIFAR100_COARSE),
    )
}


def find_source(name: str) -> Source | None:
    """Look up a data set by its name or its hub id; None where nobody knows it."""
    for source in SOURCES.values():
        if name in (source.name, source.hub_id):
            return source
    return None


def locate(source: Source, root: str | os.PathLike[str] | None) -> Files:
    """The parquet files of the train and test split, from the first place that has them.

    Raises:
        ValueError: No place has them, or a place has a part of them.
    """
    roots = data_roots(root)
    folders = [place / part for place in roots for part in (source.folder, str(source.hub_id))]
    for folder in folders:
        if found := parquet_files(folder, ("train", "test")):
            return found
    from_hub, reason = hub_files(str(source.hub_id), ("train", "test"))
    if from_hub:
        return from_hub
    looked = ", ".join(str(folder) for folder in folders) or "no folder (no root or VITRAIL_DATA given)"
    home = roots[0] if roots else Path("<folder>")
    raise ValueError(
        f"data set {source.name} not found: looked in {looked} and the hub's local cache, and {reason}; put "
        f"train-*.parquet and test-*.parquet of {source.hub_id} into {home / source.folder}/ and "
        f"{'try again' if roots else 'set VITRAIL_DATA=<folder>'}"
    )


def data_roots(root: str | os.PathLike[str] | None) -> list[Path]:
    """Folders that hold data sets: the one given, and that in the environment variable VITRAIL_DATA.

    Raises:
        ValueError: The folder given does not exist.
    """
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"data root: no folder {root}")
    return [Path(place) for place in (root, os.environ.get("VITRAIL_DATA")) if place]
