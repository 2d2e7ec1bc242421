"""A model as a tree: what each module gives out, how many parameters it holds, what it costs.

Others call it model summary (Keras, torchinfo). Here nothing is computed: shapes and multiply-adds come from
a pass on the meta device, so that a model of any size and an image of any size take the same fraction of a
second. Equal modules next to each other are one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from vitrail.components.tap import Tap
from vitrail.evaluation.cost import count_parameters, macs_by_module, without_numbers

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module, or a parameter that belongs to no module below."""

    name: str
    """As `named_modules` has it; "" is the model."""
    kind: str
    """Its class, or "parameter"."""
    shapes: tuple[Shape, ...]
    """Of the tensors that come out for one image, or of the parameter; none where the module is not called
    itself, because another uses its weights."""
    parameters: int
    """Trainable and frozen, those of the parts included."""
    macs: int
    """Multiply-adds, those of the parts included. Products that a module takes itself, such as those of
    attention, are in its number and in none of its parts'."""
    parts: tuple[Part, ...]
    """In the order of definition. Containers are left out in favour of what is in them, and modules that have
    neither parameters nor multiply-adds altogether."""

    def to_dict(self, depth: int) -> dict[str, Any]:
        """Everything, `depth` levels down, for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"parts": [part.to_dict(depth - 1) for part in self.parts] if depth else []}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model at one image size."""

    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    model: Part

    def to_dict(self, depth: int) -> dict[str, Any]:
        """Everything, `depth` levels down, for JSON."""
        return {"image_shape": self.image_shape, "model": self.model.to_dict(depth)}

    def text(self, depth: int, width: int) -> str:
        """The tree as a table.

        Args:
            depth: How many levels below the model to show.
            width: Characters a line may have; the class names are cut where it is too small.
        """
        unit, letter = (1e9, "G") if self.model.macs >= 1e9 else (1e6, "M")
        rows = [("module", "class", "output", "parameters", f"{letter}MACs")]
        for label, parts in _lines([self.model], depth):
            part, count = parts[0], len(parts)
            rows.append(
                (
                    label,
                    part.kind if count == 1 else f"{count} x {part.kind}",
                    " ".join("x".join(map(str, shape)) for shape in part.shapes),
                    f"{part.parameters:,}" if part.parameters else "",
                    _rounded(part.macs / unit),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        widths[1] = max(len("class"), min(widths[1], width - sum(widths) + widths[1] - 2 * 4))
        lines = [
            f"{name:<{widths[0]}}  {_cut(kind, widths[1]):<{widths[1]}}  {output:<{widths[2]}}  "
            f"{parameters:>{widths[3]}}  {macs:>{widths[4]}}".rstrip()
            for name, kind, output, parameters, macs in rows
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        lines.append(lines[1])
        size = "x".join(map(str, self.image_shape))
        return "\n".join(
            [
                *lines,
                f"{self.model.parameters:,} parameters, {self.model.macs:,} MACs for one image of {size}",
                "MACs: multiply-adds of linear layers, convolutions, both attention products.",
                "A line includes those below it; `n x`: n equal modules, the numbers of one.",
            ]
        )


def summarize(model: nn.Module, image_shape: Sequence[int]) -> Summary:
    """Look at every module of a model while one image passes; the model stays as it is.

    Args:
        model: Any Vitrail model, on any device.
        image_shape: Channels, height and width.

    Raises:
        ValueError: The model does not take such an image.
    """
    shown = without_numbers(model)
    shapes: dict[nn.Module, tuple[Shape, ...]] = {}
    for module in shown.modules():
        module.register_forward_hook(
            lambda own, _inputs, output: shapes.update({own: tuple(_shapes(output))})
        )
    macs = macs_by_module(shown, image_shape)

    def part(name: str, module: nn.Module) -> Part:
        inner = [
            own
            for child_name, child in _children(name, module)
            if (own := part(child_name, child)).parameters or own.macs
        ]
        # Where nothing is below, the parameters are the module: a linear layer's weight and bias.
        loose = module.named_parameters(recurse=False) if inner else ()
        return Part(
            name=name,
            kind=type(module).__name__,
            shapes=shapes.get(module, ()),
            parameters=count_parameters(module),
            # A part of the model that is never called itself, only what is in it, is not in the table.
            macs=macs[name] if name in macs else sum(own.macs for own in inner),
            parts=(*(_parameter(_join(name, own), value) for own, value in loose), *inner),
        )

    channels, height, width = image_shape
    return Summary(image_shape=(channels, height, width), model=part("", shown))


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules directly below, in place of containers those in them; taps, which only look, are left out."""
    for own, child in module.named_children():
        full = _join(name, own)
        if isinstance(child, nn.ModuleList):
            yield from _children(full, child)
        elif not isinstance(child, Tap):
            yield full, child


def _parameter(name: str, value: nn.Parameter) -> Part:
    return Part(
        name=name,
        kind="parameter",
        shapes=(tuple(value.shape),),
        parameters=value.numel(),
        macs=0,
        parts=(),
    )


def _shapes(output: Any) -> Iterator[Shape]:
    """The shapes of the tensors in what a module gives out."""
    if isinstance(output, Tensor):
        yield tuple(output.shape)
    elif isinstance(output, (tuple, list)):
        for own in output:
            yield from _shapes(own)


def _join(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


def _lines(
    parts: list[Part], depth: int, above: str = "", before: str = "", below: str = ""
) -> Iterator[tuple[str, list[Part]]]:
    """The lines of a tree: a label, and the equal parts that it stands for.

    Args:
        parts: Equal parts, which become one line.
        depth: How many levels below them to go.
        above: Name of the module that they are in.
        before: What is drawn before the label.
        below: What is drawn before the labels of the next level.
    """
    first, last = (own.name.removeprefix(above).removeprefix(".") for own in (parts[0], parts[-1]))
    until = f" to {last.removeprefix(_stem(last))}" if len(parts) > 1 else ""
    yield before + (first or "model") + until, parts
    if not depth:
        return
    groups = [list(group) for _, group in groupby(parts[0].parts, key=_structure)]
    for number, group in enumerate(groups, start=1):
        branch, trunk = ("└ ", "  ") if number == len(groups) else ("├ ", "│ ")
        yield from _lines(group, depth - 1, parts[0].name, below + branch, below + trunk)


def _structure(part: Part, nested: bool = False) -> tuple[Any, ...]:
    """What equal parts have in common: all but the number at the end of their names."""
    name = "" if nested else _stem(part.name)
    inner = tuple(_structure(own, nested=True) for own in part.parts)
    return name, part.kind, part.shapes, part.parameters, part.macs, inner


def _rounded(macs: float) -> str:
    if not macs:
        return ""
    return f"{macs:.3f}" if macs >= 0.0005 else "<0.001"


def _stem(name: str) -> str:
    return name.rstrip("0123456789")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
