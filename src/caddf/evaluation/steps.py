"""Steps to a target: the fewest steps n whose finite-step bound reaches a given likelihood (eq. 14, measured).

Every bound is a sum over k of w_k A_k (`caddf.evaluation.bounds`), and the number of steps is in w alone. So one
set of masked sets serves every n: drawn for the mean of w over n = 1, 2, 4, ..., and weighed for each n anew. All n
share their noise, further n cost no evaluation, and A_L, where everything is masked, is read once and has no noise.

`anchor` 0 is diffusion alone; above it the causal branch fills in what is masked at lambda = `anchor`, left to right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.errors import InputError, at_least
from caddf.evaluation.bounds import Draws, check_anchor, draw, infilling
from caddf.evaluation.estimates import Estimate, estimate
from caddf.evaluation.masks import Noise, step_weights
from caddf.evaluation.reading import Model, checked, denoised
from caddf.schedules import LOG_LINEAR, Schedule

STANDARD_ERRORS = 2.0
"""How far the curve is moved for `Steps.between`."""


@dataclass(frozen=True)
class Steps:
    """The fewest steps whose bound is at most `target` (nats per token); None where `most` steps do not reach it.

    between: the same with the curve lowered and raised by two standard errors.
    curve: the bound at every number of steps that was looked at.
    """

    target: float
    anchor: float
    steps: int | None
    between: tuple[int | None, int | None]
    curve: dict[int, Estimate]


@dataclass(frozen=True)
class StepCurve:
    """The bound of the sampler in n steps to `anchor`, then infilling, for every n from 1 to `most`.

    infill: nats of the infilling; masked: mean nats at lambda = 1; draws: masked sets of fewer than L positions; level:
    nats per token that those of `draws` lie about, and owe nothing to them: what is drawn is how far they lie off.
    """

    length: int
    anchor: float
    schedule: Schedule
    most: int
    infill: Float[Tensor, "B S"]
    masked: Float[Tensor, " B"]
    draws: Draws
    level: float

    def nats(self, steps: int) -> Float[Tensor, "B S"]:
        """The bound in `steps` steps, per row and sample."""
        weights = step_weights(self.length, self.schedule.grid(steps, self.anchor))
        whole, weights[-1] = weights[-1].item(), 0.0
        return (
            self.infill
            + whole * self.masked[:, None]
            + self.draws.average(weights, torch.full_like(self.masked, self.level))
        )

    def bound(self, steps: int) -> Estimate:
        """`nats`, averaged, per token."""
        return estimate(self.nats(steps), self.length)

    def reach(self, target: float) -> Steps:
        """The fewest steps whose bound is at most `target`, by doubling and then bisection (the bound falls with n)."""
        curve: dict[int, Estimate] = {}

        def reaches(steps: int, errors: float) -> bool:
            if steps not in curve:
                curve[steps] = self.bound(steps)
            return curve[steps].nll + errors * (curve[steps].standard_error or 0.0) <= target

        def fewest(errors: float) -> int | None:
            return _first(lambda steps: reaches(steps, errors), self.most)

        steps, between = fewest(0.0), (fewest(-STANDARD_ERRORS), fewest(STANDARD_ERRORS))
        return Steps(target, self.anchor, steps, between, dict(sorted(curve.items())))


def _first(holds: Callable[[int], bool], most: int) -> int | None:
    """The first of 1 to `most` from which on `holds`, None where there is none."""
    high = 1
    while not holds(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2  # does not hold (or is 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@torch.no_grad()
def step_curve(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    anchor: float = 0.0,
    schedule: Schedule = LOG_LINEAR,
    most: int | None = None,
    *,
    vocab_size: int | None = None,
) -> StepCurve:
    """Reads `x0` in `samples` + 2 passes (`samples` more to infill); `most` is the largest n, L if not given.

    Raises `InputError` for rows of one token, and for an `anchor` that the model cannot infill from.
    """
    model, length = checked(model, x0, vocab_size), x0.shape[1]
    check_anchor(model, anchor)
    most = length if most is None else most
    at_least(1, samples=samples, most=most)
    if length < 2:
        raise InputError("x0 has rows of 1 token; a chain of several steps needs at least 2")
    if anchor == 1:
        raise InputError("anchor is 1; then nothing is left to diffusion and its steps, so it must be below")
    masked = denoised(model, x0, torch.ones_like(x0, dtype=torch.bool)).nats.mean(-1).cpu()
    grid = [2**j for j in range(most.bit_length())] + [max(most, 2)]
    weights = torch.stack([step_weights(length, schedule.grid(n, anchor)) for n in grid]).mean(0)
    weights[-1] = 0.0
    pilot = draw(model, x0, weights, 1, noise)
    level = (pilot.nats / pilot.counts).mean().item()
    draws = draw(model, x0, weights, samples, noise)
    infill = infilling(model, x0, anchor, samples, noise)
    return StepCurve(length, anchor, schedule, most, infill, masked, draws, level)
