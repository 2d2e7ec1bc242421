"""Networks of any kind, CNNs too, as files that can teach: the graph and its weights, without their code.

    cnn.pt2         of `torch.export.save`: images float32 [B, C, H, W] -> logits [B, K], for B of any size
    cnn.pt2.json    "classes", in the order of the logits; "preprocessing", as in a model folder; "seal"

`save_program` writes both for any module, `vitrail export --to torch-export` for a model of ours.

A .pt2 file is a program, and reading it may run whatever somebody put into it: torch unpickles objects,
evaluates expressions, and calls functions that the file names. It is therefore read only under this user's
seal (`vitrail.pretrained.seal`). What was brought from elsewhere gets one by `trust_program`.
"""

from __future__ import annotations

import copy
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from vitrail.files import write_whole
from vitrail.pretrained.seal import is_sealed, seal

SUFFIX = ".pt2"
TOLERANCE = 1e-3
"""Largest difference, relative to the largest logit, between an image's answer alone and in a batch."""


class Program(nn.Module):
    """An exported network; it has no features, no taps and no parameters that could be trained.

    Args:
        exported: Takes images [B, C, H, W] for B of any size and answers with logits [B, K].
        classes: Names of the K classes.
        preprocessing: As `vitrail.datasets.Preprocessing.to_dict` gives it.
    """

    def __init__(
        self, exported: ExportedProgram, classes: Sequence[str], preprocessing: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.classes, self.preprocessing = tuple(classes), dict(preprocessing)
        self._exported = exported
        self._device = torch.device("cpu")
        # In a tuple it is no submodule: torch refuses to put an exported graph into evaluation mode.
        self._graph = (exported.module(),)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised as `preprocessing` says -> logits float32 [B, K]."""
        # The types of its tensors, and views that need them contiguous, are written into the graph.
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self._graph[0](images.float().contiguous())
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Shares the graph, which nobody changes; where one of them goes, the other stays."""
        return copy.copy(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go to another device, constants that the graph makes included; types and layouts stay."""
        device = fn(torch.empty(0)).device
        if device != self._device:
            self._exported = move_to_device_pass(self._exported, str(device))
            self._graph, self._device = (self._exported.module(),), device
        return self


def save_program(
    file: str | Path, network: nn.Module, *, classes: Sequence[str], preprocessing: Mapping[str, Any]
) -> None:
    """Write any network as a file that can teach, with its description beside it, and read it back.

    Args:
        file: Ends in .pt2.
        network: On the CPU; images float32 [B, C, H, W] -> logits [B, K]. It is put into evaluation mode.
        classes: Names of its K classes, in the order of its logits.
        preprocessing: What it wants: `img_size` [height, width], `in_chans`, `mean` and `std` (a number for
            each channel, of values 0 to 1), `interpolation`, `crop_ratio`.

    Raises:
        ValueError: A network that torch cannot export, or that does not do what this says; nothing is
            written then.
    """
    file = Path(file)
    if file.suffix != SUFFIX:
        raise ValueError(f"expected a file {SUFFIX}, got {file}")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: no folder {file.parent}; make it, or choose another place")
    description = {"classes": list(classes), "preprocessing": dict(preprocessing)}
    shape = _image_shape(description, file)
    try:
        with torch.no_grad():
            # Of 1 image torch.export would take for granted that it is 1.
            exported = torch.export.export(
                network.eval(), (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim("batch")},)
            )
        written = io.BytesIO()
        torch.export.save(exported, written)
        written.seek(0)
        program = Program(torch.export.load(written), classes, preprocessing)
    except Exception as error:  # torch.export's refusals have no common kind
        raise ValueError(
            f"{type(network).__name__} cannot be exported for batches of any size ({_reason(error)})"
        ) from None
    _check(program, shape, str(file))
    write_whole(file, written.getvalue())
    _describe(file, description)


def trust_program(file: str | Path) -> None:
    """Seal a file .pt2, and its description, that somebody else made or that was made on another machine.

    Only for files of people whom one trusts: from now on what is in it will be run.

    Raises:
        ValueError: No such file, or no description that can be read.
    """
    file = Path(file)
    description = _description(file)
    _image_shape(description, file)
    _describe(file, description)


def load_program(file: str | Path) -> Program:
    """Read a network that `save_program` or `vitrail export --to torch-export` wrote.

    Raises:
        ValueError: No such file, no description, no seal of this user, a network that takes other images or
            gives other logits than its description says, only batches of one size, or answers that depend on
            chance or on the other images; one line.
    """
    file = Path(file)
    description = _description(file)
    shape = _image_shape(description, file)
    if not is_sealed(description, [file]):
        raise ValueError(
            f"{file} is not from here or changed since, and a {SUFFIX} file is a program that could do "
            "anything: write it again, or, if you trust whoever made it, call "
            f"vitrail.pretrained.trust_program({str(file)!r})"
        )
    try:
        program = Program(
            torch.export.load(file), tuple(description["classes"]), description["preprocessing"]
        )
    except Exception as error:  # torch raises anything, for instance where another version wrote the file
        raise ValueError(
            f"{file} cannot be read by torch {torch.__version__} ({_reason(error)}); write it again"
        ) from None
    _check(program, shape, str(file))
    return program


def _describe(file: Path, description: Mapping[str, Any]) -> None:
    sealed = dict(description) | {"seal": seal(description, [file])}
    write_whole(_beside(file), json.dumps(sealed, indent=2) + "\n")


def _description(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"no file {file}")
    try:
        content = json.loads(_beside(file).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{file} does not tell its classes and preprocessing: expected {_beside(file).name} beside it, "
            "as vitrail.pretrained.save_program writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{_beside(file)} is damaged ({error}); write it again") from None
    if not isinstance(content, dict):
        raise ValueError(f'{_beside(file)}: expected {{"classes": ..., "preprocessing": ...}}')
    return content


def _image_shape(description: Mapping[str, Any], file: Path) -> tuple[int, int, int]:
    """Channels, height and width that a description states, after a look at its form."""
    classes, prepared = description.get("classes"), description.get("preprocessing")
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{_beside(file)}: expected the names of the classes as classes, got {classes!r}")
    told = prepared if isinstance(prepared, Mapping) else {}
    size = told.get("img_size")
    shape = (told.get("in_chans"), *size) if isinstance(size, (list, tuple)) else ()
    if len(shape) != 3 or not all(isinstance(axis, int) and axis > 0 for axis in shape):
        raise ValueError(
            f"{_beside(file)}: expected in_chans and img_size [height, width] in preprocessing, got "
            f"{prepared!r}"
        )
    return shape


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


@torch.no_grad()
def _check(program: Program, shape: tuple[int, int, int], file: str) -> None:
    """Three random images together, and each alone, must be answered, and answered alike."""
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    try:
        together = program(images)
        alone = torch.cat([program(image[None]) for image in images])
    except Exception as error:  # a graph raises whatever its operators and its conditions raise
        raise ValueError(
            f"{file} does not take batches of any size of images {list(shape)} ({_reason(error)})"
        ) from None
    if together.shape != (3, len(program.classes)):
        raise ValueError(
            f"{file} answers to 3 images with {list(together.shape)}, and its description names "
            f"{len(program.classes)} classes"
        )
    if not (together - alone).abs().max() <= TOLERANCE * together.abs().max():
        raise ValueError(
            f"{file} answers to an image otherwise when others are beside it, or when it is asked again: "
            "put the network into evaluation mode before it is exported"
        )


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
