"""Score entropy against its definition, t-DCE and the entropy of known sources (float64, V and L tiny)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawing import generator
from enumeration import entropy, exact_denoiser, masks, random_denoiser, random_source, sequences
from scores import Source, transitions
from torch import Tensor

from caddf.concrete_score import PROCESSES, Uniform, log_scores, process_of, score_entropy
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation import score_entropy as bounds
from caddf.evaluation.score_entropy import score_bound
from caddf.interface import AnyOrder
from caddf.models.config import BranchConfig
from caddf.models.single import SingleConfig, build_single
from caddf.objectives.dce import TimeDCE
from caddf.objectives.score_entropy import ScoreEntropy
from caddf.schedules import SCHEDULES, Geometric, LogLinear, Schedule

V, L = 3, 2
P0 = random_source(V, L)
SIGMAS = 5  # one comparison at so many standard errors fails by chance with probability 6e-7
EVERY = sequences(V, L)


def by_definition(process: str, log_s: Tensor, x_t: int, x0: int, level: float) -> float:
    """sum over v != x_t of Q(v, x_t) (s - r log s + K(r)), all from the rate matrix; [M] as a target has no rate."""
    way, total = transitions(process, V, level), 0.0
    for v in range(V):
        if v == x_t:
            continue
        rate = 1 / V if process == "uniform" else float(x_t == V)
        s, r = log_s[v].exp().item(), (way[v, x0] / way[x_t, x0]).item()
        total += rate * (s - r * log_s[v].item() + (r * (np.log(r) - 1) if r > 1e-12 else 0.0))
    return total


@pytest.mark.parametrize("level", [1e-3, 0.4, 5.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_it_is_the_definition(process, level):
    log_s = torch.randn(V, dtype=torch.float64, generator=generator())
    for x0 in range(V):
        for x_t in range(V) if process == "uniform" else [V]:
            given = log_s.index_fill(0, torch.tensor([x_t]), 0.0) if process == "uniform" else log_s
            args = (given[None], torch.tensor([x_t]), torch.tensor([x0]), torch.tensor([level], dtype=torch.float64))
            value = PROCESSES[process](V).entropy(*args).item()
            assert value == pytest.approx(by_definition(process, given, x_t, x0, level), rel=1e-9)
            assert value >= 0


@pytest.mark.parametrize("process", PROCESSES)
def test_it_is_zero_at_the_ratio_and_nowhere_else(process):
    level, x0 = torch.tensor([0.7], dtype=torch.float64), torch.tensor([1])
    way = transitions(process, V, 0.7)
    for x_t in range(V) if process == "uniform" else [V]:
        log_s = (way[:V, 1] / way[x_t, 1]).clamp(min=1e-300).log()[None]
        at = PROCESSES[process](V).entropy(log_s, torch.tensor([x_t]), x0, level).item()
        off = PROCESSES[process](V).entropy(log_s + 0.1 * (log_s != 0), torch.tensor([x_t]), x0, level).item()
        assert at == pytest.approx(0, abs=1e-12) and off > 1e-4


@pytest.mark.parametrize("schedule", [schedule() for schedule in SCHEDULES.values()], ids=list(SCHEDULES))
def test_of_a_normalised_network_it_is_t_dce(schedule):
    """The same draws, term by term: and so in expectation."""
    model, x0 = as_model(random_denoiser(V, L), V), EVERY.repeat(20, 1)
    dse = ScoreEntropy(schedule, earliest=0).nats(model, x0, generator())
    torch.testing.assert_close(dse, TimeDCE(schedule).nats(model, x0, generator()), rtol=1e-9, atol=1e-9)
    assert dse.sum() > 0


def test_of_an_unnormalised_network_it_is_more():
    model = as_model(random_denoiser(V, L), V)
    x_t, level = torch.tensor([[V, V]]), torch.tensor([0.5], dtype=torch.float64)
    log_s = log_scores(model, model(x_t, x_t, AnyOrder())[0], x_t == V, level.expand(1))
    process, x0, levels = process_of(model), torch.tensor([0, 1]), level.expand(2)
    assert (process.entropy(log_s + 0.3, x_t[0], x0, levels) > process.entropy(log_s, x_t[0], x0, levels)).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_parts_add_up_and_gradients_too(process):
    torch.manual_seed(0)
    model = build_single(SingleConfig(V, L, BranchConfig(1, 8, 2), score="unscaled", process=process)).double()
    torch.nn.init.normal_(model.output.weight)
    level = torch.linspace(0.1, 2, len(EVERY), dtype=torch.float64)
    x_t = process_of(model).corrupt(EVERY, -torch.expm1(-level), generator())
    results = []
    for elements in (1 << 24, V * L * 4):
        model.zero_grad()
        nats = score_entropy(model, EVERY, x_t, level, elements)
        nats.sum().backward()
        results.append((nats.detach(), model.output.weight.grad.clone(), model.diffusion.embedding.weight.grad.clone()))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)


def test_earliest_is_checked():
    with pytest.raises(InputError, match="earliest"):
        ScoreEntropy(earliest=1.0)


# Bounds, by quadrature: expectations over x_t by enumeration, integrals over sbar by Gauss-Legendre.


def states_of(process: str) -> Tensor:
    return EVERY if process == "uniform" else torch.cartesian_prod(*[torch.arange(V + 1)] * L)


def expected_entropy(model: Source, level: float) -> Tensor:
    """E[score entropy | x0] of each x0."""
    way, states, out = transitions(model.process, V, level), states_of(model.process), []
    for x0 in EVERY:
        p = way[states, x0].prod(-1)
        reached = states[p > 0]
        levels = torch.full((len(reached),), level, dtype=torch.float64)
        nats = score_entropy(model, x0.expand_as(reached).contiguous(), reached, levels)
        out.append((p[p > 0] * nats.sum(-1)).sum())
    return torch.stack(out)


def diffusion_term(model: Source, low: float, high: float, points: int = 40) -> Tensor:
    """int_low^high E[score entropy] dsbar, over log sbar."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    center, half = (np.log(high) + np.log(low)) / 2, (np.log(high) - np.log(low)) / 2
    levels = np.exp(center + half * nodes)
    return sum(half * w * s * expected_entropy(model, float(s)) for w, s in zip(weights, levels, strict=True))


