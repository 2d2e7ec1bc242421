"""SimMIM: the pixels of hidden areas are predicted by one linear layer, with any architecture.

    B batch, C channels, N tokens as they enter the first block, s stride of the last map

Paper: Xie et al. 2022, "SimMIM: a Simple Framework for Masked Image Modeling". A learned token stands for
what is hidden, so pyramids keep their whole grid (MAE would be faster, but they cannot drop patches).

What differs: hidden pixels are zero before they reach the encoder, so that overlapping embeddings (PVT v2,
convolutional stems, CrossViT's second branch) cannot look at them. Exactly the pixels that are hidden count
in the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.patch import patch_grid
from vitrail.components.position import Grid
from vitrail.components.tap import record
from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import without_classifier
from vitrail.tasks.masking import random_masking
from vitrail.tasks.reach import blank_features, freeze_unreached
from vitrail.tasks.task import Batch, Reconstruction, Task


class SimMIM(Task):
    """Predict the pixels of hidden squares."""

    def __init__(self, model: Encoder, *, ratio: float = 0.6, mask_size: int | None = None) -> None:
        """SimMIM around an encoder.

        Args:
            model: Any encoder; it loses its classifier, and what does not lead to its last map is frozen.
            ratio: Share of the squares that is hidden.
            mask_size: Side of a square in pixels, rounded to whole patches; None: a seventh of the shorter
                side of the model's images (the paper's 32 of 224).

        Raises:
            ValueError: A value out of range.
        """
        super().__init__()
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {ratio}")
        if mask_size is not None and mask_size < 1:
            raise ValueError(f"mask_size must be at least 1 pixel, got {mask_size}")
        with record(model, "embed") as seen:
            features = blank_features(model)
        freeze_unreached(without_classifier(model), features.patches)
        self.model, self.ratio = model, ratio
        self.stride = model.stages[-1].stride
        self.mask_token = nn.Parameter(torch.empty(seen["embed"].shape[2]))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(features.patches.shape[2], model.config.in_chans * self.stride**2)
        shape = model.config.image_shape
        patch = shape[0] / model.flow(shape).start[-1].grid[0]
        self.unit = max(1, round((min(shape) / 7 if mask_size is None else mask_size) / patch))
        self._cells: dict[tuple[Grid, torch.device], _Cells] = {}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] -> "loss", the mean absolute difference of hidden pixels."""
        images = batch["images"]
        mask, hidden = self.mask(images)
        differences = (self.predict(images, mask, hidden).float() - images).abs() * hidden
        return {"loss": differences.sum() / (hidden.sum() * images.shape[1])}

    def mask(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Choose the squares to hide.

        Args:
            images: [B, C, H, W].
            generator: On the images' device; None: the global one.

        Returns:
            A mask of tokens [B, N], true where the mask token replaces them, and one of pixels [B, 1, H, W].
        """
        grid, row_of, column_of = self._cells_of(images)
        units = patch_grid(*grid, self.unit)
        masking = random_masking(len(images), units[0] * units[1], self.ratio, images.device, generator)
        squares = torch.zeros(len(images), units[0] * units[1], dtype=torch.bool, device=images.device)
        squares = squares.scatter(1, masking.masked, True).unflatten(1, units)
        tokens = squares.repeat_interleave(self.unit, 1).repeat_interleave(self.unit, 2)
        tokens = tokens[:, : grid[0], : grid[1]]
        return tokens.flatten(1), tokens[:, row_of[:, None], column_of][:, None]

    def predict(self, images: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of images of which it does not see the hidden pixels, [B, C, H, W]."""
        maps = self.model.forward_features(images * ~hidden, fill=(mask, self.mask_token)).map()
        pixels = F.pixel_shuffle(self.head(maps.movedim(1, 3)).movedim(3, 1), self.stride)
        # Longer than the image where the encoder padded it; shorter by a few pixels where cells are no whole
        # number of pixels (CrossViT), which repeats the last.
        rows, columns = (
            torch.arange(size, device=images.device).clamp(max=given - 1)
            for size, given in zip(images.shape[2:], pixels.shape[2:], strict=True)
        )
        return pixels[:, :, rows[:, None], columns]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """What the model makes of normalised images [B, C, H, W] of which it sees a part.

        Args:
            images: Normalised.
            generator: Decides what is hidden; on the images' device. None: the global one.
        """
        mode = self.training
        self.eval()
        try:
            mask, hidden = self.mask(images, generator)
            prediction = self.predict(images, mask, hidden).float()
        finally:
            self.train(mode)
        return Reconstruction(images, hidden, images * ~hidden, torch.where(hidden, prediction, images))

    def trained(self) -> Encoder:
        """The encoder."""
        return self.model

    def _cells_of(self, images: Tensor) -> _Cells:
        """Where the pixels of images lie in the grid; kept, because a GPU would have to wait for it."""
        shape = (images.shape[2], images.shape[3])
        if (shape, images.device) not in self._cells:
            cells = self.model.flow(shape).start[-1].cells
            places = (
                torch.bucketize(torch.arange(size), torch.tensor([start for start, _ in spans]), right=True)
                for size, spans in zip(shape, (cells.rows, cells.columns), strict=True)
            )
            self._cells[shape, images.device] = _Cells(
                cells.grid, *((place - 1).to(images.device) for place in places)
            )
        return self._cells[shape, images.device]


class _Cells(NamedTuple):
    """The grid of the tokens that enter the first block, and the row and the column of each pixel in it."""

    grid: Grid
    rows: Tensor
    """[H]."""
    columns: Tensor
    """[W]."""
