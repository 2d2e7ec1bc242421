"""`vitrail optimize` against eager PyTorch, ours and timm's, and against the machine's limit.

    python benchmarks/optimized.py [--models 'vit*'] [--batch N]... [--quick]

Contestants: eager float32 of ours and of timm (the same weights), and ours compiled in float32, bfloat16 and
int8. 8 images at a time and 1. Times are medians of repetitions in turns, in one process with the same
threads; the ceiling is a product of two matrices in the contestant's own precision, taken in the same turns,
and a contestant's share of it counts 2 operations a multiply-add of `count_macs`. All keep freed memory, as
every `vitrail` command does (`vitrail.malloc`): the times are of models, not of page faults.

Weights are fresh and images random, so int8 is calibrated on noise: the times are those of trained weights,
the agreement is not, and is not stated. The cosine between logits shows that the same thing is computed.

`--quick` is a smoke test: one tiny model, float32 only, one repetition.
"""

from __future__ import annotations

import vitrail.torchvision_ops  # noqa: F401  (before timm)

# isort: split
import argparse
import fnmatch
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from measure import in_turns, machine, median_ratio, summary, write_result
from vitrail.evaluation.cost import count_macs
from vitrail.evaluation.timing import product
from vitrail.malloc import keep_freed_memory
from vitrail.models import Encoder, build_model
from vitrail.pretrained.compiled import CompiledModel, load_package
from vitrail.pretrained.formats import to_theirs
from vitrail.shipping.ahead import compile_ahead
from vitrail.shipping.int8 import quantise
from vitrail.shipping.optimize import Bfloat16

MODELS = (
    "vit_base_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b1",
    "cait_xxs24_224",
    "crossvit_9_240",
)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
PRECISIONS = ("float32", "bf16", "int8")


def peer(name: str, model: Encoder, changes: dict[str, Any]) -> torch.nn.Module:
    """timm's model with our weights."""
    theirs = timm.create_model(name, num_classes=model.config.num_classes, **changes).eval()
    theirs.load_state_dict(to_theirs(model.state_dict(), "timm", model.config))
    return theirs


def compiled(model: Encoder, precision: str, images: Tensor, folder: Path) -> tuple[CompiledModel, float]:
    """The compiled model, and the seconds that compiling took."""
    began = time.perf_counter()
    form = {
        "float32": lambda: model,
        "bf16": lambda: Bfloat16(model),
        "int8": lambda: quantise(model, images.split(8)),
    }[precision]()
    package = folder / f"{precision}.pt2"
    compile_ahead(form, images.shape[1:], package)
    run = load_package(package)
    return CompiledModel(run, images.shape[1:]), time.perf_counter() - began


def product_in(precision: str, size: int) -> Callable[[], object]:
    """A product of two square matrices in this precision."""
    if precision == "int8":
        left, right = torch.randint(-127, 128, (2, size, size), dtype=torch.int8)
        return lambda: torch._int_mm(left, right)
    return product(size, torch.bfloat16 if precision == "bf16" else torch.float32, torch.device("cpu"))


def measure(name: str, batches: Sequence[int], *, quick: bool) -> dict[str, Any]:
    """Times of all contestants for one model."""
    changes = TINY if quick else {}
    torch.manual_seed(0)
    model = build_model(name, **changes).eval()
    images = torch.randn(max(32, *batches), model.config.in_chans, *model.config.image_shape)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"eager": model, "timm": peer(name, model, changes)}
    compile_s = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for precision in PRECISIONS[:1] if quick else PRECISIONS:
            ways[precision], compile_s[precision] = compiled(model, precision, images, Path(folder))
        expected = model(images[:8])
        cosine = {
            way: float(F.cosine_similarity(act(images[:8]), expected).mean()) for way, act in ways.items()
        }
        size = 256 if quick else 2048
        products = {f"product {precision}": product_in(precision, size) for precision in PRECISIONS}
        macs = count_macs(model, images.shape[1:])
        found = {}
        for batch in batches:
            some = images[:batch]
            acts: dict[str, Callable[[], object]] = {
                way: (lambda act=act, some=some: act(some)) for way, act in ways.items()
            }
            seconds = in_turns({**acts, **products}, 1 if quick else 20)
            ceilings = {
                precision: 2 * size**3 / min(seconds[f"product {precision}"]) for precision in PRECISIONS
            }
            rates = {name: 2 * macs * batch / statistics.median(seconds[name]) for name in acts}
            found[str(batch)] = {
                "ceilings_gflops": {name: rate / 1e9 for name, rate in ceilings.items()},
                "contestants": {
                    name: summary(seconds[name])
                    | {
                        "eager_over_this": median_ratio(seconds["eager"], seconds[name]),
                        "timm_over_this": median_ratio(seconds["timm"], seconds[name]),
                        "share_of_ceiling": rate / ceilings.get(name, ceilings["float32"]),
                    }
                    for name, rate in rates.items()
                },
            }
    return {"cosine": cosine, "compile_s": compile_s, "batches": found}


def main() -> None:
    """Measure, print a line for each contestant, and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="*", help="shell-style pattern over the names")
    parser.add_argument("--batch", type=int, action="append", help="images at a time (default 8 and 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args()
    names = fnmatch.filter(MODELS, options.models)
    if options.quick:
        names = names[:1]
    if not names:
        parser.error(f"no model matches {options.models!r}; known: {', '.join(MODELS)}")
    keep_freed_memory()
    result: dict[str, Any] = {"quick": options.quick, "machine": machine("timm", "torchao"), "models": {}}
    for name in names:
        found = measure(name, options.batch or (8, 1), quick=options.quick)
        result["models"][name] = found
        for batch, measured in found["batches"].items():
            for way, taken in measured["contestants"].items():
                print(
                    f"{name}  batch {batch}  {way:<8} {1e3 * taken['median_s']:9.2f} ms  "
                    f"timm / this {taken['timm_over_this']:5.2f}  share of the ceiling "
                    f"{taken['share_of_ceiling']:.2f}  cosine {found['cosine'][way]:.5f}",
                    flush=True,
                )
        write_result("optimized", result, quick=options.quick)


if __name__ == "__main__":
    main()
