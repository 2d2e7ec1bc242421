"""The contract that every architecture keeps: three steps from images to features, and one head.

    B batch, C channels, H x W pixels, N patches, P prefix tokens, D width, K classes

`patch(images)` gives tokens and their grid, `place(tokens, grid)` adds positions and prefix tokens,
`encode(tokens, grid)` runs the blocks. `forward_features` strings them together and returns a `Features`
record that carries its own geometry: nobody outside needs to know how many prefix tokens there are or which
shape the grid has. timm calls the same surface `forward_features` and `forward_intermediates`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Stage(NamedTuple):
    """One level of a pyramid: how many pixels one cell stands for, and how many channels it has."""

    stride: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Features:
    """What an encoder saw, with its geometry."""

    patches: Tensor
    """[B, N, D], row-major; fewer than the grid holds where `keep` dropped some."""
    prefix: Tensor
    """[B, P, D]: class token, then registers; P may be 0."""
    grid: tuple[int, ...]
    """(rows, columns) of the full grid, or (time, rows, columns)."""
    stages: tuple[Tensor, ...] = ()
    """Maps [B, D_i, H_i, W_i] of a pyramid, finest first."""
    layers: dict[int, Features] = field(default_factory=dict)
    """Features after the blocks that `layers=` asked for, by the numbers as they were asked."""

    def map(self) -> Tensor:
        """The patches as a map [B, D, rows, columns] (or [B, D, time, rows, columns]).

        Raises:
            ValueError: Patches were dropped with `keep`, so they fill no grid.
        """
        cells = int(torch.Size(self.grid).numel())
        if self.patches.shape[1] != cells:
            raise ValueError(
                f"{self.patches.shape[1]} of {cells} patches were kept: no map; encode without keep="
            )
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


Fill = tuple[Tensor, Tensor]
"""A mask [B, N] (true = replace) and the token [D] that replaces."""


class Encoder(nn.Module, ABC):
    """An architecture: images to features to logits."""

    config: Any
    """The frozen config dataclass from which the model was built."""
    num_features: int
    """Width of what the head receives."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Stride and width of each map that the encoder offers, finest first."""

    @abstractmethod
    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images.

        Args:
            images: [B, C, H, W], normalised; any height and width.
            keep: [B, n] numbers of the patches to keep, dropped after positions were added (MAE); prefix
                tokens are not counted and always stay.
            fill: Mask [B, N] and token [D] that replaces masked patches before positions are added (SimMIM).
            layers: Blocks after which to keep features too; negative numbers count from the last.

        Raises:
            ValueError: Wrong channels, a layer that does not exist, or `keep` where the architecture cannot
                drop patches.
        """

    @abstractmethod
    def forward_head(self, features: Features) -> Tensor:
        """Features -> logits [B, K]."""

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for another number of classes; all else stays as it is."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides all those with one dimension."""

    def position_table(self, grid: tuple[int, int]) -> Tensor | None:
        """The positions that are added to the patches, [N, D]; None where the architecture adds none."""
        return None

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(images))
