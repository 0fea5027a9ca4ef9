"""Bounds, their weights and their masks against enumeration over all sequences and masks (float64, V and L tiny).

Chance tests compare a Monte-Carlo mean with its exact value at `SIGMAS` standard errors: under a normal law one such
comparison fails by chance with probability 6e-7. Seeds are fixed, so what passes once passes always.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from drawing import generator
from enumeration import (
    CONFIGS,
    entropy,
    exact_denoiser,
    masked_nats,
    masks,
    random_denoiser,
    random_network,
    random_source,
    sequences,
    support,
    two_bits,
)
from torch import Tensor

from caddf import evaluation
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation.bounds import (
    diffusion_bound,
    draw,
    finite_step_bound,
    hybrid_bound,
    importance_weighted_bound,
    schedule_bound,
    truncated,
)
from caddf.evaluation.likelihood import ar_nll, block_nll, causal_nll, score
from caddf.evaluation.masks import draw_masks, interval_weights, step_weights
from caddf.interface import LanguageModel
from caddf.schedules import SCHEDULES, LogLinear

SIGMAS = 5
V, L = 2, 4
SOURCE = random_source(V, L)
network = partial(random_network, V, L)


def over_masks(model: LanguageModel, x0: Tensor, infill: bool = False) -> Tensor:
    """[B, 2^L]: `masked_nats` for every set of masked positions."""
    return torch.stack([masked_nats(model, x0, where, infill) for where in masks(x0.shape[1])], -1)


EVERYWHERE = torch.ones(L, dtype=torch.bool)


def at(nats: Tensor, masked: float, scored: Tensor = EVERYWHERE) -> Tensor:
    """E at lambda of the sums over masked positions, where only the scored ones may be."""
    sizes, allowed = masks(L).sum(-1), ~(masks(L) & ~scored).any(-1)
    p = torch.tensor(masked, dtype=torch.float64)
    return (nats * p**sizes * (1 - p) ** (scored.sum() - sizes))[:, allowed].sum(-1)


def integral(nats: Tensor, low: float, high: float, points: int = 40, scored: Tensor = EVERYWHERE) -> Tensor:
    """int_low^high 1/lambda E dlambda: a polynomial, so that Gauss-Legendre is exact up to rounding."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    lambdas = (low + high) / 2 + (high - low) / 2 * nodes
    terms = [w * at(nats, float(x), scored) / float(x) for x, w in zip(lambdas, weights, strict=True)]
    return (high - low) / 2 * torch.stack(terms).sum(0)


def steps_sum(nats: Tensor, grid: list[float], scored: Tensor = EVERYWHERE) -> Tensor:
    """The finite-step bound, term by term."""
    return torch.stack([(b - a) / b * at(nats, b, scored) for a, b in itertools.pairwise(grid)]).sum(0)


def close_in_mean(samples: Tensor, exact: Tensor) -> None:
    """Each row's mean over its repetitions (last dimension, independent) equals `exact` within `SIGMAS` errors."""
    error = samples.std(-1) / samples.shape[-1] ** 0.5
    assert ((samples.mean(-1) - exact).abs() <= SIGMAS * error + 1e-10).all()


def repeat(bound, x0: Tensor, times: int, **settings: object) -> Tensor:
    """[B, times] independent row means of a bound."""
    out = bound(x0=x0.repeat_interleave(times, 0), **settings)
    return out.reshape(len(x0), times, -1).mean(-1)


