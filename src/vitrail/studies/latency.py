"""How long the models of finished runs take for one image, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrail.datasets import Preprocessing
from vitrail.evaluation.timing import in_turns, waiting
from vitrail.pretrained import load_model

_REPETITIONS, _WARMUP, _LONG_ENOUGH_S = 20, 3, 2.0


def latencies(folders: Sequence[Path], device: torch.device) -> list[tuple[float, ...]]:
    """Time the forward pass of one image (a clip: one that stands still) through each model, in turns.

    Args:
        folders: Run folders; each model gets an image of the size that it was trained with.
        device: Where.

    Returns:
        Seconds of each pass, for each model; 20 passes or more.
    """
    acts = {}
    for number, folder in enumerate(folders):
        stored = load_model(folder)
        size = Preprocessing.from_dict(stored.preprocessing).img_size
        image = torch.randn(1, stored.model.config.in_chans, *size, device=device)
        acts[str(number)] = partial(_answer, stored.model.to(device), image)
    seconds = in_turns(
        acts, _REPETITIONS, warmup=_WARMUP, wait=waiting(device), lasting=_LONG_ENOUGH_S * len(acts)
    )
    return [tuple(own) for own in seconds.values()]


@torch.inference_mode()
def _answer(model: nn.Module, image: Tensor) -> Tensor:
    logits: Tensor = model(image)
    return logits
