"""ReMDM (Wang et al. 2025): a reverse chain with a way back to `[M]`, so that what stands may be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from caddf.decoding.ancestral import masking_times
from caddf.decoding.task import Counts, Frame, Task, denoise, draw, full_pass
from caddf.errors import Checked, InputError, a_share, at_least
from caddf.interface import LanguageModel
from caddf.schedules import SCHEDULES, ScheduleName

CAPS: dict[str, Callable[[float, float], float]] = {
    "cap": lambda eta, largest: min(eta, largest),
    "rescale": lambda eta, largest: eta * largest,
}
"""sigma_t from eta and the largest sigma_t (section 4.1)."""


@dataclass(frozen=True)
class Step:
    """From lambda_t = `upper` to lambda_s = `lower`; what stands is masked again with probability `sigma` (eq. 6)."""

    upper: float
    lower: float
    sigma: float


@dataclass(frozen=True)
class Remasking(Checked):
    """The n-step chain of eq. 6, exact for it; where `eta` is 0 it is `ancestral`, draw for draw.

    steps: of the reverse chain.
    schedule: whose evenly spaced times are the chain's levels.
    remask: what eta does to the largest possible sigma: `cap` or `rescale`.
    eta: how much is masked again, in [0, 1].
    start: the time, from 1 (noise) down to 0, from which on tokens are masked again (eq. 10).
    end: the time from which on none is masked again.
    hold: the lambda at which the chain waits from `start` to `end` (the paper's loop: 0.1, with `start` 0.55, `end`
        0.05 and `eta` 0.02); not set, it does not wait.
    confident: deals sigma out over what stands in a row, by a softmax of -q of each token when it was drawn. Masked
        positions are then revealed as if sigma were 0, so that more than lambda is masked.
    cache: false evaluates every row that has masks at every step, for comparison.

    No token is final before the last step that masks again, so that an end of text stops nothing until then.
    """

    steps: int = 64
    schedule: ScheduleName = "loglinear"
    remask: Literal["cap", "rescale"] = "cap"
    eta: float = 0.04
    start: float = 1.0
    end: float = 0.0
    hold: float | None = None
    confident: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")
        a_share(self, "eta")
        if not 0 <= self.end < self.start <= 1:
            raise InputError(f"start is {self.start} and end {self.end}; 0 <= end < start <= 1 is needed")
        if self.hold is None:
            return
        if not 0 < self.hold < 1 or self.end == 0 or self.start == 1:
            raise InputError(f"hold is {self.hold}; it must lie between 0 and 1, and so must start and end with it")
        if self.confident:
            raise InputError("confident is set with hold, where it would reveal nothing; leave one of them out")

    def plan(self) -> list[Step]:
        """The levels of the chain, and sigma_t of each step."""
        schedule, times = SCHEDULES[self.schedule](), torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        if self.hold is None:
            levels = schedule.grid(self.steps).flip(0)
        else:  # three phases: down to `hold` by `start`, waiting, and on from there at `end`
            at = schedule.inverse(torch.tensor(self.hold, dtype=torch.float64)).clamp(0, 1)
            before = at + (1 - at) * (times - self.start) / (1 - self.start)
            inner = torch.where(times > self.start, before, at)
            levels = schedule.masked(torch.where(times < self.end, at * times / self.end, inner))
            levels[(times <= self.start) & (times >= self.end)] = self.hold
            levels[0], levels[-1] = 1.0, 0.0
        plan = []
        for t, (upper, lower) in zip(times.tolist(), pairwise(levels.tolist()), strict=False):
            largest = min(1.0, lower / (1 - upper)) if upper < 1 else 1.0  # eq. 7; alpha is 1 - lambda
            plan.append(Step(upper, lower, CAPS[self.remask](self.eta, largest) if self.end < t <= self.start else 0.0))
        return plan

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame for each step that changes something.

        `turn` holds a uniform draw below lambda for each masked position, which is revealed when the chain comes down
        to it; what stays masked is brought back to be uniform below the next lambda.
        """
        x, counts, wanted = task.tokens.clone(), counts or Counts.zeros(len(task.tokens)), task.wanted
        plan, turn = self.plan(), masking_times(task)
        psi = torch.full(x.shape, torch.inf, dtype=torch.float64, device=x.device)  # q of what stands
        last = max((j for j, step in enumerate(plan) if step.sigma > 0), default=-1)
        active = task.unfinished(x)
        for j, step in enumerate(plan):
            masked = x == task.mask_id
            open_, standing = wanted & masked & active[:, None], wanted & ~masked & active[:, None]
            counts.add(open_.any(1), needed=full_pass(model, task.lengths))

            # Eq. 6, z_t = m: revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
            kept = step.lower - (0.0 if self.confident else step.sigma * (1 - step.upper))
            where = open_ & (turn >= kept)
            fresh = x
            if (read := where if self.cache else open_).any():
                log_q = denoise(model, task, x, read, counts)
                log_q = log_q if read is where else log_q[where[read]]
                fresh = draw(task, x, where, log_q)
                psi = psi.masked_scatter(where, log_q.gather(-1, fresh[where][:, None])[:, 0].double().exp())
                counts.add(where.any(1), rounds=1)
            if kept > 0:
                turn = turn * (step.lower / kept)

            # Eq. 6, z_t != m: masked again with probability sigma.
            if step.sigma > 0:
                u, sigma = task.generators.uniform(standing).to(x.device), self._sigma(step, psi, standing)
                again = standing & (u < sigma)
                turn = torch.where(again, step.lower * u / sigma, turn)
                fresh = torch.where(again, task.mask_id, fresh)
            changed, x = (fresh != x).any(), fresh
            if j >= last and (changed or j == last):
                active = task.unfinished(x)
            if changed:
                yield Frame(x, where, counts)

    def _sigma(
        self, step: Step, psi: Float[Tensor, "B L"], standing: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L"] | Float[Tensor, ""]:
        """sigma_t of each position that stands."""
        if not self.confident:
            return psi.new_tensor(step.sigma)
        return step.sigma * torch.where(standing, -psi, -torch.inf).softmax(1).nan_to_num(0)
