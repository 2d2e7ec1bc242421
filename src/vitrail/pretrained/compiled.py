"""The compiled model of an optimised folder: machine code for one kind of CPU, beside the ordinary weights.

    model.safetensors, config.json   an ordinary model folder
    optimized.json                   what was chosen and measured, for which machine, and the seal
    optimized.pt2                    the compiled model with its weights; absent where eager was faster

`vitrail.shipping.optimize` writes it. The .pt2 file is made by AOTInductor: it starts without a compiler, in
a fraction of a second. It is code, and a folder may come from anyone: it is run only under this user's seal
(`vitrail.pretrained.seal`) of these files, and where the CPU has all that it was compiled for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.files import write_whole
from vitrail.pretrained.seal import is_sealed, seal

RECORD = "optimized.json"
PACKAGE = "optimized.pt2"
LARGEST_BATCH = 1024
"""Images that compiled code takes at a time; more are split."""


class CompiledModel(nn.Module):
    """A compiled model; it has no parameters, no features and no taps.

    Args:
        run: Normalised images float32 [B, C, H, W] -> logits float32 [B, K], for B from 1 to `LARGEST_BATCH`.
        image_shape: (C, H, W).
        seal: Tells compiled models apart; that of the folder it is from.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], image_shape: Sequence[int], *, seal: str = ""
    ) -> None:
        super().__init__()
        self.run, self.image_shape, self.seal = run, tuple(image_shape), seal

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K].

        Raises:
            ValueError: Images of another shape than it was compiled for.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"this model is compiled for images {list(self.image_shape)}, got {list(images.shape[1:])}; "
                "prepare them with its preprocessing, or use the ordinary weights of its folder"
            )
        # Compiled code reads memory as it lay when it was compiled.
        parts = images.contiguous().split(LARGEST_BATCH)
        return torch.cat([self.run(part) for part in parts])


def load_compiled(source: str | Path) -> CompiledModel | None:
    """Load the compiled model of a folder.

    Args:
        source: As `from_pretrained` takes it; only a folder on this disk can hold a compiled model.

    Returns:
        None where there is none: use the ordinary weights.

    Raises:
        ValueError: It was compiled on another kind of CPU, for another torch, by somebody else, or changed
            since; one line.
    """
    for folder in (Path(source), Path(source) / "model"):
        if (folder / "config.json").is_file():
            break
    else:
        return None
    if not (folder / RECORD).is_file():
        return None
    again = "run `vitrail optimize` again here, or delete optimized.json to use the ordinary weights"
    try:
        record = json.loads((folder / RECORD).read_text())
        compiled, machine, own = record["compiled"], record["machine"], str(record["seal"])
        version, features = machine["torch"], machine["cpu_features"]
        image_shape = [int(size) for size in record["image_shape"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} is damaged ({error}); {again}") from None
    if not compiled:
        return None
    if version != torch.__version__:
        raise ValueError(
            f"{folder} was compiled by torch {version}, and this is {torch.__version__}; {again}"
        )
    if missing := sorted(set(features) - set(cpu_features())):
        raise ValueError(f"{folder} was compiled for a CPU that has {', '.join(missing)}; {again}")
    files = _sealed(folder)
    if not (all(file.is_file() for file in files) and is_sealed(record, files)):
        raise ValueError(f"{folder}: its compiled model was made by somebody else or changed since; {again}")
    return CompiledModel(load_package(folder / PACKAGE), image_shape, seal=own)


def load_package(package: Path) -> Callable[[Tensor], Tensor]:
    """The function of a .pt2 file: images [B, C, H, W] -> logits [B, K].

    By torch's loader itself: `torch._inductor.aoti_load_package` calls the same after importing the compiler,
    which takes seconds.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)

    def run(images: Tensor) -> Tensor:
        logits: Tensor = loader.run([images])[0]
        return logits

    return run


def cpu_features() -> list[str]:
    """The instruction sets of this CPU, by name, with its architecture; compiled code may use any of them."""
    found = torch.cpu.get_capabilities()
    return sorted([str(found["architecture"]), *(name for name, value in found.items() if value is True)])


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write optimized.json, sealed; the other files of the folder are there already.

    Raises:
        ValueError: The key of the seal cannot be written.
    """
    sealed = dict(record) | {"seal": seal(record, _sealed(folder))}
    write_whole(folder / RECORD, json.dumps(sealed, indent=2) + "\n")


def _sealed(folder: Path) -> list[Path]:
    """The files under the seal; there is no package where eager PyTorch was chosen."""
    return [folder / name for name in ("config.json", "model.safetensors", PACKAGE)]
