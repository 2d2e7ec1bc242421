"""A folder of photographs through a classifier, as a whole command: Vitrail against a plain timm script.

    python benchmarks/predict_folder.py [--repetitions 5] [--quick]

200 photographs of ImageNet (median 500 x 375 pixels; VITRAIL_DATA must hold imagenet-sample/), ViT-Ti/16 at
224 pixels, the five most probable classes of each as JSON lines. Every time is that of a process from its
start to its end, imports included; the ways take turns, after one of each that is not counted, so that all
files are in the page cache.

- vitrail: `python -m vitrail predict MODEL FOLDER --output x.jsonl`.
- vitrail_bf16: the same with the folder that `vitrail optimize MODEL --precision bf16` wrote, judged on
  scenes/ of VITRAIL_DATA; not with `--quick`, since it compiles for half a minute.
- timm_1: the loop that people write: PIL, torchvision's Resize (bicubic), CenterCrop, ToTensor and Normalize,
  one image at a time through timm's model in inference mode.
- timm_32: the same with 32 images at a time.
- import_torch: `python -c "import torch"`, which no way gets below.

All have the same random weights and as many threads as PyTorch takes by itself. `answers` compares what each
way of Vitrail and timm_1 wrote: the share of photographs with the same first class, and the largest
difference of its probability. `--quick` is a smoke test: 16 photographs, one repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from measure import in_turns, machine, median_ratio, summary, write_result
from vitrail.datasets import Preprocessing, load_dataset
from vitrail.models import build_model
from vitrail.pretrained import load_model, save_model
from vitrail.shipping.optimize import optimize

MODEL = "vit_tiny_patch16_224"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TARGET = 2.5
OWN = {"vitrail": "model", "vitrail_bf16": "compiled"}
PEERS = {"timm_1": 1, "timm_32": 32}

# torchvision_ops only makes torchvision importable where its operators do not fit torch.
PLAIN = f"""
import json, sys
from pathlib import Path
import vitrail.torchvision_ops
import timm, torch
from PIL import Image
from torchvision import transforms

weights, folder, output, batch_size = sys.argv[1:]
model = timm.create_model("{MODEL}")
model.load_state_dict(torch.load(weights))
model.eval()
transform = transforms.Compose([
    transforms.Resize(248, transforms.InterpolationMode.BICUBIC),
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize({MEAN}, {STD}),
])
files = sorted(Path(folder).glob("*.JPEG"))
with open(output, "w") as file, torch.inference_mode():
    for start in range(0, len(files), int(batch_size)):
        some = files[start : start + int(batch_size)]
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in some])
        best = model(images).softmax(dim=1).topk(5)
        for path, shares, classes in zip(some, best.values.tolist(), best.indices.tolist()):
            row = {{"source": str(path), "classes": [str(k) for k in classes], "probabilities": shares}}
            file.write(json.dumps(row) + "\\n")
"""


def prepare(work: Path, count: int | None) -> Path:
    """Write weights for both sides, and a folder of links to photographs.

    Raises:
        ValueError: The photographs are not there.
    """
    root = os.environ.get("VITRAIL_DATA")
    files = sorted((Path(root) / "imagenet-sample").glob("*.JPEG")) if root else []
    if not files:
        raise ValueError("no photographs: set VITRAIL_DATA to a folder that holds imagenet-sample/")
    torch.manual_seed(0)
    model = build_model(MODEL)
    prepared = Preprocessing((224, 224), 3, MEAN, STD, crop_ratio=0.9).to_dict()
    save_model(work / "model", model, name=MODEL, classes=(), preprocessing=prepared)
    torch.save(model.state_dict(), work / "weights.pth")
    (work / "photographs").mkdir()
    for file in files[:count]:
        (work / "photographs" / file.name).symlink_to(file.resolve())
    return work / "photographs"


def command(way: str, work: Path) -> list[str]:
    """What is started."""
    weights, folder, output = (str(work / name) for name in ("weights.pth", "photographs", f"{way}.jsonl"))
    if way in OWN:
        return ["-m", "vitrail", "predict", str(work / OWN[way]), folder, "--output", output, "--top", "5"]
    if way == "import_torch":
        return ["-c", "import torch"]
    return ["-c", PLAIN, weights, folder, output, str(PEERS[way])]


def start(way: str, work: Path) -> None:
    """Run one way as a process, from nothing."""
    (work / f"{way}.jsonl").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, *command(way, work)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{way} failed: {done.stderr}")


def compare(work: Path, way: str) -> dict[str, float]:
    """How the answers of a way of Vitrail and of timm_1 agree."""
    own, other = (
        [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        for name in (way, "timm_1")
    )
    pairs = list(zip(own, other, strict=True))
    if any(a["source"] != b["source"] for a, b in pairs):
        raise ValueError(f"{way} and timm_1 did not read the same files in the same order")
    equal = [(a, b) for a, b in pairs if a["classes"][0] == b["classes"][0]]
    return {
        "same_first_class": len(equal) / len(pairs),
        "largest_difference": max(abs(a["probabilities"][0] - b["probabilities"][0]) for a, b in equal),
    }


def measure(repetitions: int, quick: bool) -> dict[str, Any]:
    """Take all times."""
    described = machine("timm", "torchvision", "pillow")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        count = len(list(prepare(work, 16 if quick else None).iterdir()))
        own = ["vitrail"] if quick else list(OWN)
        if not quick:
            # Random weights: how many answers stay the same is said below, and no reason to refuse.
            data = load_dataset("scenes", in_chans=3)
            optimize(
                load_model(work / "model"), work / "compiled", precision="bf16", data=data, agreement=0.01
            )
        ways = (*own, *PEERS, "import_torch")
        acts = {way: lambda way=way: start(way, work) for way in ways}
        seconds = in_turns(acts, repetitions, warmup=0 if quick else 1)
        answers = {way: compare(work, way) for way in own}
    return {
        "benchmark": "predict_folder",
        "quick": quick,
        "machine": described,
        "settings": {"model": MODEL, "images": count, "repetitions": repetitions, "target": TARGET},
        "ways": {
            way: summary(taken)
            | ({} if way == "import_torch" else {"images_per_s": count / statistics.median(taken)})
            for way, taken in seconds.items()
        },
        "peer_over_vitrail": {
            way: {peer: median_ratio(seconds[peer], seconds[way]) for peer in PEERS} for way in own
        },
        "answers": answers,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 16 photographs, one repetition")
    options = parser.parse_args()
    result = measure(1 if options.quick else options.repetitions, options.quick)
    for way, found in result["ways"].items():
        print(f"{way:14}{found['median_s']:8.2f} s (median), {found['min_s']:.2f} s (smallest)")
    for way, ratios in result["peer_over_vitrail"].items():
        for peer, ratio in ratios.items():
            print(f"{peer} / {way}: {ratio:.2f} (target {TARGET})")
    print(f"answers: {result['answers']}")
    print(write_result("predict_folder", result, quick=options.quick))


if __name__ == "__main__":
    main()
