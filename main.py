"""The front door of a checkout: `python main.py train ...`, and `from main import ViTTrainer, ViTConfig`.

Everything lies in the package `vitrail`, which `pip install -r requirements.txt` installs.
"""

if __name__ == "__main__":
    from vitrail.cli import main

    main()
else:
    from vitrail.quickstart import (
        AttentionVisualizer,
        ViTClassifier,
        ViTConfig,
        ViTTrainer,
        ViTTransferLearning,
    )

    __all__ = ["AttentionVisualizer", "ViTClassifier", "ViTConfig", "ViTTrainer", "ViTTransferLearning"]
