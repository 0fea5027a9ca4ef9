"""Upper bounds of -log p(x0), by Monte Carlo (nats per sequence); `truncated` is a published number, and no bound.

The any-order bounds are one sum. With exactly k of L positions masked, chosen uniformly, let A_k be the expected mean
of -log q(x0_i | x^UM) over the masked positions; each bound is sum_k w_k A_k, and only w differs: 1 for eq. 9 over
all of lambda (the any-order form of Ou et al. 2025), `interval_weights` for a part of lambda, `step_weights` for a
sampler of n steps. So k is drawn in proportion to w, stratified over the samples of a row. Drawing lambda and then each
mask by itself has the same mean; but its 1 / lambda meets a mask with probability ~ lambda, so that its second moment,
int 1/lambda dlambda, is infinite. Given k this noise is integrated out: no weight exceeds sum(w).

Nothing here averages over canvases with `prefix = x0` and a weight of 1 / lambda: that number lies below the entropy.

Where `scored` marks some positions, the others are given: they are never masked, L is the number of the scored ones,
and the sums bound -log p(scored | given), the orders being those of the scored positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import InputError, a_share, at_least
from caddf.evaluation.masks import (
    Noise,
    binomial,
    counted,
    draw_masks,
    interval_weights,
    step_weights,
    strata,
    uniform,
)
from caddf.evaluation.reading import Model, Readout, checked, denoised, infilled, read
from caddf.interface import AnyOrder, LanguageModel
from caddf.schedules import LOG_LINEAR, Schedule

ReadMasked = Callable[[LanguageModel, Int[Tensor, "B L"], Bool[Tensor, "B L"]], Readout]
"""How a masked set is read: `denoised`, or `infilled`."""


def check_anchor(model: LanguageModel, anchor: float) -> None:
    """Raises `InputError` where `anchor` is no probability, or the model cannot infill below it."""
    a_share(anchor=anchor)
    if anchor > 0 and "fused" not in model.heads:
        raise InputError(f"anchor is {anchor}; a model without a causal branch cannot infill, so it must be 0")


# Sums over drawn masks.


@dataclass(frozen=True)
class Draws:
    """Masked sets of `counts` positions, and what was read there; k is drawn with the probabilities `drawn[k - 1]`.

    `nats` and `right` sum the nats, and whether the arg max is x0_i, over the k masked positions.
    """

    counts: Int[Tensor, "B S"]
    nats: Float[Tensor, "B S"]
    right: Float[Tensor, "B S"]
    drawn: Float[Tensor, " L"]

    def average(self, weights: Float[Tensor, " L"], level: Float[Tensor, " B"] | None = None) -> Float[Tensor, "B S"]:
        """sum_k w_k A_k, estimated.

        Where k was drawn for other weights, a `level` of nats per token that owes nothing to the draws takes out most
        of the noise and moves no mean: it counts as sum(w) exactly, and only what A_k differs from it is drawn.
        """
        ratio = (weights / self.drawn)[self.counts - 1]
        if level is None:
            return ratio / self.counts * self.nats
        return ratio * (self.nats / self.counts - level[:, None]) + weights.sum() * level[:, None]


def draw(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    weights: Float[Tensor, " n"],
    samples: int,
    noise: Noise,
    reading: ReadMasked = denoised,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Draws:
    """`samples` masked sets per row, k in proportion to `weights` (one per scored position), each read in one pass."""
    drawn = weights / weights.sum()
    masked = draw_masks(x0.shape, F.pad(drawn, (1, 0)), samples, noise, scored)
    nats, right = [], []
    for where in masked.to(x0.device):
        out = reading(model, x0, where)
        nats.append(out.nats.sum(-1))
        right.append((out.best == x0).sum(-1))
    return Draws(masked.sum(-1).T, torch.stack(nats, -1).cpu(), torch.stack(right, -1).cpu().double(), drawn)


def _average(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    weights: Float[Tensor, " n"],
    samples: int,
    noise: Noise,
    scored: Bool[Tensor, "B L"],
) -> Float[Tensor, "B S"]:
    if not weights.any():
        return torch.zeros(len(x0), samples, dtype=torch.float64)
    return draw(model, x0, weights, samples, noise, scored=scored).average(weights)


def infilling(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    anchor: float,
    samples: int,
    noise: Noise,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B S"]:
    """`E[-sum over masked of log p_fused(x_i | x_<i, z)]`, z drawn at `anchor`: sum_k w_k A_k with w_k = k P(k)."""
    check_anchor(model, anchor)
    scored, count = counted(x0, scored)
    if anchor == 0:  # nothing is masked
        return torch.zeros(len(x0), samples, dtype=torch.float64)
    weights = torch.arange(1, count + 1) * binomial(count, anchor)[1:]
    different = 1 if anchor == 1 else samples  # at 1 everything is masked in every draw
    return draw(model, x0, weights, different, noise, infilled, scored).average(weights).expand(-1, samples)


# Bounds.


@torch.no_grad()
def diffusion_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Eq. 9 over all of lambda in [0, 1] with `prefix = x_t`: k ~ U{1..L}, weight L / k. The row mean is unbiased."""
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    return _average(model, x0, interval_weights(count, 0, 1), samples, noise, scored)


