"""Batches in an order that is a pure function of seed and epoch, so that a killed run resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from vitrail.datasets.images import ImageSet


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Number of batches that `batches` gives for `n` images.

    A set smaller than one batch counts as one short batch even with `drop_last`: dropping it would make an
    epoch that trains on nothing.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    full, left = divmod(n, batch_size)
    return full + (left > 0 and (full == 0 or not drop_last))


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = True,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read one epoch of an image set in batches.

    Args:
        images: The set to read.
        batch_size: Images a batch.
        seed: Not negative; together with `epoch` it alone decides the order.
        epoch: Counted from 0; every epoch has its own order.
        shuffle: False reads in the order of the set.
        drop_last: Leave out a last batch that is not full (unless it is the only one).
        start: Skip this many batches without reading them; the others are what they are without `start`.

    Yields:
        Images, uint8 [B, C, H, W], and labels, int64 [B].
    """
    n = len(images)
    order = np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)
    for step in range(start, steps_per_epoch(n, batch_size, drop_last)):
        yield images.batch(order[step * batch_size : (step + 1) * batch_size])
