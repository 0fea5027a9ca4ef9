"""Likelihoods and bounds on them: what may be called a perplexity (nats per sequence, averaged, then exponentiated).

Exact, by the chain rule: `causal_nll`, `ar_nll`, `block_nll`. Upper bounds, by Monte Carlo: all the others but
`truncated`, which is a published number and no bound.

The any-order bounds are one sum. With exactly k of L positions masked, chosen uniformly, let A_k be the expected mean
of -log q(x0_i | x^UM) over the masked positions; each bound is sum_k w_k A_k, and only w differs: 1 for eq. 9 over
all of lambda (the any-order form of Ou et al. 2025), `interval_weights` for a part of lambda, `step_weights` for a
sampler of n steps. So k is drawn in proportion to w, stratified over the samples of a row. Drawing lambda and then each
mask by itself has the same mean; but its 1 / lambda meets a mask with probability ~ lambda, so that its second moment,
int 1/lambda dlambda, is infinite. Given k this noise is integrated out: no weight exceeds sum(w).

Nothing here averages over canvases with `prefix = x0` and a weight of 1 / lambda: that number lies below the entropy.

Where `scored` marks some positions, the others are given: they are never masked, L is the number of the scored ones,
and the sums bound -log p(scored | given), the orders being those of the scored positions.

Noise comes from one generator, or from one per row, which makes a row's result independent of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import inverse_cdf
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Head, Infill, LanguageModel, Pattern, as_model
from caddf.schedules import LogLinear, Schedule

Model = LanguageModel | Callable[[Tensor], Tensor]
"""A model, or a function `x_t -> log-probabilities` (then `vocab_size` must be given)."""
Noise = torch.Generator | Sequence[torch.Generator]
"""CPU generators, moved on: one for all rows, or one per row."""
Likelihood = Literal["causal", "ar", "block"]
LOG_LINEAR = LogLinear()


# Reading a model.


@dataclass(frozen=True)
class Readout:
    """What a head says of `x0`: nats `-log p(x0_i)` (float64, 0 where not read) and its arg max (-1 where not read)."""

    nats: Float[Tensor, "B L"]
    best: Int[Tensor, "B L"]


def read(
    model: LanguageModel,
    states: object,
    where: Bool[Tensor, "B L"],
    x0: Int[Tensor, "B L"],
    head: Head,
    elements: int = 1 << 25,
) -> Readout:
    """Nats and arg max at the positions in `where`; at most `elements` log-probabilities (or one row's) at a time."""
    nats = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    best = torch.full_like(x0, -1)
    for rows in torch.arange(len(x0)).split(max(1, elements // (x0.shape[1] * model.vocab_size))):
        part = torch.zeros_like(where)
        part[rows] = where[rows]
        log_p = model.log_probs(states, part, head)
        nats[part] = -log_p.gather(-1, x0[part][:, None])[:, 0].double()
        best[part] = log_p.argmax(-1)
    return Readout(nats, best)


def checked(model: Model, x0: Int[Tensor, "B L"], vocab_size: int | None) -> LanguageModel:
    """The model of `as_model`; raises `InputError` where `x0` is not rows of its tokens."""
    model = as_model(model, vocab_size)
    if x0.ndim != 2 or not x0.numel() or x0.dtype != torch.int64:
        raise InputError(f"x0 has shape {tuple(x0.shape)} and type {x0.dtype}; token ids [B, L] in int64 are needed")
    if x0.min() < 0 or x0.max() >= model.vocab_size:
        worst = int(x0.min()) if x0.min() < 0 else int(x0.max())
        raise InputError(f"x0 holds the id {worst}; the model's tokens are 0 to {model.vocab_size - 1}")
    return model


def check_anchor(model: LanguageModel, anchor: float) -> None:
    """Raises `InputError` where `anchor` is no probability, or the model cannot infill below it."""
    if not 0 <= anchor <= 1:
        raise InputError(f"anchor is {anchor}; it must lie in [0, 1]")
    if anchor > 0 and "fused" not in model.heads:
        raise InputError(f"anchor is {anchor}; a model without a causal branch cannot infill, so it must be 0")


def counted(x0: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"] | None) -> tuple[Bool[Tensor, "B L"], int]:
    """Which positions are scored (on the CPU; all of them, if not said), and how many of each row.

    Raises `InputError` where that is not one number, or 0: rows of different numbers have different weights.
    """
    if scored is None:
        return torch.ones(x0.shape, dtype=torch.bool), x0.shape[1]
    if scored.shape != x0.shape or scored.dtype != torch.bool:
        raise InputError(
            f"scored has shape {tuple(scored.shape)} and type {scored.dtype}; a bool for each of the tokens "
            f"{tuple(x0.shape)} is needed"
        )
    least, most = scored.sum(-1).aminmax()
    if not 0 < least == most:
        raise InputError(f"scored marks {least} to {most} positions of a row; it must be one number, at least 1")
    return scored.cpu(), int(most)


def nth(marked: Bool[Tensor, "B L"], n: Int[Tensor, "B ..."]) -> Int[Tensor, "B ..."]:
    """Where the `n`-th of the marked positions of each row is, counted from 0."""
    first = (~marked).long().argsort(dim=-1, stable=True)
    return first.gather(-1, n.view(len(n), -1)).view_as(n)


def at_least_one(**settings: int) -> None:
    """Raises `InputError` on a setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


# Exact likelihoods.


def read_exact(
    model: LanguageModel, x0: Int[Tensor, "B L"], likelihood: Likelihood, block_size: int | None = None
) -> Readout:
    """Every position of `x0` under one exact likelihood, in one pass; `block_size` is the model's if not given.

    Raises `InputError` on a likelihood that the model does not have.
    """
    size = model.block_size if block_size is None else block_size
    at_least_one(block_size=size)
    readings: dict[str, tuple[Pattern, Head]] = {
        "causal": (Infill(), "causal"),
        "ar": (Infill(), "fused"),
        "block": (Block(size), "fused"),
    }
    if likelihood not in readings:
        raise InputError(f"likelihood is {likelihood}; it must be one of {', '.join(readings)}")
    pattern, head = readings[likelihood]
    if head not in model.heads:
        raise InputError(f"likelihood is {likelihood}; this model has no {head} head (causal branch off)")
    states, _ = model(x0, torch.full_like(x0, model.mask_id), pattern)
    return read(model, states, torch.ones_like(x0, dtype=torch.bool), x0, head)


@overload
def score(
    model: Model,
    x0: Tensor,
    likelihood: Likelihood = ...,
    block_size: int | None = ...,
    *,
    vocab_size: int | None = ...,
) -> Tensor: ...
@overload
def score(
    model: Model,
    x0: Sequence[Sequence[int]],
    likelihood: Likelihood = ...,
    block_size: int | None = ...,
    *,
    vocab_size: int | None = ...,
) -> list[Tensor]: ...
@torch.no_grad()
def score(
    model: Model,
    x0: Tensor | Sequence[Sequence[int]],
    likelihood: Likelihood = "causal",
    block_size: int | None = None,
    *,
    vocab_size: int | None = None,
) -> Tensor | list[Tensor]:
    """log p(x0_i | x0_<i) of every token (nats, float64): `[B, L]`, or for a list of rows a list of `[L_r]`.

    `causal`, `ar` and `block` as in `causal_nll`, `ar_nll` and `block_nll`. A list's rows are scored one by one.
    """
    if not isinstance(x0, Tensor):
        rows = [torch.tensor([list(row)], dtype=torch.int64) for row in x0]
        return [score(model, row, likelihood, block_size, vocab_size=vocab_size)[0] for row in rows]
    return -read_exact(checked(model, x0, vocab_size), x0, likelihood, block_size).nats


def causal_nll(model: Model, x0: Int[Tensor, "B L"], *, vocab_size: int | None = None) -> Float[Tensor, " B"]:
    """-sum_i log p_causal(x_i | x_<i): the causal branch's own head."""
    return -score(model, x0, "causal", vocab_size=vocab_size).sum(-1)


def ar_nll(model: Model, x0: Int[Tensor, "B L"], *, vocab_size: int | None = None) -> Float[Tensor, " B"]:
    """-sum_i log p_fused(x_i | x_<i, h(all-masked canvas)).

    The canvas is as long as the row. An encoder without absolute positions, as the diffusion branch is, makes equal
    states of equal tokens, so that an all-masked canvas of the training length would say the same.
    """
    return -score(model, x0, "ar", vocab_size=vocab_size).sum(-1)


def block_nll(
    model: Model, x0: Int[Tensor, "B L"], block_size: int, *, vocab_size: int | None = None
) -> Float[Tensor, " B"]:
    """-sum_i log p_fused(x_i | x_<i, h(x_<start of i's block)), blocks counted from position 0."""
    return -score(model, x0, "block", block_size, vocab_size=vocab_size).sum(-1)


# Weights of the any-order bounds.


def binomial(length: int, p: float | Tensor) -> Float[Tensor, "*n L1"]:
    """P(k of `length` positions are masked), k = 0..L, each masked with probability `p`."""
    p = torch.as_tensor(p, dtype=torch.float64)[..., None]
    k, n = torch.arange(length + 1, dtype=torch.float64), torch.tensor(float(length), dtype=torch.float64)
    choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.exp(choices + torch.xlogy(k, p) + torch.special.xlog1py(n - k, -p))


def interval_weights(length: int, low: float, high: float) -> Float[Tensor, " L"]:
    """w of `int_low^high 1/lambda E[sum over masked of -log q] dlambda`; their sum is L (high - low).

    `int C(L, k) lambda^(k-1) (1-lambda)^(L-k) dlambda` is a Beta integral: w_k is the probability that the k-th
    smallest of L uniforms lies between `low` and `high`.
    """
    below = (
        binomial(length, torch.tensor([low, high], dtype=torch.float64)).flip(-1).cumsum(-1).flip(-1)[:, 1:]
    )  # P(k or more)
    return (below[1] - below[0]).clamp(min=0)


def step_weights(length: int, grid: Float[Tensor, " n1"]) -> Float[Tensor, " L"]:
    """w of `sum_j (1 - lambda_{j-1} / lambda_j) E_{lambda_j}[sum over masked of -log q]` over an increasing `grid`."""
    reveal = 1 - grid[:-1] / grid[1:]
    return (torch.arange(length + 1) * (reveal @ binomial(length, grid[1:])))[1:]


# Draws.


def uniform(shape: tuple[int, ...], noise: Noise) -> Float[Tensor, "B ..."]:
    """Uniforms in [0, 1), float64, row b from its own generator where there are several."""
    if isinstance(noise, torch.Generator):
        return torch.rand(shape, dtype=torch.float64, generator=noise)
    if len(noise) != shape[0]:
        raise InputError(f"there are {len(noise)} generators for {shape[0]} rows; give one, or one per row")
    return torch.stack([torch.rand(shape[1:], dtype=torch.float64, generator=own) for own in noise])


def strata(rows: int, samples: int, noise: Noise) -> Float[Tensor, "B S"]:
    """Uniforms in [0, 1), one in each of `samples` equal parts."""
    at_least_one(samples=samples)
    return (torch.arange(samples) + uniform((rows, samples), noise)) / samples


def draw_masks(
    shape: torch.Size,
    counts: Float[Tensor, " n1"],
    samples: int,
    noise: Noise,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Bool[Tensor, "samples B L"]:
    """Sets of masked positions: their size k = 0..n from the probabilities `counts`, stratified; uniform given k.

    They lie among the `scored` positions, n of each row.
    """
    rows, length = shape
    k = inverse_cdf(counts.expand(rows, samples, -1), strata(rows, samples, noise))
    place = uniform((rows, samples, length), noise)
    if scored is not None:
        place = place.where(scored[:, None], 1.0)  # behind all others
    rank = place.argsort(-1).argsort(-1)
    return (rank < k[..., None]).transpose(0, 1)


# Bounds.


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


Reading = Callable[[LanguageModel, Int[Tensor, "B L"], Bool[Tensor, "B L"]], Readout]


def denoised(model: LanguageModel, x0: Int[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Readout:
    """q(x0_i | x_t) at the masked positions, `prefix = x_t` (eq. 5)."""
    x_t = torch.where(where, model.mask_id, x0)
    states, _ = model(x_t, x_t, AnyOrder())
    return read(model, states, where, x0, model.denoiser)


def infilled(model: LanguageModel, x0: Int[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Readout:
    """p_fused(x0_i | x0_<i, z) at the masked positions of the canvas z (eq. 6); their product is one chain rule."""
    states, _ = model(x0, torch.where(where, model.mask_id, x0), Infill())
    return read(model, states, where, x0, "fused")


def draw(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    weights: Float[Tensor, " n"],
    samples: int,
    noise: Noise,
    reading: Reading = denoised,
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
    at_least_one(paths=paths)
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


# Averages.


@dataclass(frozen=True)
class Estimate:
    """An average over rows.

    nll: nats per token. standard_error: of `nll`, over rows, so that Monte-Carlo noise is in it; None with one row.
    samples: Monte-Carlo samples per row (1 for exact likelihoods). bytes: of text scored, where known.
    """

    nll: float
    standard_error: float | None
    tokens: int
    rows: int
    samples: int
    bytes: int | None = None

    @property
    def ppl(self) -> float:
        """exp(nll), per token."""
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which compares across tokenisers; None where the bytes are not known."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, for JSON."""
        return {
            "nll": self.nll,
            "standard_error": self.standard_error,
            "ppl": self.ppl,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "rows": self.rows,
            "samples": self.samples,
        }


def estimate(
    nats: Float[Tensor, " B"] | Float[Tensor, "B S"], tokens: int | Int[Tensor, " B"], bytes: int | None = None
) -> Estimate:
    """Averages per-row nats (one value, or S samples, per row) over `tokens` (of each row, or of every row)."""
    samples = nats.shape[1] if nats.ndim == 2 else 1
    per_row = nats.double().reshape(len(nats), samples).mean(-1)
    count = torch.as_tensor(tokens, dtype=torch.float64).expand(len(nats))
    nll, n = (per_row.sum() / count.sum()).item(), len(nats)
    # The ratio estimator's error; with rows of one length, the standard deviation over sqrt(n).
    spread = (per_row - nll * count).square().sum().sqrt() / count.sum()
    error = spread.item() * math.sqrt(n / (n - 1)) if n > 1 else None
    return Estimate(nll, error, int(count.sum()), n, samples, bytes)
