"""Peak memory of a training step: plain, in micro-batches, with activation checkpointing, with both.

    python benchmarks/memory.py [--quick]

A process of its own for each way takes two steps of ViT-S/16 with 32 images of 224 x 224 (the second one with
AdamW's averages and all gradients in memory) and reports the highest memory that the operating system ever
counted for it, less what it had with model, optimiser and batch before the first step. Time is
that of the second step; the processes run one after the other. `--quick` is a smoke test: ViT-Ti, 4 images.
"""

from __future__ import annotations

import argparse
import json
import time

WAYS = {
    "plain": (None, False),
    "micro-batches of 8": (8, False),
    "recompute": (None, True),
    "recompute, micro-batches of 8": (8, True),
}


def measure(model_name: str, images: int, micro_batch: int | None, recompute: bool) -> dict[str, float]:
    """Two steps here -> MiB at the peak beyond the start, seconds of the second step, and its loss."""
    import torch

    from vitrail.bench.memory import PeakMemory
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
        optimizer.step()
        optimizer.zero_grad()
    return {"peak_mib": peak.grown(), "step_s": time.perf_counter() - began, "loss": total}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: ViT-Ti, 4 images")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = ("vit_tiny_patch16_224", 4) if options.quick else ("vit_small_patch16_224", 32)
    if options.way:
        print(json.dumps(measure(*settings, *WAYS[options.way])))
        return
    from measure import machine, printed_by, write_result

    found = {}
    for way in WAYS:
        found[way] = json.loads(printed_by(__file__, "--way", way, *(["--quick"] if options.quick else [])))
        share = found[way]["peak_mib"] / found["plain"]["peak_mib"]
        print(
            f"{way:32}{found[way]['peak_mib']:8.0f} MiB  {100 * share:4.0f} %  "
            f"{found[way]['step_s']:7.2f} s  loss {found[way]['loss']:.6f}"
        )
    content = {
        "benchmark": "memory",
        "quick": options.quick,
        "machine": machine(),
        "settings": {"model": settings[0], "images": settings[1]},
        "ways": found,
    }
    print(write_result("memory", content, quick=options.quick))


if __name__ == "__main__":
    main()
