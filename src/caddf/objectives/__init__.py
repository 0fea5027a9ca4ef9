"""Training objectives: each function is its equation; all are in nats."""

from caddf.objectives.any_order import AnyOrderLoss
from caddf.objectives.autoregressive import AutoregressiveLoss
from caddf.objectives.block import BlockDiffusion
from caddf.objectives.d3pm import D3PM
from caddf.objectives.dce import Denoising, LambdaDCE, TimeDCE
from caddf.objectives.forms import DenoisingConfig
from caddf.objectives.loss import Loss, Objective
from caddf.objectives.plaid import PlaidLoss
from caddf.objectives.score_entropy import ScoreEntropy, ScoreEntropyConfig
from caddf.objectives.synergistic import Synergistic, SynergisticConfig

__all__ = [
    "D3PM",
    "AnyOrderLoss",
    "AutoregressiveLoss",
    "BlockDiffusion",
    "Denoising",
    "DenoisingConfig",
    "LambdaDCE",
    "Loss",
    "Objective",
    "PlaidLoss",
    "ScoreEntropy",
    "ScoreEntropyConfig",
    "Synergistic",
    "SynergisticConfig",
    "TimeDCE",
]
