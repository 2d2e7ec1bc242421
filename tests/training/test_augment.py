"""Whole-batch augmentation: each operation against torchvision, and the batch's behaviour as a whole."""

import vitrail.torchvision_ops  # noqa: F401, I001  (before torchvision)

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from vitrail.config import AugmentSection
from vitrail.training import augment
from vitrail.training.augment import Augment

EVERYTHING = AugmentSection(
    flip=True,
    crop=2,
    resized_crop=0.3,
    rotate=15,
    translate=0.1,
    scale=0.1,
    shear=5,
    randaugment=2,
    erase=0.5,
)
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 20, 36), (1, 8, 8), (3, 8, 8)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, height=32, width=40, seed=0):
    """Smooth random uint8 images that use most of the range."""
    coarse = torch.rand(count, channels, 4, 5, generator=generator(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def grey_levels_apart(ours, theirs):
    """Largest difference between 0..1 and uint8 images, in levels of 255."""
    return (ours * 255 - theirs.float()).abs().max()


# Colour. torchvision rounds down to 8 bits where we keep floats, hence one level; contrast and saturation
# round the grey down as well, hence up to two.

FACTORS = [0.1, 0.6, 1.0, 1.4, 1.9]
COLOUR = {
    "auto_contrast": (lambda x, _: augment.auto_contrast(x), lambda x, _: reference.autocontrast(x), 1.01),
    "equalize": (lambda x, _: augment.equalize(x), lambda x, _: reference.equalize(x), 0.01),
    "solarize": (
        lambda x, f: augment.solarize(x, 100 * f / 255),
        lambda x, f: reference.solarize(x, 100 * f),
        0.01,
    ),
    "posterize": (
        lambda x, f: augment.posterize(x, 1 + int(3 * f)),
        lambda x, f: reference.posterize(x, 1 + int(3 * f)),
        0.01,
    ),
    "color": (
        lambda x, f: augment.adjust_color(x, torch.full((len(x),), f)),
        reference.adjust_saturation,
        2.01,
    ),
    "contrast": (
        lambda x, f: augment.adjust_contrast(x, torch.full((len(x),), f)),
        reference.adjust_contrast,
        2.01,
    ),
    "brightness": (
        lambda x, f: augment.adjust_brightness(x, torch.full((len(x),), f)),
        reference.adjust_brightness,
        1.01,
    ),
    "sharpness": (
        lambda x, f: augment.adjust_sharpness(x, torch.full((len(x),), f)),
        reference.adjust_sharpness,
        2.01,
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", COLOUR)
def test_colour_operation_is_torchvisions(name, factor, channels):
    ours, theirs, levels = COLOUR[name]
    images = pictures(channels=channels)
    changed = ours(images / 255, factor)
    assert grey_levels_apart(changed, theirs(images, factor)) <= levels
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_factors_belong_to_their_images():
    images = pictures(count=2) / 255
    changed = augment.adjust_brightness(images, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(changed, torch.stack([images[0] * 0.5, images[1]]))


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_images_survive_colour_statistics(value):
    images = torch.full((2, 3, 32, 32), value) / 255
    for operation in (augment.auto_contrast, augment.equalize):
        torch.testing.assert_close(operation(images), images)


def test_equalize_leaves_images_with_too_few_pixels():
    images = pictures(height=8, width=8)
    torch.testing.assert_close(augment.equalize(images / 255), images / 255)


# Geometry. Both sample in float32; the coordinates differ in the last digits.

GEOMETRIC = {
    "rotate": (
        lambda v: augment.rotation(torch.tensor([math.radians(30 * v)])),
        {"angle": lambda v: -30 * v},
    ),
    "scale": (
        lambda v: augment.scaling(torch.tensor([1 + v / 2]), torch.tensor([1 + v / 2])),
        {"scale": lambda v: 1 + v / 2},
    ),
    "translate": (
        lambda v: augment.translation(torch.tensor([10.0 * v]), torch.tensor([-5.0 * v])),
        {"translate": lambda v: [10 * v, -5 * v]},
    ),
    "shear_x": (
        lambda v: augment.shearing(torch.tensor([math.tan(math.radians(20 * v))]), torch.zeros(1)),
        {"shear": lambda v: [20 * v, 0.0]},
    ),
    "shear_y": (
        lambda v: augment.shearing(torch.zeros(1), torch.tensor([math.tan(math.radians(20 * v))])),
        {"shear": lambda v: [0.0, 20 * v]},
    ),
}


@pytest.mark.parametrize("value", [-1.0, 0.2, 0.6])
@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 28, 28), (1, 9, 8)])
def test_geometric_operation_is_torchvisions_affine(name, value, shape):
    channels, height, width = shape
    images = pictures(3, channels, height, width) / 255
    matrix, settings = GEOMETRIC[name]
    neutral = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    changes = {key: make(value) for key, make in settings.items()}
    expected = reference.affine(
        images, **neutral | changes, interpolation=InterpolationMode.BILINEAR, fill=None
    )
    torch.testing.assert_close(
        augment.affine(images, matrix(value).expand(3, 3, 3)), expected, atol=2e-4, rtol=0
    )


def test_rotation_by_a_quarter_is_exact():
    images = pictures(2, 3, 16, 16) / 255
    quarter = augment.rotation(torch.full((2,), math.pi / 2))
    torch.testing.assert_close(augment.affine(images, quarter), images.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_randaugment_geometry_is_torchvisions():
    height, width, strength = 30, 40, 0.9
    images = pictures(1, 3, height, width) / 255
    matrices = augment._randaugment_matrices(strength, height, width)
    settings = {
        "rotate": {"angle": -30 * strength},
        "shear_x": {"shear": [math.degrees(math.atan(0.3 * strength)), 0.0], "center": [0, 0]},
        "shear_y": {"shear": [0.0, math.degrees(math.atan(0.3 * strength))], "center": [0, 0]},
        "translate_x": {"translate": [int(150 / 331 * width * strength), 0]},
        "translate_y": {"translate": [0, int(150 / 331 * height * strength)]},
    }
    neutral = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    for name, changes in settings.items():
        place = augment.RANDAUGMENT_OPERATIONS.index(name)
        ours = augment.affine(images, matrices[place, :1])
        expected = reference.affine(images, **neutral | changes, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0, msg=name)
        undone = matrices[place, 0] @ matrices[place, 1]
        if not name.startswith("shear"):
            torch.testing.assert_close(undone, torch.eye(3), atol=1e-5, rtol=0)


def test_chained_matrices_apply_from_first_to_last():
    images = pictures(1, 1, 24, 24) / 255
    move, turn = augment.translation(torch.tensor([6.0]), torch.zeros(1)), augment.rotation(torch.ones(1))
    both = augment.affine(images, augment._chain([move, turn]))
    one_by_one = augment.affine(augment.affine(images, move), turn)
    # What the move pushes over the border is lost when sampling twice, so compare the middle.
    torch.testing.assert_close(both[..., 8:16, 8:16], one_by_one[..., 8:16, 8:16], atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_takes_exact_pixels_of_the_padded_image(shape):
    images = pictures(9, *shape)
    corners = torch.tensor([(row, column) for row in (0, 3, 6) for column in (0, 2, 6)])
    cropped = augment.crop(images, 3, corners)
    padded = torch.nn.functional.pad(images, [3] * 4)
    for ours, whole, (row, column) in zip(cropped, padded, corners.tolist(), strict=True):
        assert torch.equal(ours, whole[:, row : row + shape[1], column : column + shape[2]])


def test_flip_mirrors_the_chosen_images():
    images = pictures(3)
    flipped = augment.flip(images, torch.tensor([True, False, True]))
    assert torch.equal(flipped, torch.stack([images[0].flip(-1), images[1], images[2].flip(-1)]))


def test_a_crop_that_may_show_nothing_of_the_image_is_refused():
    images = torch.zeros(2, 1, 8, 10, dtype=torch.uint8)
    assert Augment(AugmentSection(crop=7))(images, generator()).shape == images.shape
    with pytest.raises(ValueError, match="got 8 for 8 x 10 pixels"):
        Augment(AugmentSection(crop=8))(images, generator())


def test_flip_and_crop_of_a_batch_are_windows_of_the_padded_images_or_their_mirrors():
    images = pictures(32, 3, 10, 12)
    changed = (Augment(AugmentSection(flip=True, crop=2))(images, generator()) * 255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images, [2] * 4)
    mirrored = 0
    for ours, whole in zip(changed, padded, strict=True):
        straight, mirror = (
            any(
                torch.equal(ours, source[:, row : row + 10, column : column + 12])
                for row in range(5)
                for column in range(5)
            )
            for source in (whole, whole.flip(-1))
        )
        assert straight or mirror
        mirrored += mirror
    assert 6 < mirrored < 26


def test_resized_crop_keeps_its_area_and_aspect():
    section = AugmentSection(resized_crop=0.2)
    matrices = Augment(section)._geometry(torch.zeros(4000, 1, 30, 40), generator(), None)
    widths, heights = matrices[:, 0, 0] * 40, matrices[:, 1, 1] * 30
    areas = widths * heights / 1200
    ratios = widths / heights
    assert 0.2 - 1e-4 <= areas.min() < 0.21
    assert 0.9 < areas.max() <= 1 + 1e-4
    assert 3 / 4 - 1e-3 <= ratios.min() < 0.76
    assert 1.32 < ratios.max() <= 4 / 3 + 1e-3
    # The crop lies inside the image.
    assert (matrices[:, 0, 2].abs() + widths / 2).max() <= 20 + 1e-3
    assert (matrices[:, 1, 2].abs() + heights / 2).max() <= 15 + 1e-3


def test_affine_parts_stay_in_their_ranges():
    images = torch.zeros(2000, 1, 20, 40)
    turn = Augment(AugmentSection(rotate=10))._geometry(images, generator(), None)
    degrees = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]))
    assert 9.8 < degrees.max() <= 10.001
    assert -10.001 <= degrees.min() < -9.8
    move = Augment(AugmentSection(translate=0.1))._geometry(images, generator(), None)
    assert 3.9 < move[:, 0, 2].abs().max() <= 4.001
    assert 1.9 < move[:, 1, 2].abs().max() <= 2.001
    size = 1 / Augment(AugmentSection(scale=0.2))._geometry(images, generator(), None)[:, 0, 0]
    assert 0.799 <= size.min() < 0.81
    assert 1.19 < size.max() <= 1.201


# Random erasing.


def test_erase_replaces_exactly_the_box():
    images = pictures(2, 3, 8, 10) / 255
    boxes = torch.tensor([[1, 4, 2, 7], [0, 8, 0, 0]])
    erased = augment.erase(images, boxes, torch.full((45,), 0.5))
    expected = images.clone()
    expected[0, :, 1:4, 2:7] = 0.5
    assert torch.equal(erased, expected)


@pytest.mark.parametrize("size", [(32, 32), (20, 36), (8, 8)])
def test_erased_areas_and_share(size):
    images = torch.rand(1500, 1, *size, generator=generator(1)) * 0.9 + 0.05
    erased = augment._erase_some(images.clone(), 0.25, generator())
    boxes = (erased != images)[:, 0]
    areas = boxes.sum((1, 2)) / (size[0] * size[1])
    hit = areas > 0
    assert 0.2 < hit.float().mean() < 0.3
    # Sides are rounded to whole pixels, which matters most for small areas.
    assert areas[hit].min() >= 0.02 * 0.5
    assert areas[hit].max() <= 1 / 3 * 1.25
    assert 0.13 < areas[hit].mean() < 0.22
    # Each is one solid box.
    rows, columns = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert torch.equal(boxes.sum((1, 2)), rows * columns)
    assert erased.min() >= 0
    assert erased.max() <= 1


# Batches as a whole.


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_on(shape):
    images = pictures(64, *shape)
    before = images.clone()
    batch = Augment(EVERYTHING)(images, generator())
    assert torch.equal(images, before)
    assert batch.shape == images.shape
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert batch.isfinite().all()
    assert batch.min() >= -1e-6
    assert batch.max() <= 1 + 1e-6
    assert (batch != images / 255).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_same_generator_state_same_batch(shape):
    images = pictures(32, *shape)
    first, again, other = (Augment(EVERYTHING)(images, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_plays_no_part():
    images = pictures(16)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Augment(EVERYTHING)(images, generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(Augment(EVERYTHING)(images, generator()), first)


@pytest.mark.parametrize("strong", [True, False])
def test_everything_off_only_scales(strong):
    images = pictures()
    rng = generator()
    state = rng.get_state()
    assert torch.equal(Augment(AugmentSection())(images, rng, strong=strong), images / 255)
    assert torch.equal(rng.get_state(), state)


def test_without_the_strong_part():
    images = pictures(32)
    weak = EVERYTHING.model_copy(update={"randaugment": 0, "erase": 0.0})
    assert torch.equal(
        Augment(EVERYTHING)(images, generator(), strong=False), Augment(weak)(images, generator())
    )
    only_strong = AugmentSection(randaugment=2, erase=1.0)
    assert torch.equal(Augment(only_strong)(images, generator(), strong=False), images / 255)


def test_magnitude_zero_leaves_only_the_operations_without_magnitude():
    images = pictures(400, height=16, width=16)
    batch = Augment(AugmentSection(randaugment=1, randaugment_magnitude=0))(images, generator())
    changed = (batch - images / 255).abs().amax((1, 2, 3)) > 1e-5
    # Auto-contrast; equalize needs 255 pixels below the brightest level, which 16 x 16 seldom has.
    assert changed.float().mean() < 3 / 14


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_the_named_operation_on_each_image(channels):
    count, strength = 200, 0.9
    images = pictures(count, channels, 20, 24)
    batch = Augment(AugmentSection(randaugment=1, randaugment_magnitude=9))(images, generator(5))
    pixels = images / 255
    table = augment._randaugment_matrices(strength, 20, 24)
    colour = augment._colour_operations(strength)
    seen = set()
    for number in range(count):
        one = pixels[number : number + 1]
        matches = []
        for place, name in enumerate(augment.RANDAUGMENT_OPERATIONS):
            for side, sign in ((0, 1), (1, -1)):
                if name in colour:
                    factors = torch.tensor([1 + sign * 0.9 * strength])
                    expected = colour[name](one, factors)
                elif name == "identity":
                    expected = one
                else:
                    expected = augment.affine(one, table[place, side : side + 1])
                if torch.allclose(batch[number : number + 1], expected, atol=1e-4):
                    matches.append(name)
        assert matches, number
        seen.add(matches[0])
    # On one channel, color is the identity.
    assert len(seen) >= 12


def test_two_operations_on_an_image_keep_their_order():
    """A colour operation between two geometric ones is applied to what the first one left."""
    images = pictures(300, 1, 16, 16)
    once = Augment(AugmentSection(randaugment=2, randaugment_magnitude=10))(images, generator(2))
    rng = generator(2)
    rounds = torch.randint(14, (2, 300), generator=rng)
    sides = torch.randint(2, (2, 300), generator=rng)
    table = augment._randaugment_matrices(1.0, 16, 16)
    colour = augment._colour_operations(1.0)
    for number in range(300):
        names = [augment.RANDAUGMENT_OPERATIONS[operations[number]] for operations in rounds]
        geometric = [name not in colour and name != "identity" for name in names]
        if all(geometric):
            continue  # sampled once here, twice below
        expected = images[number : number + 1] / 255
        for turn, name in enumerate(names):
            side = sides[turn, number]
            if name in colour:
                expected = colour[name](expected, 1 + 0.9 * (1.0 - 2 * side)[None])
            elif geometric[turn]:
                expected = augment.affine(expected, table[rounds[turn, number], side][None])
        torch.testing.assert_close(once[number : number + 1], expected, atol=1e-4, rtol=0, msg=str(names))
