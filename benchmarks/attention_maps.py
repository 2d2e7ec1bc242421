"""What it costs to see the class token's attention in all layers of ViT-B/16, beside a plain answer.

    python benchmarks/attention_maps.py [--repetitions 5] [--quick]

Four ways, in turns, on the same 8 images of 224 x 224: a plain forward pass; `attention_maps` (every layer,
mean over the heads); transformers' ViT of the same size plain, and with `output_attentions=True` (which needs
its eager attention, chosen when the model is built). Each way also runs once in a process of its own, for the
highest memory that the operating system counted (VmHWM) less what it had before. `--quick` is a smoke
test: ViT-Ti, one image, once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

import vitrail.torchvision_ops  # noqa: F401  (before transformers imports torchvision)
from measure import in_turns, machine, median_ratio, peak_growth, printed_by, summary, write_result
from vitrail.explain.attention import attention_maps
from vitrail.models import build_model

SIZES = {"base": (768, 12), "tiny": (192, 3)}
BATCH = {"base": 8, "tiny": 1}
WAYS = ("plain", "maps", "transformers", "transformers maps")


def prepare(way: str, size: str) -> Callable[[], object]:
    """What a way does once."""
    dim, heads = SIZES[size]
    images = torch.randn(BATCH[size], 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    if way in ("plain", "maps"):
        model = build_model(f"vit_{size}_patch16_224").eval()
        if way == "plain":
            return lambda: model(images)
        return lambda: attention_maps(model, images)
    import transformers

    config = transformers.ViTConfig(
        hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, num_labels=1000
    )
    seen = way == "transformers maps"
    config._attn_implementation = "eager" if seen else "sdpa"
    other = transformers.ViTForImageClassification(config).eval()
    if not seen:
        return lambda: other(images)

    def maps() -> list[torch.Tensor]:
        attentions = other(images, output_attentions=True).attentions
        return [own[:, :, 0, 1:].mean(dim=1) for own in attentions]

    return maps


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test: ViT-Ti, one image, once")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = "tiny" if options.quick else "base"
    torch.set_grad_enabled(False)
    if options.memory:
        print(peak_growth(prepare(options.memory, size), times=1))
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
        "maps_over_plain": median_ratio(seconds["maps"], seconds["plain"]),
        "maps_extra_mib": memory["maps"] - memory["plain"],
        "transformers_maps_over_ours": median_ratio(seconds["transformers maps"], seconds["maps"]),
        "transformers_maps_extra_mib": memory["transformers maps"] - memory["transformers"],
    }
    shown = {key: value for key, value in result.items() if key not in ("times", "machine")}
    print(json.dumps(shown, indent=2))
    print(write_result("attention_maps", result, quick=options.quick))


if __name__ == "__main__":
    main()
