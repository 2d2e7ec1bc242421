"""Forward pass and training step of each architecture against the peers that have it, on a CPU in float32.

    python benchmarks/architectures.py [--models 'swin*'] [--repetitions N] [--threads N] [--quick]

Forward: evaluation mode, no gradients. Training step: train mode, forward, cross-entropy, backward, gradients
freed; no optimiser, which is the same for all. 8 images of the size that the variant was made for. A peer is
the same model of timm, transformers, torchvision or vit-pytorch (left out where it is not installed).

Targets, of the ratio of a peer's time to ours: 0.95 for the fastest peer; 1.2 for timm in the training step
of Swin-T and in both for CaiT and PVT v2. What misses one is marked.

Fairness: one process, the same threads, images and labels; the peer holds our weights, converted, and its
logits in train mode differ from ours by less than 1e-4, or nothing is timed (so no drop rate is left, and it
is the same work); every library with the attention that it chooses by itself; all keep freed memory, as every
`vitrail` command does (`vitrail.malloc`). Repetitions take turns, one of each contestant (and in training one
product of two float32 matrices, the machine's ceiling), and the order rotates, so that a busy moment of the
machine hits all alike. A ratio is the median of the ratios within a repetition. The share of the ceiling
counts 2 floating-point operations a multiply-add of `count_macs`, 6 in training.

The result is written after each model, with the machine and the versions it was measured with. A later run
measures what is missing, or was measured by another machine, versions or settings; `--anew`: all that
`--models` selects. A commit counts as the same with and without local changes, because the result itself is
one: after changing code without a commit, say `--anew`. `--quick` is a smoke test: tiny models, one
repetition.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from measure import RESULTS, in_turns, machine, median_ratio, summary
from vitrail.bench.measure import forward_pass, training_step
from vitrail.bench.peers import OURS, PEERS, contest, input_shape
from vitrail.evaluation.cost import count_macs, count_parameters
from vitrail.evaluation.timing import product, product_rate
from vitrail.files import write_whole
from vitrail.malloc import keep_freed_memory

INSTALLED = tuple(peer for peer in PEERS if importlib.util.find_spec(peer.replace("-", "_")))
FASTEST = 0.95
"""At least so large must the ratio to the fastest peer be."""
PRODUCT = "product"
PHASES = ("forward", "training")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture: who else has it, and what is asked of us."""

    peers: tuple[str, ...]
    tiny: Mapping[str, Any]
    """Changes of the config, under names that timm shares, for `--quick`."""
    over_timm: Mapping[str, float] = field(default_factory=dict)
    """Phase -> at least so many times as fast as timm."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the times are taken."""

    quick: bool = False
    """Tiny models."""
    batch_size: int = 8
    repetitions: int = 10
    warmup: int = 2
    product_size: int = 2048
    precision: str = "fp32"


QUICK = Settings(quick=True, batch_size=2, repetitions=1, warmup=0, product_size=256)

_TINY_VIT = {"img_size": 32, "depth": 1}
_TINY_SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
_TINY_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 64)}
_BOTH = {"forward": 1.2, "training": 1.2}
_THREE = ("timm", "transformers", "torchvision")

