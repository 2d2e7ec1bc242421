"""The contract between what is minimised and the loop that minimises it.

A task is a module: a batch goes in, a dictionary with a scalar "loss" comes out. It never sees the optimiser,
the device, the log or the checkpoint; the loop never sees which task it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

Batch = dict[str, Tensor]
"""`images` [B, C, H, W], normalised, and what the task needs besides (`targets` [B, K])."""


class Task(nn.Module, ABC):
    """What is minimised: model, head and loss."""

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One batch -> "loss" (a scalar to minimise) and further scalars to log."""

    @abstractmethod
    def trained(self) -> nn.Module:
        """The model that is evaluated and saved."""

    def after_step(self) -> None:
        """Called after each optimiser step, for instance to move a teacher."""
