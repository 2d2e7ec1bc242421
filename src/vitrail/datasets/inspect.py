"""What is in a data set, before a model is trained on it: `vitrail data`.

`inspect_dataset` decodes every image once and keeps a thousand bytes of each: images a class, sizes, modes,
mean and standard deviation, broken files, and pictures that are there more than once. `contact_sheet` draws
some of them.

Doubles are found by what is seen, not by the bytes of the files, so that a picture is found again at another
size, quality, brightness or in other colours: two images are the same picture when their grey versions of
32 x 32 pixels are equal or correlate above 0.995. (At 16 x 16 pixels so do some different ones written in
MNIST.) A picture in train and in test makes the test result too good; one with two classes cannot be learnt.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.datasets.items import Items
from vitrail.datasets.scan import decoded
from vitrail.datasets.splits import how_divided
from vitrail.datasets.transforms import BrokenImageError, convert, fit, is_grey, open_upright

_SPLITS = ("train", "val", "test")
_THUMB = 32
_ALIKE = 0.995
# Enough directions to tell most images apart, few enough for a search tree.
_DIRECTIONS = 12
_SAMPLE = 5_000
_LISTED = 10
_ALL_CLASSES = 40
_FEW = 5
"""Of fewer images of a class, one is taken for test, one for validation, and hardly any is left to learn."""
_SMALL = 8
"""A picture with a side of fewer pixels than this is hardly one; those of scikit-learn's digits have 8."""
_UNBALANCED = 1.5


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What is in one split."""

    split: str
    images: int
    """Number of images, broken ones included."""
    counts: tuple[int, ...]
    """Number of images of each class, broken ones included."""
    heights: tuple[int, float, int]
    """Smallest, median and largest, in pixels."""
    widths: tuple[int, float, int]
    """Smallest, median and largest, in pixels."""
    sizes: int
    """Number of different sizes."""
    small: int
    """Number of images with a side below 8 pixels."""
    modes: Mapping[str, int]
    """Number of images of each of Pillow's modes (L grey, RGB, P palette, ...), the most frequent first."""
    mean: tuple[float, ...]
    """Mean of pixel / 255, a channel: one if all images are grey, else three. Every image counts the same."""
    std: tuple[float, ...]
    """Standard deviation of the same."""
    broken: tuple[tuple[str, str], ...]
    """Sources of images that cannot be decoded, with the reasons."""


