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
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from vitrail.datasets import Preprocessing
from vitrail.explain.attention import PatchAttention, attention_maps, patch_attention
from vitrail.explain.draw import explanation_figure, image_grid, label, png
from vitrail.explain.faithfulness import Curve, deletion, insertion
from vitrail.explain.methods import METHODS
from vitrail.files import write_whole
from vitrail.models.encoder import Encoder

_MOST_VALUES = 2_500_000
"""Attention values of an image that are kept with 256 levels; more are kept with 32, which pack smaller."""
_CURVE_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One method on one image."""

    name: str
    values: Tensor
    """[rows, columns]."""
    deletion: Curve
    insertion: Curve
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers; gains are areas above those of random orders, so 0 is chance."""
        return {
            "method": self.name,
            "deletion_gain": float(self.deletion.gain[0]),
            "insertion_gain": float(self.insertion.gain[0]),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class ExplainedImage:
    """All that was found out about one image."""

    source: str
    target: str
    """The class that was explained."""
    predictions: tuple[tuple[str, float], ...]
    """The most probable classes, best first."""
    methods: tuple[Explained, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps, as JSON types."""
        predictions = [{"class": name, "confidence": share} for name, share in self.predictions]
        methods = [own.to_dict() for own in self.methods]
        return {"image": self.source, "class": self.target, "predictions": predictions, "methods": methods}

    def table(self) -> str:
        """For a terminal: how far each method can be trusted on this image."""
        name, share = self.predictions[0]
        lines = [f"{self.source}: {name} {100 * share:.1f} %; what speaks for {self.target}:"]
        lines.append(f"  {'method':22}  deletion  insertion  seconds")
        ranked = sorted(self.methods, key=lambda own: -float(own.deletion.gain[0] + own.insertion.gain[0]))
        for own in ranked:
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
    folder: Path,
    images: Sequence[str | Path],
    *,
    model: Encoder,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    title: str,
    methods: Sequence[str],
    target: int | None = None,
) -> Explanation:
    """Write `explanation.html` and PNG files into a folder.

    Args:
        folder: Made where it does not exist; files of the same names are replaced.
        images: Image files.
        model: The model; it is put into evaluation mode.
        preprocessing: How images become its input.
        classes: Their names, in the order of the logits.
        title: What the page calls the model.
        methods: Names of `METHODS`.
        target: Number of the class that is explained; None: what the model predicts, for each image.

    Raises:
        ValueError: An image that cannot be read; no such class or method; a folder that cannot be written.
    """
    model.eval()
    opened = [preprocessing.open_image(image) for image in images]  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    pages: list[dict[str, Any]] = []
    found: list[ExplainedImage] = []
    taken: set[str] = set()
    for source, pixels in zip(images, opened, strict=True):
        own = _explain(Path(source), pixels[None], model, classes, methods, target)
        found.append(own)
        seen = preprocessing.denormalise(pixels[None])[0]  # uint8 [C, H, W]
        stem = _free_name(Path(source).stem, taken)
        pages.append(_draw(folder, stem, own, seen, pixels[None], model))
    environment = Environment(
        loader=PackageLoader("vitrail.reporting", ""), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("explanation.html.jinja").render(
        title=title, images=pages, data=Markup(_script_json([own["attention"] for own in pages]))
    )
    write_whole(folder / "explanation.html", page)
    return Explanation(page=folder / "explanation.html", images=tuple(found))


def explain(
    model: Encoder, image: Tensor, methods: Sequence[str], target: int | None = None
) -> list[Explained]:
    """Run methods on one image [1, C, height, width], each with its curves of deletion and insertion."""
    found = []
    for name in methods:
        began = time.perf_counter()
        values = METHODS[name].run(model, image, target)
        seconds = time.perf_counter() - began
        curves = [
            curve(model, image, values, target, steps=_CURVE_STEPS, random_orders=4)
            for curve in (deletion, insertion)
        ]
        found.append(
            Explained(
                name=name,
                values=values[0].detach().float().cpu(),
                deletion=curves[0],
                insertion=curves[1],
                seconds=seconds,
            )
        )
    return found


def _explain(
    source: Path,
    pixels: Tensor,
    model: Encoder,
    classes: Sequence[str],
    methods: Sequence[str],
    target: int | None,
) -> ExplainedImage:
    pixels = pixels.to(next(model.parameters()).device)
    with torch.no_grad():
        shares = model(pixels).softmax(dim=1)[0].cpu()
    number = int(shares.argmax()) if target is None else target
    best = shares.topk(min(5, len(classes)))
    return ExplainedImage(
        source=str(source),
        target=classes[number],
        predictions=tuple(
            (classes[k], share) for share, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ),
        methods=tuple(explain(model, pixels, methods, number)),
    )


def _draw(
    folder: Path, stem: str, found: ExplainedImage, seen: Tensor, pixels: Tensor, model: Encoder
) -> dict[str, Any]:
    """Write the pictures of one image; what the page shows of it."""
    cards = []
    for own in found.methods:
        method = METHODS[own.name]
        content = png(explanation_figure(seen, own.values, signed=method.signed))
        write_whole(folder / f"{stem}-{own.name}.png", content)
        cards.append(
            own.to_dict() | {"title": method.title, "says": method.says, "picture": _embedded(content)}
        )
    pixels = pixels.to(next(model.parameters()).device)
    layers = attention_maps(model, pixels)
    captions = [label(Path(found.source).name, 16), *(f"layer {i + 1}" for i in range(len(layers)))]
    maps = image_grid(
        seen.expand(len(captions), -1, -1, -1),
        captions,
        columns=min(len(captions), 5),
        heat=[None, *(own.values[0].clamp(min=0).cpu() for own in layers)],
    )
    write_whole(folder / f"{stem}-attention.png", png(maps))
    return {
        "found": found,
        "name": Path(found.source).name,
        "cards": sorted(cards, key=lambda card: -(card["deletion_gain"] + card["insertion_gain"])),
        "attention": _attention_data(seen, patch_attention(model, pixels)),
    }


def _attention_data(seen: Tensor, layers: Sequence[PatchAttention]) -> dict[str, Any]:
    """The image and all attention, as the page's script reads it.

    Each map is scaled to its own largest size and becomes a row of a PNG, one picture a layer: head by head
    the class token's map, where there is one, then those of the patches.
    """
    rows = [_rows(own) for own in layers]
    levels = 255 if sum(own.numel() for own in rows) <= _MOST_VALUES else 31
    described = []
    for own, values in zip(layers, rows, strict=True):
        top = values.abs().amax(dim=1)
        signed = bool((values < 0).any())
        scaled = values / top.clamp(min=1e-12)[:, None]
        scaled = (scaled + 1) / 2 if signed else scaled
        packed = ((scaled * levels).round() * (255 / levels)).round().to(torch.uint8)
        described.append(
            {
                "name": own.layer,
                "heads": len(own.values),
                "asking": own.asking,
                "grid": tuple(own.values.shape[2:]),
                "classToken": own.class_token is not None,
                "signed": signed,
                "top": [float(f"{value:.3g}") for value in top.tolist()],
                "rows": _embedded(_png_of(packed)),
            }
        )
    return {
        "height": seen.shape[1],
        "width": seen.shape[2],
        "image": _embedded(_png_of(seen.permute(1, 2, 0).squeeze(2))),
        "layers": described,
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
