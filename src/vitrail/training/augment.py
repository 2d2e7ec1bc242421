"""Augmentation of whole batches: geometry, RandAugment and random erasing, vectorised on the batch's device.

Others augment one image at a time in the loader's worker processes; here a batch arrives as uint8, and one
call changes all its images with the same few tensor operations. What is random (a few numbers an image) is
drawn on the CPU from the generator that is passed in and then moved, so the same generator state gives the
same batch, and nothing waits for the device.

Sources: RandAugment (Cubuk et al. 2019, arXiv:1909.13719), random erasing (Zhong et al. 2017,
arXiv:1708.04896, with the settings of DeiT, Touvron et al. 2020, arXiv:2012.12877), random resized crop
(Szegedy et al. 2014, arXiv:1409.4842). What differs from the usual implementations:

- All geometric parts of an image, those of RandAugment included, are one matrix and one bilinear sampling
  as long as no colour operation stands between them; outside of the image everything is black.
- Colour operations work on float pixels, so nothing is rounded to 8 bits between two of them.
- RandAugment's magnitude is the paper's, 0 to 10. torchvision's `magnitude=9` of 31 bins is 3 here; the
  `rand-m9` of timm and DeiT is 9.
- Random erasing happens before normalisation. timm fills with standard normal noise after it; the noise
  here has the mean and deviation of the images that it goes into, which is nearly the same, and is cut to
  0..1.

Shapes: B images, C channels, H height, W width, n images of one group. A matrix [B, 3, 3] maps a place in the
output to the place in the input that it shows, in pixels (x, y, 1) from the image's centre, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config import AugmentSection

RANDAUGMENT_OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The paper's 14 operations, each as likely as any other; the geometric ones stand last."""

_FIRST_GEOMETRIC = RANDAUGMENT_OPERATIONS.index("rotate")
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_CROP_ASPECT = (3 / 4, 4 / 3)


class Augment:
    """The random changes that a config section asks for; what is switched off there costs nothing.

    Args:
        section: Which parts, and how strong; Mixup and CutMix are in `vitrail.training.mixing`.
    """

    def __init__(self, section: AugmentSection) -> None:
        self.section = section

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        strong: bool = True,
        area: tuple[float, float] | None = None,
    ) -> Tensor:
        """Change each image of a batch at random: flip, crop, geometry, RandAugment, erasing, in this order.

        Args:
            images: uint8 [B, C, H, W] with 1 or 3 channels, on any device; stays as it is.
            generator: On the CPU; the only source of randomness.
            strong: Whether RandAugment and erasing take part (they end at the section's `stop_at`).
            area: Smallest and largest share of the area that is shown; None: from `resized_crop` to all.

        Returns:
            float32 [B, C, H, W], 0 to 1, on the same device.

        Raises:
            ValueError: `crop` pads by as much as the images are high or wide.
        """
        section = self.section
        height, width = images.shape[2:]
        if section.crop >= min(height, width):
            raise ValueError(
                f"augment.crop must lie below the side of the images, or a crop may show padding alone; got "
                f"{section.crop} for {height} x {width} pixels"
            )
        if section.flip or section.crop:
            images = _flip_and_crop(images, section, generator)
        matrices = self._geometry(images, generator, area)
        pixels = images.float().div_(255)
        if strong and section.randaugment:
            pixels = _randaugment(pixels, matrices, section, generator)
        elif matrices is not None:
            pixels = affine(pixels, matrices)
        if strong and section.erase:
            pixels = _erase_some(pixels, section.erase, generator)
        return pixels

    def _geometry(
        self, images: Tensor, generator: torch.Generator, area: tuple[float, float] | None
    ) -> Tensor | None:
        """Random matrices [B, 3, 3] on the CPU for all geometric parts together, None where all are off."""
        section, (count, _, height, width) = self.section, images.shape
        parts = []
        if area is None and section.resized_crop:
            area = section.resized_crop, 1.0
        if area is not None:
            crop_heights, crop_widths = _random_sizes(count, (height, width), area, _CROP_ASPECT, generator)
            x, y = (torch.rand(2, count, generator=generator) - 0.5) * torch.stack(
                [width - crop_widths, height - crop_heights]
            )
            parts += [translation(x, y), scaling(width / crop_widths, height / crop_heights)]
        if section.scale:
            factors = 1 + section.scale * _signed(count, generator)
            parts.append(scaling(factors, factors))
        if section.shear:
            slopes = (math.radians(section.shear) * _signed(count, generator)).tan()
            parts.append(shearing(slopes, torch.zeros(count)))
        if section.rotate:
            parts.append(rotation(math.radians(section.rotate) * _signed(count, generator)))
        if section.translate:
            x, y = section.translate * _signed(2 * count, generator).view(2, count)
            parts.append(translation(x * width, y * height))
        return _chain(parts) if parts else None


