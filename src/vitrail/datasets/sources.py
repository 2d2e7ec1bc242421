"""Known data sets by name: what they hold, where their files lie, and their splits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitrail.config import nearest
from vitrail.datasets.images import ImageSet, stratified_split
from vitrail.datasets.resident import Columns, load_resident

_CONNECT_TIMEOUT_S = 10.0


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


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The parts of a data set."""

    train: ImageSet
    val: ImageSet | None
    """Held out of the training images; None where nothing was to be held out."""
    test: ImageSet


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


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows."""
    return sorted(SOURCES)


def find_source(name: str) -> Source:
    """Look up a data set by its name or its hub id.

    Raises:
        ValueError: The name is unknown; the message names the nearest.
    """
    for source in SOURCES.values():
        if name in (source.name, source.hub_id):
            return source
    known = [*SOURCES, *(source.hub_id for source in SOURCES.values() if source.hub_id)]
    raise ValueError(f"unknown data set {name!r}: {nearest(name, known)}")


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    train_fraction: float = 1.0,
) -> Splits:
    """Load a data set, from the first place that has it.

    The places are `root`, the folder in the environment variable VITRAIL_DATA, the local cache of the Hugging
    Face hub, and the hub itself. A root holds `<name>/` or `<owner>/<repository>/` with the hub's files
    `train-*.parquet` and `test-*.parquet` at any depth.

    Args:
        name: A name of `list_datasets()`, or its hub id.
        root: Folder with data sets.
        val_fraction: Share of the training images held out, stratified by class, 0 to below 1.
        split_seed: Decides which images are held out and, with `train_fraction`, which are used.
        train_fraction: Share of the remaining training images to use, stratified by class, above 0 to 1. For
            one seed, the images of a smaller share are among those of a larger one.

    Raises:
        ValueError: The name is unknown, no place has the set, or its files are damaged; in one line.
    """
    source = find_source(name)
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction: expected 0 to below 1, got {val_fraction}")
    if not 0.0 < train_fraction <= 1.0:
        raise ValueError(f"train_fraction: expected above 0 to 1, got {train_fraction}")
    train, test = _digits(source) if source.hub_id is None else _parquet(source, root)
    val = None
    if val_fraction > 0.0:
        rest, held_out = stratified_split(train.labels, val_fraction, split_seed)
        train, val = train.subset(rest), train.subset(held_out, split="val")
    if train_fraction < 1.0:
        used, _ = stratified_split(train.labels, 1.0 - train_fraction, split_seed)
        train = train.subset(used)
    return Splits(train=train, val=val, test=test)


def _digits(source: Source) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's digits, values 0 to 16 scaled to bytes; without an own split, a fixed fifth is test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    whole = ImageSet.from_arrays(
        pixels, bunch.target, classes=source.classes, name=source.name, mean=source.mean, std=source.std
    )
    rest, held_out = stratified_split(whole.labels, 0.2, seed=0)
    return whole.subset(rest), whole.subset(held_out, split="test")


def _parquet(source: Source, root: str | os.PathLike[str] | None) -> tuple[ImageSet, ImageSet]:
    files = _locate(source, root)
    columns = Columns(
        image=source.image_column,
        label=source.label_column,
        shape=source.shape,
        num_classes=len(source.classes),
    )

    def load(split: str) -> ImageSet:
        resident = load_resident(files[split], columns, name=source.name, split=split)
        return ImageSet(
            stored=resident.images,
            labels=resident.labels,
            classes=source.classes,
            name=source.name,
            split=split,
            fingerprint=resident.fingerprint,
            mean=source.mean,
            std=source.std,
        )

    return load("train"), load("test")


def _locate(source: Source, root: str | os.PathLike[str] | None) -> dict[str, list[Path]]:
    """The parquet files of each split, from the first place that has them."""
    roots = [Path(place) for place in (root, os.environ.get("VITRAIL_DATA")) if place]
    if root is not None and not Path(root).is_dir():
        raise ValueError(f"data root: no folder {root}")
    folders = [place / part for place in roots for part in (source.folder, str(source.hub_id))]
    for folder in folders:
        if found := _files(folder):
            return found
    from_hub, reason = _from_hub(str(source.hub_id))
    if from_hub:
        return from_hub
    looked = ", ".join(str(folder) for folder in folders) or "no folder (no root or VITRAIL_DATA given)"
    home = roots[0] if roots else Path("<folder>")
    raise ValueError(
        f"data set {source.name} not found: looked in {looked} and the hub's local cache, and {reason}; put "
        f"train-*.parquet and test-*.parquet of {source.hub_id} into {home / source.folder}/ and "
        f"{'try again' if roots else 'set VITRAIL_DATA=<folder>'}"
    )


def _files(folder: Path) -> dict[str, list[Path]] | None:
    """The parquet files of both splits under a folder, or None where there is none.

    Raises:
        ValueError: There are some, but not all, or the same split lies in two folders.
    """
    found = {split: sorted(folder.rglob(f"{split}-*.parquet")) for split in ("train", "test")}
    if not any(found.values()):
        return None
    for split, files in found.items():
        places = sorted({str(path.parent) for path in files})
        if len(places) != 1:
            raise ValueError(
                f"{folder}: expected {split}-*.parquet in one folder, got {' and '.join(places) or 'none'}"
            )
        # Parts are numbered train-00000-of-00002: a missing one would otherwise go unnoticed.
        part = re.search(r"-of-(\d+)", files[0].name)
        if part and int(part[1]) != len(files):
            raise ValueError(
                f"{places[0]}: expected {int(part[1])} files {split}-*.parquet, got {len(files)}"
            )
    return found


def _from_hub(hub_id: str) -> tuple[dict[str, list[Path]] | None, str]:
    """The files in the hub's local cache, else downloaded; or the reason why there are none."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*train-*.parquet", "*test-*.parquet"]

    def snapshot(local_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, repo_type="dataset", allow_patterns=patterns, local_files_only=local_only
            )
        )

    try:
        # An interrupted download leaves a part, which the hub then completes.
        if found := _files(snapshot(True)):
            return found, ""
    except (LocalEntryNotFoundError, ValueError):
        pass
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return None, "HF_HUB_OFFLINE forbids the hub"
    try:
        # One short question first: the download itself waits long and tries often where nothing answers.
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=_CONNECT_TIMEOUT_S)
        downloaded = snapshot(False)
    except Exception as error:
        # The library lets errors of its HTTP client through, whose kind changed from version to version.
        return None, f"the hub did not give it ({' '.join(str(error).split())[:120]})"
    return _files(downloaded), "the hub has no such files"
