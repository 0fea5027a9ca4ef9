"""Law 1: a schedule's derivative, inverse and limits, and what is derived from them."""

import math

import pytest
import torch
from catalogue import SCHEDULE_LIST

from caddf.errors import InputError
from caddf.schedules import Cosine, Geometric, LogLinear, Schedule

EXTREMES = [1e-12, 1e-6, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12]
TIMES = torch.cat([torch.linspace(0.001, 0.999, 199), torch.tensor(EXTREMES)]).double()
TIMES[-len(EXTREMES) :] = torch.tensor(EXTREMES, dtype=torch.float64)

each_schedule = pytest.mark.parametrize("schedule", SCHEDULE_LIST, ids=lambda s: type(s).__name__)


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=0)


@each_schedule
def test_slope_is_the_derivative_of_masked(schedule: Schedule) -> None:
    t = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.masked(t).sum(), t)
    # The derivative that autograd has of expm1 is a difference from 1, absolutely accurate alone.
    torch.testing.assert_close(schedule.slope(TIMES), derivative, rtol=1e-9, atol=1e-13)


@each_schedule
def test_rate_is_the_derivative_of_the_cumulative_rate(schedule: Schedule) -> None:
    t = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.cumulative_rate(t).sum(), t)
    close(schedule.rate(TIMES), derivative, rtol=1e-9)


@each_schedule
def test_cumulative_rate_and_masked_agree(schedule: Schedule) -> None:
    sbar = schedule.cumulative_rate(TIMES)
    assert sbar.isfinite().all() and (sbar >= 0).all()
    close(schedule.masked(TIMES), -torch.expm1(-sbar))
    # e^-x turns an absolute rounding error of x (here up to 37) into a relative one.
    close(schedule.kept(TIMES), torch.exp(-sbar), rtol=1e-11)


@each_schedule
def test_weight_and_score_factor(schedule: Schedule) -> None:
    sbar, gamma = schedule.cumulative_rate(TIMES), schedule.rate(TIMES)
    factor = 1 / torch.expm1(sbar)  # e^-sbar / (1 - e^-sbar)
    close(schedule.score_factor(TIMES), factor, rtol=1e-11)
    close(schedule.weight(TIMES), gamma * factor, rtol=1e-11)


@each_schedule
def test_inverse(schedule: Schedule) -> None:
    # Near t = 1 the geometric lambda is 1 - e^-20: the digits of t are in 1 - lambda, eight of them lost.
    torch.testing.assert_close(schedule.inverse(schedule.masked(TIMES)), TIMES, rtol=1e-9, atol=1e-15)


@each_schedule
def test_limits_and_monotone(schedule: Schedule) -> None:
    low, high = schedule.limits
    assert 0 <= low < high <= 1
    masked = schedule.masked(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (masked.diff() > 0).all()
    assert masked[0] == low and masked[-1] == high


def test_published_limits() -> None:
    assert LogLinear().limits == (0, 1 - 1e-3)
    assert Cosine().limits == pytest.approx((0, 1), abs=1e-15)
    assert Geometric().limits == pytest.approx((-math.expm1(-1e-4), -math.expm1(-20)), rel=1e-12)


@each_schedule
def test_the_ends(schedule: Schedule) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.kept(ends), 1 - schedule.masked(ends), rtol=0, atol=1e-15)
    late = ends[1:]  # t = 0 is never drawn, t = 1 is
    assert (schedule.weight(late) > 0).all() and schedule.weight(late).isfinite().all()
    assert (schedule.score_factor(late) >= 0).all() and not schedule.rate(late).isnan().any()


def test_cosine_near_one_keeps_its_digits() -> None:
    # cos(pi/2 (1 - d)) = sin(pi d / 2); 1 - lambda would have lost all but four of them.
    d = torch.tensor(2.0**-40, dtype=torch.float64)
    close(Cosine().score_factor(1 - d), torch.sin(math.pi * d / 2), rtol=1e-11)
    close(Cosine().rate(1 - d), 1 / d, rtol=1e-11)


@pytest.mark.parametrize("steps", [0, 1_000_001])
def test_a_grid_has_as_many_steps_as_are_of_use(steps):
    with pytest.raises(InputError, match=f"steps is {steps}; it must lie between 1 and 1,000,000"):
        LogLinear().grid(steps)
