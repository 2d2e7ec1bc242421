"""What a model costs: parameters, multiply-adds, time.

"MACs" are the multiply-adds of linear layers, convolutions and both attention products. Counters that leave
attention out, or that mix multiply-adds with floating-point operations (two each), are why published tables
differ by a third.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.components.tap import record


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds of one image [C, H, W] through the model.

    The count runs on shapes only (the meta device), and with the attention weights watched: the explicit path
    consists of products that every counter knows.
    """
    shapes_only = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), record(shapes_only, "*weights"), FlopCounterMode(display=False) as counter:
        shapes_only(torch.empty(1, *image_shape, device="meta"))
    return counter.get_total_flops() // 2
