"""What a model sees in images: one page to point at, and the pictures beside it, by `vitrail explain`.

The page is a single file without a network: a chooser of layer and head over the attention of every patch
(pointing at a patch shows what that patch attends to), and a picture of each method that explains the
answer, with the numbers that say how far to trust it.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from vitrail.components.tap import record, taps
from vitrail.datasets import Preprocessing
from vitrail.explain.attention import Heads, PatchAttention, attention_layers, attention_maps, patch_attention
from vitrail.explain.draw import explanation_figure, image_grid, label, png
from vitrail.explain.faithfulness import Curve, curves
from vitrail.explain.methods import METHODS, find_methods
from vitrail.explain.target import class_scores, scores_of
from vitrail.files import write_whole
from vitrail.models.encoder import Encoder

_MOST_VALUES = 2_500_000
"""Attention values of an image that are kept with 256 levels; more are kept with 32, which pack smaller."""
_LARGE_MODEL = 20_000_000
"""Parameters from which curves of deletion and insertion get by with half the points and random orders."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One method on one image."""

    name: str
    values: Tensor
    """[rows, columns]."""
    seconds: float
    deletion: Curve | None = None
    """None, like the next, where the model has no head: there is no class whose probability could fall."""
    insertion: Curve | None = None

    @property
    def gain(self) -> float:
        """Mean gain of both curves, by which methods are ranked; 0 without them."""
        both = [curve for curve in (self.deletion, self.insertion) if curve is not None]
        return sum(float(curve.gain[0]) for curve in both) / max(len(both), 1)

    def to_dict(self) -> dict[str, Any]:
        """The numbers; gains are areas above those of random orders, so 0 is chance."""
        gains = {
            f"{curve.kind}_gain": float(curve.gain[0])
            for curve in (self.deletion, self.insertion)
            if curve is not None
        }
        return {"method": self.name, **gains, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, kw_only=True)
