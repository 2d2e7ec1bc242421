"""From a config to a trained, tested, saved model."""

from vitrail.training.run import Estimate, Result, Run, estimate, evaluate_and_write, prepare, train

__all__ = ["Estimate", "Result", "Run", "estimate", "evaluate_and_write", "prepare", "train"]
