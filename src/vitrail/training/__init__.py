"""From a config to a trained, tested, saved model."""

from vitrail.training.judge import evaluate_and_write
from vitrail.training.run import Result, train
from vitrail.training.setup import Estimate, Run, architecture, estimate, prepare, training_batches

__all__ = [
    "Estimate",
    "Result",
    "Run",
    "architecture",
    "estimate",
    "evaluate_and_write",
    "prepare",
    "train",
    "training_batches",
]
