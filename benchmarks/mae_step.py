"""A step of MAE pre-training: Vitrail against transformers, same encoder, decoder, mask share and optimiser.

    python benchmarks/mae_step.py [--repetitions 5] [--quick]

ViT-B/16 at 224 pixels, batch 8, 75 % hidden, the paper's decoder (8 blocks of width 512), normalised targets,
AdamW; forward, backward and update, in turns. Peak memory is that of a process of its own for each
(VmHWM after two steps, less what it had with model, optimiser and batch before the first). `--quick` is a
smoke test: ViT-Ti, one image, once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

import vitrail.torchvision_ops  # noqa: F401  (before transformers imports torchvision)
from measure import in_turns, machine, median_ratio, peak_growth, printed_by, summary, write_result
from vitrail.models import build_model
from vitrail.tasks import MAE

SIZES = {"base": (768, 12), "tiny": (192, 3)}
BATCH = {"base": 8, "tiny": 1}
WAYS = ("vitrail", "transformers")


def prepare(way: str, size: str) -> Callable[[], object]:
    """One training step of one of the two."""
    dim, heads = SIZES[size]
    images = torch.randn(BATCH[size], 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    if way == "vitrail":
        model = build_model(f"vit_{size}_patch16_224", num_classes=0)
        task = MAE(model, ratio=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16).train()

        def loss() -> torch.Tensor:
            return task({"images": images}, 0)["loss"]

        parameters = [own for own in task.parameters() if own.requires_grad]
    else:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, norm_pix_loss=True
        )
        other = ViTMAEForPreTraining(config).train()

        def loss() -> torch.Tensor:
            return other(pixel_values=images).loss

        parameters = [own for own in other.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test: ViT-Ti, one image, once")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = "tiny" if options.quick else "base"
    if options.memory:
        print(peak_growth(prepare(options.memory, size), times=2))
        return
    about = machine("transformers")
    quick = ["--quick"] if options.quick else []
    memory = {way: float(printed_by(__file__, "--memory", way, *quick)) for way in WAYS}
    acts = {way: prepare(way, size) for way in WAYS}
    seconds = in_turns(acts, 1 if options.quick else options.repetitions, warmup=0 if options.quick else 1)
    result = {
        "machine": about,
        "model": f"vit_{size}_patch16_224",
        "batch": BATCH[size],
        "times": {way: summary(own) for way, own in seconds.items()},
        "peak_mib": memory,
        "transformers_over_ours": median_ratio(seconds["transformers"], seconds["vitrail"]),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))
    print(write_result("mae_step", result, quick=options.quick))


if __name__ == "__main__":
    main()
