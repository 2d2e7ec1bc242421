"""Weights of an image model as the start of a video model: each moment is seen as the image was.

    B images, T frames, t frames a tubelet, C channels, D width

| weights | of the image model | in the video model |
|---|---|---|
| patch embedding | [D, C, p, p] | [D, t C, p, p]: the same for each frame of a tubelet, divided by t |
| positions in space | [1, P + N, D] | the same, added at each moment |
| positions in time | | zero |
| blocks, norm, class token | | the same |

A clip whose frames are all equal then has, at each moment, the tokens of the image model (Arnab et al. 2021,
ViViT, section 3.4: inflated filters, and positions that are repeated). Zeros in time are no trap: moments
differ in what they show, so their positions learn apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vitrail.models.video_vit import VideoViT
from vitrail.models.vit import ViTConfig
from vitrail.pretrained.fit import change_channels

_SHARED = (
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token",
    "pool", "qkv_bias", "position",
)  # fmt: skip
# What may differ: sizes that are resampled, the head, and what is for training only.
_FREE = {"img_size", "in_chans", "num_classes", "head", "init", "drop", "attn_drop", "drop_path"}


def video_options(image: ViTConfig) -> dict[str, Any]:
    """The fields of a video ViT that an image model decides."""
    return {name: getattr(image, name) for name in _SHARED}


def to_video(
    state: Mapping[str, Tensor], image: ViTConfig, model: VideoViT, source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make an image model's weights those of a video model.

    Args:
        state: The image model's, in our names.
        image: Its config.
        model: Which will take them.
        source: Where they came from, for messages.

    Returns:
        The weights, and what was done with those that are not as they were.

    Raises:
        ValueError: The video model computes something else than the image model; the field is named.
    """
    video = model.config
    theirs = {field.name: getattr(image, field.name) for field in fields(ViTConfig)}
    ours = {field.name: getattr(video.frame, field.name) for field in fields(ViTConfig)}
    ours["position"] = video.position
    if theirs["position"] != "learned":
        raise ValueError(
            f"{source} has position {theirs['position']!r}, and a video model starts from images with "
            "'learned' ones only"
        )
    for name, value in theirs.items():
        if name not in _FREE and value != ours[name]:
            change = f"; take {name} {value}" if name in _SHARED else ", and no video model has that"
            raise ValueError(
                f"{source} is an image model with {name} {value}, this video model has {ours[name]}{change}"
            )
    made = dict(state)
    moments = video.num_frames // video.tubelet
    made["time_embed"] = torch.zeros(1, moments, video.embed_dim)
    done = {"time_embed": f"zero for {moments} moments: the source is an image model"}
    weight = made["patch_embed.proj.weight"]
    if video.tubelet > 1:
        old, new = weight.shape[1], video.in_chans
        channels = "" if old == new else f"{old} channels made {new}, "
        one = change_channels(weight, video.in_chans)
        made["patch_embed.proj.weight"] = one.repeat(1, video.tubelet, 1, 1) / video.tubelet
        done["patch_embed.proj.weight"] = (
            f"{channels}repeated for the {video.tubelet} frames of a tubelet, 1/{video.tubelet} each"
        )
    return made, done
