"""Lossless block speculation: the diffusion branch drafts, or the text itself; the target verifies (`verification`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from caddf.decoding.left_to_right import reader_for
from caddf.decoding.plan import Plan, Target, first_open, most_rounds
from caddf.decoding.round_by_parts import RoundByParts
from caddf.decoding.task import Counts, Frame, Task
from caddf.errors import Checked, InputError, a_share, at_least
from caddf.interface import Drafting, LanguageModel

MOST_COPIES = 64
"""Each has room for what the target says of all tokens, in every row."""


@dataclass(frozen=True)
class Speculative(Checked):
    """Each round the diffusion branch drafts and one causal pass verifies: the target's distribution exactly.

    target: `causal` (the causal branch's own head) or `fused` (in blocks of `block_size`, each fused with its
        all-masked start; templates always). Where windows slide (`plan`) a round that is accepted whole adds a token.
    block_size: k; not set, the model's own.
    drafts: of a chain, in a round at most, and at most k; not set, two thirds of k.
    renew: a chain, which hears what has come to stand in its window, drafts from it in later rounds too, as long as so
        many places are left; not set, half of a round's drafts. With k each round has a window of its own.
    lookup: where so many last tokens have stood before, drafts are copied from behind them, and the diffusion branch is
        not read; 0: never. A model that has nothing to draft with copies, or writes one token a round.
    copies: copied drafts of a round at most, which are as many as tokens have matched, and at least what a window has;
        not set, four times k; 64 at most. With the fused target a round copies a window's.
    least: drafts are verified while the product of their largest draft probabilities is at least this; 0 verifies all.
    cache: false reads whole rows each time, for comparison.
    """

    target: Target = "causal"
    block_size: int | None = None
    drafts: int | None = None
    renew: int | None = None
    lookup: int = 3
    copies: int | None = None
    least: float = 0.0
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        a_share(self, "least")
        at_least(0, self, "lookup", note="0: never")
        at_least(1, self, "drafts", "renew", "copies")
        if self.copies is not None and self.copies > MOST_COPIES:
            raise InputError(f"copies is {self.copies}; it must be at most {MOST_COPIES}")

    def drafting(self, model: LanguageModel) -> Drafting:
        """How rounds of `model` are drafted; raises `InputError` where windows have no room for `drafts`."""
        size = self.block_size or model.block_size
        most = self.drafts or max(2 * size // 3, 1)
        if most > size:
            raise InputError(f"drafts is {self.drafts}; it must be at most the block size, which is {size}")
        renew, copies = self.renew or (most + 1) // 2, self.copies or min(4 * size, MOST_COPIES)
        return Drafting(size, most, renew, self.least, self.lookup, copies, "draft" in model.heads)

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per round."""
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        plan = Plan.of(model, task, self.target, self.block_size or model.block_size)
        how = self.drafting(model)
        if not (how.proposes or how.lookup):
            raise InputError("this model has nothing to draft with but lookup, which is 0")
        reader = reader_for(model, plan, counts, drafting=how.proposes, cache=self.cache)
        by_parts = RoundByParts(model, plan, reader, how, counts)
        state = reader.start()
        n, since = first_open(task, x), torch.full_like(task.lengths, -1)
        for _ in most_rounds(task):
            rows = (n < x.shape[1]) & ~task.finished(x)
            if not rows.any():
                return
            done, state = reader.round(state, x, n, rows, how)
            if done is not None:
                frame, n = Frame(done.tokens, done.fresh, counts, done.drafts, done.corrected), done.n
            else:
                frame, n, since, state = by_parts(x, n, rows, since, state)
            x = frame.tokens
            yield frame
