"""Batches in an order that is a pure function of seed and epoch, so that a killed run resumes exactly.

`batches` reads one epoch. Training reads many, with a `BatchReader`, whose worker processes live as long as
it does. An `ImageSet` is read in the process itself, because a batch is one indexed read; a `FileSet` is
decoded by worker processes, a batch each, whose results wait in page-locked memory where there is a GPU.

What a batch holds depends on seed, epoch and position alone: not on the number of workers, not on where
reading started, and, for the images together, not on the number of processes that share each batch.
"""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.datasets.decode import random_crop
from vitrail.datasets.file_set import FileSet, Images
from vitrail.datasets.images import ImageSet

_Pair = tuple[Tensor, Tensor]


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
    images: Images,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = True,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    resized_crop: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read one epoch in batches. Whoever reads several keeps a `BatchReader`.

    Args:
        images: As in `BatchReader`, and so are those not named here.
        epoch: Counted from 0; every epoch has its own order.
        start: Skip this many batches without reading them; the others are what they are without `start`.

    Yields:
        Images, uint8 [B, C, H, W], and labels, int64 [B].

    Raises:
        ValueError: As `BatchReader`.
    """
    reader = BatchReader(
        images,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        shard=shard,
        workers=workers,
        resized_crop=resized_crop,
    )
    return reader.epoch(epoch, start)


class BatchReader:
    """Reads a set in batches, epoch after epoch, with the same worker processes.

    The workers start with the first batch and end when the reader is no longer referred to, or this process
    ends in whatever way. They ignore Ctrl-C, so that this process can finish a step and save.

    Args:
        images: The set to read.
        batch_size: Images a batch, over all processes that share it.
        seed: Not negative; decides, with the epoch, the order and the crops.
        shuffle: False reads in the order of the set.
        drop_last: Leave out a last batch that is not full (unless it is the only one).
        shard: Number of this process and how many share each batch; each takes a contiguous part of it. A
            batch that does not come out even is shared as evenly as it goes, and who gets nothing of it has
            one batch less; a full batch of training (`drop_last`) must come out even.
        workers: Processes that decode a `FileSet`, each with one thread; 0 decodes in this process. An
            `ImageSet` needs none.
        resized_crop: Smallest share of the area in a random resized crop of the original picture
            (`decode.random_crop`), above 0 to 1; None takes the whole picture. Of a `FileSet` only: of an
            `ImageSet` only the resized pictures are left, which are cropped in the batch.
        labels: Whether labels are read; without, no label is touched, and those of a batch are empty, [0].

    Raises:
        ValueError: A number out of range, or a crop of an `ImageSet`.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        resized_crop: float | None = None,
        labels: bool = True,
    ) -> None:
        steps_per_epoch(len(images), batch_size)
        rank, world = shard
        if not 0 <= rank < world:
            raise ValueError(f"shard: expected a process from 0 and how many there are, got {shard}")
        if drop_last and batch_size % world:
            raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {batch_size}")
        if drop_last and 0 < len(images) < world:
            raise ValueError(f"{images.name}: {len(images)} images are not enough for {world} processes")
        if workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        if resized_crop is not None:
            if isinstance(images, ImageSet):
                raise ValueError(
                    f"resized_crop: {images.name} is kept resized in memory, where no original pictures are "
                    "left to crop; crop the batches, or load it with storage files"
                )
            if not 0.0 < resized_crop <= 1.0:
                raise ValueError(f"resized_crop: expected above 0 to 1, got {resized_crop}")
        self._read = images.batch if labels else _pixels_alone(images)
        self._order = _Order(
            images=len(images),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            shard=shard,
        )
        self._decoder = _Decoder(images, seed, resized_crop, labels) if isinstance(images, FileSet) else None
        self._workers, self._parts = workers, _Parts()
        self._loader: DataLoader[_Pair | ValueError] | None = None
        self._loader_held: weakref.finalize | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Read one epoch.

        One epoch at a time: one that was left early cannot be gone on with after the next was begun.

        Args:
            epoch: Counted from 0; every epoch has its own order.
            start: Skip this many batches without reading them.

        Yields:
            Images, uint8 [B, C, H, W], and labels, int64 [B].

        Raises:
            BrokenImageError: An image that cannot be decoded, when its batch is due.
            ValueError: A worker process was killed.
        """
        parts = self._order.parts(epoch, start)
        if self._decoder is None:
            for part in parts:
                yield self._read(part.indices)
        elif not self._workers:
            for part in parts:
                yield _raised(self._decoder[part])
        else:
            yield from self._from_workers(self._decoder, parts)

    def _from_workers(self, decoder: _Decoder, parts: Iterator[_Part]) -> Iterator[_Pair]:
        if self._loader is None:
            self._loader = DataLoader(
                decoder,
                batch_size=None,
                sampler=self._parts,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                persistent_workers=True,
                worker_init_fn=_leave_interrupts_to_parent,
                pin_memory=torch.cuda.is_available(),
                # Without its own, every epoch would draw from the generator that dropout draws from.
                generator=torch.Generator(),
            )
            # A reader that is part of a reference cycle, as in the frames of a traceback, is taken apart by
            # the garbage collector in any order. If that closed the pipes to the workers before these were
            # told to end, it would take ten seconds. Held from elsewhere, the loader goes after the reader.
            self._loader_held = weakref.finalize(self, _nothing, self._loader)
        self._parts.next = parts
        try:
            for found in self._loader:
                yield _raised(found)
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            reason = " ".join(str(error).split())[:200]
        # Outside of the handler, so that the traceback does not keep what is left of the workers.
        assert self._loader_held is not None
        self._loader_held.detach()
        self._loader = None
        raise ValueError(
            f"a worker process that decodes images ended ({reason}); if memory was short, take fewer workers "
            "or a smaller batch"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """The images of one batch that one process reads."""

    indices: np.ndarray
    """Positions in the set, int64 [B]."""
    epoch: int
    first: int
    """Position of the first one in the order of the epoch."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    """Which images one process reads when. Apart from the reader, which what is still to be read must not
    keep alive.
    """

    images: int
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    shard: tuple[int, int]

    def parts(self, epoch: int, start: int) -> Iterator[_Part]:
        """This process's part of each batch of an epoch, from batch `start` on."""
        n, (rank, world) = self.images, self.shard
        order = np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
        for step in range(start, steps_per_epoch(n, self.batch_size, self.drop_last)):
            first = step * self.batch_size
            each, left = divmod(min(self.batch_size, n - first), world)
            begin = first + rank * each + min(rank, left)
            end = begin + each + (rank < left)
            if begin < end:
                yield _Part(indices=order[begin:end], epoch=epoch, first=begin)


