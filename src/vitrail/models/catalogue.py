"""The variants at a glance: size, cost, and what published weights of them reach.

Counting all variants takes a minute, so parameters and multiply-adds are kept here, as they were counted. The
tests count anew or compare with closed forms, and say which line is missing or wrong and how it must read.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitrail.models import SHORT_NAMES, VARIANTS, list_models
from vitrail.models.published import RECIPES, TOP1

PARAMETERS_AND_MACS: dict[str, tuple[int, int]] = {
    "cait_cifar": (1_343_818, 81_430_272),
    "cait_m36_384": (271_221_352, 172_943_655_936),
    "cait_m48_448": (356_460_520, 329_107_670_016),
    "cait_s24_224": (46_916_200, 9_327_327_744),
    "cait_s24_384": (47_062_120, 32_110_109_184),
    "cait_s36_384": (68_366_632, 47_907_955_200),
    "cait_xs24_384": (26_670_088, 19_240_642_944),
    "cait_xxs24_224": (11_956_264, 2_523_475_200),
    "cait_xxs24_384": (12_029_224, 9_599_136_000),
    "cait_xxs36_224": (17_299_720, 3_755_697_408),
    "cait_xxs36_384": (17_372_680, 14_313_009_408),
    "cct_14_7x2_224": (22_367_273, 5_521_901_568),
    "cct_14_7x2_384": (22_513_193, 18_580_282_368),
    "cct_2_3x2_32": (283_723, 35_341_568),
    "cct_4_3x2_32": (482_123, 50_021_632),
    "cct_6_3x1_32": (3_233_803, 1_013_844_480),
    "cct_6_3x1_32_sine": (3_168_267, 1_013_844_480),
    "cct_6_3x2_32": (3_326_923, 253_463_040),
    "cct_7_3x1_32": (3_760_139, 1_181_616_640),
    "cct_7_3x1_32_sine": (3_694_603, 1_181_616_640),
    "cct_7_3x2_32": (3_853_259, 289_114_624),
    "cct_7_7x2_224": (4_804_521, 1_604_784_128),
    "crossvit_15_240": (27_528_464, 5_790_571_776),
    "crossvit_15_dagger_240": (28_209_008, 6_112_304_640),
    "crossvit_15_dagger_408": (28_500_080, 21_398_550_336),
    "crossvit_18_240": (43_271_408, 9_031_158_528),
    "crossvit_18_dagger_240": (44_266_976, 9_473_218_944),
    "crossvit_18_dagger_408": (44_606_560, 32_409_093_024),
    "crossvit_9_240": (8_553_296, 1_840_796_160),
    "crossvit_9_dagger_240": (8_776_592, 1_979_049_984),
    "crossvit_base_240": (105_025_232, 21_191_473_152),
    "crossvit_cifar": (1_280_660, 121_901_952),
    "crossvit_small_240": (26_856_272, 5_615_557_632),
    "crossvit_tiny_240": (7_014_800, 1_562_734_080),
    "cvt_6_4_32": (3_190_283, 214_731_264),
    "cvt_7_4_32": (3_716_619, 250_382_848),
    "deit3_base_patch16_224": (86_585_320, 17_563_828_224),
    "deit3_base_patch16_384": (86_877_160, 55_484_350_464),
    "deit3_huge_patch14_224": (632_126_440, 167_295_109_120),
    "deit3_large_patch16_224": (304_374_760, 61_554_712_576),
    "deit3_large_patch16_384": (304_763_880, 191_066_300_416),
    "deit3_medium_patch16_224": (38_849_512, 7_990_968_320),
    "deit3_small_patch16_224": (22_059_496, 4_598_882_304),
    "deit3_small_patch16_384": (22_205_416, 15_490_351_104),
    "deit_base_distilled_patch16_224": (87_338_192, 17_656_811_520),
    "deit_base_distilled_patch16_384": (87_630_032, 55_591_342_080),
    "deit_base_patch16_224": (86_567_656, 17_563_828_224),
    "deit_base_patch16_384": (86_859_496, 55_484_350_464),
    "deit_cifar": (1_808_852, 127_415_040),
    "deit_small_distilled_patch16_224": (22_436_432, 4_624_140_288),
    "deit_small_patch16_224": (22_050_664, 4_598_882_304),
    "deit_tiny_distilled_patch16_224": (5_910_800, 1_261_003_776),
    "deit_tiny_patch16_224": (5_717_416, 1_253_683_200),
    "diffvit_base_patch16_224": (86_563_048, 17_563_828_224),
    "diffvit_cifar": (350_795, 39_535_872),
    "diffvit_cifar_plain": (1_807_114, 125_341_824),
    "diffvit_small_patch16_224": (22_050_664, 4_598_882_304),
    "diffvit_tiny_patch16_224": (5_717_416, 1_253_683_200),
    "pvt_cifar": (1_436_218, 45_640_320),
    "pvt_large": (61_369_320, 9_813_765_632),
    "pvt_medium": (44_208_104, 6_659_175_424),
    "pvt_small": (24_485_864, 3_815_701_504),
    "pvt_tiny": (13_229_288, 1_932_911_616),
    "pvt_v2_b0": (3_666_760, 566_065_664),
    "pvt_v2_b1": (14_009_000, 2_108_355_584),
    "pvt_v2_b2": (25_362_856, 4_026_734_592),
    "pvt_v2_b2_li": (22_553_512, 3_888_850_944),
    "pvt_v2_b3": (45_238_696, 6_897_303_552),
    "pvt_v2_b4": (62_556_072, 10_101_116_416),
    "pvt_v2_b5": (81_956_008, 11_717_260_288),
    "pvt_v2_cifar": (1_557_418, 49_411_968),
    "swin_base_patch4_window12_384": (87_903_584, 47_083_134_976),
    "swin_base_patch4_window7_224": (87_768_224, 15_430_946_816),
    "swin_cifar": (929_822, 79_889_664),
    "swin_large_patch4_window12_384": (196_735_516, 103_919_087_616),
    "swin_large_patch4_window7_224": (196_532_476, 34_475_759_616),
    "swin_mnist_2blk": (103_314, 5_482_368),
    "swin_mnist_2blk_patch2": (102_546, 21_777_024),
    "swin_small_patch4_window7_224": (49_606_258, 8_740_875_264),
    "swin_tiny_patch4_window7_224": (28_288_354, 4_490_566_656),
    "swinv2_base_window12_192": (109_280_841, 11_877_602_304),
    "swinv2_base_window12to16_192to256": (87_918_816, 21_969_235_968),
    "swinv2_base_window12to24_192to384": (87_918_816, 55_148_310_528),
    "swinv2_base_window16_256": (87_918_816, 21_969_235_968),
    "swinv2_base_window8_256": (87_918_816, 20_325_134_336),
    "swinv2_cifar": (947_422, 80_692_480),
    "swinv2_large_window12_192": (228_772_549, 26_133_917_184),
    "swinv2_large_window12to16_192to256": (196_739_932, 47_740_303_360),
    "swinv2_large_window12to24_192to384": (196_739_932, 115_991_427_072),
    "swinv2_small_window16_256": (49_728_418, 12_783_078_400),
    "swinv2_small_window8_256": (49_728_418, 11_545_857_024),
    "swinv2_tiny_window16_256": (28_347_154, 6_660_619_264),
    "swinv2_tiny_window8_256": (28_347_154, 5_939_690_496),
    "video_vit_28": (105_610, 5_754_496),
    "video_vit_base_patch16_224": (86_544_016, 180_344_893_440),
    "video_vit_small_patch16_224": (22_038_544, 56_878_061_568),
    "vit_base_patch14_dinov2": (86_579_712, 151_573_718_016),
    "vit_base_patch14_reg4_dinov2": (86_582_016, 152_115_766_272),
    "vit_base_patch16_224": (86_567_656, 17_563_828_224),
    "vit_base_patch16_384": (86_859_496, 55_484_350_464),
    "vit_base_patch32_224": (88_224_232, 4_409_186_304),
    "vit_base_patch32_384": (88_297_192, 13_043_564_544),
    "vit_base_patch8_224": (86_576_872, 78_148_337_664),
    "vit_cifar": (350_667, 39_535_872),
    "vit_cifar_plain": (1_806_538, 125_341_824),
    "vit_digits": (136_522, 2_413_696),
    "vit_huge_patch14_224": (632_045_800, 167_295_109_120),
    "vit_large_patch14_dinov2": (304_367_616, 506_803_826_688),
    "vit_large_patch14_reg4_dinov2": (304_370_688, 508_551_278_592),
    "vit_large_patch16_224": (304_326_632, 61_554_712_576),
    "vit_large_patch16_384": (304_715_752, 191_066_300_416),
    "vit_large_patch32_224": (306_535_400, 15_377_539_072),
    "vit_large_patch32_384": (306_632_680, 45_275_963_392),
    "vit_mnist_2blk": (105_098, 1_795_968),
    "vit_mnist_small": (123_307, 9_584_256),
    "vit_small_patch14_dinov2": (22_056_192, 46_696_739_328),
    "vit_small_patch14_reg4_dinov2": (22_057_344, 46_882_828_800),
    "vit_small_patch16_224": (22_050_664, 4_598_882_304),
    "vit_small_patch16_384": (22_196_584, 15_490_351_104),
    "vit_small_patch32_224": (22_878_952, 1_142_909_952),
    "vit_small_patch32_384": (22_915_432, 3_442_900_992),
    "vit_small_patch8_224": (22_055_272, 22_405_742_592),
    "vit_tiny_patch16_224": (5_717_416, 1_253_683_200),
    "vit_tiny_patch16_384": (5_790_376, 4_682_219_520),
}
"""Variant -> what `vitrail.evaluation.cost` counts, at the variant's image size and number of classes."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the catalogue."""

    name: str
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    parameters: int | None
    """None where nobody has counted yet; the same for `macs`."""
    macs: int | None
    """Multiply-adds of one image."""
    top1: dict[str, float]
    """Recipe (of `RECIPES`) -> published per cent of ImageNet-1k's validation images."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON, with each recipe told in full."""
        return {
            "name": self.name,
            "image_shape": self.image_shape,
            "parameters": self.parameters,
            "macs": self.macs,
            "top1": [
                {"percent": percent, "recipe": recipe, "about": RECIPES[recipe]}
                for recipe, percent in self.top1.items()
            ],
        }


