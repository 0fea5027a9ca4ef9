"""Steps to a target: the curve against sums over all masked sets, and the search on it.

Chance tests compare means at 5 standard errors, or 5.5 where several are compared: they fail by chance once in 1e6.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from drawing import generator
from enumeration import exact_denoiser, masks, random_denoiser, random_source, sequences
from torch import Tensor

from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation.bounds import finite_step_bound
from caddf.evaluation.masks import step_weights
from caddf.evaluation.reading import denoised, infilled
from caddf.evaluation.steps import step_curve
from caddf.schedules import Cosine, LogLinear

V, L = 2, 5
SOURCE = random_source(V, L)
MODELS = {"exact": as_model(exact_denoiser(SOURCE), V), "random": as_model(random_denoiser(V, L), V)}
X0 = sequences(V, L)


@cache
def readings(name: str) -> list[tuple[int, Tensor, Tensor]]:
    """Of every masked set: its size, and the nats of each row of X0 over it, in any order and left to right."""
    every = [hidden.expand_as(X0) for hidden in masks(L) if hidden.any()]
    return [
        (int(where[0].sum()), *(read(MODELS[name], X0, where).nats.sum(-1) for read in (denoised, infilled)))
        for where in every
    ]


def enumerated(name: str, schedule, steps: int, anchor: float) -> Tensor:
    """The bound of each row of X0: sums over steps and over all masked sets, with their probabilities."""
    nats, grid = torch.zeros(len(X0), dtype=torch.float64), schedule.grid(steps, anchor)
    for k, any_order, left_to_right in readings(name):
        some = grid[1:] ** k * (1 - grid[1:]) ** (L - k)
        nats += ((1 - grid[:-1] / grid[1:]) * some).sum() * any_order
        nats += anchor**k * (1 - anchor) ** (L - k) * left_to_right
    return nats


@pytest.mark.parametrize("anchor", [0.0, 0.4])
@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=["loglinear", "cosine"])
@pytest.mark.parametrize("name", MODELS)
def test_the_curve_is_the_enumerated_bound_at_every_n(name, schedule, anchor):
    model, samples = MODELS[name], 200
    curve = step_curve(model, X0, samples, generator(), anchor, schedule, most=12)
    for steps in range(1, 13):
        nats = curve.nats(steps).mean(0)  # a sample of all rows; its strata only lessen the spread of the mean
        error = nats.std() / samples**0.5
        expected = enumerated(name, schedule, steps, anchor).mean()
        assert abs(nats.mean() - expected) < 5.5 * error + 1e-9


def test_it_owes_little_noise_to_the_weights():
    """Of a model whose nats do not depend on what is masked a draw says nothing new, at any number of steps."""
    model = as_model(lambda x_t: torch.full((*x_t.shape, V), -math.log(V), dtype=torch.float64), V)
    curve = step_curve(model, X0, 20, generator(), most=12)
    for steps in range(1, 13):
        expected = torch.full_like(curve.nats(steps), L * math.log(V))
        torch.testing.assert_close(curve.nats(steps), expected)


def test_one_step_has_no_noise():
    curve = step_curve(MODELS["random"], X0, 3, generator())
    expected = enumerated("random", LogLinear(), 1, 0.0)
    torch.testing.assert_close(curve.nats(1), expected[:, None].expand(-1, 3))


def test_it_agrees_with_the_bound_of_one_n():
    model, samples = MODELS["random"], 200
    ours = step_curve(model, X0, samples, generator(1), 0.3).nats(3).mean(0)
    other = finite_step_bound(model, X0, 3, samples, generator(2), anchor=0.3).mean(0)
    error = ((ours.var() + other.var()) / samples).sqrt()
    assert abs(ours.mean() - other.mean()) < 5 * error


def test_no_n_is_weighed_far_above_the_draws():
    """Doubling leaves no gaps: any n's weights stay within a few times those of the draws."""
    length = 64
    mixture = torch.stack([step_weights(length, LogLinear().grid(2**j)) for j in range(7)]).mean(0)[:-1]
    worst = max((step_weights(length, LogLinear().grid(n))[:-1] / mixture).max() for n in range(2, length + 1))
    assert worst < 7.01  # the number of ns in the mixture, which those in it reach


ROWS = (SOURCE.flatten() * 60).round().long()
"""How often each row of X0 stands in a text of about 60 rows, as likely as the source has them: bounds fall with n."""
TEXT = X0.repeat_interleave(ROWS, 0)


def of_text(steps: int, anchor: float) -> float:
    """The enumerated bound of TEXT, nats per token."""
    return (ROWS.double() @ enumerated("exact", LogLinear(), steps, anchor) / ROWS.sum() / L).item()


@pytest.mark.parametrize("wanted, anchor", [(1, 0.0), (2, 0.0), (3, 0.0), (1, 0.3), (2, 0.3)])
def test_the_fewest_steps_are_found(wanted, anchor):
    """The target lies between the bounds of n - 1 and n steps, at least 5 standard errors of the draws from both."""
    at = of_text(wanted, anchor)
    target = at + 0.05 if wanted == 1 else (at + of_text(wanted - 1, anchor)) / 2
    samples = 200 if anchor else 700
    curve = step_curve(MODELS["exact"], TEXT, samples, generator(), anchor, most=16)
    error = curve.nats(wanted).mean(0).std() / L / samples**0.5
    assert abs(at - target) > 5 * error
    found = curve.reach(target)
    assert found.steps == wanted and found.target == target
    assert list(found.curve) == sorted(found.curve) and {1, wanted} <= set(found.curve)


@pytest.mark.parametrize("most", [2, 11, 16])
def test_the_search_finds_what_looking_at_every_n_finds(most):
    curve = step_curve(MODELS["exact"], TEXT, 20, generator(), most=most)
    for target in torch.linspace(0.35, 0.6, 40).tolist():
        every = [curve.bound(n) for n in range(1, most + 1)]
        found = curve.reach(target)
        for errors, steps in zip((-2, 0, 2), (found.between[0], found.steps, found.between[1]), strict=True):
            reached = [n for n, one in enumerate(every, 1) if one.nll + errors * one.standard_error <= target]
            assert steps == (reached[0] if reached else None)


def test_the_causal_branch_saves_steps():
    target = of_text(5, 0.0) + 1e-3
    alone, infilled_ = (step_curve(MODELS["exact"], TEXT, 200, generator(), a, most=16).reach(target) for a in (0, 0.5))
    assert infilled_.steps < alone.steps and (alone.anchor, infilled_.anchor) == (0, 0.5)


def test_a_target_that_is_not_reached():
    found = step_curve(MODELS["exact"], X0, 50, generator(), most=6).reach(0.01)
    assert found.steps is None and found.between == (None, None) and set(found.curve) == {1, 2, 4, 6}


def test_further_n_cost_no_evaluation_and_share_the_noise():
    calls = []

    def counted(x_t: Tensor) -> Tensor:
        calls.append(len(x_t))
        return exact_denoiser(SOURCE)(x_t)

    curve = step_curve(counted, X0, 7, generator(), vocab_size=V)
    assert calls == [len(X0)] * 9
    first, again = (curve.nats(n) for n in (4, 4))
    curve.reach(0.6)
    assert len(calls) == 9 and torch.equal(first, again)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"anchor": 1.0}, "anchor is 1"),
        ({"anchor": -0.1}, "anchor is -0.1"),
        ({"most": 0}, "most is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"x0": X0[:, :1]}, "rows of 1 token"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    with pytest.raises(InputError, match=says):
        step_curve(**{"model": MODELS["exact"], "x0": X0, "samples": 2, "noise": generator(), **settings})
