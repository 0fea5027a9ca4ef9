"""Measuring a model: exact likelihoods, bounds, accuracies."""

from caddf.evaluation.acceptance import Acceptance, acceptance
from caddf.evaluation.accuracy import MultiToken, autoregressive_accuracy, diffusion_accuracy, mtp
from caddf.evaluation.likelihood import (
    Estimate,
    ar_nll,
    block_nll,
    causal_nll,
    diffusion_bound,
    estimate,
    finite_step_bound,
    hybrid_bound,
    importance_weighted_bound,
    schedule_bound,
    score,
    truncated,
)
from caddf.evaluation.pairing import Ratio, paired
from caddf.evaluation.suite import EvaluationConfig, evaluate

__all__ = [
    "Acceptance",
    "Estimate",
    "EvaluationConfig",
    "MultiToken",
    "Ratio",
    "acceptance",
    "ar_nll",
    "autoregressive_accuracy",
    "block_nll",
    "causal_nll",
    "diffusion_accuracy",
    "diffusion_bound",
    "estimate",
    "evaluate",
    "finite_step_bound",
    "hybrid_bound",
    "importance_weighted_bound",
    "mtp",
    "paired",
    "schedule_bound",
    "score",
    "truncated",
]