def uniform_exactly(model: Source, low: float, high: float) -> Tensor:
    """The three terms for each x0."""
    prior = transitions("uniform", V, high)
    prior = L * torch.xlogy(prior[:, 0], prior[:, 0] * V).sum()
    way, reconstruction = transitions("uniform", V, low), []
    levels = torch.full((len(EVERY),), low, dtype=torch.float64)
    everywhere = torch.ones_like(EVERY, dtype=torch.bool)
    log_s = model.log_scores(model(EVERY, EVERY, AnyOrder(levels))[0], everywhere)
    log_p = Uniform(V).log_posterior(log_s, EVERY.flatten(), levels.repeat_interleave(L)).view(-1, L, V)
    for x0 in EVERY:
        nats = -log_p.gather(-1, x0.expand_as(EVERY)[..., None])[..., 0].sum(-1)
        reconstruction.append((way[EVERY, x0].prod(-1) * nats).sum())
    return diffusion_term(model, low, high) + prior + torch.stack(reconstruction)


def test_the_uniform_bound_is_the_entropy_with_the_exact_score():
    model, truth = Source(P0, "uniform"), entropy(P0)
    gaps = [(P0.flatten() @ uniform_exactly(model, low, high)).item() - truth for low, high in ((0.1, 3), (1e-2, 8))]
    gaps.append((P0.flatten() @ uniform_exactly(model, 1e-4, 20)).item() - truth)
    assert gaps[0] > gaps[1] > gaps[2] > -1e-6 and gaps[0] > 1e-3 and gaps[2] < 1e-4


@pytest.mark.parametrize("ends", [(0.1, 3.0), (1e-4, 20.0)])
def test_the_uniform_bound_is_above_the_entropy_for_other_networks(ends):
    for seed, noise in ((0, 0.03), (1, 0.3), (2, 1.0)):
        model = Source(P0, "uniform", noise, seed)
        assert P0.flatten() @ uniform_exactly(model, *ends) > entropy(P0)


