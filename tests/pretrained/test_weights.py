"""The table of published weights says what timm says."""

from __future__ import annotations

import pytest
import timm

from vitrail.models import VARIANTS
from vitrail.pretrained.weights import TIMM, default_weights, weights_of


def test_every_tag_is_timms_and_of_a_model_with_the_same_shape() -> None:
    assert set(TIMM) <= set(VARIANTS)
    for name, tags in TIMM.items():
        known = {
            full.partition(".")[2] for full in timm.list_pretrained(f"{name}*") if full.startswith(f"{name}.")
        }
        assert set(tags) <= known, name
        config = VARIANTS[name]
        assert timm.get_pretrained_cfg(f"{name}.{tags[0]}").input_size[1:] == config.image_shape, name


def test_names_that_can_be_given() -> None:
    assert weights_of("swin_tiny")[0] == "timm:swin_tiny_patch4_window7_224.ms_in1k"
    assert "torchvision:swin_t" in weights_of("swin_tiny_patch4_window7_224")
    assert default_weights("vit_base") == "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k"
    with pytest.raises(ValueError, match="no published weights of vit_cifar are known"):
        default_weights("vit_cifar")
