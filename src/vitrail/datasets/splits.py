"""From a name, a folder or Python objects to the training, validation and test images.

What is found are items (where each image lies); what is made of them are image sets, decoded once and kept in
memory, where they fit into a quarter of it, and else file sets, decoded when they are read.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.config import DataSection
from vitrail.datasets.clips import Frames, load_clips, with_shuffled_frames
from vitrail.datasets.file_set import FileSet, Images
from vitrail.datasets.folder import find_folder
from vitrail.datasets.hub import hub_files, parquet_files, parquet_items
from vitrail.datasets.imagenet import MEAN, STD, find_imagenet
from vitrail.datasets.images import ImageSet, stratified_split
from vitrail.datasets.items import FileItems, Items
from vitrail.datasets.moving import MOVING_MNIST, moving_digits
from vitrail.datasets.objects import object_items
from vitrail.datasets.packed import pack
from vitrail.datasets.parquet import ParquetItems
from vitrail.datasets.resident import (
    ONE_SIZE,
    Broken,
    Geometry,
    Skipped,
    check_broken,
    first_size,
    load_resident,
    median_size,
)
from vitrail.datasets.scan import scan
from vitrail.datasets.sources import SOURCES, Source, data_roots, find_source, locate
from vitrail.datasets.synthetic import SYNTHETIC, synthetic_sets
from vitrail.datasets.synthetic_compositions import with_compositions

Storage = Literal["auto", "memory", "files"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixel / 255, a channel."""

_MEMORY_SHARE = 0.25
_TEST_FRACTION, _TEST_SEED = 0.2, 0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The parts of a data set."""

    train: Images
    val: Images | None
    """The source's own, else held out of the training images; None where nothing was to be held out."""
    test: Images
    synthetic: int = 0
    """How many of the training images, the last ones, are compositions made of the others."""
    skipped: Skipped = ()
    """Sources of the images left out because they are broken, with the reasons."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files in the folder that were not taken for images, by extension, and of hidden ones."""
    original_size: tuple[int, int] | None = None
    """Median height and width of some training images as they lie in files, before they were made one size;
    None where they were not, or do not lie in files."""

    @staticmethod
    def from_datasets(
        train: Any,
        *,
        val: Any = None,
        test: Any = None,
        classes: Sequence[str] | None = None,
        label_column: str | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        train_fraction: float = 1.0,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        storage: Storage = "auto",
        broken: Broken = "refuse",
    ) -> Splits:
        """Make the splits of Python objects: what `from_dataset` takes, one each.

        Classes of `val` and `test` are matched to those of `train` by name. Where `test` is missing, `val`
        takes its place, or a fixed fifth of `train`, stratified by class.

        Args:
            train: Training images.
            val: Validation images; held out of `train` when not given.
            test: Test images.
            classes: Names of the classes; the training set's own when not given.
            label_column: Where items have several class numbers, the name of one.
            val_fraction: As for `load_dataset`, like the options that follow.
            split_seed: Which images are held out and used.
            train_fraction: Share of the training images to use.
            img_size: Height and width to fit all images to.
            in_chans: 1 or 3.
            storage: auto, memory or files.
            broken: refuse or skip.

        Raises:
            ValueError: As `from_dataset`, or a class of `val` or `test` is not in `train`.
        """
        shares = _Shares(val_fraction, split_seed, train_fraction)
        options: dict[str, Any] = {"classes": classes, "label_column": label_column}
        parts: dict[str, Items] = {"train": object_items(train, split="train", **options)}
        for split, dataset in (("val", val), ("test", test)):
            if dataset is not None:
                items = object_items(dataset, split=split, **options)
                parts[split] = items.renumbered(parts["train"].classes)
        found = _Found(parts=parts, geometry=_geometry(img_size, in_chans))
        return _splits(found, shares, storage, broken)


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows."""
    return sorted([*SOURCES, *SYNTHETIC, "imagenet", MOVING_MNIST])


def load_section(
    data: DataSection, *, img_size: int | tuple[int, int] | None = None, in_chans: int | None = None
) -> Splits:
    """The data set that a config's `data` section names; other arguments and errors as in `load_dataset`."""
    return load_dataset(
        data.name,
        root=data.root,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        train_fraction=data.train_fraction,
        synthetic=data.synthetic,
        img_size=img_size,
        in_chans=in_chans,
        storage=data.storage,
        broken=data.broken,
        label_column=data.label_column,
        frames=data.frames,
        frame_stride=data.frame_stride,
        shuffle_frames=data.shuffle_frames,
    )


