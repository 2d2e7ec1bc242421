"""Masked autoencoder: most patches are hidden, and their pixels are predicted from the rest.

    B batch, N patches, m of them hidden, P = C * p * p values of a patch

Paper: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners". The encoder sees the visible
patches only; a small decoder gets them and a mask token for each hidden place.

What differs: the decoder's last block and its output are computed for the hidden patches only, which the
loss reads (the same numbers in less time); the decoder grows with the encoder; hidden pixels are zero before
they reach the encoder, so that convolutional stems, whose tokens overlap, cannot look at them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.patch import patch_grid
from vitrail.components.position import Grid, SinCosPosition2d, coordinates
from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import without_classifier
from vitrail.tasks.masking import (
    Masking,
    hide,
    patchify,
    pixels_of,
    random_masking,
    take,
    unpatchify,
)
from vitrail.tasks.predictor import Predictor
from vitrail.tasks.reach import freeze_unreached, one_patch_features
from vitrail.tasks.task import Batch, Reconstruction, Task


class MAE(Task):
    """Predict the pixels of hidden patches."""

    def __init__(
        self,
        model: Encoder,
        *,
        ratio: float = 0.75,
        norm: Literal["l2", "l1"] = "l2",
        normalise_targets: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
    ) -> None:
        """A masked autoencoder around an encoder.

        Args:
            model: An encoder that can drop patches; it loses its classifier.
            ratio: Share of the patches that is hidden.
            norm: Squared (the paper) or absolute differences.
            normalise_targets: Give each target patch mean 0 and deviation 1 (section 4.1: better features).
            decoder_dim: Width of the decoder; None: two thirds of the encoder's, in steps of 32 and at most
                512: the paper's 512 for ViT-B and larger.
            decoder_depth: Blocks of the decoder; None: two thirds of the encoder's, at most 8 (the paper's).
            decoder_heads: None: heads of width 32 (the paper's 16 of 512).

        Raises:
            ValueError: A value out of range, or an encoder that needs all patches.
        """
        super().__init__()
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {ratio}")
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm must be l2 or l1, got {norm!r}")
        features = one_patch_features(model, "mae")
        freeze_unreached(without_classifier(model), features.patches, features.prefix)
        (stride, width), depth = model.stages[0], len(model.block_names())
        values = model.config.in_chans * stride**2
        if normalise_targets and values == 1:
            raise ValueError("normalise_targets needs patches of more than one value; switch it off")
        if decoder_dim is None:
            decoder_dim = min(max(round(width / 48), 1) * 32, 512)
        if decoder_depth is None:
            decoder_depth = min(max(depth * 2 // 3, 1), 8)
        self.model, self.patch_size = model, stride
        self.ratio, self.norm, self.normalise_targets = ratio, norm, normalise_targets
        self.decoder = Predictor(width, decoder_dim, decoder_depth, decoder_heads, values)
        self.position = SinCosPosition2d(decoder_dim)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] -> "loss", and "explained".

        "explained" is the share of the variance of the hidden targets that the prediction accounts for: 0
        where it knows no more than their mean, 1 where it is right.
        """
        images = batch["images"]
        grid = self._grid(images)
        masking = random_masking(len(images), grid[0] * grid[1], self.ratio, images.device)
        targets = take(self.targets(images), masking.masked)
        prediction = self.predict(images, masking).float()
        loss = {"l2": F.mse_loss, "l1": F.l1_loss}[self.norm](prediction, targets)
        missed = F.mse_loss(prediction.detach(), targets)
        return {"loss": loss, "explained": 1 - missed / targets.var(correction=0).clamp(min=1e-6)}

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """What the decoder says of the hidden patches, in the units of the targets: [B, m, P]."""
        seen = self.model.forward_features(hide(images, masking.keep, self.patch_size), keep=masking.keep)
        positions = self.position(self._grid(images))
        return self.decoder(seen, masking.keep, masking.masked, positions)

    def targets(self, images: Tensor) -> Tensor:
        """What should be predicted of all patches, [B, N, P]."""
        patches = patchify(images, (self.patch_size, self.patch_size))
        if not self.normalise_targets:
            return patches
        mean, deviation = _statistics(patches)
        return (patches - mean) / deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """What the model makes of images [B, C, H, W] of which it sees a part.

        With normalised targets the model predicts a patch up to its mean and deviation. Taking those from the
        hidden patch itself, as is usual, shows what the model has not seen. Here they are those of the
        visible patches around, weighted by a Gaussian of their distance, one patch wide: the pattern is the
        model's, the brightness and contrast are its neighbours'.

        Args:
            images: Normalised.
            generator: Decides what is hidden; on the images' device. None: the global one.
        """
        mode = self.training
        self.eval()
        try:
            grid = self._grid(images)
            masking = random_masking(len(images), grid[0] * grid[1], self.ratio, images.device, generator)
            prediction = self.predict(images, masking).float()
        finally:
            self.train(mode)
        size, shape = (self.patch_size, self.patch_size), (images.shape[2], images.shape[3])
        shown = take(patchify(images, size), masking.keep)
        if self.normalise_targets:
            prediction = _borrow_statistics(prediction, shown, masking, grid)
        patches = take(torch.cat([shown, prediction], dim=1), masking.restore)
        mask = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device)
        return Reconstruction(
            images=images,
            hidden=pixels_of(mask.scatter(1, masking.keep, False), self.patch_size, shape),
            masked=hide(images, masking.keep, self.patch_size),
            prediction=unpatchify(patches, size, shape),
        )

    def trained(self) -> Encoder:
        """The encoder; the decoder has done its work."""
        return self.model

    def _grid(self, images: Tensor) -> Grid:
        return patch_grid(images.shape[2], images.shape[3], self.patch_size)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch: [B, N, P] -> twice [B, N, 1]."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()  # a patch of one colour has no deviation to divide by


def _borrow_statistics(prediction: Tensor, shown: Tensor, masking: Masking, grid: Grid) -> Tensor:
    """Give predictions [B, m, P] the mean and deviation of the shown patches [B, n, P] around them."""
    mean, deviation = _statistics(shown)
    places = torch.stack(coordinates(grid, shown.device), dim=1)  # [N, 2]
    distances = torch.cdist(places[masking.masked], places[masking.keep])  # [B, m, n]
    shares = (-0.5 * distances.square()).softmax(dim=2)
    return prediction * (shares @ deviation) + shares @ mean
