"""Published weights of our variants: which there are, and which one is taken when nobody says.

The tags are those that timm gave them: `in1k` trained on ImageNet-1k, `in21k` or `in22k` on the larger set,
`_ft_in1k` fine-tuned on ImageNet-1k afterwards; `augreg` Steiner et al. 2022, `orig` Dosovitskiy et al. 2021,
`fb` and `ms` the authors of DeiT, CaiT and Swin; `dino`, `mae` and `lvd142m` trained without labels.
"""

from __future__ import annotations

from vitrail.models import SHORT_NAMES
from vitrail.pretrained.formats.torchvision import VARIANTS as TORCHVISION

_IN1K, _FT = "augreg_in1k", "augreg_in21k_ft_in1k"
_SWIN, _SWIN_LARGE = ("ms_in1k", "ms_in22k_ft_in1k", "ms_in22k"), ("ms_in22k_ft_in1k", "ms_in22k")
_DEIT3 = ("fb_in1k", "fb_in22k_ft_in1k")

TIMM: dict[str, tuple[str, ...]] = {
    "vit_tiny_patch16_224": (_FT, "augreg_in21k"),
    "vit_tiny_patch16_384": (_FT,),
    "vit_small_patch8_224": ("dino",),
    "vit_small_patch16_224": (_FT, _IN1K, "augreg_in21k", "dino"),
    "vit_small_patch16_384": (_FT, _IN1K),
    "vit_small_patch32_224": (_FT, "augreg_in21k"),
    "vit_small_patch32_384": (_FT,),
    "vit_base_patch8_224": ("augreg2_in21k_ft_in1k", _FT, "augreg_in21k", "dino"),
    "vit_base_patch16_224": (
        "augreg2_in21k_ft_in1k", _FT, _IN1K, "orig_in21k_ft_in1k", "sam_in1k", "augreg_in21k", "orig_in21k",
        "mae", "dino",
    ),
    "vit_base_patch16_384": (_FT, _IN1K, "orig_in21k_ft_in1k"),
    "vit_base_patch32_224": (_FT, _IN1K, "sam_in1k", "augreg_in21k", "orig_in21k"),
    "vit_base_patch32_384": (_FT, _IN1K),
    "vit_large_patch16_224": (_FT, "augreg_in21k", "orig_in21k", "mae"),
    "vit_large_patch16_384": (_FT,),
    "vit_large_patch32_224": ("orig_in21k",),
    "vit_large_patch32_384": ("orig_in21k_ft_in1k",),
    "vit_huge_patch14_224": ("orig_in21k", "mae"),
    **{
        f"vit_{size}_patch14_{registers}dinov2": ("lvd142m",)
        for size in ("small", "base", "large")
        for registers in ("", "reg4_")
    },
    **{
        f"deit_{size}_{suffix}": ("fb_in1k",)
        for size, suffixes in {
            "tiny": ("patch16_224", "distilled_patch16_224"),
            "small": ("patch16_224", "distilled_patch16_224"),
            "base": ("patch16_224", "patch16_384", "distilled_patch16_224", "distilled_patch16_384"),
        }.items()
        for suffix in suffixes
    },
    **{f"deit3_{size}_patch16_{side}": _DEIT3 for size in ("small", "base", "large") for side in (224, 384)},
    "deit3_medium_patch16_224": _DEIT3,
    "deit3_huge_patch14_224": _DEIT3,
    **{
        f"cait_{name}": ("fb_dist_in1k",)
        for name in (
            "xxs24_224", "xxs24_384", "xxs36_224", "xxs36_384", "xs24_384", "s24_224", "s24_384", "s36_384",
            "m36_384", "m48_448",
        )
    },
    **{
        f"crossvit_{name}": ("in1k",)
        for name in (
            "tiny_240", "small_240", "base_240", "9_240", "15_240", "18_240", "9_dagger_240", "15_dagger_240",
            "18_dagger_240", "15_dagger_408", "18_dagger_408",
        )
    },
    **{f"pvt_v2_{size}": ("in1k",) for size in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")},
    **{f"swin_{size}_patch4_window7_224": _SWIN for size in ("tiny", "small", "base")},
    "swin_large_patch4_window7_224": _SWIN_LARGE,
    "swin_base_patch4_window12_384": _SWIN,
    "swin_large_patch4_window12_384": _SWIN_LARGE,
    **{
        f"swinv2_{size}_window{window}_256": ("ms_in1k",)
        for size in ("tiny", "small", "base")
        for window in (8, 16)
    },
    **{f"swinv2_{size}_window12_192": ("ms_in22k",) for size in ("base", "large")},
    **{
        f"swinv2_{size}_window12to{window}_192to{pixels}": ("ms_in22k_ft_in1k",)
        for size in ("base", "large")
        for window, pixels in ((16, 256), (24, 384))
    },
}  # fmt: skip
"""timm's tags of each variant; the first is the default."""


def weights_of(name: str) -> tuple[str, ...]:
    """What can be given as `pretrained=` for a variant, best known first; empty: nobody published any."""
    name = SHORT_NAMES.get(name, name)
    timms = tuple(f"timm:{name}.{tag}" for tag in TIMM.get(name, ()))
    return timms + tuple(f"torchvision:{theirs}" for theirs, ours in TORCHVISION.items() if ours == name)


def default_weights(name: str) -> str:
    """The weights that `pretrained=True` means.

    Raises:
        ValueError: Nobody published any.
    """
    known = weights_of(name)
    if not known:
        raise ValueError(f"no published weights of {name} are known; give their path as pretrained=")
    return known[0]
