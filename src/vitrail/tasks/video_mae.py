"""Masked autoencoder for clips: most patches of some frames are hidden, and predicted from the rest.

    B batch, T frames, t frames a tubelet, N = T / t * rows * columns patches, m of them hidden,
    P = t * C * p * p values of a patch

Paper: Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
Pre-Training". All is as in `vitrail.tasks.mae`, but that patches span t frames, that a tube hides the same
places in all frames, and that the decoder knows places in time.

What differs: the loss is that of absolute differences by default (the paper's are squared: `norm: l2`); the
values of a patch are normalised together, where the authors' code does so for each channel apart.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vitrail.components.space_time import SinCosPosition3d, clip_grid, frames, moments, places
from vitrail.models.encoder import Encoder
from vitrail.tasks.mae import MAE
from vitrail.tasks.masking import Masking, patchify, pixels_of, random_masking, tube_masking, unpatchify


class VideoMAE(MAE):
    """Predict the pixels of hidden patches of clips; `images` of a batch are clips [B, T, C, H, W]."""

    name: ClassVar[str] = "video_mae"
    takes: ClassVar[tuple[int, str]] = (3, "clips")

    def __init__(
        self,
        model: Encoder,
        *,
        mask: Literal["tube", "random"] = "tube",
        ratio: float | None = None,
        norm: Literal["l1", "l2"] = "l1",
        normalise_targets: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
    ) -> None:
        """A masked autoencoder around an encoder of clips.

        Args:
            model: It loses its classifier.
            mask: Hide the same places in all frames, so that no other frame shows what is hidden in one, or
                any patches.
            ratio: Share of the patches that is hidden; None: 0.9 of tubes (the paper's), 0.75 of any patches.
            norm: Absolute or squared differences.
            normalise_targets: Give each target patch mean 0 and deviation 1.
            decoder_dim: As in `MAE`; the paper's are half as wide as the encoder.
            decoder_depth: As in `MAE`; the paper's have 4 blocks.
            decoder_heads: As in `MAE`.

        Raises:
            ValueError: As `MAE`, an unknown mask, or an encoder of images.
        """
        if mask not in ("tube", "random"):
            raise ValueError(f"mask must be tube or random, got {mask!r}")
        super().__init__(
            model,
            ratio={"tube": 0.9, "random": 0.75}[mask] if ratio is None else ratio,
            norm=norm,
            normalise_targets=normalise_targets,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
        )
        self.mask, self.tubelet = mask, int(model.config.tubelet)

    def masking(self, images: Tensor, generator: torch.Generator | None = None) -> Masking:
        """Which patches are hidden: as many in every clip."""
        grid = clip_grid(images, self.tubelet, self.patch_size)
        if self.mask == "tube":
            return tube_masking(len(images), grid, self.ratio, images.device, generator)
        return random_masking(len(images), grid[0] * grid[1] * grid[2], self.ratio, images.device, generator)

    def patches(self, images: Tensor) -> Tensor:
        """Clips cut into patches, [B, N, P]."""
        cut = patchify(moments(images, self.tubelet), (self.patch_size, self.patch_size))
        return cut.flatten(1, 2)  # [B, moments, rows * columns, P] -> [B, N, P]

    def images_of(self, patches: Tensor, images: Tensor) -> Tensor:
        """Patches [B, N, P] put together, in the shape of some clips."""
        count, *_ = clip_grid(images, self.tubelet, self.patch_size)
        made = unpatchify(
            patches.unflatten(1, (count, -1)),
            (self.patch_size, self.patch_size),
            (images.shape[3], images.shape[4]),
        )
        return frames(made, self.tubelet)

    def pixels(self, mask: Tensor, images: Tensor) -> Tensor:
        """A mask of patches [B, N] -> of the pixels of some clips, [B, T, 1, H, W]."""
        count, *_ = clip_grid(images, self.tubelet, self.patch_size)
        shape = (images.shape[3], images.shape[4])
        return pixels_of(mask.unflatten(1, (count, -1)), self.patch_size, shape).repeat_interleave(
            self.tubelet, 1
        )

    def positions(self, images: Tensor) -> Tensor:
        """The decoder's positions for all patches, [1, N, d]."""
        return self.position(clip_grid(images, self.tubelet, self.patch_size))

    def places(self, images: Tensor) -> Tensor:
        """Where each patch lies, in moments and patches: [N, 3]."""
        return places(clip_grid(images, self.tubelet, self.patch_size), images.device)

    def _position(self, dim: int) -> nn.Module:
        return SinCosPosition3d(dim)

    def _patch_values(self, model: Encoder) -> int:
        """P."""
        return int(model.config.tubelet) * super()._patch_values(model)