@dataclass(frozen=True, kw_only=True)
class SamePicture:
    """Images that show the same picture."""

    sources: tuple[str, ...]
    splits: tuple[str, ...]
    """Split of each of them."""
    classes: tuple[str, ...]
    """Class of each of them."""


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What is in a data set."""

    name: str
    classes: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    doubles: tuple[SamePicture, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are not taken for images, by extension, the most frequent first."""

    def doubles_in(self, split: str) -> tuple[SamePicture, ...]:
        """Pictures that are in a split more than once."""
        return tuple(same for same in self.doubles if same.splits.count(split) > 1)

    def doubles_between(self) -> tuple[SamePicture, ...]:
        """Pictures that are in more than one split."""
        return tuple(same for same in self.doubles if len(set(same.splits)) > 1)

    def problems(self) -> list[str]:
        """What should be mended before training, a line each; nothing of this is a matter of taste."""
        found = []
        if len(self.classes) == 1:
            found.append(f"one class only ({self.classes[0]}): there is nothing to tell it from")
        for part in self.splits:
            if part.broken:
                found.append(f"{part.split}: {_count(len(part.broken), 'image')} cannot be decoded")
            if part.small:
                found.append(f"{part.split}: {_count(part.small, 'image')} with a side below {_SMALL} pixels")
            if empty := [name for name, n in zip(self.classes, part.counts, strict=True) if n == 0]:
                found.append(f"{part.split}: no images of {_some(empty)}")
            few = [name for name, n in zip(self.classes, part.counts, strict=True) if 0 < n < _FEW]
            if part.split == "train" and few:
                found.append(f"train: fewer than {_FEW} images of {_some(few)}")
        if len(self.splits) == 1 and (repeated := self.doubles_in("train")):
            found.append(
                f"{_count(len(repeated), 'picture')} there more than once, which may come into train and test"
            )
        if between := self.doubles_between():
            found.append(f"{_count(len(between), 'picture')} in more than one split")
        if mixed := [same for same in self.doubles if len(set(same.classes)) > 1]:
            found.append(f"{_count(len(mixed), 'picture')} with more than one class")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self) | {"problems": self.problems()}

    def table(self) -> str:
        """Everything as text, for a terminal."""
        total = sum(part.images for part in self.splits)
        ignored = ", ".join(f"{n:,} {kind}" for kind, n in self.ignored.items())
        problems = [f"  {line}" for line in self.problems()]
        blocks = [
            f"{self.name}: {_count(total, 'image')}, {_count(len(self.classes), 'class', 'classes')}",
            _aligned(self._fact_rows()),
            _aligned(self._class_rows()),
            "\n".join(self._balance()),
            how_divided([part.split for part in self.splits]),
            "\n".join(_broken_lines(self.splits)),
            "\n".join(_double_lines(self.doubles)),
            f"files that are not images, not read: {ignored}" if ignored else "",
            "\n".join(["to mend:", *problems]) if problems else "nothing to mend",
        ]
        return "\n\n".join(block for block in blocks if block)

    def _fact_rows(self) -> list[list[str]]:
        parts = self.splits
        return [
            ["", *(part.split for part in parts)],
            ["images", *(f"{part.images:,}" for part in parts)],
            ["height (min / median / max)", *(_range(part.heights) for part in parts)],
            ["width (min / median / max)", *(_range(part.widths) for part in parts)],
            ["different sizes", *(f"{part.sizes:,}" for part in parts)],
            ["modes", *(", ".join(f"{mode} {n:,}" for mode, n in part.modes.items()) for part in parts)],
            ["mean", *(_numbers(part.mean) for part in parts)],
            ["std", *(_numbers(part.std) for part in parts)],
            ["broken", *(f"{len(part.broken):,}" for part in parts)],
            ["repeated pictures", *(f"{len(self.doubles_in(part.split)):,}" for part in parts)],
        ]

    def _class_rows(self) -> list[list[str]]:
        """Images of each class; of many classes the largest and the smallest of the first split."""
        shown = np.arange(len(self.classes))
        skipped = len(shown) - _ALL_CLASSES
        if skipped > 0:
            ordered = np.argsort(-np.array(self.splits[0].counts), kind="stable")
            shown = np.concatenate([ordered[: _ALL_CLASSES // 2], ordered[-_ALL_CLASSES // 2 :]])
        rows = [[self.classes[k], *(f"{part.counts[k]:,}" for part in self.splits)] for k in shown]
        if skipped > 0:
            rows.insert(_ALL_CLASSES // 2, [f"... {_count(skipped, 'class', 'classes')} between"])
        return [["class", *(part.split for part in self.splits)], *rows]

    def _balance(self) -> list[str]:
        lines = []
        for part in self.splits:
            most, least = int(np.argmax(part.counts)), int(np.argmin(part.counts))
            largest, smallest = part.counts[most], part.counts[least]
            if smallest == largest:
                lines.append(f"{part.split}: every class has {_count(largest, 'image')}")
            elif smallest and largest < _UNBALANCED * smallest:
                lines.append(f"{part.split}: classes are balanced ({smallest:,} to {largest:,} images)")
            elif smallest:
                lines.append(
                    f"{part.split}: {self.classes[most]} ({largest:,}) has {largest / smallest:.1f} times "
                    f"the images of {self.classes[least]} ({smallest:,})"
                )
        return lines


def inspect_dataset(parts: Mapping[str, Items], ignored: Mapping[str, int] | None = None) -> DatasetSummary:
    """Look at every image of a data set.

    The images are decoded one after the other, in threads; about a thousand bytes of each stay in memory.

    Args:
        parts: The items of each split: train, val, test, or some of them.
        ignored: Number of files in the folder that were not taken for images, by extension.

    Raises:
        ValueError: There is no split, or a source itself cannot be read (a damaged parquet file).
    """
    if not parts:
        raise ValueError("expected at least one split, got none")
    parts = {split: parts[split] for split in sorted(parts, key=_SPLITS.index)}
    looks = {split: list(decoded(items, _look)) for split, items in parts.items()}
    first = next(iter(parts.values()))
    return DatasetSummary(
        name=first.name,
        classes=first.classes,
        splits=tuple(_summary(split, items, looks[split]) for split, items in parts.items()),
        doubles=tuple(_doubles(parts, looks)),
        ignored=dict(sorted((ignored or {}).items(), key=lambda kind: (-kind[1], kind[0]))),
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What is kept of one image."""

    mode: str
    size: tuple[int, int]
    """Height and width, upright."""
    moments: np.ndarray
    """Mean and mean square of pixel / 255, a channel, [2, C]."""
    thumb: bytes
    """Grey, 32 x 32."""


def _look(encoded: bytes | Image.Image, source: str) -> _Look:
    picture = open_upright(encoded, source)
    plain = convert(picture, 1 if is_grey(picture) else 3, source)
    histogram = np.array(plain.histogram()).reshape(-1, 256)  # [C * 256] -> [C, 256]
    values = np.arange(256) / 255
    thumb = plain.convert("L").resize((_THUMB, _THUMB), Image.Resampling.BILINEAR)
    return _Look(
        mode=picture.mode,
        size=(picture.height, picture.width),
        moments=np.stack([histogram @ values, histogram @ values**2]) / (picture.height * picture.width),
        thumb=thumb.tobytes(),
    )


def _summary(split: str, items: Items, looks: Sequence[_Look | BrokenImageError]) -> SplitSummary:
    whole = [look for look in looks if isinstance(look, _Look)]
    sizes = np.array([look.size for look in whole] or [(0, 0)])
    channels = max((look.moments.shape[1] for look in whole), default=1)
    moments = [np.broadcast_to(look.moments, (2, channels)) for look in whole]
    mean, square = np.mean(moments, axis=0) if moments else np.zeros((2, channels))
    return SplitSummary(
        split=split,
        images=len(items),
        counts=tuple(np.bincount(items.labels, minlength=len(items.classes)).tolist()),
        heights=_spread(sizes[:, 0]),
        widths=_spread(sizes[:, 1]),
        sizes=len({look.size for look in whole}),
        small=sum(min(look.size) < _SMALL for look in whole),
        modes=dict(Counter(look.mode for look in whole).most_common()),
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()),
        broken=tuple((look.source, look.reason) for look in looks if isinstance(look, BrokenImageError)),
    )


def _doubles(
    parts: Mapping[str, Items], looks: Mapping[str, Sequence[_Look | BrokenImageError]]
) -> list[SamePicture]:
    places = [
        (split, index, look.thumb)
        for split, found in looks.items()
        for index, look in enumerate(found)
        if isinstance(look, _Look)
    ]
    labels = {split: items.labels for split, items in parts.items()}
    found = []
    for group in same_pictures([thumb for *_, thumb in places]):
        own = [places[row][:2] for row in group]
        found.append(
            SamePicture(
                sources=tuple(parts[split].source(index) for split, index in own),
                splits=tuple(split for split, _ in own),
                classes=tuple(parts[split].classes[labels[split][index]] for split, index in own),
            )
        )
    return found


def same_pictures(thumbs: Sequence[bytes]) -> list[np.ndarray]:
    """Find the groups of small grey pictures that are equal or correlate above 0.995.

    Args:
        thumbs: 32 * 32 grey values each.

    Returns:
        The positions of each group of two or more, ascending; the groups by their first position.
    """
    numbers: dict[bytes, int] = {}
    same = np.array([numbers.setdefault(thumb, len(numbers)) for thumb in thumbs], dtype=np.int64)
    different = np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, _THUMB**2)
    group = _linked(different)[same]  # [N]
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return sorted((rows for rows in groups if len(rows) > 1), key=lambda rows: int(rows[0]))


def _linked(thumbs: np.ndarray) -> np.ndarray:
    """Number of the group that each of M different thumbs belongs to, int64 [M]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    group = np.arange(len(thumbs))
    lively = np.flatnonzero(np.ptp(thumbs, axis=1))
    unit = thumbs[lively].astype(np.float32)
    unit -= unit.mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    # Unit vectors with a correlation above r are less than sqrt(2 - 2 r) apart, and their projections no
    # further: a tree over a few directions finds all that may be alike, then all pixels tell.
    some = unit[:: len(unit) // _SAMPLE + 1]
    _, directions = np.linalg.eigh(some.T @ some)  # ascending
    tree = cKDTree(unit @ directions[:, -_DIRECTIONS:])
    pairs = tree.query_pairs(np.sqrt(2 - 2 * _ALIKE), output_type="ndarray")
    for block in np.array_split(pairs, len(pairs) // 100_000 + 1):
        left, right = block.T
        alike = np.einsum("ip,ip->i", unit[left], unit[right]) > _ALIKE
        ends = group[lively[left[alike]]], group[lively[right[alike]]]
        links = coo_array((np.ones(len(ends[0]), bool), ends), shape=(len(thumbs),) * 2)
        group = connected_components(links, directed=False)[1][group]
    return group


def contact_sheet(
    items: Items, *, classes: int = 10, per_class: int = 8, cell: int = 96, seed: int = 0
) -> bytes:
    """Draw images of some classes, a row a class.

    Args:
        items: The images of one split.
        classes: Largest number of rows; of more classes, some are taken, evenly over all.
        per_class: Images a row.
        cell: Height and width of each image, in pixels.
        seed: Decides which images of a class.

    Returns:
        The bytes of a PNG.
    """
    count = len(items.classes)
    shown = np.unique(np.linspace(0, count - 1, min(classes, count)).round().astype(int))
    gap, margin, font = 4, 12, ImageFont.truetype(_font(), 13)
    names = [_shortened(items.classes[k]) for k in shown]
    column = int(max((font.getlength(name) for name in names), default=0)) + 2 * margin
    title = (
        f"{items.name} {items.split}: {len(shown):,} of {count:,} classes"
        if len(shown) < count
        else (f"{items.name} {items.split}")
    )
    top = 36
    width = column + per_class * (cell + gap) + margin
    sheet = Image.new("RGB", (width, top + len(shown) * (cell + gap) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, top / 2), title, "black", font, anchor="lm")
    generator, labels = np.random.default_rng(seed), items.labels
    for row, (name, k) in enumerate(zip(names, shown, strict=True)):
        y = top + row * (cell + gap)
        draw.text((margin, y + cell / 2), name, "black", font, anchor="lm")
        for place, index in enumerate(generator.permutation(np.flatnonzero(labels == k))[:per_class]):
            x = column + place * (cell + gap)
            try:
                sheet.paste(_cell(items.read(index), items.source(index), cell), (x, y))
            except BrokenImageError:
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline="red")
                draw.text((x + cell / 2, y + cell / 2), "broken", "red", font, anchor="mm")
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _cell(encoded: bytes | Image.Image, source: str, cell: int) -> Image.Image:
    picture = convert(open_upright(encoded, source), 3, source)
    # Small images are shown with their pixels as squares, not blurred.
    small = max(picture.size) < cell
    return fit(picture, (cell, cell), interpolation="nearest" if small else "bicubic")


def _font() -> Path:
    """A font with the letters of most scripts, which Pillow's own lacks; matplotlib brings it along."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _spread(sides: np.ndarray) -> tuple[int, float, int]:
    return int(sides.min()), float(np.median(sides)), int(sides.max())


def _range(spread: tuple[int, float, int]) -> str:
    smallest, median, largest = spread
    return f"{smallest:,}" if smallest == largest else f"{smallest:,} / {median:,.0f} / {largest:,}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest:,} more" if rest > 0 else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns: the first to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows if at < len(row)) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def _broken_lines(parts: Sequence[SplitSummary]) -> list[str]:
    broken = [f"  {source}: {reason}" for part in parts for source, reason in part.broken]
    rest = [f"  and {len(broken) - _LISTED:,} more"] if len(broken) > _LISTED else []
    return ["images that cannot be decoded:", *broken[:_LISTED], *rest] if broken else []


def _double_lines(doubles: Sequence[SamePicture]) -> list[str]:
    lines = []
    for same in doubles[:_LISTED]:
        places = [
            f"{source} ({split}, {name})"
            for source, split, name in zip(same.sources, same.splits, same.classes, strict=True)
        ]
        lines += [f"  {places[0]}", *(f"    = {place}" for place in places[1:_LISTED])]
        lines += [f"    = {len(places) - _LISTED:,} more"] if len(places) > _LISTED else []
    lines += [f"  and {len(doubles) - _LISTED:,} more pictures"] if len(doubles) > _LISTED else []
    return ["the same picture (alike at 32 x 32 grey pixels):", *lines] if lines else []
