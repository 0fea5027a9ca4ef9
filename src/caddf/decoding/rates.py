"""Decoding by the rates of the reverse chain: Euler and tau-leaping steps (Lou, Meng and Ermon 2024, section 4.1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.concrete_score import Process, ScoreModel, Step, Uniform, log_scores, process_of
from caddf.decoding.task import Counts, Frame, Task, denoise, draw, evaluate, full_pass
from caddf.errors import Checked, InputError, at_least
from caddf.interface import AnyOrder, LanguageModel
from caddf.schedules import SCHEDULES, Schedule, ScheduleName


@dataclass(frozen=True)
class Rates(Checked):
    """`steps` steps from t = 1 to `end`, then one that removes the noise that is left; all positions step at once.

    For score networks, absorbing and uniform, and for denoisers (absorbing). The uniform chain starts from random
    tokens and may change each of them again until the end, so that no row ends early. Given tokens stay as they are:
    for the absorbing chain that is conditioning; for the uniform one, whose network expects them noised, an
    approximation (the authors' too). The warp acts on where a position moves to, never on whether it moves.

    steps: of the reverse chain, before the last noise is removed.
    schedule: whose rates the steps follow.
    end: the time at which steps end and the noise that is left is removed.
    cache: a denoiser is evaluated only where something moves; false evaluates every row at every step, for comparison.
        A score network always is: its scores change with the time.
    """

    steps: int = 64
    schedule: ScheduleName = "loglinear"
    end: float = 1e-5
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")
        if not 0 < self.end < 1:
            raise InputError(f"end is {self.end}; it must lie between 0 and 1")

    @abstractmethod
    def step(
        self,
        process: Process,
        schedule: Schedule,
        log_s: Float[Tensor, "N V"],
        x: Int[Tensor, " N"],
        t: Tensor,
        s: Tensor,
    ) -> Step:
        """The step from time t to s < t, given the scores at t."""

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame for each step that changes something."""
        process, schedule = process_of(model), SCHEDULES[self.schedule]()
        counts = counts or Counts.zeros(len(task.tokens))
        x, wanted, revisits = task.tokens.clone(), task.wanted, isinstance(process, Uniform)
        # A denoiser's q sums to one, so its scores to e^-sbar / (1 - e^-sbar): what moves is known before it is read.
        ahead = self.cache and not isinstance(model, ScoreModel)
        if revisits:
            fresh = (task.generators.uniform(wanted) * model.vocab_size).long().to(x.device)
            x = torch.where(wanted, fresh, x)
        active = wanted.any(1) if revisits else task.unfinished(x)
        one = torch.ones((), dtype=torch.float64)
        # Cosine: no rate reaches t = 1.
        start = 1.0 if schedule.cumulative_rate(one).isfinite() else 1 - min(self.end, 1e-5)
        times = torch.linspace(start, self.end, self.steps + 1, dtype=torch.float64)
        for t, s in [*pairwise(times), (times[-1], None)]:
            where = wanted & process.noisy(x) & active[:, None]
            if not where.any():
                return
            counts.add(where.any(1), needed=full_pass(model, task.lengths))
            level = schedule.cumulative_rate(t)
            if ahead:
                log_s = -torch.expm1(level).log().to(x.device).expand(int(where.sum()), 1)
            else:
                log_s = _scores(model, task, x, where, level, counts)
            if s is None:
                step = process.denoise(log_s, x[where], level.item())
            else:
                step = self.step(process, schedule, log_s, x[where], t, s)
            moved = torch.zeros_like(where).masked_scatter(where, task.uniforms(where) < step.move)
            if moved.any():
                log_to = denoise(model, task, x, moved, counts, level) if ahead else step.log_to[moved[where]]
                x = draw(task, x, moved, log_to)
                active = active if revisits else task.unfinished(x)
                counts.add(moved.any(1), rounds=1)
                yield Frame(x, moved, counts)


class Euler(Rates):
    """Rates as they are at t, for the whole step (authors' "euler"; SEDD, eq. 17)."""

    def step(
        self,
        process: Process,
        schedule: Schedule,
        log_s: Float[Tensor, "N V"],
        x: Int[Tensor, " N"],
        t: Tensor,
        s: Tensor,
    ) -> Step:
        """(t - s) gamma(t) of way in sbar."""
        return process.euler(log_s, x, ((t - s) * schedule.rate(t)).item())


class TauLeaping(Rates):
    """The best step that treats positions apart (Tweedie tau-leaping; authors' "analytic"; SEDD, theorem 4.2)."""

    def step(
        self,
        process: Process,
        schedule: Schedule,
        log_s: Float[Tensor, "N V"],
        x: Int[Tensor, " N"],
        t: Tensor,
        s: Tensor,
    ) -> Step:
        """sbar(t) - sbar(s) of way."""
        return process.tweedie(log_s, x, (schedule.cumulative_rate(t) - schedule.cumulative_rate(s)).item())


def _scores(
    model: LanguageModel, task: Task, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], level: Tensor, counts: Counts
) -> Float[Tensor, "N V"]:
    """log s at the positions in `where`, row-major (float64)."""

    def read(rows: Bool[Tensor, " B"], length: int) -> Float[Tensor, "n V"]:
        part = x[rows, :length]
        levels = level.to(x.device).expand(len(part))
        states, _ = model(part, part, AnyOrder(levels))
        return log_scores(model, states, where[rows, :length], levels).double()

    return evaluate(model, task, where, counts, read)
