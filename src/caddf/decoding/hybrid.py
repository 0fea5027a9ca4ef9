"""Hybrid decoding: diffusion sets anchors in any order, the fused branches fill in left to right between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from caddf.decoding.ancestral import Ancestral
from caddf.decoding.autoregressive import Autoregressive
from caddf.decoding.first_hitting import FirstHitting
from caddf.decoding.speculative import Speculative
from caddf.decoding.task import Counts, Frame, Task
from caddf.errors import Checked, a_share
from caddf.interface import LanguageModel


@dataclass(frozen=True)
class Hybrid(Checked):
    """Diffusion from lambda 1 down to `anchor`, then infilling of what is still masked (eq. 6) over that canvas.

    Exact for the hybrid bound at l* = `anchor`, or with `steps` for its n-step form (the left-endpoint sum).

    anchor: share still masked when infilling starts; 1 is left to right alone, 0 is diffusion alone.
    steps: of the chain that sets the anchors; not set, they come by first hitting.
    speculate: draft and verify the infilling, which changes its speed and not its distribution.
    cache: false reads whole rows each time, for comparison.
    """

    anchor: float = 0.75
    steps: int | None = None
    speculate: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share(self, "anchor", note="the share still masked when infilling starts")
        self._any_order()  # raises

    def _any_order(self) -> FirstHitting | Ancestral:
        if self.steps is None:
            return FirstHitting(self.anchor)
        return Ancestral(self.steps, until=self.anchor, cache=self.cache)

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """The frames of both phases."""
        counts = counts or Counts.zeros(len(task.tokens))
        tokens = task.tokens
        for frame in self._any_order()(model, task, counts):
            tokens = frame.tokens
            yield frame
        if not self.anchor:
            return
        fill_in = (Speculative if self.speculate else Autoregressive)(cache=self.cache)
        yield from fill_in(model, replace(task, tokens=tokens, template=True), counts)