def load_dataset(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    train_fraction: float = 1.0,
    synthetic: float = 0.0,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    storage: Storage = "auto",
    broken: Broken = "refuse",
    label_column: str | None = None,
    frames: int | None = None,
    frame_stride: int = 1,
    shuffle_frames: bool = False,
) -> Splits:
    """Load a data set, from the first place that has it.

    `name` is, in this order,

    - a name of `list_datasets()`, or its hub id: from `root`, the folder in the environment variable
      VITRAIL_DATA, the local cache of the Hugging Face hub, or the hub itself. A root holds `<name>/` or
      `<owner>/<repository>/` with the hub's files `train-*.parquet` and `test-*.parquet` at any depth, and
      for imagenet `imagenet/train/<synset>/` and `imagenet/val/<synset>/`, or is itself such a folder;
    - a folder, also one in `root` or VITRAIL_DATA, in one of the layouts of `vitrail.datasets.folder`, or
      with parquet files in the hub's layout;
    - the hub id of any data set of parquet files: from the hub's local cache, or the hub;
    - shapes, textures or fractals (`vitrail.datasets.synthetic`), drawn at `img_size`, else at 32 x 32;
    - moving_mnist (`vitrail.datasets.moving`), clips made of MNIST's digits; or, with `frames`, a folder of
      clips in one of the layouts of `vitrail.datasets.clips`.

    A source without test images takes its validation images for them, or else a fixed fifth of its images,
    stratified by class. Where no validation images are left, some are held out of the training images.

    Args:
        name: A name, a folder, or a hub id.
        root: Folder with data sets.
        val_fraction: Share of the training images held out, stratified by class, 0 to below 1.
        split_seed: Decides which images are held out and, with `train_fraction`, which are used.
        train_fraction: Share of the remaining training images to use, stratified by class, above 0 to 1. For
            one seed, the images of a smaller share are among those of a larger one.
        synthetic: Compositions (`vitrail.datasets.synthetic_compositions`) to add for each training image
            that is used, 0 to 10; of images in memory only.
        img_size: Height and width that every image is fitted to: the shorter side resized, the centre taken.
            When not given, all images must have one size, and keep it. The known small sets always do: the
            model's preprocessing enlarges them on the device.
        in_chans: 1 (luminance) or 3 (RGB); when not given, 1 if all training images are grey, else 3.
        storage: memory decodes all images once (`ImageSet`), files decodes them when they are read
            (`FileSet`), auto takes memory where that needs less than a quarter of the machine's.
        broken: What to do with images that cannot be decoded: refuse the set, or skip them, which
            `Splits.skipped` tells.
        label_column: Name of the label in tables and parquet files that do not tell, or have several.
        frames: Read clips of so many frames; None reads images (and 3 frames of moving_mnist).
        frame_stride: Every how many frames of a video one is taken.
        shuffle_frames: The frames of each clip in a random order, as a control.

    Raises:
        ValueError: The name is unknown, no place has the set, its files are damaged or do not fit together,
            or an option is out of range; in one line.
    """
    shares = _Shares(val_fraction, split_seed, train_fraction, synthetic)
    geometry = _geometry(img_size, in_chans)
    for option, value, known in (
        ("storage", storage, ("auto", "memory", "files")),
        ("broken", broken, ("refuse", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{option}: expected {' or '.join(known)}, got {value!r}")
    if frames is not None or str(name) == MOVING_MNIST:
        chosen = Frames(count=3 if frames is None else frames, stride=frame_stride, shuffled=shuffle_frames)
        return _clips(str(name), root, chosen, geometry, shares, broken)
    if frame_stride != 1 or shuffle_frames:
        raise ValueError(
            "frame_stride and shuffle_frames are for clips: say how many frames with data.frames"
        )
    if str(name) in SYNTHETIC:
        return _held_out(synthetic_sets(str(name), geometry.img_size, in_chans), shares)
    source = find_source(str(name))
    if source is not None and source.hub_id is None:
        train, test = _digits(source, in_chans or 1)
        return _held_out({"train": train, "test": test}, shares)
    if source is not None:
        found = _find_known(source, root, in_chans)
        return _splits(found, shares, "memory" if storage == "auto" else storage, broken)
    found = _find(str(name), root, geometry, label_column)
    if found.empty:
        raise ValueError(
            f"{found.empty[0]}: expected images in this class folder, got none; add some, or remove it"
        )
    return _splits(found, shares, storage, broken)


def find_items(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    label_column: str | None = None,
) -> tuple[dict[str, Items], Mapping[str, int]]:
    """The encoded images of a data set as they lie there: nothing is decoded, held out or resized.

    Args:
        name: As for `load_dataset`.
        root: As for `load_dataset`.
        label_column: As for `load_dataset`.

    Returns:
        The items of each split that the source has, and the number of other files by extension.

    Raises:
        ValueError: As `load_dataset`, as far as names and files are concerned; but a class may be empty.
    """
    if str(name) == MOVING_MNIST:
        raise ValueError(f"{MOVING_MNIST} is made of mnist when it is loaded: no files to look at")
    if str(name) in SYNTHETIC:
        raise ValueError(f"{name} is drawn when it is loaded: no files to look at")
    source = find_source(str(name))
    if source is not None and source.hub_id is None:
        pictures = {
            own.split: list(zip(own.images[:, 0], own.labels, strict=True)) for own in _digits(source, 1)
        }
        options: dict[str, Any] = {"classes": source.classes, "name": source.name}
        return {split: object_items(own, split=split, **options) for split, own in pictures.items()}, {}
    if source is not None:
        return _find_known(source, root, None).parts, {}
    found = _find(str(name), root, _geometry(None, None), label_column)
    return found.parts, found.ignored


def from_dataset(
    dataset: Any,
    *,
    classes: Sequence[str] | None = None,
    label_column: str | None = None,
    name: str | None = None,
    split: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    storage: Storage = "auto",
) -> Images:
    """Make a set of a Python object: a torchvision data set, a torch `Dataset`, a hub `Dataset`, a list.

    Items are pairs (image, class number) or mappings with both; `DatasetItems` says which images they may be.
    The data set's own transforms run: once, where the images are kept in memory, and at every read with
    storage files (which random transforms need). Of a stream, take a part: `list(stream.take(5000))`.

    Args:
        dataset: Has a length, and items by number.
        classes: Names of the classes; the data set's own, else "0", "1", ... when not given.
        label_column: Where items have several class numbers, the name of one.
        name: Name of the data set.
        split: train, val or test.
        mean: A channel, of pixel / 255; computed from the images when not given.
        std: As `mean`.
        img_size: Height and width that every image is fitted to.
        in_chans: 1 or 3; when not given, 1 if all images are grey, else 3.
        storage: auto, memory or files, as for `load_dataset`.

    Raises:
        ValueError: It has no length or no such items, an image cannot be decoded, or, without `img_size`, the
            images are of unequal size.
    """
    items = object_items(dataset, classes=classes, label_column=label_column, name=name, split=split)
    found = _Found(parts={"train": items}, geometry=_geometry(img_size, in_chans))
    made = _sets(found, storage, "refuse")[0]["train"]
    return replace(made, mean=mean or made.mean, std=std or made.std)


@dataclass(frozen=True)
class _Shares:
    """Which of the training images are held out, and which are used."""

    val_fraction: float
    split_seed: int
    train_fraction: float
    synthetic: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction: expected 0 to below 1, got {self.val_fraction}")
        if not 0.0 < self.train_fraction <= 1.0:
            raise ValueError(f"train_fraction: expected above 0 to 1, got {self.train_fraction}")
        if not 0.0 <= self.synthetic <= 10.0:
            raise ValueError(f"synthetic: expected 0 to 10 compositions for each image, got {self.synthetic}")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The items of a data set, and how they are to come out."""

    parts: dict[str, Items]
    geometry: Geometry
    known: Mapping[int, Statistics] = field(default_factory=dict)
    """Mean and standard deviation that need not be computed, by number of channels."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    empty: tuple[Path, ...] = ()
    """Class folders of train without images."""


def _geometry(img_size: int | tuple[int, int] | None, in_chans: int | None) -> Geometry:
    size = (
        (img_size, img_size) if isinstance(img_size, int) else None if img_size is None else tuple(img_size)
    )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"img_size: expected a height and a width above 0, got {img_size}")
    if in_chans not in (None, 1, 3):
        raise ValueError(f"in_chans: expected 1 or 3, got {in_chans}")
    return Geometry(img_size=size, resize=size is not None, in_chans=in_chans)


def _find_known(source: Source, root: str | os.PathLike[str] | None, in_chans: int | None) -> _Found:
    """A known data set of parquet files: images of another size are an error, not resized."""
    own, *size = source.shape
    parts: dict[str, Items] = {
        split: ParquetItems(
            files,
            image_column=source.image_column,
            label_column=source.label_column,
            classes=source.classes,
            name=source.name,
            split=split,
        )
        for split, files in locate(source, root).items()
    }
    known = {own: (source.mean, source.std)}
    if own == 1:
        known[3] = (source.mean * 3, source.std * 3)
    geometry = Geometry(img_size=(size[0], size[1]), in_chans=in_chans or own)
    return _Found(parts=parts, geometry=geometry, known=known)


def _find(
    name: str, root: str | os.PathLike[str] | None, geometry: Geometry, label_column: str | None
) -> _Found:
    """ImageNet, a folder, or a data set of the hub that is not among the known ones."""
    roots = data_roots(root)
    if name == "imagenet":
        for folder in (place for root in roots for place in (root / "imagenet", root)):
            if folder.is_dir() and (found := find_imagenet(folder)):
                return _Found(
                    parts=found.parts, geometry=geometry, known={3: (MEAN, STD)}, ignored=found.ignored
                )
        raise ValueError(
            f"imagenet: expected imagenet/train/<synset>/ and imagenet/val/<synset>/ in "
            f"{' or '.join(map(str, roots)) or 'a folder given as data.root or VITRAIL_DATA'}, got none"
        )
    for folder in (Path(name).expanduser(), *(root / name for root in roots)):
        if not name or not folder.is_dir():
            continue
        if files := parquet_files(folder, places=(".", "*")):
            label = folder.resolve().name
            return _Found(parts=parquet_items(files, label, label_column=label_column), geometry=geometry)
        found = find_folder(folder, label_column=label_column)
        return _Found(parts=found.parts, geometry=geometry, ignored=found.ignored, empty=found.empty)
    if name and Path(name).expanduser().is_file():
        raise ValueError(f"{name} is a file: expected a folder of images, or the name of a data set")
    beside = _folders_beside(name, roots)
    if not _HUB_ID.fullmatch(name):
        if os.sep in name:
            raise ValueError(f"no folder {name}{_meant(name, beside)}")
        known = list_datasets()
        meant = _meant(name, {*known, *beside}) or f"; the known ones are {', '.join(known)}"
        raise ValueError(f"no folder and no data set {name!r}{meant}")
    files, reason = hub_files(name)
    if not files:
        places = " or in ".join(["here", *map(str, roots)])
        raise ValueError(
            f"data set {name} not found: no folder of that name {places}, not in the hub's local cache, and "
            f"{reason}{_meant(name, {*beside, *(str(own.hub_id) for own in SOURCES.values())})}"
        )
    return _Found(parts=parquet_items(files, name, label_column=label_column), geometry=geometry)


def _clips(
    name: str,
    root: str | os.PathLike[str] | None,
    frames: Frames,
    geometry: Geometry,
    shares: _Shares,
    broken: Broken,
) -> Splits:
    """Clips of a folder, or moving digits; without a test split, as with images."""
    skipped: Skipped = ()
    if name == MOVING_MNIST:
        mnist, _ = _sets(_find_known(SOURCES["mnist"], root, 1), "memory", "refuse")
        sets = {
            split: moving_digits(own, frames) for split, own in mnist.items() if isinstance(own, ImageSet)
        }
        sets["test"] = replace(sets["test"], mean=sets["train"].mean, std=sets["train"].std)
    elif find_source(name) is not None or name in {"imagenet", *SYNTHETIC}:
        raise ValueError(f"{name} has images, not clips; {MOVING_MNIST} has clips, or a folder of them")
    else:
        roots = data_roots(root)
        places = (Path(name).expanduser(), *(place / name for place in roots))
        folder = next((place for place in places if name and place.is_dir()), None)
        if folder is None:
            meant = _meant(name, {MOVING_MNIST, *_folders_beside(name, roots)})
            raise ValueError(
                f"no folder of clips {name}, neither here nor in data.root or VITRAIL_DATA{meant}"
            )
        sets, skipped = load_clips(folder, frames, geometry, broken)
    if frames.shuffled:
        sets = {split: with_shuffled_frames(own) for split, own in sets.items()}
    if "test" not in sets and "val" in sets:
        sets["test"] = replace(sets.pop("val"), split="test")
    if "test" not in sets:
        rest, held_out = stratified_split(sets["train"].labels, _TEST_FRACTION, _TEST_SEED)
        sets["train"], sets["test"] = sets["train"].subset(rest), sets["train"].subset(held_out, split="test")
    return replace(_held_out(sets, shares), skipped=skipped)


def _folders_beside(name: str, roots: Iterable[Path]) -> set[str]:
    """The folders where one was looked for, written as the name is."""
    own = Path(name).expanduser()
    parents = [(place / own).parent for place in (Path(), *roots)]
    return {str(own.parent / path.name) for parent in parents for path in parent.glob("[!.]*/")}


def _meant(name: str, known: Collection[str]) -> str:
    """The end of a message that names what a mistyped name may have meant; empty where nothing is near."""
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _splits(found: _Found, shares: _Shares, storage: Storage, broken: Broken) -> Splits:
    sets, skipped = _sets(replace(found, parts=_with_test(found.parts)), storage, broken)
    if "train" not in sets:
        sets["train"] = sets["test"].subset([], split="train")
    train = found.parts.get("train")
    original_size = median_size(train) if found.geometry.resize and isinstance(train, FileItems) else None
    return replace(
        _held_out(sets, shares), skipped=skipped, ignored=found.ignored, original_size=original_size
    )


def how_divided(splits: Collection[str]) -> str:
    """What `load_dataset` makes of a source's splits, for people; empty where it takes them as they are."""
    if "train" not in splits or {"val", "test"} <= set(splits):
        return ""
    if "test" in splits:
        test = ""
    elif "val" in splits:
        test = "val is taken for test, and "
    else:
        test = f"{100 * _TEST_FRACTION:.0f} % of each class are taken for test, and "
    share = 100 * DataSection.model_fields["val_fraction"].default
    return f"in training, {test}{share:.0f} % of train for validation (--data.val_fraction)"


def _with_test(parts: dict[str, Items]) -> dict[str, Items]:
    """Parts that have a test split, in the order train, val, test."""
    if "test" not in parts and "val" in parts:
        val = parts["val"]
        parts = {"train": parts["train"], "test": val.subset(np.arange(len(val)), split="test")}
    if "test" not in parts:
        train = parts["train"]
        rest, held_out = stratified_split(train.labels, _TEST_FRACTION, _TEST_SEED)
        parts = {"train": train.subset(rest), "test": train.subset(held_out, split="test")}
    return {split: parts[split] for split in _SPLITS if split in parts}


def _held_out(sets: Mapping[str, Images], shares: _Shares) -> Splits:
    """The splits: validation images held out, a share of the training images used, compositions added."""
    train, val = sets["train"], sets.get("val")
    if val is None and shares.val_fraction > 0.0:
        rest, held_out = stratified_split(train.labels, shares.val_fraction, shares.split_seed)
        if len(held_out):  # a class of one image gives none
            train, val = train.subset(rest), train.subset(held_out, split="val")
    if shares.train_fraction < 1.0:
        used, _ = stratified_split(train.labels, 1.0 - shares.train_fraction, shares.split_seed)
        train = train.subset(used)
    real = len(train)
    if shares.synthetic > 0.0:
        train = with_compositions(train, shares.synthetic, shares.split_seed)
    return Splits(train=train, val=val, test=sets["test"], synthetic=len(train) - real)


def _sets(found: _Found, storage: Storage, broken: Broken) -> tuple[dict[str, Images], Skipped]:
    """The sets of all parts. The first part, train, decides the number of channels, and the statistics."""
    memory = storage == "memory" or (storage == "auto" and _fit_into_memory(found))
    geometry, known = found.geometry, dict(found.known)
    sets: dict[str, Images] = {}
    skipped: Skipped = ()
    for split, items in found.parts.items():
        made, left_out = (_image_set if memory else _file_set)(items, geometry, known, broken)
        first = next(iter(sets.values()), made)
        if made.img_size != first.img_size and len(made):
            raise ValueError(
                f"{made.name}: expected {made.split} images of {first.img_size[0]}x{first.img_size[1]} "
                f"pixels as those of {first.split}, got {made.img_size[0]}x{made.img_size[1]}; {ONE_SIZE}"
            )
        geometry = replace(geometry, in_chans=made.in_chans)
        known.setdefault(made.in_chans, (made.mean, made.std))
        sets[split], skipped = made, skipped + left_out
    return sets, skipped


def _fit_into_memory(found: _Found) -> bool:
    """Whether the decoded images need less than a quarter of the memory; colours are assumed if in doubt."""
    size = found.geometry.img_size
    sizes = (first[1] for items in found.parts.values() if (first := first_size(items)))
    height, width = size or next(sizes, (1, 1))
    count = sum(len(items) for items in found.parts.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return count * (found.geometry.in_chans or 3) * height * width < _MEMORY_SHARE * memory


def _image_set(
    items: Items, geometry: Geometry, known: Mapping[int, Statistics], broken: Broken
) -> tuple[ImageSet, Skipped]:
    resident = load_resident(items, geometry, broken=broken)
    mean, std = known.get(resident.images.shape[1], (resident.mean, resident.std))
    made = ImageSet(
        stored=resident.images,
        labels=resident.labels,
        classes=items.classes,
        name=items.name,
        split=items.split,
        fingerprint=resident.fingerprint,
        mean=mean,
        std=std,
    )
    return made, resident.skipped


def _file_set(
    items: Items, geometry: Geometry, known: Mapping[int, Statistics], broken: Broken
) -> tuple[FileSet, Skipped]:
    if isinstance(items, ParquetItems):
        items = pack(items)
    seen = scan(items)
    skipped = tuple((items.source(index), reason) for index, reason in seen.broken)
    check_broken(skipped, len(items), broken)
    sizes, grey = seen.sizes[seen.whole], seen.grey[seen.whole]
    if skipped:
        items = items.subset(seen.whole)
    img_size = geometry.img_size
    if not geometry.resize and len(items):
        height, width = img_size or sizes[0].tolist()
        others = np.flatnonzero((sizes != (height, width)).any(axis=1))
        if len(others):
            raise ValueError(
                f"{items.source(others[0])}: expected {height}x{width} pixels as in {items.source(0)}, got "
                f"{sizes[others[0], 0]}x{sizes[others[0], 1]}; {ONE_SIZE}"
            )
        img_size = height, width
    in_chans = geometry.in_chans or (1 if grey.all() else 3)
    mean, std = known.get(in_chans, (None, None))
    return FileSet.from_items(
        items, img_size=img_size or (1, 1), in_chans=in_chans, mean=mean, std=std
    ), skipped


def _digits(source: Source, in_chans: int) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's digits, values 0 to 16 scaled to bytes; without an own split, a fixed fifth is test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    whole = ImageSet.from_arrays(
        np.repeat(pixels, in_chans, axis=1),
        bunch.target,
        classes=source.classes,
        name=source.name,
        mean=source.mean * in_chans,
        std=source.std * in_chans,
    )
    rest, held_out = stratified_split(whole.labels, _TEST_FRACTION, _TEST_SEED)
    return whole.subset(rest), whole.subset(held_out, split="test")
