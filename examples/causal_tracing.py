"""Hide a part of a picture, give single tokens of single layers back, and see where the answer comes back.

    python examples/causal_tracing.py --model_path runs/demo --image_path docs/images/digit.png \
        --hide 0.25 0.25 0.75 0.75 --output_dir visualizations/

The model is a run folder, a model folder, timm:NAME.TAG or a hub repository. --hide takes the top, left,
bottom and right of the hidden part as shares of the picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitrail.explain.draw import image_grid, png
from vitrail.explain.tracing import causal_trace
from vitrail.serving import Predictor


def main() -> None:
    """Trace, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_path", "--model-path", required=True)
    parser.add_argument("--image_path", "--image-path", type=Path, required=True)
    parser.add_argument(
        "--hide",
        type=float,
        nargs=4,
        default=(0.25, 0.25, 0.75, 0.75),
        metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
    )
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("visualizations"))
    options = parser.parse_args()

    predictor = Predictor.from_source(options.model_path)
    image = predictor.preprocessing.open_image(options.image_path)[None]
    _, _, height, width = image.shape
    top, left, bottom, right = options.hide
    damaged = image.clone()
    damaged[..., round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = (
        0.0
    )

    found = causal_trace(predictor.model, image, damaged)
    name = predictor.classes[found.target]
    print(f"{name}: {100 * found.whole:.1f} %, with the hidden part {100 * found.damaged:.1f} %")
    for layer in found.layers:
        best = f"{layer.block}: best patch {100 * layer.patches.max():+.1f} points"
        print(best + (f", class token {100 * layer.prefix[0]:+.1f}" if len(layer.prefix) else ""))
    seen = predictor.preprocessing.denormalise(damaged)
    maps = [None, *(layer.patches.clamp(min=0) for layer in found.layers)]
    captions = ["hidden part", *(layer.block for layer in found.layers)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / f"tracing-{options.image_path.stem}.png"
    grid = image_grid(seen.expand(len(maps), -1, -1, -1), captions, columns=min(len(maps), 5), heat=maps)
    path.write_bytes(png(grid))
    print(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