# Matrices. Each builder says what happens to the content; the matrix itself maps output to input.


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Move the content by `x` pixels to the right and `y` down (each [n]); matrices [n, 3, 3]."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrices(one, zero, -x, zero, one, -y)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Enlarge the content by the factors `x` in width and `y` in height (each [n]); matrices [n, 3, 3]."""
    zero = torch.zeros_like(x)
    return _matrices(1 / x, zero, zero, zero, 1 / y, zero)


def shearing(x: Tensor, y: Tensor) -> Tensor:
    """Shear: the output at (column c, row r) from the centre shows the input at (c + x r, r + y c).

    Args:
        x: Slopes along the width, [n]; the tangent of torchvision's angle.
        y: Slopes along the height, [n].

    Returns:
        Matrices [n, 3, 3].
    """
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrices(one, x, zero, y, one, zero)


def rotation(angles: Tensor) -> Tensor:
    """Turn the content counter-clockwise by `angles` in radians ([n]); matrices [n, 3, 3]."""
    zero, cosine, sine = torch.zeros_like(angles), angles.cos(), angles.sin()
    return _matrices(cosine, -sine, zero, sine, cosine, zero)


def _matrices(*upper: Tensor) -> Tensor:
    """Matrices [n, 3, 3] from the six numbers (each [n]) of the two upper rows."""
    zero = torch.zeros_like(upper[0])
    return torch.stack([*upper, zero, zero, zero + 1], 1).view(-1, 3, 3)


def _chain(parts: Sequence[Tensor]) -> Tensor:
    """One matrix for several that follow each other, the first of `parts` being the first that happens."""
    return reduce(torch.matmul, parts)