@pytest.fixture(params=["exact", "random"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return as_model(exact_denoiser(SOURCE) if request.param == "exact" else random_denoiser(V, L), V)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.999), (1e-4, 1), (0.3, 0.8), (0.999, 1), (0.5, 0.5)])
def test_interval_weights_are_the_integral(low: float, high: float) -> None:
    model, x0 = network(), sequences(V, L)
    nats, sizes, weights = over_masks(model, x0), masks(L).sum(-1), interval_weights(L, low, high)
    means = torch.stack([nats[:, sizes == k].mean(-1) / k for k in range(1, L + 1)], -1)
    torch.testing.assert_close(means @ weights, integral(nats, low, high), rtol=1e-10, atol=1e-12)
    assert weights.sum().item() == pytest.approx(L * (high - low), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("anchor", [0.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_step_weights_are_the_sum_over_steps(schedule: type, steps: int, anchor: float) -> None:
    nats, sizes = over_masks(network(), sequences(V, L)), masks(L).sum(-1)
    grid = schedule().grid(steps, anchor)
    assert (grid[0], grid[-1], len(grid)) == (anchor, 1, steps + 1) and (grid.diff() > 0).all()
    means = torch.stack([nats[:, sizes == k].mean(-1) / k for k in range(1, L + 1)], -1)
    torch.testing.assert_close(means @ step_weights(L, grid), steps_sum(nats, grid.tolist()))


def test_weights_hold_at_a_real_length() -> None:
    torch.testing.assert_close(interval_weights(1024, 0, 1), torch.ones(1024, dtype=torch.float64))
    assert interval_weights(1024, 0.999, 1).sum().item() == pytest.approx(1.024, rel=1e-9)
    fine = step_weights(64, LogLinear().grid(20_000))
    torch.testing.assert_close(fine, torch.ones(64, dtype=torch.float64), rtol=2e-2, atol=0)


def test_diffusion_bound_is_unbiased(model: LanguageModel) -> None:
    x0 = sequences(V, L)
    exact = integral(over_masks(model, x0), 0, 1)
    for samples in (1, 3):
        close_in_mean(repeat(diffusion_bound, x0, 500, model=model, samples=samples, noise=generator()), exact)


@pytest.mark.parametrize("settings", [CONFIGS[0], CONFIGS[1]], ids=str)
def test_bounds_of_a_network_are_unbiased(settings: dict) -> None:
    model, x0 = network(**settings), sequences(V, L)
    nats = over_masks(model, x0)
    drawn = {"model": model, "samples": 4, "noise": generator()}
    close_in_mean(repeat(diffusion_bound, x0, 60, **drawn), integral(nats, 0, 1))
    close_in_mean(repeat(finite_step_bound, x0, 60, **drawn, steps=3), steps_sum(nats, LogLinear().grid(3).tolist()))
    if "fused" in model.heads:
        exact = integral(nats, 0.3, 1) + at(over_masks(model, x0, infill=True), 0.3)
        close_in_mean(repeat(hybrid_bound, x0, 60, **drawn, anchor=0.3), exact)
        return
    with pytest.raises(InputError, match="cannot infill"):
        hybrid_bound(model, x0, 0.3, 1, generator())


def test_draws_serve_other_weights() -> None:
    """With a level and without, the mean is the same; where all nats are the level, no noise is left."""
    model, x0, times = as_model(random_denoiser(V, L), V), sequences(V, L), 500
    nats, everything, weights = over_masks(model, x0), torch.ones(L).double(), interval_weights(L, 0.3, 0.9)
    draws = draw(model, x0.repeat_interleave(times, 0), everything, 2, generator())
    level = integral(nats, 0, 1) / L
    for guess in (None, level.repeat_interleave(times)):
        drawn = draws.average(weights, guess).mean(-1).view(len(x0), times)
        close_in_mean(drawn, integral(nats, 0.3, 0.9))

    uniform = as_model(lambda x_t: torch.full((*x_t.shape, V), 1 / V, dtype=torch.float64).log(), V)
    draws = draw(uniform, x0, everything, 2, generator())
    level = torch.full((len(x0),), math.log(V), dtype=torch.float64)
    exact = torch.full((len(x0), 2), 0.6 * L * math.log(V), dtype=torch.float64)
    torch.testing.assert_close(draws.average(weights, level), exact)
    assert draws.average(weights).std() > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_every_schedule_gives_the_same_bound(model: LanguageModel, schedule: type) -> None:
    x0 = sequences(V, L)
    exact = integral(over_masks(model, x0), 0, 1)
    drawn = repeat(schedule_bound, x0, 1000, model=model, schedule=schedule(), samples=4, noise=generator())
    close_in_mean(drawn, exact)


def test_schedule_bound_needs_its_end_pieces() -> None:
    """A schedule that covers [0.2, 0.7] only: the pieces are most of the bound, so a wrong one would show."""

    class Short(LogLinear):
        def masked(self, t: Tensor) -> Tensor:
            return 0.2 + 0.5 * t

        def slope(self, t: Tensor) -> Tensor:
            return torch.full_like(t, 0.5)

    x0, model = sequences(V, L), as_model(random_denoiser(V, L), V)
    nats = over_masks(model, x0)
    drawn = repeat(schedule_bound, x0, 1000, model=model, schedule=Short(), samples=2, noise=generator())
    close_in_mean(drawn, integral(nats, 0, 1))
    drawn = repeat(truncated, x0, 1000, model=model, schedule=Short(), samples=2, noise=generator())
    close_in_mean(drawn, integral(nats, 0.2, 0.7))


@pytest.mark.parametrize("anchor", [0.0, 0.3, 0.8])
def test_hybrid_bound_is_unbiased(model: LanguageModel, anchor: float) -> None:
    x0 = sequences(V, L)
    exact = integral(over_masks(model, x0), anchor, 1)
    if anchor:
        exact = exact + at(over_masks(model, x0, infill=True), anchor)
    close_in_mean(repeat(hybrid_bound, x0, 500, model=model, anchor=anchor, samples=2, noise=generator()), exact)


def test_hybrid_bound_ends_in_the_ar_likelihood_and_the_diffusion_bound() -> None:
    model, x0 = network(), sequences(V, L)
    hybrid = hybrid_bound(model, x0, 1.0, 3, generator())
    assert hybrid.shape == (len(x0), 3)
    assert torch.equal(hybrid, ar_nll(model, x0)[:, None].expand(-1, 3))
    assert torch.equal(hybrid_bound(model, x0, 0.0, 3, generator()), diffusion_bound(model, x0, 3, generator()))


@pytest.mark.parametrize("anchor", [0.0, 0.4])
def test_finite_step_bound_is_unbiased(model: LanguageModel, anchor: float) -> None:
    x0 = sequences(V, L)
    exact = steps_sum(over_masks(model, x0), LogLinear().grid(3, anchor).tolist())
    if anchor:
        exact = exact + at(over_masks(model, x0, infill=True), anchor)
    settings = {"model": model, "steps": 3, "anchor": anchor, "noise": generator()}
    close_in_mean(repeat(finite_step_bound, x0, 500, samples=2, **settings), exact)
    close_in_mean(repeat(importance_weighted_bound, x0, 1000, paths=1, **settings), exact)


def test_finite_steps_fall_to_the_continuous_bound() -> None:
    x0, p = support(SOURCE)
    model = as_model(exact_denoiser(SOURCE), V)
    nats, sizes = over_masks(model, x0), masks(L).sum(-1)
    means = torch.stack([nats[:, sizes == k].mean(-1) / k for k in range(1, L + 1)], -1)
    bounds = [p @ means @ step_weights(L, LogLinear().grid(steps)) for steps in (1, 2, 4, 8, 16, 4096)]
    assert all(coarse - fine > 1e-3 for coarse, fine in itertools.pairwise(bounds[:-1]))
    assert entropy(SOURCE) < bounds[-1] < entropy(SOURCE) + 1e-3


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_importance_weights_are_unbiased_for_the_chain(anchor: float) -> None:
    """The mean weight over paths is the chain's own probability of x0, so over all x0 it sums to one."""
    model, x0, paths = random_denoiser(V, L), sequences(V, L), 1000
    chain = {"model": model, "vocab_size": V, "steps": 2, "anchor": anchor}
    weights = repeat(importance_weighted_bound, x0, paths, paths=1, noise=generator(), **chain).neg().exp()
    close_in_mean(weights.sum(0)[None], torch.ones(1, dtype=torch.float64))
    # One estimate of so many paths is such a mean.
    many = importance_weighted_bound(x0=x0, paths=paths, noise=generator(1), **chain).neg().exp()
    assert ((many - weights.mean(-1)).abs() < SIGMAS * weights.std(-1) * (2 / paths) ** 0.5).all()


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_more_paths_tighten(anchor: float) -> None:
    """Jensen: over p0, 1 path > 2 paths > 8 paths > entropy, each by more than `SIGMAS` errors."""
    x0, p = support(SOURCE)
    chain = {"model": random_denoiser(V, L), "vocab_size": V, "steps": 4, "anchor": anchor}
    means, errors = [], []
    for paths in (1, 2, 8):
        drawn = repeat(importance_weighted_bound, x0, 1000, paths=paths, noise=generator(paths), **chain)
        means.append(float(p @ drawn.mean(-1)))
        errors.append(float((p**2 @ drawn.var(-1) / drawn.shape[-1]) ** 0.5))
    for i in (0, 1):
        assert means[i] - means[i + 1] > SIGMAS * math.hypot(errors[i], errors[i + 1])
    assert means[2] - entropy(SOURCE) > SIGMAS * errors[2]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_bounds_are_above_the_entropy_for_any_network(settings: dict) -> None:
    """Exact values, so without chance."""
    model = network(**settings)
    x0, p = support(SOURCE)
    nats = over_masks(model, x0)
    values = [integral(nats, 0, 1), steps_sum(nats, LogLinear().grid(3).tolist())]
    if "fused" in model.heads:
        infill = over_masks(model, x0, infill=True)
        values += [integral(nats, anchor, 1) + at(infill, anchor) for anchor in (0.2, 0.7)]
        values += [causal_nll(model, x0), ar_nll(model, x0), block_nll(model, x0, 2)]
    for value in values:
        assert (p @ value).item() > entropy(SOURCE)


def test_exact_denoiser_gives_the_entropy() -> None:
    """In expectation over p0 the continuous bounds are the entropy: hybrid at every l*, and eq. 9."""
    x0, p = support(SOURCE)
    model = as_model(exact_denoiser(SOURCE), V)
    for anchor in (0.0, 0.3, 0.8, 1.0):
        drawn = repeat(hybrid_bound, x0, 200, model=model, anchor=anchor, samples=4, noise=generator())
        error = (p**2 @ drawn.var(-1) / drawn.shape[-1]).sqrt()
        assert abs(p @ drawn.mean(-1) - entropy(SOURCE)) <= SIGMAS * error + 1e-10


# Given tokens.

SCORED = [
    torch.tensor(row) for row in ([False, True, True, True], [False, False, True, True], [True, False, False, True])
]


def conditional(scored: Tensor) -> Tensor:
    """-log p0(scored | given) of every sequence."""
    given = (sequences(V, L) * ~scored) @ V ** torch.arange(L)
    p = SOURCE.flatten()
    return torch.stack([p[given == g].sum() for g in given]).log() - p.log()


def bounds_given(model: LanguageModel, scored: Tensor) -> dict[str, tuple[object, dict, Tensor]]:
    """Every bound but the importance-weighted, how it is called, and its exact value for every sequence."""
    every, grid = sequences(V, L), LogLinear().grid(3).tolist()
    nats = over_masks(model, every)
    whole = integral(nats, 0, 1, scored=scored)
    found = {
        "diffusion": (diffusion_bound, {"samples": 2}, whole),
        "schedule": (schedule_bound, {"samples": 4, "schedule": LogLinear(0.1)}, whole),
        "truncated": (truncated, {"samples": 2, "schedule": LogLinear(0.3)}, integral(nats, 0, 0.7, scored=scored)),
        "nfe": (finite_step_bound, {"samples": 2, "steps": 3}, steps_sum(nats, grid, scored)),
        "one path": (importance_weighted_bound, {"paths": 1, "steps": 3}, steps_sum(nats, grid, scored)),
    }
    if "fused" in model.heads:
        exact = integral(nats, 0.3, 1, scored=scored) + at(over_masks(model, every, infill=True), 0.3, scored)
        found["hybrid"] = (hybrid_bound, {"samples": 2, "anchor": 0.3}, exact)
    return found


@pytest.mark.parametrize("scored", SCORED, ids=str)
def test_bounds_given_tokens_are_unbiased(model: LanguageModel, scored: Tensor) -> None:
    every = sequences(V, L)
    for bound, settings, exact in bounds_given(model, scored).values():
        rows = scored.expand(len(every) * 400, -1)
        close_in_mean(repeat(bound, every, 400, model=model, noise=generator(), scored=rows, **settings), exact)


@pytest.mark.parametrize("scored", SCORED, ids=str)
def test_bounds_given_tokens_are_above_the_conditional_entropy(scored: Tensor) -> None:
    """Exact values, so without chance; with the exact denoiser the continuous ones are -log p0(scored | given)."""
    p, truth = SOURCE.flatten(), conditional(scored)
    exact = bounds_given(as_model(exact_denoiser(SOURCE), V), scored)
    for name in ("diffusion", "schedule", "hybrid"):
        torch.testing.assert_close(exact[name][2], truth)
    assert p @ exact["nfe"][2] > p @ truth
    for settings in CONFIGS[:2]:
        for name, (_, _, value) in bounds_given(network(**settings), scored).items():
            assert name == "truncated" or p @ value > p @ truth


def test_importance_weights_given_tokens_are_unbiased_for_the_chain() -> None:
    """Over all that may follow what is given, the chain's probabilities sum to one."""
    model, every, scored = random_denoiser(V, L), sequences(V, L), SCORED[1]
    chain = {"model": model, "vocab_size": V, "steps": 2, "paths": 1, "scored": scored.expand(len(every) * 1000, -1)}
    weights = repeat(importance_weighted_bound, every, 1000, noise=generator(), **chain).neg().exp()
    close_in_mean(weights.view(4, 4, -1).sum(1), torch.ones(4, dtype=torch.float64))


def test_all_scored_is_what_is_not_said() -> None:
    model, x0 = network(), sequences(V, L)
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    for bound, settings, _ in bounds_given(model, EVERYWHERE).values():
        said, unsaid = (
            bound(model, x0, noise=generator(), **more, **settings) for more in ({"scored": everywhere}, {})
        )
        assert torch.equal(said, unsaid)


def test_bad_masks_of_scored_positions() -> None:
    x0 = sequences(V, L)[:2]
    for scored, complaint in (
        (torch.ones(2, 3, dtype=torch.bool), r"scored has shape \(2, 3\)"),
        (torch.ones(2, L), r"type torch.float32; a bool for each"),
        (torch.zeros(2, L, dtype=torch.bool), "scored marks 0 to 0 positions"),
        (torch.stack(SCORED[:2]), "scored marks 2 to 3 positions of a row; it must be one number"),
    ):
        with pytest.raises(InputError, match=complaint):
            diffusion_bound(network(), x0, 1, generator(), scored=scored)


def test_two_identical_fair_bits() -> None:
    """The forbidden average is (ln 2)/2, below the truth; nothing public returns it, and only `truncated` is below."""
    p0 = two_bits()
    x0, _ = support(p0)
    denoiser, truth = exact_denoiser(p0), math.log(2)
    assert entropy(p0) == pytest.approx(truth)

    # Eq. 9 averaged over lambda with prefix = x0, by hand: with both bits masked the first costs ln 2 and the second,
    # which sees it, nothing; a single masked bit is known from the canvas.
    model = as_model(denoiser, 2)
    neither, second, first, both = (masked_nats(model, x0, where, infill=True)[0] for where in masks(2))
    assert (neither, second, first, both) == pytest.approx((0, 0, 0, truth))
    lambdas = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    forbidden = ((lambdas**2 * both + lambdas * (1 - lambdas) * (first + second)) / lambdas).mean().item()
    assert forbidden == pytest.approx(truth / 2)

    # What follows calls every public likelihood and bound.
    assert {name for name in evaluation.__all__ if name.endswith(("_nll", "_bound", "score", "truncated"))} == {
        *("causal_nll", "ar_nll", "block_nll", "score", "diffusion_bound", "schedule_bound", "hybrid_bound"),
        *("finite_step_bound", "importance_weighted_bound", "truncated"),
    }
    at_least = truth - 1e-12
    repeated = x0.repeat(200, 1)
    everywhere = {"model": denoiser, "x0": repeated, "vocab_size": 2}
    drawn = {**everywhere, "samples": 2, "noise": generator()}
    exact = [causal_nll(**everywhere), ar_nll(**everywhere), block_nll(**everywhere, block_size=2)]
    exact += [-score(denoiser, repeated, which, 2, vocab_size=2).sum(-1) for which in ("causal", "ar", "block")]
    for nll in exact:
        torch.testing.assert_close(nll, torch.full_like(nll, truth))
    torch.testing.assert_close(diffusion_bound(**drawn).mean(-1), exact[0])  # k = 1 and k = 2, one each
    for steps, anchor in itertools.product((1, 2, 16), (0.0, 0.5)):
        assert (
            importance_weighted_bound(**everywhere, steps=steps, paths=4, noise=generator(), anchor=anchor).min()
            >= at_least
        )
    # The others hold in expectation: each is its exact value, which is at least the truth.
    close = []
    for anchor in (0.0, 0.3, 0.7, 1.0):
        close.append((hybrid_bound(**drawn, anchor=anchor), truth))
        for steps in (1, 2, 16):
            pairs = itertools.pairwise(LogLinear().grid(steps, anchor).tolist())
            both_masked = sum((b - a) / b * b**2 for a, b in pairs)  # and cost 2 ln 2 then, one alone nothing
            close.append(
                (finite_step_bound(**drawn, steps=steps, anchor=anchor), truth * (anchor**2 + 2 * both_masked))
            )
    close += [(schedule_bound(**drawn, schedule=schedule()), truth) for schedule in SCHEDULES.values()]
    for nats, exact_value in close:
        assert exact_value >= at_least
        close_in_mean(nats.mean(-1)[None], torch.tensor([exact_value], dtype=torch.float64))

    # The published, truncated form is no bound, and misses what it leaves out: lambda in [0.999, 1].
    stops = truncated(**drawn).mean()
    assert stops.item() < truth
    many = truncated(**{**drawn, "samples": 64}).mean(-1)
    close_in_mean(many[None], torch.tensor([truth * 0.999**2], dtype=torch.float64))


def test_a_row_draws_what_it_draws_alone() -> None:
    model, x0 = network(), sequences(V, L)[:5]

    def noise(rows: range) -> list[torch.Generator]:
        return [generator(r) for r in rows]

    for bound in (
        lambda x, n: diffusion_bound(model, x, 3, n),
        lambda x, n: schedule_bound(model, x, LogLinear(), 3, n),
        lambda x, n: hybrid_bound(model, x, 0.5, 3, n),
        lambda x, n: finite_step_bound(model, x, 4, 3, n),
        lambda x, n: importance_weighted_bound(model, x, 4, 3, n, anchor=0.3),
    ):
        together = bound(x0, noise(range(5)))
        alone = torch.cat([bound(x0[r : r + 1], noise(range(r, r + 1))) for r in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_counts_are_stratified_and_masks_uniform() -> None:
    weights = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64) / 4
    masked = draw_masks(torch.Size((3000, 3)), weights, 4, generator())
    assert masked.sum(-1).sort(0).values[:, 0].tolist() == [1, 2, 3, 3]
    assert (masked.sum(-1) == torch.tensor([1, 2, 3, 3])[:, None]).all()
    share = masked[0].double().mean(0)  # 1000 expected of 3000 each; sd 0.0086
    assert ((share - 1 / 3).abs() < SIGMAS * 0.0087).all()


def test_bad_input() -> None:
    model, x0 = network(), sequences(V, L)
    with pytest.raises(InputError, match="int64"):
        diffusion_bound(model, x0.int(), 1, generator())
    with pytest.raises(InputError, match=r"anchor is 1\.5"):
        hybrid_bound(model, x0, 1.5, 1, generator())
    with pytest.raises(InputError, match="anchor is -1"):
        importance_weighted_bound(model, x0, 2, 1, generator(), anchor=-1)
    with pytest.raises(InputError, match="samples is 0"):
        diffusion_bound(model, x0, 0, generator())
    with pytest.raises(InputError, match="steps is 0"):
        finite_step_bound(model, x0, 0, 1, generator())
    with pytest.raises(InputError, match="paths is 0"):
        importance_weighted_bound(model, x0, 1, 0, generator())
    with pytest.raises(InputError, match="generators"):
        diffusion_bound(model, x0, 1, [generator()])
