"""What features hold: as colours, by their neighbours, read by the head, and as images that excite them.

    B images, N patches on a grid, D width, K classes, H heads

Layers are blocks, counted as in `forward_features(layers=)`, and features are what it gives: mostly
normalised by the model's last norm, in early stages of Swin and PVT as the blocks give them. Of CrossViT the
large branch is shown. Models are put into evaluation mode for the while; nothing else about them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.tap import record
from vitrail.explain.target import class_scores, evaluating
from vitrail.models.encoder import Encoder, Features

PIXEL_LIMIT = 2.0
"""Largest size of a normalised pixel that `maximise` makes; with ImageNet's mean and standard deviation black
and white are at -2.1 and 2.6."""
STEP = 0.1
"""How far `maximise` moves a pixel in the first step, as a root mean square; steps shrink to nothing, because
the total variation has a kink where neighbours are equal, around which steps of one size jump for ever."""

Objective = Callable[[Encoder, Tensor], Tensor]
"""What `maximise` makes large: a model and images [B, C, H, W] -> one number an image, [B]."""


@torch.no_grad()
def feature_colours(model: Encoder, images: Tensor, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """The three main directions of the patches' features, as red, green and blue.

    Patches that the model takes for the same kind of thing get the same colour, across images too (Oquab et
    al. 2023, DINOv2, figure 1). Each layer has one basis, fitted over the patches of all images, and each
    direction is stretched to the whole range; its sign makes its largest coefficient positive. A direction in
    which nothing varies is 0.5.

    Args:
        model: Any encoder.
        images: [B, C, height, width], normalised.
        layers: Which to show; None: all.

    Returns:
        Layer -> [B, rows, columns, 3], 0 to 1, on the CPU; the rows and columns are those of the layer.

    Raises:
        ValueError: No images, a layer that does not exist, or features that are not finite.
    """
    if not len(images):
        raise ValueError("no images: colours need at least one")
    return {layer: _colours(layer, seen) for layer, seen in _by_layer(model, images, layers).items()}


class PatchMatch(NamedTuple):
    """A patch and how similar it is."""

    image: int
    row: int
    column: int
    similarity: float
    """Cosine, -1 to 1."""


@torch.no_grad()
def nearest_patches(
    model: Encoder, images: Tensor, image: int, row: int, column: int, *, count: int = 5, layer: int = -1
) -> tuple[PatchMatch, ...]:
    """The patches of the other images whose features are most similar to those of one patch.

    Args:
        model: Any encoder.
        images: [B, C, height, width], normalised.
        image: Number of the image with the patch.
        row: Row of the patch, in the grid of the layer.
        column: Its column.
        count: How many to find.
        layer: Whose features to compare.

    Returns:
        The nearest first.

    Raises:
        ValueError: No such patch or layer, or fewer patches in the other images than are to be found.
    """
    patches = _by_layer(model, images, (layer,))[layer].map().flatten(2, -2).permute(0, 2, 3, 1).float()
    B, rows, columns, _ = patches.shape
    for name, number, size in (("image", image, B), ("row", row, rows), ("column", column, columns)):
        if not 0 <= number < size:
            raise ValueError(f"no {name} {number}: expected 0 to {size - 1}")
    others = (B - 1) * rows * columns
    if not 1 <= count <= others:
        raise ValueError(f"count: expected 1 to {others}, the patches of {B - 1} other images, got {count}")
    directions = F.normalize(patches, dim=3)
    similarity = directions @ directions[image, row, column]  # [B, rows, columns]
    similarity[image] = -torch.inf
    values, order = similarity.flatten().sort(descending=True, stable=True)
    return tuple(
        PatchMatch(place // (rows * columns), place // columns % rows, place % columns, value)
        for place, value in zip(order[:count].tolist(), values[:count].tolist(), strict=True)
    )


class LayerVectors(NamedTuple):
    """One vector an image after a layer, in the two ways that heads read tokens."""

    patches: Tensor
    """Mean of the patches, [B, D]."""
    token: Tensor | None
    """What a head that reads tokens would get: the class token, with distillation the mean of both, [B, D].
    None where the head reads patches, or the token comes later (CaiT, PVT)."""

    @property
    def read(self) -> Tensor:
        """The token where there is one, else the patches."""
        return self.patches if self.token is None else self.token


@torch.no_grad()
def layer_vectors(model: Encoder, images: Tensor) -> list[LayerVectors]:
    """The images as vectors after every layer, to be compared, clustered and classified.

    Of sequence pooling (CCT), whose shares belong to the last layer, all patches count alike.

    Args:
        model: Any encoder, with or without a head.
        images: [B, C, height, width], normalised.
    """
    tokens = (
        model.flow((images.shape[-2], images.shape[-1])).reads[-1].prefix
    )  # of CrossViT: the large branch
    return [
        LayerVectors(
            patches=features.patches.mean(dim=1),
            token=features.prefix[:, :tokens].mean(dim=1) if tokens and features.prefix.shape[1] else None,
        )
        for features in _by_layer(model, images, None).values()
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """What the head would answer after each layer."""

    layers: tuple[int, ...]
    """The layers that the head can read, counted from 0."""
    logits: Tensor
    """[layers, B, K]; the last are the model's answer."""


