"""Peak memory of a training step: plain, in micro-batches, with activation checkpointing, with both.

    python benchmarks/memory.py [--quick]

A process of its own for each way takes two steps of ViT-S/16 with 32 images of 224 x 224 (the second one with
AdamW's averages and all gradients in memory) and reports the highest memory that the operating system ever
counted for it, less what it had with model, optimiser and batch before the first step. Time is
that of the second step; the processes run one after the other.

Then twice as many images: in one batch, and with both means in a process that the operating system gives no
more than 2 GiB of data (`RLIMIT_DATA`; what torch itself takes is in it). Their first gradients are compared:
`difference` is the largest of any parameter, over the largest gradient of that parameter.

`--quick` is a smoke test: ViT-Ti, 4 images.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

BOTH = "recompute, micro-batches of 8"
WAYS = {
    "plain": (None, False),
    "micro-batches of 8": (8, False),
    "recompute": (None, True),
    BOTH: (8, True),
}
LIMIT = 2 * 2**30


def measure(
    model_name: str, images: int, micro_batch: int | None, recompute: bool, gradients: Path | None
) -> dict[str, float]:
    """Two steps here -> MiB at the peak beyond the start and in all, seconds of the second step, its loss.

    The gradients of the first step are written to a file where one is named.
    """
    import torch

    from vitrail.bench.memory import PeakMemory, highest
    from vitrail.models import build_model
    from vitrail.tasks import build_task

    torch.manual_seed(0)
    model = build_model(model_name)
    model.recompute = recompute
    task = build_task("classify", model).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4, fused=True)
    size = micro_batch or images
    batch = {"images": torch.randn(images, 3, 224, 224), "targets": torch.arange(images)}
    peak = PeakMemory(torch.device("cpu"))
    for step in range(2):
        began, total = time.perf_counter(), 0.0
        for first in range(0, images, size):
            part = {name: value[first : first + size] for name, value in batch.items()}
            loss = task(part, step)["loss"] * (len(part["targets"]) / images)
            loss.backward()
            total += float(loss)
        if step == 0 and gradients is not None:
            torch.save({name: weight.grad for name, weight in task.named_parameters()}, gradients)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "peak_mib": peak.grown(),
        "process_mib": highest(),
        "step_s": time.perf_counter() - began,
        "loss": total,
    }


def compare_limited(arguments: list[str]) -> dict[str, Any]:
    """Twice as many images, plain and under the limit -> both measurements and how far gradients differ."""
    import torch

    from measure import printed_by

    found: dict[str, Any] = {"limit_mib": LIMIT // 2**20}
    with tempfile.TemporaryDirectory() as place:
        gradients = []
        for way, more in (("plain", []), (BOTH, ["--limited"])):
            file = Path(place) / f"{way}.pt"
            words = ["--way", way, "--twice", "--gradients", str(file), *more, *arguments]
            found[way] = json.loads(printed_by(__file__, *words))
            gradients.append(torch.load(file, weights_only=True))
    plain, limited = gradients
    found["difference"] = max(
        float((plain[name] - limited[name]).abs().max() / plain[name].abs().max()) for name in plain
    )
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: ViT-Ti, 4 images")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--twice", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, images = ("vit_tiny_patch16_224", 4) if options.quick else ("vit_small_patch16_224", 32)
    if options.way:
        if options.limited:  # before torch is there
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        found = measure(model, images * (1 + options.twice), *WAYS[options.way], options.gradients)
        print(json.dumps(found))
        return
    from measure import machine, printed_by, write_result

    found, quick = {}, ["--quick"] if options.quick else []
    for way in WAYS:
        found[way] = json.loads(printed_by(__file__, "--way", way, *quick))
        share = found[way]["peak_mib"] / found["plain"]["peak_mib"]
        print(
            f"{way:32}{found[way]['peak_mib']:8.0f} MiB  {100 * share:4.0f} %  "
            f"{found[way]['step_s']:7.2f} s  loss {found[way]['loss']:.6f}"
        )
    limited = compare_limited(quick)
    print(
        f"{2 * images} images: {limited['plain']['process_mib']:.0f} MiB in all, with both means "
        f"{limited[BOTH]['process_mib']:.0f} under a limit of {limited['limit_mib']}; "
        f"gradients differ by {limited['difference']:.1g}"
    )
    content = {
        "benchmark": "memory",
        "quick": options.quick,
        "machine": machine(),
        "settings": {"model": model, "images": images},
        "ways": found,
        "limited": limited,
    }
    print(write_result("memory", content, quick=options.quick))


if __name__ == "__main__":
    main()