class _Decoder(Dataset[_Pair | ValueError]):
    """Decodes a part of a batch; runs in the worker processes."""

    def __init__(self, images: FileSet, seed: int, resized_crop: float | None, labels: bool) -> None:
        self.images, self.seed, self.resized_crop, self.labels = images, seed, resized_crop, labels

    def __getitem__(self, part: _Part) -> _Pair | ValueError:
        crops = None
        if self.resized_crop is not None:
            # From the position in the epoch, so that a crop is the same whoever makes it.
            places = range(part.first, part.first + len(part.indices))
            generators = [np.random.default_rng([self.seed, part.epoch, place]) for place in places]
            crops = [partial(random_crop, smallest=self.resized_crop, generator=own) for own in generators]
        try:
            if self.labels:
                return self.images.batch(part.indices, crops)
            return self.images.pixels(part.indices, crops), _no_labels()
        except ValueError as error:
            # As a value: the DataLoader would put a traceback into its message.
            return error


class _Parts:
    """The sampler of a DataLoader whose worker processes stay while what it samples changes."""

    def __init__(self) -> None:
        self.next: Iterator[_Part] = iter(())

    def __iter__(self) -> Iterator[_Part]:
        return self.next


def _pixels_alone(images: Images) -> Callable[[np.ndarray], _Pair]:
    return lambda indices: (images.pixels(indices), _no_labels())


def _no_labels() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _raised(found: _Pair | ValueError) -> _Pair:
    if isinstance(found, ValueError):
        raise found
    return found


def _as_it_is(found: Any) -> Any:
    """Instead of the DataLoader's own conversion, which makes lists of tuples."""
    return found


def _nothing(loader: DataLoader[_Pair | ValueError]) -> None:
    """What is left to do when a reader has gone: to hold its loader no longer."""


def _leave_interrupts_to_parent(worker: int) -> None:
    # Ctrl-C reaches the whole process group, and the parent may want to finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
