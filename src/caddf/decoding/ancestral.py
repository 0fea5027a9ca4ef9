"""The reverse chain in n steps (eqs. 2, 3; Ou et al. 2025), on a schedule's grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from caddf.decoding.task import Counts, Frame, Task, fill, full_pass
from caddf.errors import Checked, at_least
from caddf.interface import LanguageModel
from caddf.schedules import SCHEDULES, ScheduleName


def masking_times(task: Task) -> Float[Tensor, "B L"]:
    """The lambda at which the reverse process reveals each wanted position: uniform, whatever the tokens are."""
    return task.generators.uniform(task.wanted).to(task.tokens.device)


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
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        revealed_at, wanted, active = masking_times(task), task.wanted, task.unfinished(x)
        for upper, lower in pairwise(SCHEDULES[self.schedule]().grid(self.steps, self.until).flip(0).tolist()):
            counts.add(active, needed=full_pass(model, task.lengths))
            where = wanted & (revealed_at >= lower) & (revealed_at < upper) & active[:, None]
            read = where if self.cache else wanted & (x == task.mask_id) & active[:, None]
            x = fill(model, task, x, where, counts, read=read)
            if where.any():
                active = task.unfinished(x)
                counts.add(where.any(1), rounds=1)
                yield Frame(x, where, counts)
