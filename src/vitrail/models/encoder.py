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
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.components.flow import Flow
from vitrail.components.position import TableLayout
from vitrail.components.tap import Tap


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


def asked_blocks(layers: Sequence[int], depth: int) -> dict[int, list[int]]:
    """Which of `depth` blocks `layers` asks for: number of the block, from 0 -> how it was asked for.

    Raises:
        ValueError: There is no such block.
    """
    asked: dict[int, list[int]] = {}
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(
                f"layer {layer} of a model with {depth} blocks; expected {-depth} to {depth - 1}"
            )
        asked.setdefault(layer % depth, []).append(layer)
    return asked


def bias_by_offset(bias: Tensor, window: tuple[int, int]) -> Tensor:
    """One value an offset instead of one a pair of patches.

    Args:
        bias: [H, n, n]; rows ask, columns are asked; pairs with the same offset have the same value.
        window: Rows and columns of the n patches.

    Returns:
        [H, 2 rows - 1, 2 columns - 1], as `Encoder.position_bias` has it.
    """
    asking, asked = zip(*(_ends(size) for size in window), strict=True)
    pairs = bias.unflatten(2, window).unflatten(1, window)  # [H, rows, columns, rows, columns]
    return pairs[:, asking[0][:, None], asking[1], asked[0][:, None], asked[1]]


def _ends(size: int) -> tuple[Tensor, Tensor]:
    """Two places on an axis for each offset from 1 - size to size - 1: the one that asks, the one asked."""
    offsets = torch.arange(1 - size, size)
    return offsets.clamp(min=0), (-offsets).clamp(min=0)


Fill = tuple[Tensor, Tensor]
"""A mask [B, N] (true = replace) and the token [D] that replaces."""


class Encoder(nn.Module, ABC):
    """An architecture: images to features to logits."""

    config: Any
    """The frozen config dataclass from which the model was built."""
    num_features: int
    """Width of what the head receives."""
    recompute: bool = False
    """Activation checkpointing: blocks keep their inputs only and compute the rest again going backward."""
    after_blocks: ClassVar[tuple[str, ...]] = ("norm", "fc_norm", "attention_pool", "head")
    """Beginnings of the names of the parameters that come after the blocks."""

    head_names: ClassVar[tuple[str, ...]] = ("head.", "head_dist.")
    """Beginnings of the names of the classifier's parameters, which `reset_classifier` replaces."""

    @property
    def has_head(self) -> bool:
        """Whether there is a classifier; without one the "logits" are pooled features."""
        return any(name.startswith(self.head_names) for name, _ in self.named_parameters())

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

    @abstractmethod
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks' modules, in the order in which an image passes them."""

    @abstractmethod
    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """How tokens hear of each other, for images of a height and width in pixels."""

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter: 0 in the embedding, i in the i-th block, last + 1 in the norm and head.

        Layer-wise decay of the learning rate counts with it (Clark et al. 2020, ELECTRA; Bao et al. 2022).
        """
        names = self.block_names()
        for number, block in enumerate(names, start=1):
            if parameter.startswith(block + "."):
                return number
        return len(names) + 1 if parameter.startswith(self.after_blocks) else 0

    def run_block(self, block: nn.Module, *arguments: Any) -> Any:
        """Call a block, with activation checkpointing where `recompute` is on (Chen et al. 2016).

        A block that somebody watches is run as it is: what passes its taps must be there to look at.
        """
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return block(*arguments)
        if any(isinstance(tap, Tap) and tap.watched for tap in block.modules()):
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode; a part whose parameters are all frozen stays in evaluation mode."""
        super().train(mode)
        if mode:
            for part in self.modules():
                own = list(part.parameters())
                if own and not any(parameter.requires_grad for parameter in own):
                    part.eval()
        return self

    def position_table(self, grid: tuple[int, int]) -> Tensor | None:
        """The positions that are added to the patches, [N, D]; None where the architecture adds none."""
        return None

    def position_bias(self, grid: tuple[int, int]) -> dict[str, Tensor]:
        """What each block adds to the scores of its attention for the offset between two patches.

        Args:
            grid: Rows and columns of the patches (of a pyramid: of its first stage).

        Returns:
            Block -> [H, 2 r - 1, 2 c - 1] for r x c patches that attend to each other: the grid, or the
            block's window. The middle is offset 0; below and right of it the patch that asks lies below and
            right of the one that is asked. Empty where there is no such bias.
        """
        return {}

    def position_rotation(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [N, pairs] by which queries and keys of patches turn; None where none do."""
        return None

    def position_layouts(self) -> dict[str, TableLayout]:
        """Learned tables whose size depends on that of the images: parameter -> what its rows are for.

        Weights of a model for another image size are resampled by them when they are loaded.
        """
        return {}

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(images))
