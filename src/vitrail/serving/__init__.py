"""Trained models at work."""

from vitrail.serving.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