# Operations on whole batches.


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images (bool [B]) left to right. Any type, [B, C, H, W]."""
    rows, columns = _all_pixels(images)
    return pick(images, rows, torch.where(chosen[:, None], columns.flip(1), columns))


def crop(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """Cut a window of the images' own size out of the images padded with zeros; exact pixels.

    Args:
        images: Any type, [B, C, H, W].
        padding: Pixels added at every side.
        corners: Upper left corners of the windows as (row, column) of the padded images, int64 [B, 2], each
            0 to 2 * padding.
    """
    rows, columns = _all_pixels(images)
    return pick(F.pad(images, [padding] * 4), rows + corners[:, :1], columns + corners[:, 1:])


def pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels where the given rows and columns of an image cross.

    Args:
        images: Any type, [B, C, H, W].
        rows: int64 [B, H'], 0 to H - 1.
        columns: int64 [B, W'], 0 to W - 1.

    Returns:
        Images [B, C, H', W'].
    """
    count, channels, _, width = images.shape
    places = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    picked = images.flatten(2).gather(2, places.expand(-1, channels, -1))
    return picked.view(count, channels, rows.shape[1], columns.shape[1])


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample the images bilinearly where the matrices say; zeros outside.

    Args:
        images: Floating point, [B, C, H, W].
        matrices: From places in the output to places in the input, in pixels from the centre, [B, 3, 3]; the
            last row is 0 0 1.
    """
    height, width = images.shape[-2:]
    device = images.device
    # grid_sample's coordinates run from -1 to 1 over the outer edges of the image.
    half = matrices.new_tensor([width / 2, height / 2])
    to_input = (matrices[:, :2] / half[:, None]).to(device, images.dtype, non_blocking=True)
    x = torch.arange(width, device=device, dtype=images.dtype) - (width - 1) / 2
    y = torch.arange(height, device=device, dtype=images.dtype) - (height - 1) / 2
    per_column, per_row, shift = to_input[..., None, None].unbind(2)  # [B, 2, 1, 1] each
    # Sums of products rather than a matrix product: that one may run in TF32, a tenth of a pixel off.
    grid = (shift + per_row * y[:, None]) + per_column * x  # [B, 2, H, 1] + [B, 2, 1, W]
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to the full range; constant channels stay. [B, C, H, W], 0 to 1."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    constant = low == high
    low = low.masked_fill(constant, 0)
    return (images - low).div_((high - low).masked_fill_(constant, 1))


def equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram of 256 levels as flat as a table of levels can, as Pillow does.

    Channels with fewer than 255 pixels below their brightest level stay (rounded to 256 levels), as there.

    Args:
        images: [B, C, H, W], 0 to 1.
    """
    levels = _levels(images).long().flatten(2)
    # Counts are small whole numbers, exact in floating point, where adding and dividing them is faster.
    histogram = images.new_zeros(*levels.shape[:2], 256)
    histogram.scatter_add_(2, levels, images.new_ones(()).expand_as(levels))
    brightest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = ((levels.shape[2] - brightest) / 255).floor_()
    below = histogram.cumsum(2) - histogram
    table = ((below + (step / 2).floor_()) / step.clamp(min=1)).floor_().clamp_(max=255)
    unchanged = torch.arange(256, device=images.device, dtype=images.dtype)
    table = torch.where(step == 0, unchanged, table).div_(255)
    return table.gather(2, levels).view_as(images)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the pixels that reach the threshold. [B, C, H, W], 0 to 1, as the threshold is."""
    # |x - 1| is 1 - x here; torch.where takes three times as long on a CPU.
    return (images - (images >= threshold).to(images.dtype)).abs_()


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keep the upper 1 to 8 bits of each pixel's 8. [B, C, H, W], 0 to 1."""
    width = 2 ** (8 - bits)
    return _levels(images).div_(width).floor_().mul_(width / 255)


