"""Making weights fit a model, and telling what was done with each tensor.

Nothing is left to chance: every tensor of the source is used, resampled, or left out for a stated reason, and
every parameter of the model is filled; only the head may stay fresh, for another number of classes. Anything
else is an error that names what does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.components.position import Grid, TableLayout, refit_table
from vitrail.models import Encoder

_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class LoadReport:
    """What was done with each tensor; names are ours."""

    source: str
    """Where the weights came from."""
    matched: tuple[str, ...]
    """Taken as they are, bit by bit."""
    resized: Mapping[str, str]
    """Positions resampled for another image size, channels summed or repeated, patches cut by a convolution
    or by hand, what a video model makes of an image model's: name -> what was done."""
    fresh: tuple[str, ...]
    """Left as the model had them: the head, where the source has none or one for other classes."""
    ignored: Mapping[str, str]
    """Tensors of the source that were left out on purpose: name -> why."""

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"{self.source}: {len(self.matched)} tensors taken as they are"]
        lines += [f"  {name}: {what}" for name, what in self.resized.items()]
        if self.fresh:
            whys = sorted({self.ignored[name] for name in self.fresh if name in self.ignored})
            instead = f" (the source has {', '.join(whys)})" if whys else ""
            lines.append(f"  fresh, to be trained: {', '.join(sorted(self.fresh))}{instead}")
        reasons: dict[str, list[str]] = {}
        for name in sorted(self.ignored.keys() - set(self.fresh)):
            reasons.setdefault(self.ignored[name], []).append(name)
        for why, names in reasons.items():
            several = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            lines.append(f"  left out: {several} ({why})")
        return "\n".join(lines)


def fit_state(
    model: Encoder,
    state: Mapping[str, Tensor],
    source: str,
    *,
    layouts: Mapping[str, TableLayout] | None = None,
    ignored: Mapping[str, str] | None = None,
    changed: Mapping[str, str] | None = None,
) -> LoadReport:
    """Load weights into a model, all of them or none.

    Args:
        model: Filled in place; untouched when anything does not fit.
        state: In our names.
        source: Where it came from, for messages.
        layouts: What the rows of the source's position tables are for (`Encoder.position_layouts` of its
            model); without them tables are taken for square grids, or for the shape of this model's.
        ignored: What was left out already, for the report.
        changed: What was done already with weights that are not as they were, for the report.

    Raises:
        ValueError: Weights that do not fit; one line that counts what is missing, unexpected or of another
            shape, and names the first.
    """
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    given, dropped = dict(state), dict(ignored or {})
    _fold_class_position(model, given)
    fresh = _take_head(model, own, given, dropped)
    for name in given.keys() & own.keys():
        if name not in parameters and given[name].shape != own[name].shape:
            dropped[name] = "computed for the size of the images"
            given[name] = own[name]
    resized = dict(changed or {})
    tables = model.position_layouts()
    unequal = []
    for name in sorted(given.keys() & own.keys()):
        old, new = given[name], own[name].shape
        layout = (layouts or {}).get(name)
        if old.shape == new and layout in (None, tables.get(name)):
            continue
        if name in tables and old.shape[-1] == new[-1]:
            if layout is None or layout.rows != old.shape[-2]:
                layout = _guessed(name, old, tables[name], source)
            given[name] = refit_table(old, layout, tables[name])
            resized[name] = f"positions {_cells(layout.grid)} resampled to {_cells(tables[name].grid)}"
        elif old.ndim == 4 and (old.shape[0], *old.shape[2:]) == (new[0], *new[2:]):
            given[name] = change_channels(old, new[1])
            resized[name] = f"{old.shape[1]} channels made {new[1]}"
        elif name == _PATCHES and {old.ndim, len(new)} == {2, 4} and old.numel() == new.numel():
            given[name] = old.reshape(new)  # [D, C, p, p] <-> [D, C * p * p]
            resized[name] = f"a {'matrix' if len(new) == 2 else 'convolution'}, with the same numbers"
        else:
            unequal.append(name)
    missing = sorted(own.keys() - given.keys() - set(fresh))
    unexpected = sorted(given.keys() - own.keys())
    if missing or unexpected or unequal:
        first = (unequal or missing or unexpected)[0]
        shapes = f": {list(given[first].shape)} for {list(own[first].shape)}" if unequal else ""
        raise ValueError(
            f"{source} does not fit this model: {len(missing)} tensors missing, {len(unexpected)} "
            f"unexpected, {len(unequal)} of another shape (for instance {first}{shapes}); nothing was loaded"
        )
    model.load_state_dict({**given, **{name: own[name] for name in fresh}})
    matched = tuple(sorted(given.keys() - resized.keys() - dropped.keys()))
    return LoadReport(source, matched, resized, tuple(fresh), dropped)


def change_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A convolution's weight for another number of input channels.

    One channel takes the sum of all. More channels take the old ones in turn, each copy its share: an image
    whose channels are all equal gives the same result as before. Fewer, but several, keep the first ones,
    scaled by C / C'.

    Args:
        weight: [D, C, p, p].
        in_chans: Channels wanted, C'.

    Returns:
        [D, C', p, p].
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    if in_chans < channels:
        return weight[:, :in_chans] * (channels / in_chans)
    turns = torch.arange(in_chans, device=weight.device) % channels
    copies = torch.bincount(turns, minlength=channels)[turns]
    return weight[:, turns] / copies[:, None, None]


def _take_head(
    model: Encoder, own: Mapping[str, Tensor], given: dict[str, Tensor], dropped: dict[str, str]
) -> list[str]:
    """Names of the head's parameters that stay fresh; what the source has for them is taken out."""
    heads = model.head_names
    wanted = [name for name in own if name.startswith(heads)]
    there = [name for name in given if name.startswith(heads)]
    if sorted(wanted) == sorted(there) and all(own[name].shape == given[name].shape for name in wanted):
        return []
    for name in there:
        del given[name]
        dropped[name] = "a head for other classes" if wanted else "this model has no head"
    return wanted


def _fold_class_position(model: Encoder, given: dict[str, Tensor]) -> None:
    """Positions with a row for the class token, in a model without one: the row is added to the token.

    DINOv2 with registers is stored so; the sum is what the network sees in either form.
    """
    table, layout = given.get("pos_embed"), model.position_layouts().get("pos_embed")
    if table is None or layout is None or layout.first or "cls_token" not in given:
        return
    rows = table.shape[1]
    if rows != layout.rows and not _is_square(rows) and _is_square(rows - 1):
        given["cls_token"] = given["cls_token"] + table[:, :1]
        given["pos_embed"] = table[:, 1:]


def _guessed(name: str, table: Tensor, layout: TableLayout, source: str) -> TableLayout:
    """The layout of a table whose grid nobody told: square, else of the shape of the model's own."""
    cells = table.shape[-2] - layout.first - layout.last
    rows, columns = layout.grid
    if columns == 1:
        return TableLayout((cells, 1), layout.first, layout.last)
    sides = [(math.isqrt(max(cells, 0)),) * 2]
    height = round(math.sqrt(max(cells, 0) * rows / columns))
    if height:
        sides.append((height, cells // height))
    for grid in sides:
        if cells > 0 and grid[0] * grid[1] == cells:
            return TableLayout(grid, layout.first, layout.last)
    raise ValueError(
        f"{source}: {name} has {table.shape[-2]} rows, and which grid they belong to cannot be told; "
        "expected that of a square image"
    )


def _is_square(number: int) -> bool:
    return number >= 0 and math.isqrt(number) ** 2 == number


def _cells(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
