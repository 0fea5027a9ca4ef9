"""Euler and tau-leaping: one step against Bayes, n steps against their own chain, and that chain against the source.

Chance tests are chi-squared tests that fail by chance with probability `ODDS`.
"""

from __future__ import annotations

import math

import pytest
import torch
from drawing import p_value, task
from enumeration import exact_denoiser, random_source, sequences
from scores import Source, transitions
from torch import Tensor

from caddf.categorical import RowGenerators, Warp
from caddf.concrete_score import PROCESSES, Absorbing, Uniform, log_scores, process_of
from caddf.decoding.ancestral import Ancestral
from caddf.decoding.rates import Euler, Rates, TauLeaping
from caddf.decoding.task import Task
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.interface import AnyOrder
from caddf.models.config import BranchConfig
from caddf.models.single import SingleConfig, build_single
from caddf.schedules import SCHEDULES

V, L = 3, 2
ODDS = 1e-6
P0 = (random_source(V, L, seed=3) + 1 / V**L) / 2  # no sequence is rare


def drawn(decoder: Rates, model, given: Task) -> Tensor:
    return [*decoder(model, given)][-1].tokens


def chain(decoder: Rates, model) -> Tensor:
    """The exact distribution of what `decoder` draws, by multiplying the transition matrices of its steps."""
    process, schedule = process_of(model), SCHEDULES[decoder.schedule]()
    width = V + (not isinstance(process, Uniform))
    states = sequences(width, L)
    p = (states == V).all(-1).double() if width > V else torch.full((V**L,), 1 / V**L, dtype=torch.float64)
    times = torch.linspace(1, decoder.end, decoder.steps + 1, dtype=torch.float64)
    for n, t in enumerate(times):
        level = schedule.cumulative_rate(t).expand(len(states))
        where = process.noisy(states)
        log_s, x = log_scores(model, model(states, states, AnyOrder(level))[0], where, level), states[where]
        if n < decoder.steps:
            step = decoder.step(process, schedule, log_s, x, t, times[n + 1])
        else:
            step = process.denoise(log_s, x, level[0].item())
        one = torch.nn.functional.one_hot(states, width).double()
        to = torch.nn.functional.pad(step.log_to.softmax(-1), (0, width - V))
        one[where] = (1 - step.move)[:, None] * one[where] + step.move[:, None] * to
        joint = one[:, 0]
        for i in range(1, L):
            joint = (joint[..., None] * one[:, i].unsqueeze(1)).flatten(1)
        p = p @ joint
    return p[(states < V).all(-1)]


def divergence(p: Tensor) -> float:
    """KL(p0 || p)."""
    return (P0.flatten() * (P0.flatten() / p).log()).sum().item()


def test_tweedie_is_bayes_for_one_position():
    """p(x_s | x_t) of one token, and all the way to p(x_0 | x_t)."""
    p0, level, distance = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64), 0.9, 0.4
    for name, process in (("uniform", Uniform(V)), ("absorbing", Absorbing(V))):
        model = Source(p0, name)
        early = transitions(name, V, level - distance) @ torch.nn.functional.pad(p0, (0, name == "absorbing"))
        bayes = transitions(name, V, distance) * early  # [x_t, x_s]
        for x_t in range(V) if name == "uniform" else [V]:
            at, levels = torch.tensor([[x_t]]), torch.tensor([level], dtype=torch.float64)
            log_s = log_scores(model, model(at, at, AnyOrder(levels))[0], at >= 0, levels)
            expected = bayes[x_t] / bayes[x_t].sum()
            step = process.tweedie(log_s, at[0], distance)
            got = torch.nn.functional.pad(step.move[0] * step.log_to[0].softmax(-1), (0, name == "absorbing"))
            got[x_t] += 1 - step.move[0]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
            clean = transitions(name, V, level)[x_t, :V] * p0
            step = process.denoise(log_s, at[0], level)
            got = step.move[0] * step.log_to[0].softmax(-1)
            if x_t < V:
                got[x_t] += 1 - step.move[0]
            torch.testing.assert_close(got, clean / clean.sum(), atol=1e-10, rtol=0)


def test_euler_is_tweedie_for_a_short_way():
    for process, x in ((Uniform(V), torch.tensor([1])), (Absorbing(V), torch.tensor([V]))):
        log_s = torch.tensor([[0.3, 0.0, -1.0]], dtype=torch.float64)
        one, other = process.euler(log_s, x, 1e-6), process.tweedie(log_s, x, 1e-6)
        torch.testing.assert_close(one.move, other.move, rtol=1e-4, atol=0)
        torch.testing.assert_close(one.log_to.softmax(-1), other.log_to.softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_network_that_leaves_nothing_to_move_to_stays():
    log_s = torch.tensor([[-50.0, 0.0, -50.0]], dtype=torch.float64)
    step = Uniform(V).tweedie(log_s, torch.tensor([1]), 0.5)
    assert step.move.item() == 0 and not Warp(top_k=1)(step.log_to).isnan().any()


DECODERS = [Euler, TauLeaping]
SCHEDULE = {"absorbing": "loglinear", "uniform": "geometric"}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_its_chain_draws_the_source_as_steps_grow(decoder, process):
    model = Source(P0, process)
    settings = [decoder(steps, SCHEDULE[process]) for steps in (4, 32, 256)]
    few, more, many = (divergence(chain(one, model)) for one in settings)
    assert few > 2 * more > 4 * many and few > 1e-3 and many < 1e-3


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [3, 24])
def test_samples_have_the_distribution_of_the_chain(decoder, process, steps):
    model, rows = Source(P0, process, noise=0.2), 1500
    one = decoder(steps, SCHEDULE[process])
    samples = drawn(one, model, task(model, torch.full((rows, L), V)))
    assert p_value(samples, chain(one, model)) > ODDS


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_denoiser_has_scores(decoder):
    model = as_model(exact_denoiser(P0), V)
    one = decoder(64)
    assert divergence(chain(one, model)) < 0.02
    assert p_value(drawn(one, model, task(model, torch.full((1500, L), V))), chain(one, model)) > ODDS


