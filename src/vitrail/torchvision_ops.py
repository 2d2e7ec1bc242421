"""Lets `import torchvision` succeed where its compiled operators cannot load.

torchvision's Python layer registers shapes for operators of its compiled library while it is imported; next
to a torch build of another kind (a CPU torch with the registry's default torchvision, for instance) the
library is skipped and the import fails with "operator torchvision::nms does not exist". Declaring the two
operators is enough for the import, and `nms` gets a plain PyTorch implementation so that it also works.
Where the compiled operators load, this module does nothing. Import it before anything that imports
torchvision (timm and torchmetrics do).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from pathlib import Path

import torch
from torch import Tensor


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to repair
    folder = Path(spec.submodule_search_locations[0])
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression; boxes [N, 4] as x1 y1 x2 y2, scores [N]; indices of kept boxes."""
    order = scores.argsort(descending=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        first, rest = order[0], order[1:]
        kept.append(first)
        corner_low = torch.maximum(boxes[first, :2], boxes[rest, :2])
        corner_high = torch.minimum(boxes[first, 2:], boxes[rest, 2:])
        overlap = (corner_high - corner_low).clamp(min=0).prod(dim=1)
        order = rest[overlap / (area[first] + area[rest] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64, device=boxes.device)


if not hasattr(torch.ops.torchvision, "nms") and not _compiled_operators_load():
    # The libraries are kept in module variables: their registrations end when they are collected.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.impl("nms", _nms, "CompositeExplicitAutograd")
    # torchvision refuses nms when its library is absent, whether or not the operator exists. Only this
    # check is lifted: roi_align asks the same question to choose its own Python version.
    setattr(importlib.import_module("torchvision.ops.boxes"), "_assert_has_ops", lambda: None)  # noqa: B010
