"""Adapt a trained model to other images: its head alone, or all of it.

    vitrail train mnist-vit
    python examples/transfer_learning.py --pretrained_model runs/mnist-vit --dataset fashion_mnist --freeze
    python examples/transfer_learning.py --pretrained_model runs/mnist-vit --dataset FOLDER

FOLDER holds a folder of images for each class, or train/ and test/ with one each. Without --freeze all
weights learn, for which 1e-4 is a good learning rate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitrail import load_dataset
from vitrail.datasets import Preprocessing
from vitrail.pretrained import load_model
from vitrail.quickstart import ViTTransferLearning


def main() -> None:
    """Fine-tune, test, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pretrained_model", "--pretrained-model", required=True, help="run or model folder")
    parser.add_argument("--dataset", required=True, help="a name of vitrail.list_datasets(), or a folder")
    parser.add_argument("--freeze", action="store_true", help="train the head only")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning_rate", "--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args()

    expects = Preprocessing.from_dict(load_model(options.pretrained_model).preprocessing)
    splits = load_dataset(options.dataset, img_size=expects.img_size, in_chans=expects.in_chans)
    transfer = ViTTransferLearning(
        pretrained_model=options.pretrained_model,
        num_classes=len(splits.train.classes),
        freeze_backbone=options.freeze,
    )
    found = transfer.fine_tune(dataset=splits, epochs=options.epochs, learning_rate=options.learning_rate)
    low, high = found.test.accuracy_interval
    print(
        f"test accuracy {100 * found.test.accuracy:.2f} % "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f}, {found.test.count} images)"
    )
    print(f"model {transfer.save(options.output_dir)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