def absorbing_exactly(model: Source, schedule: Schedule) -> Tensor:
    """Both ends with the posterior of the scores there, for each x0; the middle is the diffusion term."""
    ends = schedule.cumulative_rate(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    total = torch.zeros(len(EVERY), dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = schedule.limits
    for (a, b), level in (((0.0, low), ends[0]), ((high, 1.0), ends[1])):
        if a == b:
            continue
        for node, weight in zip(nodes, weights, strict=True):
            at = (a + b) / 2 + (b - a) / 2 * node
            for where in masks(L)[1:]:
                x_t = torch.where(where, V, EVERY)
                states, _ = model(x_t, x_t, AnyOrder(torch.full((len(x_t),), level, dtype=torch.float64)))
                nats = model.nll(states, where.expand_as(x_t), EVERY).view(len(x_t), -1).sum(-1)
                p = at ** where.sum() * (1 - at) ** (~where).sum()
                total += (b - a) / 2 * weight * p / at * nats
    return total + diffusion_term(model, max(ends[0], 1e-9), ends[1])


@pytest.mark.parametrize("schedule", [LogLinear(0.05), Geometric(1e-2, 5.0)], ids=str)
def test_the_absorbing_bound_is_the_entropy_with_the_exact_score(schedule):
    exactly = absorbing_exactly(Source(P0, "absorbing"), schedule)
    torch.testing.assert_close(exactly, -P0.flatten().log(), rtol=0, atol=1e-4)
    for noise in (0.03, 0.3, 1.0):
        assert P0.flatten() @ absorbing_exactly(Source(P0, "absorbing", noise), schedule) > entropy(P0)


def close_in_mean(model: object, exactly: Tensor, schedule: Schedule, times: int, **settings: int) -> None:
    x0 = EVERY.repeat_interleave(times, 0)
    estimates = score_bound(model, x0, 4, generator(), schedule, **settings).mean(-1).view(len(EVERY), times)
    error = estimates.std(-1) / times**0.5
    assert ((estimates.mean(-1) - exactly).abs() <= SIGMAS * error + 1e-10).all()
    assert error.max() < 0.2  # of up to 8 nats: they could tell


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_estimates_have_the_mean_of_the_quadrature(noise):
    absorbing, uniform = Source(P0, "absorbing", noise), Source(P0, "uniform", noise)
    close_in_mean(absorbing, absorbing_exactly(absorbing, LogLinear(0.05)), LogLinear(0.05), 400)
    schedule = Geometric(1e-2, 5.0)
    close_in_mean(uniform, uniform_exactly(uniform, 1e-2, 5.0), schedule, 600)


def test_a_plain_function_is_a_score_too():
    close_in_mean(exact_denoiser(P0), -P0.flatten().log(), LogLinear(), 200, vocab_size=V)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_row_is_scored_as_it_would_be_alone(process):
    model = Source(P0, process, 0.3)
    rows = score_bound(model, EVERY, 2, [generator(i) for i in range(len(EVERY))])
    alone = score_bound(model, EVERY[3:4], 2, [generator(3)])
    torch.testing.assert_close(rows[3:4], alone)


def test_the_lowest_level_stands_in_for_zero():
    seen = []

    class Spy(Source):
        def __call__(self, prefix, canvas, pattern, caches=None):
            seen.extend(pattern.level.tolist())
            return super().__call__(prefix, canvas, pattern, caches)

    score_bound(Spy(P0, "uniform"), EVERY, 2, generator(), LogLinear())
    assert min(seen) == bounds.LOWEST


SEDD = {
    "sedd-uniform": ("unscaled", "uniform", Geometric()),
    "sedd-unscaled": ("unscaled", "absorbing", LogLinear()),
    "sedd-scaled": ("scaled", "absorbing", LogLinear()),
}


def train(name: str, x0: Tensor, steps: int, layers: int = 1, rate: float = 1e-2) -> tuple[Tensor, Tensor]:
    """The bound of each row of `x0` before and after `steps` steps on them."""
    score, process, schedule = SEDD[name]
    torch.manual_seed(0)
    model = build_single(SingleConfig(8, x0.shape[1], BranchConfig(layers, 32, 2), score=score, process=process))
    batch, draws, objective = x0.repeat(32 // len(x0), 1), generator(), ScoreEntropy(schedule)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    before = score_bound(model, batch, 16, generator(1), schedule)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, batch, draws).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    after = score_bound(model, batch, 16, generator(1), schedule)
    return before.mean(), after.mean()


def test_it_learns_from_the_context():
    """Two rows that any one token tells apart: log 2, where independent tokens would give 6 log 2."""
    _, after = train("sedd-scaled", torch.tensor([[3, 1, 3, 1, 3, 1], [1, 3, 1, 3, 1, 3]]), 250, 2, 5e-3)
    assert np.log(2) - 0.05 < after < 1.4
