"""Draw where a model looks in a picture: some layers, and all heads of the last one.

    python examples/attention_analysis.py \
        --model_path checkpoints/vit_base.pth --image_path examples/sample.jpg --output_dir visualizations/

The model is a run folder or a model folder of Vitrail, a hub repository, or a state dictionary (.pth) whose
file name tells the architecture. One with the weights of timm, or with fresh ones where there is no network:

    mkdir -p checkpoints
    python -c "import timm, torch; torch.save(timm.create_model('vit_base_patch16_224',
        pretrained=True).state_dict(), 'checkpoints/vit_base.pth')"
    python -c "import vitrail, torch; torch.save(vitrail.create_model('vit_base').state_dict(),
        'checkpoints/vit_base.pth')"
"""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import torch

from vitrail import create_model
from vitrail.explain.draw import png
from vitrail.models import Encoder
from vitrail.quickstart import AttentionVisualizer, ViTClassifier


def main() -> None:
    """Record, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_path", "--model-path", type=Path, required=True)
    parser.add_argument("--image_path", "--image-path", type=Path, required=True)
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("visualizations"))
    parser.add_argument("--model", help="architecture of a .pth file; when not given, the file's name")
    parser.add_argument("--layers", type=int, nargs="+", help="counted from 1; all when not given")
    options = parser.parse_args()

    if options.model_path.suffix in {".pth", ".pt"}:
        visualizer = AttentionVisualizer(
            load_pth(options.model_path, options.model or options.model_path.stem)
        )
    else:
        visualizer = AttentionVisualizer(ViTClassifier.from_pretrained(options.model_path))
    last = len(visualizer.layers)
    layers = visualizer.generate_attention_maps(options.image_path, options.layers, heads="mean")
    heads = visualizer.generate_attention_maps(options.image_path, [last], heads="all")

    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, maps in (("layers", layers), (f"heads-of-layer-{last}", heads)):
        path = options.output_dir / f"attention-{options.image_path.stem}-{name}.png"
        path.write_bytes(png(visualizer.plot_attention_maps(maps)))
        print(path)


def load_pth(path: Path, architecture: str) -> Encoder:
    """A model with the state dictionary of a .pth file; no code in the file runs.

    Raises:
        ValueError: No such file, another kind of file, or weights of another architecture; in one line.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; the head of {Path(__file__).name} tells how to make one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dictionary but {type(state).__name__}")
    state = state.get("model", state)  # the authors of DeiT and MAE keep it under this key
    model = create_model(architecture, num_classes=len(state["head.bias"]) if "head.bias" in state else 0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no {architecture}: {str(error).splitlines()[1].strip()[:200]}") from None
    return model


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