def test_tau_leaping_a_denoiser_is_the_ancestral_chain():
    """Both reveal between two levels with probability (lambda_t - lambda_s) / lambda_t."""
    model = as_model(exact_denoiser(P0), V)
    tokens = torch.full((1500, L), V)
    samples = [*Ancestral(steps=4)(model, task(model, tokens, seed=1))][-1].tokens
    assert p_value(samples, chain(TauLeaping(4), model)) > ODDS


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_rows_are_what_they_would_be_alone_and_given_tokens_stay(decoder, process):
    torch.manual_seed(0)
    model = build_single(SingleConfig(5, 8, BranchConfig(1, 16, 2), score="unscaled", process=process)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    m = model.mask_id
    tokens = torch.tensor([[1, m, m, 2, m, m, m, m], [m, 3, m, m, m, 0, 0, 0], [1, 2, 3, 4, 0, 1, 2, 3]])
    lengths, one = [8, 5, 8], decoder(12, SCHEDULE[process])
    with torch.no_grad():
        frames = [*one(model, task(model, tokens, lengths=lengths))]
        for row, length in enumerate(lengths[:2]):
            alone = drawn(one, model, task(model, tokens[row : row + 1, :length], rows=[row], lengths=[length]))
            assert torch.equal(frames[-1].tokens[row, :length], alone[0])
    wanted = task(model, tokens, lengths=lengths).wanted
    for frame in frames:
        assert torch.equal(frame.tokens[~wanted], tokens[~wanted]) and not frame.fresh[~wanted].any()
    assert (frames[-1].tokens[wanted] < m).all()
    counts = frames[-1].counts
    assert counts.diffusion[2] == 0 and (counts.diffusion[:2] <= 13).all()
    if process == "uniform":
        assert (counts.diffusion[:2] == 13).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_a_warp_chooses_where_to(process):
    model = Source(P0, process)
    samples = drawn(TauLeaping(16, SCHEDULE[process]), model, task(model, [[V, V]] * 50, warp=Warp(banned=(2,))))
    first = drawn(TauLeaping(16, SCHEDULE[process]), model, task(model, [[V, V]] * 50))
    assert (first == 2).any()
    if process == "absorbing":  # the uniform chain starts from random tokens, and may keep one
        assert not (samples == 2).any()


def test_a_finished_row_works_no_more():
    model = Source(P0, "absorbing")
    given = Task(
        torch.full((2, L), V),
        torch.tensor([L, L]),
        V,
        RowGenerators(0, 2),
        finished=lambda x: torch.tensor([True, False]),
    )
    frame = [*TauLeaping(8)(model, given)][-1]
    assert frame.counts.diffusion.tolist()[0] == 0 and (frame.tokens[0] == V).all() and (frame.tokens[1] < V).all()


@pytest.mark.parametrize("settings", [{"steps": 0}, {"end": 0.0}, {"end": 1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Euler(**settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_reveals_at_its_first_step_what_its_levels_say(schedule):
    length, steps = 4000, 4
    uniform = as_model(lambda x: torch.full((*x.shape, 3), 1 / 3, dtype=torch.float64).log(), 3)
    task = Task(torch.full((1, length), 3), torch.tensor([length]), 3, RowGenerators(0, 1))
    first = next(iter(TauLeaping(steps=steps, schedule=schedule)(uniform, task)))
    kept = SCHEDULES[schedule]().kept(torch.tensor(1 - 1 / steps, dtype=torch.float64)).item()
    at_one = SCHEDULES[schedule]().kept(torch.tensor(1.0, dtype=torch.float64)).item()
    share = 1 - (1 - kept) / (1 - at_one)  # revealed by the first step, of what was masked at t = 1
    spread = (share * (1 - share) / length) ** 0.5
    assert abs(first.fresh.double().mean().item() - share) < 5 * spread + 1e-4  # by chance once in 1.7e6


def test_time_runs_forwards_wherever_steps_end():
    """A late end with a schedule whose rate is infinite at t = 1: steps before it reveal, and the last one the rest."""
    uniform = as_model(lambda x: torch.full((*x.shape, 5), -math.log(5), dtype=torch.float64), 5)
    task = Task(torch.full((1, 40), 5), torch.tensor([40]), 5, RowGenerators(0, 1))
    frames = list(TauLeaping(steps=8, schedule="cosine", end=0.6)(uniform, task))
    assert len(frames) > 1 and (frames[-1].tokens != 5).all()
