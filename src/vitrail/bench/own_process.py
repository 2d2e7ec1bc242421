"""The process in which `vitrail.bench.measure.peak_memory` has a model's memory measured; prints JSON."""

from __future__ import annotations

import json
import sys

import torch

from vitrail.bench.measure import Settings, peaks_here
from vitrail.malloc import keep_freed_memory


def main() -> None:
    """Do what the order in the first argument says."""
    keep_freed_memory()  # as `vitrail bench` itself does, where the times are measured
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    settings = Settings(**{**order["settings"], "batches": tuple(order["settings"]["batches"])})
    try:
        found = peaks_here(order["name"], order["changes"], order["library"], settings)
    except (RuntimeError, MemoryError, ValueError) as error:
        sys.exit(" ".join(str(error).split()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
