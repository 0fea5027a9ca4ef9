"""One token at a time, left to right, with a KV cache: the target's distribution, drawn plainly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from caddf.decoding.left_to_right import reader_for
from caddf.decoding.plan import Plan, Target, first_open, most_rounds
from caddf.decoding.task import Counts, Frame, Task
from caddf.errors import Checked
from caddf.interface import LanguageModel


@dataclass(frozen=True)
class Autoregressive(Checked):
    """Draws x_n ~ p(. | x_<n) for n = 1, 2, ...; exact for the target's likelihood (eq. 6).

    target: `causal` (the causal branch's own head) or `fused` (in blocks of `block_size`; templates always).
    block_size: k; not set, the model's own.
    cache: false reads whole rows each time, for comparison.
    """

    target: Target = "causal"
    block_size: int | None = None
    cache: bool = True

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per token."""
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        plan = Plan.of(model, task, self.target, self.block_size or model.block_size)
        reader = reader_for(model, plan, counts, drafting=False, cache=self.cache)
        state, at = reader.start(), torch.arange(x.shape[1], device=x.device)
        n = first_open(task, x)
        for _ in most_rounds(task):
            if not (rows := (n < x.shape[1]) & ~task.finished(x)).any():
                return
            done, state = reader.round(state, x, n, rows)
            if done is not None:
                x, n = done.tokens, done.n
                yield Frame(x, done.fresh, counts)
                continue
            log_p, state = reader.target(state, x, n, n + 1, rows)
            u, where = task.generators.uniform(rows).to(x.device), (at == n[:, None]) & rows[:, None]
            x = torch.where(where, task.warp.draw(log_p[:, 0], u)[:, None], x)
            n = first_open(task, x)
            counts.add(rows, rounds=1)
            yield Frame(x, where, counts)
