"""The contract between what is minimised and the loop that minimises it.

A task is a module: a batch goes in, a dictionary with a scalar "loss" comes out. It never sees the optimiser,
the device, the log or the checkpoint; the loop never sees which task it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vitrail.models.encoder import Encoder

Batch = dict[str, Tensor]
"""What a task asked for, normalised: `images` [B, C, H, W], or `views` [B, V, C, H, W] where it wants several
of each image, `crops` [B, L, C, h, w] where it wants small ones too, and `targets` (labels [B] or shares
[B, K]) where it needs labels. The first axis of all is that of the images, so that a batch can be taken in
parts."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which pictures of an image a task wants to see; each is augmented on its own."""

    full: int = 1
    """Pictures of the model's size: one comes as `images` [B, C, H, W], more as `views` [B, V, C, H, W]."""
    crops: int = 0
    """Small pictures of small parts, `crops` [B, L, C, h, w]; DINO's local crops."""
    crop_size: tuple[int, int] = (96, 96)
    """Height and width of a crop in pixels."""
    crop_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a crop shows."""


class Task(nn.Module, ABC):
    """What is minimised: model, head and loss."""

    model: Encoder
    """The encoder that learns."""
    classifies: bool = False
    """Whether the model keeps a classifier, which is then tested by its accuracy; else its features are."""
    needs_labels: bool = False
    """Whether batches carry `targets`. Where not, no label is ever read."""
    views: Views = Views()
    """What the batches show of an image."""

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One batch -> "loss" (a scalar to minimise) and further scalars to log."""

    @abstractmethod
    def trained(self) -> Encoder:
        """The model that is evaluated and saved."""

    def begin(self, total_steps: int) -> None:
        """Called once before the first step with the length of the run, for what follows a schedule."""

    def after_step(self) -> None:
        """Called after each optimiser step, for instance to move a teacher."""


class Reconstruction(NamedTuple):
    """A gallery of what a model makes of hidden pixels, in the units of the normalised input."""

    images: Tensor
    """[B, C, H, W], what was hidden in part."""
    hidden: Tensor
    """[B, 1, H, W], true where a pixel was hidden."""
    masked: Tensor
    """[B, C, H, W], the images with zeros, the mean of the data, where pixels were hidden."""
    prediction: Tensor
    """[B, C, H, W], with what the model says in place of the hidden pixels."""


@runtime_checkable
class Reconstructs(Protocol):
    """A task that can show what it makes of images of which it sees a part."""

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Images [B, C, H, W], normalised -> what was hidden, and what the model says in its place."""