@torch.no_grad()
def logit_lens(model: Encoder, images: Tensor) -> LogitLens:
    """Read the features of every layer with the model's own last norm and head (nostalgebraist 2020).

    It shows at which depth an answer forms. The head was trained on the last layer only: what earlier layers
    know in another basis it cannot read.

    The head can read layers whose features have the shape of the last: all blocks of ViT, DeiT, CCT and
    CrossViT; the last stage of Swin and PVT; the class-attention blocks of CaiT, which bring in the token
    that its head reads.

    Args:
        model: An encoder with a head.
        images: [B, C, height, width], normalised.

    Raises:
        ValueError: The model has no head.
    """
    if not model.has_head:
        raise ValueError(
            f"{type(model).__name__} has no head to read its layers with; build it with num_classes, or call "
            "reset_classifier and train the head"
        )
    seen = _by_layer(model, images, None)
    last = seen[len(seen) - 1]
    readable = [layer for layer, features in seen.items() if _shapes(features) == _shapes(last)]
    with evaluating(model):
        logits = torch.stack([model.forward_head(seen[layer]) for layer in readable])
    return LogitLens(layers=tuple(readable), logits=logits)


def class_logit(number: int) -> Objective:
    """The logit of one class."""
    return lambda model, images: class_scores(model, images, number)[0]


def head_activation(attention: str, head: int) -> Objective:
    """The mean square of what one attention head hands on, over tokens and channels.

    Args:
        attention: Name of an attention module, such as "blocks.3.attn"; its taps `value` and `mixed` are
            read.
        head: Number of the head.
    """

    def measure(model: Encoder, images: Tensor) -> Tensor:
        value, mixed = _recorded(model, images, f"{attention}.value", f"{attention}.mixed")
        H = value.shape[1]
        if not 0 <= head < H:
            raise ValueError(f"no head {head} in {attention}: expected 0 to {H - 1}")
        own = mixed.unflatten(-1, (H, -1))[..., head, :]
        return own.reshape(len(images), -1).square().mean(dim=1)

    return measure


def unit_activation(tap: str, unit: int) -> Objective:
    """The mean of one channel of a tap over its tokens; "blocks.3.mlp.hidden" has the units of an MLP."""

    def measure(model: Encoder, images: Tensor) -> Tensor:
        (values,) = _recorded(model, images, tap)
        units = values.shape[-1]
        if not 0 <= unit < units:
            raise ValueError(f"no unit {unit} in {tap}: expected 0 to {units - 1}")
        return values[..., unit].reshape(len(images), -1).mean(dim=1)

    return measure


@dataclass(frozen=True, kw_only=True, eq=False)
class Maximised:
    """An image made to excite some part of a model."""

    image: Tensor
    """[C, height, width], normalised, within -2 to 2."""
    before: float
    """The objective at the noise from which the image was made."""
    after: float
    """The objective at the image."""


