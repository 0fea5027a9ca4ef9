"""Upper bounds of -log p(x0) from scores (SEDD, theorem 3.6): diffusion term, and all that lies beyond its ends.

Both bounds hold for every network, and are the entropy of the data with the exact score (uniform: as `LOWEST` goes
to 0). The integral of the score entropy depends on sbar alone, not on how a schedule runs through it; a schedule
only says at which levels the network was trained.

Where `scored` marks some positions, the chain is theirs alone: the others stay what they are, and L is the number of
the scored ones. A network of the uniform process is not told which they are, so that the exact score of whole rows is
not the exact one here.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.concrete_score import Uniform, log_scores, marked, process_of, score_entropy
from caddf.evaluation.masks import Noise, counted, nth, strata, uniform
from caddf.evaluation.reading import Model, checked, read
from caddf.interface import AnyOrder, LanguageModel
from caddf.schedules import LOG_LINEAR, Schedule

LOWEST = 1e-4
"""sbar at which a schedule that starts from 0 hands over to the reconstruction term (uniform)."""


@torch.no_grad()
def score_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    schedule: Schedule = LOG_LINEAR,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Nats per sequence, float64 on the CPU; the bound of the process that the model belongs to."""
    model = checked(model, x0, vocab_size)
    bound = uniform_bound if isinstance(process_of(model), Uniform) else absorbing_bound
    return bound(model, x0, samples, noise, schedule, scored)


def absorbing_bound(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    schedule: Schedule,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B samples"]:
    """`int_0^1 1/lambda E[sum over masked of g] dlambda`, over all of lambda in [0, 1].

    1. Between the schedule's lambda(0) and lambda(1), `g = sum_v q_v - 1 - log q_x0` with q = s (e^sbar - 1): DSE.
    2. Beyond them g = -log q_x0, with the network's posterior q = s / sum s as it is at that end: any q will do there,
       and this is eq. 9's term; it stands for the reconstruction and the prior term.

    lambda, and one position that is masked for sure in place of the weight 1/lambda, are drawn first; the others are
    masked with probability lambda. So the number of masks is uniform, and the weight L / k never large.
    """
    (scored, count), (low, high) = counted(x0, scored), schedule.limits
    lambdas = strata(len(x0), samples, noise)
    u = uniform((len(x0), samples, x0.shape[1]), noise)
    sure = nth(scored, (uniform((len(x0), samples), noise) * count).long())
    masked = ((u < lambdas[..., None]) & scored[:, None]).scatter(-1, sure[..., None], True)
    inside = (lambdas > low) & (lambdas <= high)
    ends = schedule.cumulative_rate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    level = (-torch.log1p(-lambdas)).clamp(min=max(ends[0].item(), torch.finfo(torch.float64).tiny), max=ends[1].item())
    columns = []
    for where, at, full in zip(masked.transpose(0, 1).to(x0.device), level.T, inside.T, strict=True):
        x_t = torch.where(where, model.mask_id, x0)
        dse = torch.zeros(len(x0), dtype=torch.float64)
        if full.any():
            nats = score_entropy(model, x0[full], x_t[full], at[full]).double().sum(-1).cpu()
            dse[full] = torch.expm1(at[full]) * nats
        if not full.all():
            rest = ~full
            states, _ = model(x_t[rest], x_t[rest], AnyOrder(at[rest].to(x0.device)))
            dse[rest] = read(model, states, where[rest], x0[rest], model.denoiser).nats.sum(-1).cpu()
        columns.append(count / where.sum(-1).cpu() * dse)
    return torch.stack(columns, -1)


def uniform_bound(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    schedule: Schedule,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B samples"]:
    """The three terms between a = sbar(0), or `LOWEST` if that is more, and b = sbar(1).

    1. Diffusion: `int_a^b E[score entropy] dsbar`; sbar is drawn uniformly in its logarithm, because near 0 the
       integrand is rarely met and then as large as 1 / sbar.
    2. Prior: KL(p_b(. | x0) || uniform), exactly.
    3. Reconstruction: E[-log p(x0 | x_a)], with the network's posterior.
    """
    process, (rows, length) = Uniform(model.vocab_size), x0.shape
    scored, count = counted(x0, scored)
    ours = scored.to(x0.device)
    a, b = schedule.cumulative_rate(torch.tensor([0.0, 1.0], dtype=torch.float64)).clamp(min=LOWEST).tolist()
    ratio = torch.tensor(b / a, dtype=torch.float64).log()
    level = a * torch.exp(ratio * strata(rows, samples, noise))
    u = uniform((2, rows, samples, length), noise) if isinstance(noise, torch.Generator) else None
    if u is None:
        u = uniform((rows, 2, samples, length), noise).transpose(0, 1)
    fresh = (uniform((rows, samples, length), noise) * model.vocab_size).long()
    columns = []
    for s in range(samples):
        at, end = level[:, s], torch.full((rows,), a, dtype=torch.float64)
        hit, hit_at_a = ((u[i, :, s] < -torch.expm1(-to)[:, None]) & scored for i, to in enumerate((at, end)))
        x_t = torch.where(hit.to(x0.device), fresh[:, s].to(x0.device), x0)
        diffusion = at * ratio * score_entropy(model, x0, x_t, at).double().where(ours, 0).sum(-1).cpu()
        x_a = torch.where(hit_at_a.to(x0.device), fresh[:, s].to(x0.device), x0)
        columns.append(diffusion + _reconstruction(model, process, x0, x_a, end, ours))
    kept = torch.tensor(-b, dtype=torch.float64).exp()
    here, there = kept + (1 - kept) / model.vocab_size, (1 - kept) / model.vocab_size
    prior = count * (
        here * (here * model.vocab_size).log() + (model.vocab_size - 1) * there * (there * model.vocab_size).log()
    )
    return torch.stack(columns, -1) + prior


def _reconstruction(
    model: LanguageModel,
    process: Uniform,
    x0: Int[Tensor, "B L"],
    x_a: Int[Tensor, "B L"],
    level: Float[Tensor, " B"],
    scored: Bool[Tensor, "B L"],
    elements: int = 1 << 24,
) -> Float[Tensor, " B"]:
    """-log p(x0 | x_a) over the scored positions, at most `elements` scores (or one row's) at a time."""
    states, _ = model(x_a, x_a, AnyOrder(level.to(x0.device)))
    nats = torch.zeros(len(x0), dtype=torch.float64)
    for rows in torch.arange(len(x0)).split(max(1, elements // (x0.shape[1] * model.vocab_size))):
        where = torch.zeros_like(x0, dtype=torch.bool)
        where[rows] = scored[rows]
        log_s = log_scores(model, states, where, level).double()
        log_p = process.log_posterior(log_s, x_a[where], marked(level, where))
        nats[rows] = -log_p.gather(-1, x0[where][:, None]).view(len(rows), -1).sum(-1).cpu()
    return nats
