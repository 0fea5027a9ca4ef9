"""Training objectives: each function is its equation; all are in nats."""

from caddf.objectives.any_order import AnyOrderLoss
from caddf.objectives.autoregressive import AutoregressiveLoss
from caddf.objectives.dce import Denoising, LambdaDCE, TimeDCE
from caddf.objectives.loss import Loss, Objective
from caddf.objectives.synergistic import Synergistic, SynergisticConfig

__all__ = [
    "AnyOrderLoss",
    "AutoregressiveLoss",
    "Denoising",
    "LambdaDCE",
    "Loss",
    "Objective",
    "Synergistic",
    "SynergisticConfig",
    "TimeDCE",
]
