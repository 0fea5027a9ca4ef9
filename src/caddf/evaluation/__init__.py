"""Measuring a model: exact likelihoods, bounds, accuracies.

A perplexity is nats per sequence, averaged, then exponentiated: of an exact likelihood (`likelihood.py`), or of an
upper bound (`bounds.py`, or a method's own). `truncated` is a published number and no bound.
"""

from caddf.evaluation.acceptance import Acceptance, acceptance
from caddf.evaluation.accuracy import MultiToken, autoregressive_accuracy, diffusion_accuracy, mtp
from caddf.evaluation.bounds import (
    diffusion_bound,
    finite_step_bound,
    hybrid_bound,
    importance_weighted_bound,
    schedule_bound,
    truncated,
)
from caddf.evaluation.estimates import Estimate, estimate
from caddf.evaluation.likelihood import ar_nll, block_nll, causal_nll, score
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