def adjust_color(images: Tensor, factors: Tensor) -> Tensor:
    """Scale the saturation: 0 is grey, 1 no change. [B, C, H, W], 0 to 1; factors [B]."""
    return images if images.shape[1] == 1 else _blend(luminance(images), images, factors)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Scale the contrast: 0 is the image's mean grey, 1 no change. [B, C, H, W], 0 to 1; factors [B]."""
    return _blend(luminance(images).mean((1, 2, 3), keepdim=True), images, factors)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale the pixels: 0 is black, 1 no change. [B, C, H, W], 0 to 1; factors [B]."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale the distance to a smoothed image: 0 is smooth, 1 no change; the outermost pixels stay.

    The filter is Pillow's SMOOTH: 3 x 3, the centre five times as heavy as each neighbour.

    Args:
        images: [B, C, H, W], 0 to 1.
        factors: [B].
    """
    if min(images.shape[-2:]) < 3:
        return images
    # Sums of shifted images: pooling and convolving take several times as long on a CPU.
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = square.add_(images[..., 1:-1, 1:-1], alpha=4).div_(13)
    return _blend(smooth, images, factors)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in the image's box.

    Args:
        boxes: First row, row after the last, first column, column after the last: int64 [B, 4].
        height: Height of the images.
        width: Width of the images.

    Returns:
        bool [B, 1, H, W].
    """
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # [B, 1] each
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def erase(images: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """Replace the pixels in each image's box by noise.

    Args:
        images: [B, C, H, W].
        boxes: As `box_mask` takes them, [B, 4].
        noise: New values in the order of the images' pixels, as many as all boxes have or more.
    """
    return images.masked_scatter(box_mask(boxes, *images.shape[-2:]), noise)


def _all_pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers [1, H] and column numbers [1, W]."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    return rows[None], columns[None]


def _levels(images: Tensor) -> Tensor:
    """The nearest of the 256 levels, 0 to 255, as floating point."""
    return images.mul(255).round_()


def luminance(images: Tensor) -> Tensor:
    """Luma of ITU-R 601, [B, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend(origin: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Go from the origin towards the images, past them where a factor is above 1; cut to 0..1."""
    return torch.lerp(origin, images, factors[:, None, None, None]).clamp_(0, 1)


# Random parts.


def _flip_and_crop(images: Tensor, section: AugmentSection, generator: torch.Generator) -> Tensor:
    """`flip` and `crop` at random, as far as they are on, in one pass over the pixels."""
    count, device = len(images), images.device
    rows, columns = _all_pixels(images)
    if section.flip:
        chosen = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(chosen.to(device, non_blocking=True)[:, None], columns.flip(1), columns)
    if section.crop:
        corners = torch.randint(2 * section.crop + 1, (count, 2), generator=generator)
        corners = corners.to(device, non_blocking=True)
        images = F.pad(images, [section.crop] * 4)
        rows, columns = rows + corners[:, :1], columns + corners[:, 1:]
    return pick(images, rows.expand(count, -1), columns)


def _randaugment(
    images: Tensor, matrices: Tensor | None, section: AugmentSection, generator: torch.Generator
) -> Tensor:
    """Apply the section's number of operations to each image, after what the matrices say; in place.

    Geometric operations only multiply an image's matrix; the image is sampled when a colour operation comes
    next, and at the end. For each round the images are sorted by operation, known on the host, so that an
    operation runs on a slice.
    """
    count, _, height, width = images.shape
    device = images.device
    # torchvision's 31 steps from no change to the strongest.
    strength = round(section.randaugment_magnitude * 3) / 30
    table = _randaugment_matrices(strength, height, width)
    moved = torch.full((count,), matrices is not None)
    if matrices is None:
        matrices = torch.eye(3).repeat(count, 1, 1)
    shape = (section.randaugment, count)
    rounds = torch.randint(len(RANDAUGMENT_OPERATIONS), shape, generator=generator)
    sides = torch.randint(2, shape, generator=generator)
    numbers = torch.arange(count)  # which image lies where
    for drawn, side in zip(rounds, sides, strict=True):
        order = drawn[numbers].argsort()
        numbers, matrices, moved = numbers[order], matrices[order], moved[order]
        images = images.index_select(0, order.to(device, non_blocking=True))
        operations, side = drawn[numbers], side[numbers]
        geometric = operations >= _FIRST_GEOMETRIC
        coloured = (operations > 0) & ~geometric
        images = _sample_some(images, matrices, moved & coloured)
        matrices = torch.where(coloured[:, None, None], torch.eye(3), matrices) @ table[operations, side]
        moved = geometric | (moved & ~coloured)
        factors = (1 + 0.9 * strength * (1 - 2 * side)).to(device, non_blocking=True)
        ends = operations.bincount(minlength=len(RANDAUGMENT_OPERATIONS)).cumsum(0).tolist()
        for name, change in _colour_operations(strength).items():
            place = RANDAUGMENT_OPERATIONS.index(name)
            group = slice(ends[place - 1], ends[place])
            if group.start < group.stop:
                images[group] = change(images[group], factors[group])
    images = _sample_some(images, matrices, moved)
    return images.index_select(0, numbers.argsort().to(device, non_blocking=True))


def _colour_operations(strength: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """RandAugment's colour operations on images [n, C, H, W] with factors [n] at a strength of 0 to 1."""
    # Of 256 levels, where torchvision has 255: at strength 0 white pixels stay white.
    threshold = (1 - strength) * 256 / 255
    bits = 8 - round(4 * strength)
    return {
        "auto_contrast": lambda images, _: auto_contrast(images),
        "equalize": lambda images, _: equalize(images),
        "solarize": lambda images, _: solarize(images, threshold),
        "posterize": lambda images, _: posterize(images, bits),
        "color": adjust_color,
        "contrast": adjust_contrast,
        "brightness": adjust_brightness,
        "sharpness": adjust_sharpness,
    }


@lru_cache(maxsize=64)
def _randaugment_matrices(strength: float, height: int, width: int) -> Tensor:
    """The matrix of each operation for both signs, [14, 2, 3, 3]; the identity for colour operations."""
    signs = torch.tensor([1.0, -1.0])
    none = torch.zeros(2)
    slopes = 0.3 * strength * signs
    # Pillow, and so the paper, shears around the upper left corner.
    to_corner, back = (
        translation(none - width / 2, none - height / 2),
        translation(none + width / 2, none + height / 2),
    )
    geometric = {
        "rotate": rotation(math.radians(30 * strength) * signs),
        "shear_x": _chain([back, shearing(slopes, none), to_corner]),
        "shear_y": _chain([back, shearing(none, slopes), to_corner]),
        "translate_x": translation(int(150 / 331 * width * strength) * signs, none),
        "translate_y": translation(none, int(150 / 331 * height * strength) * signs),
    }
    return torch.stack([geometric.get(name, translation(none, none)) for name in RANDAUGMENT_OPERATIONS])


def _sample_some(images: Tensor, matrices: Tensor, chosen: Tensor) -> Tensor:
    """`affine` on the chosen images, in place; matrices [B, 3, 3] and chosen, bool [B], are on the CPU."""
    members = chosen.nonzero().squeeze(1)
    if len(members) == 0:
        return images
    there = members.to(images.device, non_blocking=True)
    return images.index_copy_(0, there, affine(images.index_select(0, there), matrices[members]))


def _erase_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing with DeiT's settings, in place."""
    members = (torch.rand(len(images), generator=generator) < probability).nonzero().squeeze(1)
    if len(members) == 0:
        return images
    device, (channels, height, width) = images.device, images.shape[1:]
    sizes = _random_sizes(len(members), (height, width), _ERASED_AREA, _ERASED_ASPECT, generator)
    heights, widths = (size.round().clamp(min=1) for size in sizes)
    rows, columns = torch.rand(2, len(members), generator=generator)
    top, left = (rows * (height - heights + 1)).floor(), (columns * (width - widths + 1)).floor()
    boxes = torch.stack([top, top + heights, left, left + widths], 1).long()
    # Noise is drawn on the device, from a seed drawn on the CPU: it is the one thing that is not small.
    seed = int(torch.randint(2**62, (), generator=generator))
    amount = channels * int((heights * widths).sum())
    noise = torch.randn(amount, generator=torch.Generator(device).manual_seed(seed), device=device)
    there = members.to(device, non_blocking=True)
    some = images.index_select(0, there)
    # torch.std takes several times as long on a CPU.
    mean, square = some.mean(), (some * some).mean()
    noise = noise.mul_((square - mean * mean).clamp_(min=0).sqrt_()).add_(mean).clamp_(0, 1)
    return images.index_copy_(0, there, erase(some, boxes.to(device, non_blocking=True), noise))


def _random_sizes(
    count: int,
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> Sequence[Tensor]:
    """Heights and widths (each [n], not rounded) of boxes that fit into an image.

    The area, as a share of the image's, is uniform, and so is the logarithm of the aspect ratio. The first of
    ten draws that fits counts; where none does, the first one is cut to the image.
    """
    height, width = size
    shares, logarithms = torch.rand(2, 10, count, generator=generator)
    areas = (area[0] + (area[1] - area[0]) * shares) * (height * width)
    ratios = (math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * logarithms).exp()
    heights, widths = (areas * ratios).sqrt(), (areas / ratios).sqrt()
    first = ((heights <= height) & (widths <= width)).int().argmax(0, keepdim=True)
    return heights.gather(0, first)[0].clamp(max=height), widths.gather(0, first)[0].clamp(max=width)


def _signed(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers between -1 and 1, [n]."""
    return torch.rand(count, generator=generator) * 2 - 1
