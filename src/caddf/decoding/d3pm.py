"""The reverse chains of D3PM (Austin et al. 2021), whose networks are told the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from caddf.decoding.ancestral import masking_times, reveal
from caddf.decoding.task import Counts, Frame, Task, denoise, draw_from, full_pass
from caddf.errors import Checked
from caddf.evaluation.d3pm import AbsorbingChain, UniformChain
from caddf.interface import LanguageModel


@dataclass(frozen=True)
class D3PMAbsorbing(Checked):
    """The chain over `[M]` in `steps` steps: exact for it.

    Position i is revealed at a step drawn uniformly beforehand, from p~(x0_i | x_t) at that step; steps that reveal
    nothing cost nothing.

    steps: T of the chain.
    cache: false evaluates every row at every step, for comparison.
    """

    steps: int = 1000
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        AbsorbingChain(self.steps)  # raises

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame for each step that reveals something."""
        chain = AbsorbingChain(self.steps)
        turn = (masking_times(task) * self.steps).long().clamp(max=self.steps - 1) + 1
        steps = ((turn == t, chain.level(torch.tensor(t))) for t in range(self.steps, 0, -1))
        yield from reveal(model, task, counts, steps, self.cache)


@dataclass(frozen=True)
class D3PMUniform(Checked):
    """The uniform chain in `steps` steps: exact for it where no tokens are given.

    Starts from uniform tokens and redraws every wanted one at each step, from eq. 4 with the warped p~. Given tokens
    are held. No token is final before the last step, so an end of text stops nothing.

    steps: T of the chain.
    """

    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        UniformChain(self.steps)  # raises

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per step; what it holds is noise until the last."""
        counts, chain = counts or Counts.zeros(len(task.tokens)), UniformChain(self.steps)
        active = task.unfinished(task.tokens)
        where = task.wanted & active[:, None]
        if not where.any():
            return
        fresh = (task.uniforms(where) * model.vocab_size).long().clamp(max=model.vocab_size - 1)
        x, changed = task.tokens.masked_scatter(where, fresh), where
        for t in range(self.steps, 0, -1):
            at = torch.tensor(t, device=x.device)
            p0 = task.warp(denoise(model, task, x, where, counts, chain.level(at)))
            probs = chain.back(p0, x[where], at.expand(len(p0)))
            after = draw_from(task, x, where, probs)
            changed, x = changed | (after != x), after
            counts.add(active, needed=full_pass(model, task.lengths), rounds=1)
            yield Frame(x, changed, counts)
            changed = torch.zeros_like(where)
