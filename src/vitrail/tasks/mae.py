"""Masked autoencoder: most patches are hidden, and their pixels are predicted from the rest.

    B batch, N patches, m of them hidden, P = C * p * p values of a patch

The task for clips, `vitrail.tasks.video_mae`, is this one with other patches and masks.

Paper: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners". The encoder sees the visible
patches only; a small decoder gets them and a mask token for each hidden place.

What differs: the decoder's last block and its output are computed for the hidden patches only, which the
loss reads (the same numbers in less time); the decoder grows with the encoder; hidden pixels are zero before
they reach the encoder, so that convolutional stems, whose tokens overlap, cannot look at them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.patch import patch_grid
from vitrail.components.position import SinCosPosition2d, coordinates
from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import without_classifier
from vitrail.tasks.masking import (
    Masking,
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

    name: ClassVar[str] = "mae"
    """The task's name, for messages."""
    takes: ClassVar[tuple[int, str]] = (2, "images")
    """How many axes the grid of the patches has, and of what."""

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
        features = one_patch_features(model, self.name)
        if len(features.grid) != self.takes[0]:
            raise ValueError(
                f"task {self.name} hides patches of {self.takes[1]}, which {type(model).__name__} does not "
                "take: use task mae for images, task video_mae for clips"
            )
        freeze_unreached(without_classifier(model), features.patches, features.prefix)
        (stride, width), depth = model.stages[0], len(model.block_names())
        values = self._patch_values(model)
        if normalise_targets and values == 1:
            raise ValueError("normalise_targets needs patches of more than one value; switch it off")
        if decoder_dim is None:
            decoder_dim = min(max(round(width / 48), 1) * 32, 512)
        if decoder_depth is None:
            decoder_depth = min(max(depth * 2 // 3, 1), 8)
        self.model, self.patch_size = model, stride
        self.ratio, self.norm, self.normalise_targets = ratio, norm, normalise_targets
        self.decoder = Predictor(width, decoder_dim, decoder_depth, decoder_heads, values)
        self.position = self._position(decoder_dim)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] -> "loss", and "explained".

        "explained" is the share of the variance of the hidden targets that the prediction accounts for: 0
        where it knows no more than their mean, 1 where it is right.
        """
        images = batch["images"]
        masking = self.masking(images)
        targets = take(self.targets(images), masking.masked)
        prediction = self.predict(images, masking).float()
        loss = {"l2": F.mse_loss, "l1": F.l1_loss}[self.norm](prediction, targets)
        missed = F.mse_loss(prediction.detach(), targets)
        return {"loss": loss, "explained": 1 - missed / targets.var(correction=0).clamp(min=1e-6)}

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """What the decoder says of the hidden patches, in the units of the targets: [B, m, P]."""
        visible = images * ~self.pixels(self._mask(masking), images)
        seen = self.model.forward_features(visible, keep=masking.keep)
        return self.decoder(seen, masking.keep, masking.masked, self.positions(images))

    def targets(self, images: Tensor) -> Tensor:
        """What should be predicted of all patches, [B, N, P]."""
        patches = self.patches(images)
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
            masking = self.masking(images, generator)
            prediction = self.predict(images, masking).float()
        finally:
            self.train(mode)
        shown = take(self.patches(images), masking.keep)
        if self.normalise_targets:
            prediction = _borrow_statistics(prediction, shown, masking, self.places(images))
        patches = take(torch.cat([shown, prediction], dim=1), masking.restore)
        hidden = self.pixels(self._mask(masking), images)
        return Reconstruction(
            images=images,
            hidden=hidden,
            masked=images * ~hidden,
            prediction=self.images_of(patches, images),
        )

    def trained(self) -> Encoder:
        """The encoder; the decoder has done its work."""
        return self.model

    # What images and their patches are, which is another matter for clips.

    def masking(self, images: Tensor, generator: torch.Generator | None = None) -> Masking:
        """Which patches are hidden."""
        return random_masking(len(images), len(self.places(images)), self.ratio, images.device, generator)

    def patches(self, images: Tensor) -> Tensor:
        """Images cut into patches, [B, N, P]."""
        return patchify(images, (self.patch_size, self.patch_size))

    def images_of(self, patches: Tensor, images: Tensor) -> Tensor:
        """Patches [B, N, P] put together, in the shape of some images."""
        return unpatchify(patches, (self.patch_size, self.patch_size), (images.shape[2], images.shape[3]))

    def pixels(self, mask: Tensor, images: Tensor) -> Tensor:
        """A mask of patches [B, N] -> of the pixels of some images, of all channels alike."""
        return pixels_of(mask, self.patch_size, (images.shape[2], images.shape[3]))

    def positions(self, images: Tensor) -> Tensor:
        """The decoder's positions for all patches, [1, N, d]."""
        return self.position(patch_grid(images.shape[2], images.shape[3], self.patch_size))

    def places(self, images: Tensor) -> Tensor:
        """Where each patch lies, in patches: [N, 2]."""
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
        return torch.stack(coordinates(grid, images.device), dim=1)

    def _position(self, dim: int) -> nn.Module:
        return SinCosPosition2d(dim)

    def _patch_values(self, model: Encoder) -> int:
        """P."""
        return int(model.config.in_chans) * model.stages[0].stride ** 2

    @staticmethod
    def _mask(masking: Masking) -> Tensor:
        """[B, N], true where a patch is hidden."""
        patches = masking.keep.shape[1] + masking.masked.shape[1]
        mask = torch.ones(len(masking.keep), patches, dtype=torch.bool, device=masking.keep.device)
        return mask.scatter(1, masking.keep, False)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch: [B, N, P] -> twice [B, N, 1]."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()  # a patch of one colour has no deviation to divide by


def _borrow_statistics(prediction: Tensor, shown: Tensor, masking: Masking, places: Tensor) -> Tensor:
    """Give predictions [B, m, P] the mean and deviation of the shown patches [B, n, P] around them."""
    mean, deviation = _statistics(shown)
    distances = torch.cdist(places[masking.masked], places[masking.keep])  # [B, m, n]
    shares = (-0.5 * distances.square()).softmax(dim=2)
    return prediction * (shares @ deviation) + shares @ mean
