"""Trained models at work."""

from vitrail.serving.pipeline import find_files, predict_files
from vitrail.serving.predictor import Prediction, Predictor
from vitrail.serving.results import Outcome, predict_to

__all__ = ["Outcome", "Prediction", "Predictor", "find_files", "predict_files", "predict_to"]
