"""Models as files that run without Vitrail, compared with the model before they are kept.

| form | file | runs with | needs here |
|---|---|---|---|
| onnx | .onnx | ONNX Runtime, and whatever else reads ONNX | onnx, onnxscript, onnxruntime |
| torch-export | .pt2 | `torch.export.load` | nothing more |
| openvino | .xml and .bin | OpenVINO | onnx, onnxscript, openvino |

Beside FILE stands FILE.json: class names, preprocessing, names and shapes of input and output, and how far
the results were from the model's. All forms begin with `torch.export`; OpenVINO reads the ONNX file. A .pt2
file is sealed (`vitrail.pretrained.seal`), so that it can teach (`--task.teacher FILE.pt2`).

Images of any size are possible where an architecture's code does not ask for the size: ViT, DeiT, Diff-ViT,
CaiT, CCT, PVT and the video ViT (with positions that are learned or none). Swin lays its windows out for one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from vitrail.models import Encoder
from vitrail.pretrained import ModelFolder
from vitrail.pretrained.seal import seal

Form = Literal["onnx", "torch-export", "openvino"]
SUFFIXES: dict[Form, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}
NEEDED: dict[Form, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch-export": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
TOLERANCE = 1e-4
"""Largest difference of logits between a file and its model."""
INPUT = "images"
_ONE_SIZE = (
    "{} cannot take images of every size in one file, because its computation depends on the size: leave the "
    "size out, or write a file for each size (--size H W)"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    file: Path
    """The model."""
    about: Path
    """Its description, JSON."""
    description: dict[str, Any]
    """The content of `about`."""

    def text(self) -> str:
        """What a person wants to know, in three lines."""
        source, result = self.description["input"], self.description["output"]
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.description["checked_shapes"])
        return (
            f"{self.file}: {_shown(source)} -> {_shown(result)}\n"
            f"largest difference from the model {self.description['largest_difference']:.2g}, on {shapes}\n"
            f"classes and preprocessing {self.about}"
        )


def write_export(
    file: str | Path,
    stored: ModelFolder,
    form: Form,
    *,
    batch: int | Literal["dynamic"] = "dynamic",
    size: tuple[int, int] | Literal["dynamic"] | None = None,
) -> Exported:
    """Write a model in a form that runs elsewhere, and compare three batches of random images with the model.

    A model without a head gives its pooled features.

    Args:
        file: Ends as `SUFFIXES` says; a file that is there is replaced, but only by one that passed.
        stored: The model, on the CPU.
        form: What to write.
        batch: How many images the file takes at a time; "dynamic": any number.
        size: Height and width of its images in pixels; "dynamic": any multiples of the model's coarsest
            stride; None: as the model's preprocessing makes them.

    Raises:
        ValueError: A wrong argument, a library that is not installed, a model that cannot be exported so, or
            results that differ by `TOLERANCE` or more: then nothing is written.
    """
    file = Path(file)
    _check_request(file, form, batch, size)
    native = tuple(stored.preprocessing["img_size"])
    exported_size = native if size is None else size
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder, torch.no_grad(), _quiet():
        program = _traced(stored, batch, exported_size)
        description = _described(stored, form, program, exported_size)
        beside = Path(folder) / file.name
        shapes = _shapes_to_check(stored.model, batch, exported_size, native)
        try:
            _write(beside, form, program, description)
            difference = _largest_difference(stored.model, _reader(form, beside), shapes)
        except Exception as error:  # those of three libraries have no common kind
            if size == "dynamic":
                raise ValueError(_ONE_SIZE.format(stored.name)) from error
            raise ValueError(f"{stored.name} cannot be written as {form} ({_reason(error)})") from error
        if not difference < TOLERANCE:
            raise ValueError(
                f"{file} was not written: as {form} the results of {stored.name} differ by {difference:.2g} "
                f"(less than {TOLERANCE:g} expected)"
            )
        description |= {"largest_difference": difference, "checked_shapes": [list(shape) for shape in shapes]}
        if form == "torch-export":
            description["seal"] = seal(description, [beside])
        about = beside.with_name(f"{file.name}.json")
        about.write_text(json.dumps(description, indent=2) + "\n")
        for made in sorted(Path(folder).iterdir()):
            made.replace(file.parent / made.name)
    return Exported(file=file, about=file.parent / about.name, description=description)


def _check_request(file: Path, form: Form, batch: int | str, size: tuple[int, int] | str | None) -> None:
    if form not in get_args(Form):
        raise ValueError(f"expected one of {', '.join(get_args(Form))} as form, got {form!r}")
    if file.suffix != SUFFIXES[form]:
        raise ValueError(f"{form} files end in {SUFFIXES[form]}, got {file}; choose another name")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: no folder {file.parent}; make it, or choose another place")
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch: expected a number from 1 on, or dynamic, got {batch!r}")
    if not (size is None or size == "dynamic" or (len(size) == 2 and min(map(int, size)) >= 1)):
        raise ValueError(f"size: expected height and width in pixels, or dynamic, got {size!r}")
    missing = [name for name in NEEDED[form] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{form} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'vitrail[export]'"
        )


def _traced(stored: ModelFolder, batch: int | str, size: tuple[int, ...] | str) -> ExportedProgram:
    """The model's graph for images [B, C, H, W], or clips [B, T, C, H, W].

    Traced (and translated to ONNX) without gradients throughout: fused attention lays its result out
    otherwise where a bias learns, and a view of one layout does not fit the other.
    """
    model = stored.model.eval()
    unit = model.stages[-1].stride
    height, width = stored.preprocessing["img_size"]
    dynamic: dict[int, Any] = {0: Dim("batch")} if batch == "dynamic" else {}
    if size == "dynamic":
        # No usual size and no square: whatever asks for those would be told yes.
        example_size = unit * (height // unit + 1), unit * (width // unit + 2)
        frames = len(_shape(model, 1, example_size)) - 4
        dynamic |= {2 + frames: unit * Dim("rows"), 3 + frames: unit * Dim("columns")}
    else:
        assert not isinstance(size, str)
        example_size = size[0], size[1]
    # Of 1 image torch.export would take for granted that it is 1.
    example = torch.randn(_shape(model, 2 if isinstance(batch, str) else batch, example_size))
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=(dynamic,))
        fixed = [axis for axis in dynamic if isinstance(_input_shape(program)[axis], int)]
    except Exception as error:  # torch.export's refusals have no common kind
        if size != "dynamic":
            raise ValueError(f"{stored.name} cannot be exported ({_reason(error)})") from error
        fixed = list(dynamic)
    if fixed:
        raise ValueError(_ONE_SIZE.format(stored.name))
    return program


def _input_shape(program: ExportedProgram) -> Sequence[Any]:
    """Numbers, and symbols where an axis is dynamic."""
    (name,) = program.graph_signature.user_inputs
    return next(node for node in program.graph.nodes if node.name == name).meta["val"].shape


def _described(
    stored: ModelFolder, form: Form, program: ExportedProgram, size: tuple[int, ...] | str
) -> dict[str, Any]:
    """All that a user of the file must know."""
    model = stored.model
    names: list[str | int] = list(_input_shape(program))
    if not isinstance(names[0], int):
        names[0] = "batch"
    if size == "dynamic":
        names[-2:] = ["height", "width"]
    taken: dict[str, Any] = {"name": INPUT, "type": "float32", "shape": names}
    if size == "dynamic":
        taken["multiples_of"] = model.stages[-1].stride
    prepared = dict(stored.preprocessing)
    if not isinstance(size, str):
        prepared["img_size"] = list(size)
    outputs = model.config.num_classes if model.has_head else model.num_features
    return {
        "model": stored.name,
        "form": form,
        "input": taken,
        "output": {"name": _output_name(model), "type": "float32", "shape": [names[0], outputs]},
        "classes": list(stored.classes) if model.has_head else [],
        "preprocessing": prepared,
    }


def _write(file: Path, form: Form, program: ExportedProgram, description: dict[str, Any]) -> None:
    if form == "torch-export":
        torch.export.save(program, file, extra_files={"vitrail.json": json.dumps(description)})
        return
    shape = description["input"]["shape"]
    translated = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[description["output"]["name"]],
        dynamic_shapes=({axis: name for axis, name in enumerate(shape) if isinstance(name, str)},),
    )
    assert translated is not None
    if form == "onnx":
        properties = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()
        }
        translated.model.metadata_props.update(properties)
        translated.save(file)
        return
    openvino = importlib.import_module("openvino")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        translated.save(Path(folder) / "model.onnx")
        openvino.save_model(openvino.convert_model(Path(folder) / "model.onnx"), file, compress_to_fp16=False)


def _reader(form: Form, file: Path) -> Callable[[Tensor], Tensor]:
    """The written file as a function from images to logits."""
    if form == "torch-export":
        return torch.export.load(file).module()
    if form == "onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(
            file, providers=["CPUExecutionProvider"]
        )
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
    # Where the processor has bfloat16, OpenVINO would compute in it.
    core = importlib.import_module("openvino").Core()
    compiled = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _shapes_to_check(
    model: Encoder, batch: int | str, size: tuple[int, ...] | str, native: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Three batches; where they may vary, of other numbers and sizes: usual, larger, small and not square."""
    unit = model.stages[-1].stride
    sizes: list[tuple[int, ...]] = [native if isinstance(size, str) else size] * 3
    if size == "dynamic":
        rows, columns = (max(pixels // unit, 1) for pixels in native)
        cells = ((rows, columns), (rows + 1, columns), ((rows + 1) // 2, columns))
        sizes = [(unit * high, unit * wide) for high, wide in cells]
    counts = (1, 2, 5) if isinstance(batch, str) else (batch,) * 3
    return [_shape(model, count, (own[0], own[1])) for count, own in zip(counts, sizes, strict=True)]


def _largest_difference(
    model: Encoder, run: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]]
) -> float:
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        differences.append((run(images) - model(images)).abs().max())
    return torch.stack(differences).max().item()  # NaN stays NaN


def _shape(model: Encoder, count: int, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a batch of images, or of clips where the model takes those."""
    frames = getattr(model.config, "num_frames", None)
    return (count, *(() if frames is None else (frames,)), model.config.in_chans, *size)


def _output_name(model: Encoder) -> str:
    return "logits" if model.has_head else "features"


def _shown(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} [{', '.join(map(str, tensor['shape']))}]"


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporters say of their own insides, such as deprecations of torch within torch."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
