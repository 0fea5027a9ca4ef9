"""The training loop, its settings, optimiser, average of the weights, checkpoints and log."""

from caddf.training.config import ResolvedTrainConfig, TrainConfig
from caddf.training.loop import Batches, Result, TrainingError, train

__all__ = ["Batches", "ResolvedTrainConfig", "Result", "TrainConfig", "TrainingError", "train"]
