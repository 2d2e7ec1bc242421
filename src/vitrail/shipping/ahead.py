"""Compiling a model ahead of time: an exported graph, and from it machine code with the weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from vitrail.noise import quiet
from vitrail.pretrained.compiled import LARGEST_BATCH

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def check_compiler() -> None:
    """See whether code can be compiled here.

    Raises:
        ValueError: There is no C++ compiler.
    """
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("compiling needs a C++ compiler: install g++ or clang, or set CXX") from None


def export(model: nn.Module, image_shape: Sequence[int]) -> torch.export.ExportedProgram:
    """The model as a graph for any number of images up to `LARGEST_BATCH`.

    Args:
        model: In evaluation mode.
        image_shape: (C, H, W).
    """
    # The graph is found with some number of images. Where the frozen graph has a dimension of that size,
    # Inductor takes one for the other: code that gives 32 answers whatever comes (torch 2.13, width 32).
    taken = {*image_shape, *(size for tensor in model.state_dict().values() for size in tensor.shape)}
    count = next(prime for prime in _PRIMES if not any(size % prime == 0 for size in taken))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    return torch.export.export(model, (torch.randn(count, *image_shape),), dynamic_shapes=({0: batch},))


def compile_ahead(model: nn.Module, image_shape: Sequence[int], package: Path) -> None:
    """Compile a model for this machine's CPU.

    Args:
        model: In evaluation mode.
        image_shape: (C, H, W).
        package: The .pt2 file to write.
    """
    # Frozen weights are folded and laid out anew. Threads are those of the process that runs the code, not of
    # the one that compiles it.
    with quiet(), inductor.patch({"freezing": True, "cpp.dynamic_threads": True}):
        torch._inductor.aoti_compile_and_package(export(model, image_shape), package_path=str(package))
