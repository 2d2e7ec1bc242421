"""Many image files through a model on all cores: each takes a batch, decodes it and runs the model on it.

A thread a core, with a single thread inside PyTorch, instead of workers that decode for a model that runs on
all cores: nobody waits for anybody, decoding and computing balance by themselves, and there are never more
threads than cores. Pillow's decoders and PyTorch's operators leave the interpreter to the others meanwhile;
processes would have to import torch first, which takes longer than decoding hundreds of pictures. Batches are
small, so that what passes between the layers stays in the core's cache.

A compiled model keeps the interpreter to itself while it runs, so that threads would only wait for each
other: there the threads decode a few batches, and then it computes them one after the other, on all cores.

The pixels are those of `Preprocessing.open_image`, exactly, but for JPEGs of more than three times the wanted
size: these are decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse transform), as `datasets.decode` says.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from vitrail.datasets import BrokenImageError, Preprocessing
from vitrail.datasets.decode import reduced_scale
from vitrail.datasets.folder import image_files
from vitrail.datasets.transforms import open_header, upright_size
from vitrail.serving.predictor import Prediction, Predictor

_DECODED_AT_ONCE = 4
"""Batches that are decoded before a compiled model computes them."""


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[BrokenImageError]]:
    """The image files that are meant.

    Args:
        paths: Files, and folders, of which the images directly in them are taken (not those of folders in
            them), by extension, sorted.

    Returns:
        The files in the order given, and an error for each folder without images.
    """
    files: list[Path] = []
    empty: list[BrokenImageError] = []
    for path in map(Path, paths):
        inside = image_files(path)
        files += inside
        if not inside:
            empty.append(BrokenImageError(str(path), "no image files in this folder"))
    return files, empty


def predict_files(
    predictor: Predictor, files: Sequence[Path], *, top: int = 5, batch_size: int = 8
) -> Iterator[list[Prediction | BrokenImageError]]:
    """Predict files on as many cores as PyTorch has threads (`torch.get_num_threads`).

    A batch is always made of the same files, whatever the number of threads, so that equal files give equal
    bits; those of a compiled model may differ with the number of threads. Until the iteration ends PyTorch
    has a single thread, also for others in this process, except where the model is compiled.

    Args:
        predictor: The model.
        files: Image files.
        top: How many classes to name.
        batch_size: Files a batch.

    Yields:
        Batch by batch, in the order of the files, the prediction of each, or what is wrong with it.

    Raises:
        ValueError: A number below 1, or a model that does not classify pictures.
    """
    check_numbers(top, batch_size)
    batches = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
    way = _in_threads if predictor.compiled is None else _in_turns
    return way(predictor, batches, top)


def check_numbers(top: int, batch_size: int) -> None:
    """Refuse numbers of classes and of files a batch that are below 1."""
    for name, number in (("top", top), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")


def _in_threads(
    predictor: Predictor, batches: Iterator[Sequence[Path]], top: int
) -> Iterator[list[Prediction | BrokenImageError]]:
    """Each thread decodes a batch and runs the model on it."""

    def predict(files: Sequence[Path]) -> list[Prediction | BrokenImageError]:
        return _classified(
            predictor, files, [_open_reduced(file, predictor.preprocessing) for file in files], top
        )

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    work = (pool.submit(predict, batch) for batch in batches)
    try:
        # A few ahead of the one waited for: enough for all threads, few enough to stop soon.
        waiting = deque(itertools.islice(work, 2 * threads))
        while waiting:
            found = waiting.popleft().result()
            waiting.extend(itertools.islice(work, 1))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _in_turns(
    predictor: Predictor, batches: Iterator[Sequence[Path]], top: int
) -> Iterator[list[Prediction | BrokenImageError]]:
    """The threads decode some batches, then the model runs on all cores."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        while some := list(itertools.islice(batches, _DECODED_AT_ONCE)):
            files = list(itertools.chain.from_iterable(some))
            opened = list(pool.map(_open_reduced, files, itertools.repeat(predictor.preprocessing)))
            # What a thread of the pool sets for itself, MKL takes for all.
            torch.set_num_threads(threads)
            for batch in some:
                yield _classified(predictor, batch, opened[: len(batch)], top)
                del opened[: len(batch)]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _classified(
    predictor: Predictor, files: Sequence[Path], opened: Sequence[Tensor | BrokenImageError], top: int
) -> list[Prediction | BrokenImageError]:
    """Run the model on those pictures of a batch that could be opened."""
    whole = [(str(file), own) for file, own in zip(files, opened, strict=True) if isinstance(own, Tensor)]
    predictions: Iterator[Prediction] = iter(())
    if whole:
        sources, images = zip(*whole, strict=True)
        predictions = iter(predictor.classified(sources, torch.stack(images), top))
    return [next(predictions) if isinstance(own, Tensor) else own for own in opened]


def _open_reduced(file: Path, preprocessing: Preprocessing) -> Tensor | BrokenImageError:
    """`Preprocessing.open_image`, of a large JPEG at a reduced scale: float32 [C, H, W], or what is wrong."""
    name = str(file)
    try:
        picture = open_header(name, name)
        if isinstance(picture, JpegImageFile):
            goal = [side / preprocessing.crop_ratio for side in preprocessing.img_size]
            scale = reduced_scale(upright_size(picture), goal)
            if scale > 1:
                picture.draft(None, (picture.width // scale, picture.height // scale))
        return preprocessing.open_image(picture)
    except BrokenImageError as error:
        # A picture in memory has no name there.
        return BrokenImageError(name, error.reason)