CASES = {
    "vit_small_patch16_224": Case(peers=_THREE, tiny=_TINY_VIT),
    "vit_base_patch16_224": Case(peers=_THREE, tiny=_TINY_VIT),
    "deit_tiny_distilled_patch16_224": Case(peers=("timm", "transformers"), tiny=_TINY_VIT),
    "deit3_small_patch16_224": Case(peers=("timm",), tiny=_TINY_VIT),
    "swin_tiny_patch4_window7_224": Case(
        peers=_THREE, tiny=_TINY_SWIN | {"img_size": 56}, over_timm={"training": 1.2}
    ),
    "swinv2_tiny_window8_256": Case(peers=_THREE, tiny=_TINY_SWIN | {"img_size": 64}),
    "pvt_tiny": Case(peers=("transformers",), tiny=_TINY_PVT | {"img_size": 64}),
    "pvt_v2_b1": Case(peers=("timm", "transformers"), tiny=_TINY_PVT, over_timm=_BOTH),
    "pvt_v2_b2_li": Case(peers=("timm", "transformers"), tiny=_TINY_PVT, over_timm=_BOTH),
    "cait_xxs24_224": Case(peers=("timm",), tiny=_TINY_VIT, over_timm=_BOTH),
    "crossvit_9_240": Case(peers=("timm",), tiny={"img_size": 120}),
    "cct_7_3x1_32": Case(peers=("vit-pytorch",), tiny={"img_size": 16, "depth": 1}),
    "diffvit_small_patch16_224": Case(peers=("timm",), tiny=_TINY_VIT),
}


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Take all times of one architecture.

    Args:
        name: One of `CASES`.
        settings: How.

    Raises:
        ValueError: A peer is another model.
    """
    peers = [peer for peer in CASES[name].peers if peer in INSTALLED]
    contestants = contest(name, CASES[name].tiny if settings.quick else {}, peers)
    if contestants.absent:
        raise ValueError("; ".join(f"{name}: {peer}: {why}" for peer, why in contestants.absent.items()))
    models = contestants.models
    ours = models[OURS]
    shape, batch = input_shape(ours.config), settings.batch_size
    images = torch.randn(batch, *shape)
    macs = count_macs(ours, shape)

    times = {}
    runs = {contestant: forward_pass(model.eval(), images) for contestant, model in models.items()}
    times["forward"] = in_turns(runs, settings.repetitions, warmup=settings.warmup)
    runs = {contestant: training_step(model.train(), images) for contestant, model in models.items()}
    runs[PRODUCT] = product(settings.product_size, torch.float32, torch.device("cpu"))
    times["training"] = in_turns(runs, settings.repetitions, warmup=settings.warmup)

    products = times["training"].pop(PRODUCT)
    ceiling = product_rate(settings.product_size, products)
    found: dict[str, Any] = {
        "image_shape": shape,
        "parameters": count_parameters(ours),
        "macs_per_image": macs,
        "logit_differences": contestants.logit_differences,
        "ceiling": {"gflop_per_s": ceiling / 1e9} | summary(products),
    }
    for phase, operations in zip(PHASES, (2, 6), strict=True):
        taken, work = times[phase], operations * macs * batch
        found[phase] = {
            "contestants": {
                contestant: summary(seconds)
                | {"share_of_ceiling": work / statistics.median(seconds) / ceiling}
                for contestant, seconds in taken.items()
            },
            "peer_over_vitrail": {
                peer: median_ratio(seconds, taken[OURS]) for peer, seconds in taken.items() if peer != OURS
            },
        }
    return found | {"misses": misses(name, found)}


def misses(name: str, found: Mapping[str, Any]) -> list[str]:
    """The targets that were not reached, in words."""
    missed = []
    for phase in PHASES:
        ratios = found[phase]["peer_over_vitrail"]
        asked = {min(ratios, key=ratios.get): FASTEST} if ratios else {}
        if phase in CASES[name].over_timm:
            asked["timm"] = CASES[name].over_timm[phase]
        missed += [
            f"{phase} {peer} {ratios[peer]:.3f} < {target}"
            for peer, target in asked.items()
            if ratios[peer] < target
        ]
    return missed


def line(name: str, found: Mapping[str, Any]) -> str:
    """One line a model: ours in ms, each peer's, and in brackets the ratio to ours."""
    words = [f"{name:32}"]
    for phase in PHASES:
        words.append(f"{phase}:")
        for contestant, taken in found[phase]["contestants"].items():
            ratio = found[phase]["peer_over_vitrail"].get(contestant)
            words.append(
                f"{contestant} {1000 * taken['median_s']:.0f} ms" + (f" ({ratio:.2f})" if ratio else "")
            )
    if found["misses"]:
        words.append(f"MISSES {'; '.join(found['misses'])}")
    return "  ".join(words)


def same(stored: Mapping[str, Any], described: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a stored result was taken by this machine, with these versions and settings."""

    def lasting(found: Mapping[str, Any]) -> dict[str, Any]:
        versions = found["versions"]
        commit = versions.get("commit", "").removesuffix("-dirty")
        return {**found, "versions": {**versions, "commit": commit}, "load_before": None}

    return stored["settings"] == asdict(settings) and lasting(stored["machine"]) == lasting(described)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", default="*", metavar="NAMES", help="a shell-style pattern (default: all)")
    parser.add_argument("--repetitions", type=positive, metavar="N", help=f"default {Settings().repetitions}")
    parser.add_argument("--threads", type=positive, metavar="N", help="default all cores, or OMP_NUM_THREADS")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: in benchmarks/results)")
    parser.add_argument("--anew", action="store_true", help="measure also what was measured before")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, one repetition")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    names = fnmatch.filter(CASES, options.models)
    if not names:
        parser.error(f"no architecture matches {options.models!r}; expected one of {', '.join(CASES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = QUICK if options.quick else Settings()
    if options.repetitions:
        settings = replace(settings, repetitions=options.repetitions)
    path = options.output or RESULTS / f"architectures{'-quick' if options.quick else ''}.json"
    stored = json.loads(path.read_text())["models"] if path.exists() else {}
    peers = [peer for peer in INSTALLED if peer != "torchvision"]  # whose version is always named
    described = machine(*peers)
    for name in names:
        if options.anew or name not in stored or not same(stored[name], described, settings):
            found = measure(name, settings)
            stored[name] = {"machine": described, "settings": asdict(settings)} | found
            ordered = {case: stored[case] for case in CASES if case in stored}
            content = {"benchmark": "architectures", "models": ordered}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content, indent=2) + "\n")
        print(line(name, stored[name]), flush=True)


if __name__ == "__main__":
    main()