def maximise(
    model: Encoder,
    objective: Objective,
    *,
    image_shape: tuple[int, int] | None = None,
    steps: int = 200,
    jitter: int = 4,
    smoothness: float = 0.25,
    seed: int = 0,
) -> Maximised:
    """Make an image that excites a class, a head or a unit: gradient ascent on pixels (Erhan et al. 2009).

    Such an image shows what is sufficient, not what is typical; several seeds show more than one. Two things
    keep it from being noise that only this model reads (Olah et al. 2017): in each step the image is shifted
    a little, around its borders, and its total variation (Rudin et al. 1992) is kept low. The gradient of the
    objective is scaled to a root mean square of one, so that the same smoothness serves logits and units
    alike.

    Args:
        model: Any encoder.
        objective: `class_logit`, `head_activation`, `unit_activation` or a function like them.
        image_shape: Height and width; None: the model's own.
        steps: How often the image moves; the first move is about 0.1 a pixel, the last next to nothing.
        jitter: Largest shift in pixels, in each direction.
        smoothness: Weight of the total variation; 0: none.
        seed: Of the noise and of the shifts.

    Raises:
        ValueError: A class, tap, head or unit that does not exist, or numbers below their smallest value.
    """
    for name, value, least in (("steps", steps, 1), ("jitter", jitter, 0), ("smoothness", smoothness, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    height, width = model.config.image_shape if image_shape is None else image_shape
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(1, model.config.in_chans, height, width, generator=generator)
    shifts = torch.randint(-jitter, jitter + 1, (steps, 2), generator=generator).tolist()
    image = start = noise.to(like)
    with evaluating(model), torch.enable_grad():
        for number, shift in enumerate(shifts):
            image = image.detach().requires_grad_()
            score = objective(model, image.roll(shift, dims=(2, 3)))
            (uphill,) = torch.autograd.grad(score.sum(), image)
            (rougher,) = torch.autograd.grad(_total_variation(image), image)
            size = uphill.square().mean().sqrt().clamp(min=torch.finfo(uphill.dtype).tiny)
            direction = uphill / size - smoothness * rougher
            step = STEP * (1 - number / steps)
            image = (image.detach() + step * direction).clamp(-PIXEL_LIMIT, PIXEL_LIMIT)
    with evaluating(model), torch.no_grad():
        before, after = (float(objective(model, one)) for one in (start, image))
    return Maximised(image=image[0], before=before, after=after)


def _by_layer(model: Encoder, images: Tensor, layers: Sequence[int] | None) -> dict[int, Features]:
    """Features after the layers asked for (None: all), in that order."""
    wanted = range(len(model.block_names())) if layers is None else layers
    with evaluating(model):
        seen = model.forward_features(images, layers=tuple(wanted)).layers
    return {layer: seen[layer] for layer in wanted}


def _colours(layer: int, features: Features) -> Tensor:
    """Of one layer, [B, rows, columns, 3]."""
    patches = features.map().flatten(2, -2).permute(0, 2, 3, 1).cpu().double()  # [B, rows, columns, D]
    centred = patches.flatten(0, 2)
    centred = centred - centred.mean(dim=0)
    covariance = centred.T @ centred
    if not covariance.isfinite().all():
        raise ValueError(f"the features of layer {layer} are not finite; check images and weights")
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    variances, directions = variances.flip(0)[:3], directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, 3]
    places = centred @ (directions * largest.sign())  # [B * rows * columns, 3]
    low, high = places.aminmax(dim=0)
    varies = variances > 1e-12 * variances[0].clamp(min=torch.finfo(torch.double).tiny)
    colours = torch.where(varies, (places - low) / torch.where(varies, high - low, 1), 0.5)
    colours = F.pad(colours, (0, 3 - colours.shape[1]), value=0.5)  # fewer than three channels
    return colours.reshape(*patches.shape[:3], 3).float()


def _shapes(features: Features) -> tuple[torch.Size, torch.Size]:
    return features.patches.shape, features.prefix.shape


def _recorded(model: Encoder, images: Tensor, *names: str) -> list[Tensor]:
    """What passes some taps while the model answers, each named exactly."""
    with record(model, *names) as seen:
        model(images)
    for name in names:
        if name not in seen:
            raise ValueError(f"{name!r} is not one tap that every image passes; name one of them exactly")
    return [seen[name] for name in names]


def _total_variation(images: Tensor) -> Tensor:
    """Sum of the sizes of the differences between neighbouring pixels of [B, C, H, W]."""
    return images.diff(dim=2).abs().sum() + images.diff(dim=3).abs().sum()