class ExplainedImage:
    """All that was found out about one image."""

    source: str
    target: str | None
    """The class that was explained; None where the model has no head."""
    predictions: tuple[tuple[str, float], ...]
    """The most probable classes, best first; none where the model has no head."""
    methods: tuple[Explained, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps, as JSON types."""
        predictions = [{"class": name, "confidence": share} for name, share in self.predictions]
        methods = [own.to_dict() for own in self.methods]
        return {"image": self.source, "class": self.target, "predictions": predictions, "methods": methods}

    def table(self) -> str:
        """For a terminal: how far each method can be trusted on this image."""
        if self.target is None:
            titles = ", ".join(METHODS[own.name].title for own in self.methods)
            return f"{self.source}: the model has no head, so no class is explained; {titles}"
        name, share = self.predictions[0]
        lines = [f"{self.source}: {name} {100 * share:.1f} %; what speaks for {self.target}:"]
        lines.append(f"  {'method':22}  deletion  insertion  seconds")
        for own in sorted(self.methods, key=lambda own: -own.gain):
            found = own.to_dict()
            gains = f"{found['deletion_gain']:+9.3f}  {found['insertion_gain']:+9.3f}"
            lines.append(f"  {METHODS[own.name].title:22} {gains}  {own.seconds:7.2f}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `write_explanation` made."""

    page: Path
    images: tuple[ExplainedImage, ...]


def write_explanation(
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    model: Encoder,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    title: str,
    methods: list[str] | None = None,
    target: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads = "mean",
) -> Explanation:
    """Write `explanation.html` and PNG files into a folder.

    Args:
        folder: Made where it does not exist; files of the same names are replaced.
        images: Image files.
        model: The model; it is put into evaluation mode.
        preprocessing: How images become its input.
        classes: Their names, in the order of the logits.
        title: What the page calls the model.
        methods: Names of `METHODS`; None: the quick ones, "all" alone: all that the model can have.
        target: Number of the class that is explained; None: what the model predicts, for each image.
        layers: Layers with attention that the page and the picture of it show, from 1; None: all.
        heads: What the picture of the attention shows: "mean", "max", "min", "all" or a head, from 1.

    Raises:
        ValueError: An image that cannot be read; no such class, method, layer or head; a class or a method
            that needs one, where the model has no head; a folder that cannot be written. Nothing is written.
    """
    folder = Path(folder)
    model.eval()
    names = find_methods(methods, head=model.has_head)
    depth = len(attention_layers(model, preprocessing.img_size))
    shown = range(depth) if layers is None else [layer - 1 for layer in layers]
    for layer in shown:
        if not 0 <= layer < depth:
            raise ValueError(f"no layer {layer + 1}: {type(model).__name__} has layers 1 to {depth}")
    environment = Environment(
        loader=PackageLoader("vitrail.reporting", ""), autoescape=True, undefined=StrictUndefined
    )
    opened = [preprocessing.open_image(image) for image in images]
    files: dict[str, str | bytes] = {}  # written at the end: all of it or nothing
    pages: list[dict[str, Any]] = []
    found: list[ExplainedImage] = []
    taken: set[str] = set()
    for source, image in zip(images, opened, strict=True):
        pixels = image[None].to(next(model.parameters()).device)
        own = _explain(Path(source), pixels, model, classes, names, target)
        found.append(own)
        seen = preprocessing.denormalise(image[None])[0]  # uint8 [C, H, W]
        stem = _free_name(Path(source).stem, taken)
        pictures = {method.name: _method_picture(seen, method) for method in own.methods}
        files |= {f"{stem}-{name}.png": content for name, content in pictures.items()}
        files[f"{stem}-attention.png"] = _attention_picture(own, seen, pixels, model, shown, heads)
        cards = [
            method.to_dict()
            | {"title": METHODS[method.name].title, "says": METHODS[method.name].says}
            | {"picture": _embedded(pictures[method.name])}
            for method in sorted(own.methods, key=lambda method: -method.gain)
        ]
        attention = _attention_data(seen, model, pixels, shown)
        pages.append({"found": own, "name": Path(source).name, "cards": cards, "attention": attention})
    files["explanation.html"] = environment.get_template("explanation.html.jinja").render(
        title=title, images=pages, data=_script_json([own["attention"] for own in pages])
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    return Explanation(page=folder / "explanation.html", images=tuple(found))


def explain(
    model: Encoder, image: Tensor, methods: Sequence[str], target: int | None = None
) -> list[Explained]:
    """Run methods on one image [1, C, height, width]; with their curves where the model has a head."""
    maps: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for name in methods:
        began = time.perf_counter()
        maps[name] = METHODS[name].run(model, image, target)
        seconds[name] = time.perf_counter() - began
    followed = {}
    if model.has_head:
        large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE_MODEL
        followed = curves(
            model, image, maps, target, steps=6 if large else 12, random_orders=2 if large else 4
        )
    return [
        Explained(
            name=name,
            values=values[0].detach().float().cpu(),
            seconds=seconds[name],
            **{curve.kind: curve for curve in followed.get(name, ())},
        )
        for name, values in maps.items()
    ]


def _explain(
    source: Path,
    pixels: Tensor,
    model: Encoder,
    classes: Sequence[str],
    methods: Sequence[str],
    target: int | None,
) -> ExplainedImage:
    if not model.has_head:
        if target is not None:
            class_scores(model, pixels, target)  # says what is missing
        return ExplainedImage(
            source=str(source), target=None, predictions=(), methods=tuple(explain(model, pixels, methods))
        )
    with torch.no_grad():
        logits = model(pixels)
    number = int(scores_of(model, logits, target)[1])
    best = logits.softmax(dim=1)[0].topk(min(5, logits.shape[1]))
    return ExplainedImage(
        source=str(source),
        target=classes[number],
        predictions=tuple(
            (classes[k], share) for share, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ),
        methods=tuple(explain(model, pixels, methods, number)),
    )


def _method_picture(seen: Tensor, own: Explained) -> bytes:
    return png(explanation_figure(seen, own.values, signed=METHODS[own.name].signed))


def _attention_picture(
    found: ExplainedImage,
    seen: Tensor,
    pixels: Tensor,
    model: Encoder,
    layers: Sequence[int],
    heads: Heads,
) -> bytes:
    """The attention of the class token, or the mean of the patches: a map a layer, or a row of heads."""
    maps = attention_maps(model, pixels, layers=layers, heads="all" if isinstance(heads, int) else heads)
    columns = 5
    heat: list[Tensor | None] = [None]
    captions = [label(Path(found.source).name, 16)]
    for layer, own in zip(layers, maps, strict=True):
        each = own.values[0].clamp(min=0).cpu()
        if isinstance(heads, int):
            if not 1 <= heads <= len(each):
                raise ValueError(f"no head {heads} in layer {layer + 1}, which has heads 1 to {len(each)}")
            heat.append(each[heads - 1])
            captions.append(f"layer {layer + 1}\nhead {heads}")
        elif heads == "all":
            columns = 6
            heat += list(each)
            captions += [f"layer {layer + 1}\nhead {head + 1}" for head in range(len(each))]
        else:
            heat.append(each)
            captions.append(f"layer {layer + 1}")
    columns = min(columns, len(captions))
    grid = image_grid(seen.expand(len(captions), -1, -1, -1), captions, columns=columns, heat=heat)
    return png(grid)


def _attention_data(seen: Tensor, model: Encoder, pixels: Tensor, layers: Sequence[int]) -> dict[str, Any]:
    """The image and all attention, as the page's script reads it.

    Each map is scaled to its own largest size and becomes a row of a PNG, one picture a layer: head by head
    the class token's map, where there is one, then those of the patches. Differential attention has three
    such pictures a layer, and lambda, by which the second map is multiplied before it is taken away.
    """
    found = patch_attention(model, pixels)
    chosen = [found[layer] for layer in layers]
    kinds = {"weights": {own.layer: own for own in chosen}}
    shares: dict[str, Tensor] = {}
    if any(name.endswith(".weights1") for name in taps(model)):
        with record(model, "*.lambda") as shares:
            for tap in ("weights1", "weights2"):
                kinds[tap] = {own.layer: own for own in patch_attention(model, pixels, tap=tap)}
    rows = {
        (own.layer, kind): _rows(maps[own.layer])
        for own in chosen
        for kind, maps in kinds.items()
        if own.layer in maps
    }
    levels = 255 if sum(own.numel() for own in rows.values()) <= _MOST_VALUES else 31
    described = []
    for layer, own in zip(layers, chosen, strict=True):
        share = shares.get(f"{own.layer}.lambda")
        described.append(
            {
                "name": own.layer,
                "number": layer + 1,
                "heads": len(own.values),
                "asking": own.asking,
                "grid": tuple(own.values.shape[2:]),
                "classToken": own.class_token is not None,
                "lambda": None if share is None else round(float(share), 3),
                "maps": [_packed(values, levels) for (name, _), values in rows.items() if name == own.layer],
            }
        )
    return {
        "height": seen.shape[1],
        "width": seen.shape[2],
        "image": _embedded(_png_of(seen.permute(1, 2, 0).squeeze(2))),
        "layers": described,
    }


def _packed(values: Tensor, levels: int) -> dict[str, Any]:
    """Rows [rows, cells] as a PNG of `levels` steps, and the largest size of each row."""
    top = values.abs().amax(dim=1)
    signed = bool((values < 0).any())
    scaled = values / top.clamp(min=1e-12)[:, None]
    scaled = (scaled + 1) / 2 if signed else scaled
    packed = ((scaled * levels).round() * (255 / levels)).round().to(torch.uint8)
    return {
        "signed": signed,
        "top": [float(f"{value:.3g}") for value in top.tolist()],
        "rows": _embedded(_png_of(packed)),
    }


def _rows(own: PatchAttention) -> Tensor:
    """[H * (class token + R), cells]."""
    maps = own.values.flatten(2)  # [H, R, cells]
    if own.class_token is not None:
        maps = torch.cat([own.class_token.flatten(1)[:, None], maps], dim=1)
    return maps.flatten(0, 1).cpu()


def _png_of(pixels: Tensor) -> bytes:
    """uint8 [height, width] or [height, width, 3] as a PNG."""
    content = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(content, "PNG", optimize=True)
    return content.getvalue()


def _embedded(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element, whatever the names in it are."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name
