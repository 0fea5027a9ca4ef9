"""The reverse chain in n steps (eqs. 2, 3; Ou et al. 2025), on a schedule's grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor

from caddf.decoding.task import Counts, Frame, Task, fill, full_pass
from caddf.errors import Checked, at_least
from caddf.interface import LanguageModel
from caddf.schedules import SCHEDULES, ScheduleName


def masking_times(task: Task) -> Float[Tensor, "B L"]:
    """The lambda at which the reverse process reveals each wanted position: uniform, whatever the tokens are."""
    return task.generators.uniform(task.wanted).to(task.tokens.device)


def reveal(
    model: LanguageModel,
    task: Task,
    counts: Counts | None,
    steps: Iterable[tuple[Bool[Tensor, "B L"], Float[Tensor, ""] | None]],
    cache: bool,
) -> Iterator[Frame]:
    """A frame for each step that reveals something; a step is which positions are due, and the level (sbar) it has.

    Without `cache` every row is evaluated at every step, for comparison.
    """
    x, counts, active = task.tokens.clone(), counts or Counts.zeros(len(task.tokens)), task.unfinished(task.tokens)
    for due, level in steps:
        counts.add(active, needed=full_pass(model, task.lengths))
        where = task.wanted & due & active[:, None]
        read = where if cache else task.wanted & (x == task.mask_id) & active[:, None]
        x = fill(model, task, x, where, counts, read=read, level=level)
        if where.any():
            active = task.unfinished(x)
            counts.add(where.any(1), rounds=1)
            yield Frame(x, where, counts)


@dataclass(frozen=True)
class Ancestral(Checked):
    """The n-step chain: exact for the chain, and for the continuous process as n grows.

    A masked position is revealed between lambda_t and lambda_s with probability (lambda_t - lambda_s) / lambda_t, which
    is to say at a time drawn uniformly beforehand; what stands there is drawn from q(x0_i | x_t).

    steps: of the reverse chain.
    schedule: whose evenly spaced times are the chain's levels.
    until: the lambda at which it stops, leaving what is still masked there.
    cache: false evaluates every row at every step, for comparison.
    """

    steps: int = 64
    schedule: ScheduleName = "loglinear"
    until: float = 0.0
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame for each step that reveals something."""
        revealed_at = masking_times(task)
        levels = SCHEDULES[self.schedule]().grid(self.steps, self.until).flip(0).tolist()
        steps = (((revealed_at >= lower) & (revealed_at < upper), None) for upper, lower in pairwise(levels))
        yield from reveal(model, task, counts, steps, self.cache)