@torch.no_grad()
def truncated(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    schedule: Schedule = LOG_LINEAR,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Eq. 9 over the schedule's lambda(0) to lambda(1) alone. NOT a bound: it can lie below the entropy.

    This is the published form (log-linear: lambda ends at 0.999), here for comparison with published numbers only.
    """
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    return _average(model, x0, interval_weights(count, *schedule.limits), samples, noise, scored)


@torch.no_grad()
def schedule_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    schedule: Schedule,
    samples: int,
    noise: Noise,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Eq. 8 in t (no time term), and what `schedule` misses of lambda in [0, 1]: the same bound for every schedule.

    Its noise is that of drawing each mask by itself; `diffusion_bound` is what to report. Up to three evaluations per
    sample.
    """
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    low, high = schedule.limits
    t = 1 - strata(len(x0), samples, noise)
    masked = (uniform((len(x0), samples, x0.shape[1]), noise) < schedule.masked(t)[..., None]) & scored[:, None]
    nats = [denoised(model, x0, where).nats.sum(-1) for where in masked.transpose(0, 1).to(x0.device)]
    body = schedule.weight(t) * torch.stack(nats, -1).cpu()
    ends = (interval_weights(count, 0, low), interval_weights(count, high, 1))
    return body + sum(_average(model, x0, weights, samples, noise, scored) for weights in ends)


@torch.no_grad()
def hybrid_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    anchor: float,
    samples: int,
    noise: Noise,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Diffusion from lambda = 1 to l* = `anchor`, then left-to-right infilling; 1 is `ar_nll`, 0 `diffusion_bound`.

    `E_z[-sum over masked of log p_fused(x_i | x_<i, z)] + int_l*^1 1/lambda E[-sum over masked of log q] dlambda`, two
    evaluations per sample. Given tokens stand in z, as in a template: then 1 is not quite `ar_nll`, whose canvas is
    all masked.
    """
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    infill = infilling(model, x0, anchor, samples, noise, scored)
    return infill + _average(model, x0, interval_weights(count, anchor, 1), samples, noise, scored)


@torch.no_grad()
def finite_step_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    steps: int,
    samples: int,
    noise: Noise,
    schedule: Schedule = LOG_LINEAR,
    anchor: float = 0.0,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Bound of the ancestral sampler in `steps` steps on `Schedule.grid` ("PPL at NFE"), to `anchor`, then infilling.

    `sum_j (lambda_j - lambda_{j-1}) / lambda_j E[-sum over masked of log q(x0_i | x_lambda_j)]`, whatever the number of
    steps at one evaluation per sample (two with an anchor): the step is drawn together with k.
    """
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    infill = infilling(model, x0, anchor, samples, noise, scored)
    return infill + _average(model, x0, step_weights(count, schedule.grid(steps, anchor)), samples, noise, scored)


@torch.no_grad()
def importance_weighted_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    steps: int,
    paths: int,
    noise: Noise,
    schedule: Schedule = LOG_LINEAR,
    anchor: float = 0.0,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, " B"]:
    """`-log mean over paths of w` for the chain of `finite_step_bound`, which it equals with one path (in expectation).

    A path says at which step each position is revealed; w is the product over steps of the probabilities of the
    tokens revealed there (the probabilities of the path itself cancel), times that of the infilling below `anchor`.
    More paths tighten it (Burda et al. 2016). At most `paths * (steps + 1)` evaluations.
    """
    at_least(1, paths=paths)
    model = checked(model, x0, vocab_size)
    check_anchor(model, anchor)
    scored, _ = counted(x0, scored)
    lambdas = schedule.grid(steps, anchor)
    # Position i is masked while lambda > jump: a given one never.
    jump = uniform((len(x0), paths, x0.shape[1]), noise).where(scored[:, None], 1.0)
    log_w = torch.zeros(len(x0), paths, dtype=torch.float64)
    for p in range(paths):
        for above, below in zip(lambdas.flip(0)[:-1].tolist(), lambdas.flip(0)[1:].tolist(), strict=True):
            masked, revealed = jump[:, p] < above, (jump[:, p] < above) & (jump[:, p] >= below)
            if (rows := revealed.any(-1)).any():
                x_t = torch.where(masked[rows].to(x0.device), model.mask_id, x0[rows])
                states, _ = model(x_t, x_t, AnyOrder())
                out = read(model, states, revealed[rows].to(x0.device), x0[rows], model.denoiser)
                log_w[rows, p] -= out.nats.sum(-1).cpu()
        if anchor > 0:
            log_w[:, p] -= infilled(model, x0, (jump[:, p] < anchor).to(x0.device)).nats.sum(-1).cpu()
    return math.log(paths) - log_w.logsumexp(-1)