def find_variants(pattern: str) -> list[Variant]:
    """The variants that match a shell-style pattern, or whose names hold a text, sorted.

    Raises:
        ValueError: None does; the message names the nearest.
    """
    names = list_models(pattern if set("*?[") & set(pattern) else f"*{pattern}*")
    if not names:
        near = difflib.get_close_matches(pattern.strip("*?"), [*SHORT_NAMES, *VARIANTS], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vitrail models` lists all"
        raise ValueError(f"no model matches {pattern!r}: {hint}")
    return [_variant(name) for name in names]


def _variant(name: str) -> Variant:
    config = VARIANTS[name]
    parameters, macs = PARAMETERS_AND_MACS.get(name, (None, None))
    return Variant(
        name=name,
        image_shape=(config.in_chans, *config.image_shape),
        parameters=parameters,
        macs=macs,
        top1=TOP1.get(name, {}),
    )


def table(variants: Sequence[Variant], width: int) -> str:
    """The variants as a table, a line for each published figure, and below it what the recipes are.

    Args:
        variants: At least one.
        width: Characters that a line of the explanation may have.
    """
    rows = [("model", "parameters", "GMACs", "size", "top-1", "recipe")]
    for variant in variants:
        _, height, wide = variant.image_shape
        own = (
            variant.name,
            "" if variant.parameters is None else f"{variant.parameters:,}",
            "" if variant.macs is None else f"{variant.macs / 1e9:.3f}",
            str(height) if height == wide else f"{height}x{wide}",
        )
        # As many decimals as are published, two at most; padded, so that the points stand in one column.
        figures = [(f"{round(percent, 2):<5}", recipe) for recipe, percent in variant.top1.items()]
        figures = figures or [("", "")]
        rows += [(*own, *figures[0]), *(("", "", "", "", *figure) for figure in figures[1:])]
    first, *others = (max(len(row[column]) for row in rows) for column in range(5))
    lines = []
    for name, *numbers, recipe in rows:
        aligned = (cell.rjust(size) for cell, size in zip(numbers, others, strict=True))
        lines.append("  ".join([name.ljust(first), *aligned, recipe]).rstrip())
    used = [recipe for recipe in RECIPES if any(recipe in variant.top1 for variant in variants)]
    if used:
        lines += ["", "top-1: per cent of ImageNet-1k's validation images, of published weights"]
        column = 2 + max(map(len, used)) + 2
        for recipe in used:
            lines.append(
                textwrap.fill(
                    RECIPES[recipe],
                    width,
                    initial_indent=f"  {recipe}".ljust(column),
                    subsequent_indent=" " * column,
                )
            )
    return "\n".join(lines)
