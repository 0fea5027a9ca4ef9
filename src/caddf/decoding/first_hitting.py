"""First-hitting decoding: the continuous chain, one token at each jump (Zheng et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from caddf.decoding.ancestral import masking_times
from caddf.decoding.task import Counts, Frame, Task, fill, full_pass
from caddf.errors import Checked
from caddf.interface import LanguageModel


@dataclass(frozen=True)
class FirstHitting(Checked):
    """Reveals one position at a time, in the order of the jump times: exact for the continuous chain, any schedule.

    until: the lambda at which it stops, leaving what is still masked there.
    """

    until: float = 0.0

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per position."""
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        revealed_at = torch.where(task.wanted, masking_times(task), -1.0)
        while True:
            next_time = revealed_at.amax(1, keepdim=True)
            active = task.unfinished(x) & (next_time[:, 0] >= self.until)
            where = (revealed_at == next_time) & task.wanted & active[:, None]
            where &= where.cumsum(1) == 1  # two equal times: one of them now
            if not where.any():
                return
            x = fill(model, task, x, where, counts)
            revealed_at = torch.where(where, -1.0, revealed_at)
            counts.add(active, needed=full_pass(model, task.lengths), rounds=1)
            yield Frame(x, where, counts)
