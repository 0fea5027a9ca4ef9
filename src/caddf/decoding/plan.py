"""What is decoded left to right: the target, where drafts stand, and how far a row is.

The target is a distribution over the next token that stays the same whatever is drafted:
`causal`  log p_causal(x_i | x_<i), the causal branch's own head;
`fused`   log p_fused(x_i | x_<i, h), h being that of i's block all masked, or in a template that of the template.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.decoding.task import NO_TOKEN, DecodingError, Task
from caddf.decoding.windows import copies_end, drafts_end, new_start, start_of
from caddf.errors import InputError
from caddf.interface import Block, Drafting, Head, Infill, LanguageModel

Target = Literal["causal", "fused"]


@dataclass(frozen=True)
class Plan:
    """What the target is and where drafts stand: the head, the pattern of its canvas, and whether windows slide.

    They do where drafts are no reading of the target's own canvas: a causal head reads none, and a chain drafts from
    windows of its own, which know of what stands behind them what they hold of it. Where the diffusion branch reads
    clean blocks, such windows are `aligned` with them instead.

    `chained` says whether drafts are made one after the other, by a model with a chain.
    """

    task: Task
    head: Head
    pattern: Block | Infill
    sliding: bool
    aligned: bool
    chained: bool

    @classmethod
    def of(cls, model: LanguageModel, task: Task, target: Target, block_size: int) -> Plan:
        """Templates always have the fused target: a causal one ignores what comes after; it is where nothing fuses.

        Raises `InputError` where the model does not have the head.
        """
        head: Head = "fused" if task.template else target
        if head not in model.heads:
            raise InputError(
                f"target is {head}; this model does not read left to right, it only has {sorted(model.heads)}"
            )
        pattern = Infill() if task.template else Block(block_size)
        head = head if getattr(model, "fuses", True) else "causal"
        own, sliding = model.chained or (head == "causal" and not task.template), getattr(model, "sliding", True)
        return cls(task, head, pattern, own and sliding, own and not sliding, model.chained)

    @property
    def within(self) -> bool:
        """Whether the target is known up to the window's end, and not behind it."""
        return not (self.sliding or self.aligned)

    def window(self, n: Int[Tensor, " B"], size: int) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Where a new window of drafts from n on starts and ends.

        One that does not slide is n's block, or the template's next `size` positions.
        """
        if self.sliding:
            start = new_start(n)
        elif self.aligned or isinstance(self.pattern, Block):
            start = Block(size).start(n)
        else:
            start = n
        return start, torch.minimum(start + size, self.task.lengths)

    def drafted(
        self, n: Int[Tensor, " B"], drafting: Drafting, since: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Where the window that drafts come from starts, and where these end; `since` is where the last one does."""
        start, end = self.window(n, drafting.size)
        if not self.chained:
            return start, end
        start = start_of(start, n, since, drafting)
        return start, drafts_end(start, n, self.task.lengths, drafting)

    def copied(self, n: Int[Tensor, " B"], drafting: Drafting, matched: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Where copies from n on end: with the window, or further where the target is known behind it."""
        start, end = self.window(n, drafting.size)
        if self.head == "fused" or self.within:
            return end
        return copies_end(start, n, self.task.lengths, matched, drafting)

    def needed(self, end: Int[Tensor, " B"], branches: int = 2) -> Int[Tensor, " B"]:
        """Token-positions of an evaluation up to `end` without caches; of a template the second branch reads all."""
        beyond = self.task.lengths if isinstance(self.pattern, Infill) else end
        return end if branches == 1 else end + beyond


def first_open(task: Task, x: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Each row's first position that is still to be filled, T where there is none."""
    at = torch.arange(x.shape[1], device=x.device)
    return torch.where(task.wanted & (x == task.mask_id), at, x.shape[1]).amin(1)


def most_rounds(task: Task) -> Iterator[None]:
    """Turns for as many rounds as a task can take, each of which brings every row a token further.

    Raises `DecodingError` where they were not enough.
    """
    yield from itertools.repeat(None, int(task.wanted.sum(1).max()) + 1)
    raise DecodingError(NO_TOKEN)


def at_places(values: Tensor, place: Int[Tensor, "B n"]) -> Tensor:
    """What stands at places of each row; before the first what the first holds, and beyond the last the last."""
    return values.gather(1, place.clamp(0, values.shape[1] - 1))


def width_of(start: Int[Tensor, " B"], end: Int[Tensor, " B"]) -> int:
    """What the widest row needs."""
    return int((end - start).max())


def padded(log_p: Float[Tensor, "N V"], where: Bool[Tensor, "B n"]) -> Float[Tensor, "B n V"]:
    """Row-major readings back in their places, 0 where nothing was read."""
    if len(log_p) == where.numel():
        return log_p.view(*where.shape, -1)
    out = log_p.new_zeros(*where.shape, log_p.shape[-1])
    out[where] = log_p
    return out
