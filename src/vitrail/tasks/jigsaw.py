"""Jigsaw: an image is cut into tiles, these are shuffled, and for each one its place is predicted.

    B batch, t x t tiles, D width of the last map

Papers: Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles";
Chen et al. 2023, "Jigsaw-ViT: Learning Jigsaw Puzzles in Vision Transformer" (one answer a token instead of
one of some hundred chosen permutations, so that any permutation will do).

What differs: the pixels are shuffled, not the tokens, so every architecture serves. Jigsaw-ViT takes the
positions away; here they stay and say where a tile lies now, which tells nothing of where it came from, and
they are trained. Tiles are not set apart by gaps (Noroozi and Favaro) nor dropped (Jigsaw-ViT): edges that
go on in another tile are a clue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import without_classifier
from vitrail.tasks.masking import patchify, take, unpatchify
from vitrail.tasks.reach import blank_features, freeze_unreached
from vitrail.tasks.task import Batch, Task


class Jigsaw(Task):
    """Predict where shuffled tiles came from."""

    def __init__(self, model: Encoder, *, tiles: int = 4) -> None:
        """The puzzle around an encoder.

        Args:
            model: Any encoder; it loses its classifier, and what does not lead to its last map is frozen.
            tiles: Rows, and columns, of tiles.

        Raises:
            ValueError: Fewer than 2, or more than the last map has cells.
        """
        super().__init__()
        features = blank_features(model)
        most = min(features.grid)
        if not 2 <= tiles <= most:
            raise ValueError(
                f"tiles must lie between 2 and {most}: the model's last map has {features.grid[0]} x "
                f"{features.grid[1]} cells and cannot tell more apart; got {tiles}"
            )
        freeze_unreached(without_classifier(model), features.patches)
        self.model, self.tiles = model, tiles
        self.head = nn.Linear(features.patches.shape[2], tiles**2)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] -> "loss", and "placed", the share of tiles put where they belong.

        Raises:
            ValueError: The images cannot be cut into equal tiles.
        """
        images = batch["images"]
        origins = torch.rand(len(images), self.tiles**2, device=images.device).argsort(dim=1)
        logits = self.predict(shuffle_tiles(images, origins))
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), origins.flatten()),
            "placed": (logits.argmax(dim=2) == origins).float().mean(),
        }

    def predict(self, images: Tensor) -> Tensor:
        """For each tile of images [B, C, H, W] the logits of where it came from, [B, t * t, t * t]."""
        maps = self.model.forward_features(images).map()
        pooled = F.adaptive_avg_pool2d(maps, self.tiles)  # [B, D, t, t]
        return self.head(pooled.flatten(2).transpose(1, 2)).float()

    def trained(self) -> Encoder:
        """The encoder."""
        return self.model


def shuffle_tiles(images: Tensor, origins: Tensor) -> Tensor:
    """Put at each place the tile that another place had.

    Args:
        images: [B, C, H, W].
        origins: [B, t * t], for each place, in row-major order, where its tile comes from.

    Raises:
        ValueError: The images cannot be cut into t x t equal tiles.
    """
    height, width = images.shape[2:]
    tiles = round(origins.shape[1] ** 0.5)
    if height % tiles or width % tiles:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into {tiles} x {tiles} equal tiles; choose "
            "another number with --task.tiles, or another image size"
        )
    size = (height // tiles, width // tiles)
    return unpatchify(take(patchify(images, size), origins), size, (height, width))
