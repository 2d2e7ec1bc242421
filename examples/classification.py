"""Train a small ViT with your own loaders, keep it, and classify a picture with it.

    python examples/classification.py --epochs 20 --output_dir runs/classification

The pictures are scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: no download, half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from vitrail.quickstart import ViTClassifier, ViTConfig, ViTTrainer


def main() -> None:
    """Train, save, classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning_rate", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("runs/classification"))
    options = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # [N, 1, 8, 8], 0 to 1
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=128, channels=1
    )
    trainer = ViTTrainer(config)
    history = trainer.train(
        train_loader=DataLoader(train, batch_size=32, shuffle=True),
        val_loader=DataLoader(val, batch_size=256),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
    )
    print(f"validation accuracy {100 * history['val_accuracy'][-1]:.1f} % of {len(val)} images")

    folder = trainer.save(options.output_dir)
    picture = options.output_dir / "digit.png"
    Image.fromarray((digits.images[7] * 255 / 16).astype("uint8")).save(picture)
    found = ViTClassifier.from_pretrained(folder).predict(picture)
    print(f"{picture}: {found['class']}, confidence {found['confidence']:.3f}")


if __name__ == "__main__":
    main()
