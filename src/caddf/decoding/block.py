"""Semi-autoregressive decoding: one block after the other, each by diffusion (Arriola et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.decoding.ancestral import masking_times
from caddf.decoding.plan import first_open
from caddf.decoding.task import Counts, Frame, Task, count_pass, draw, full_pass, read_rows
from caddf.errors import Checked, InputError, at_least
from caddf.interface import AnyOrder, Block, BlockReader, LanguageModel
from caddf.schedules import SCHEDULES, ScheduleName


@dataclass(frozen=True)
class SemiAutoregressive(Checked):
    """Denoises the first block that has masks in it, given the clean blocks before it; then the next.

    steps: of each block's reverse chain, on `schedule`; not set, one token at each jump time (first hitting, as
        published), which is exact for the continuous chain, and so for the block diffusion bound.
    schedule: whose evenly spaced times are the levels of those steps.
    block_size: k; not set, the model's own.
    cache: false reads whole rows each time, for comparison.

    Tokens given in later blocks are not seen before their block. A chain drafts from left to right alone: where drafts
    chain, the denoiser of eq. 5 fills the blocks, which reads what stands before them in both directions and is kept
    in no cache; that is the law of its any-order chain, one block after the other.
    """

    steps: int | None = None
    schedule: ScheduleName = "loglinear"
    block_size: int | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame for each step that reveals something."""
        if "draft" not in model.heads:
            raise InputError(f"the block decoder reads the draft head; this model has {sorted(model.heads)}")
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        pattern = Block(self.block_size or model.block_size)
        positions, turn = torch.arange(x.shape[1], device=x.device), masking_times(task)
        if self.steps is not None:  # the step at which a position is revealed, in place of the time
            grid = SCHEDULES[self.schedule]().grid(self.steps).to(x.device)
            turn = torch.bucketize(turn, grid, right=True).double()
        reader = self._reader(model, task, pattern)
        clean = torch.zeros_like(task.lengths)
        while (active := task.unfinished(x)).any():
            start = pattern.start(first_open(task, x))
            open_ = task.wanted & (x == task.mask_id) & active[:, None]
            here = open_ & (pattern.start(positions) == start[:, None])
            where = here & (turn == torch.where(here, turn, -1.0).amax(1, keepdim=True))
            if self.steps is None:
                where &= where.cumsum(1) == 1  # two equal times: one of them now
            log_q, clean = reader.read(x, where, start, clean, counts)
            x = draw(task, x, where, log_q)
            end = torch.minimum(start + pattern.size, task.lengths)
            counts.add(active, needed=full_pass(model, end), rounds=1)
            yield Frame(x, where, counts)

    def _reader(self, model: LanguageModel, task: Task, pattern: Block) -> CachedRows | WholeRows:
        """Cached where the model can, the reference where it cannot or `cache` is off."""
        if self.cache and hasattr(model, "allocate_blocks"):
            cached, (rows, length) = cast(BlockReader, model), task.tokens.shape
            slots = -(-length // pattern.size) * pattern.size + 1
            if (cache := cached.allocate_blocks(rows, slots)) is not None:
                return CachedRows(cached, task, pattern, cache, slots)
        return WholeRows(model, task, pattern)


@dataclass(frozen=True)
class WholeRows:
    """The reference: each reading is a pass over the row, of which what follows the block is not heard."""

    model: LanguageModel
    task: Task
    pattern: Block

    def read(
        self,
        x: Int[Tensor, "B T"],
        where: Bool[Tensor, "B T"],
        start: Int[Tensor, " B"],
        clean: Int[Tensor, " B"],
        counts: Counts,
    ) -> tuple[Float[Tensor, "N V"], Int[Tensor, " B"]]:
        """log q at the positions in `where`, row-major, and `clean` as it was."""

        chained, end = self.model.chained, torch.minimum(start + self.pattern.size, self.task.lengths)

        def read(rows: Bool[Tensor, " B"], length: int) -> Float[Tensor, "n V"]:
            part = x[rows, :length]
            states, _ = self.model(part, part, AnyOrder() if chained else self.pattern)
            return self.model.log_probs(states, where[rows, :length], self.model.denoiser if chained else "draft")

        count_pass(self.model, where, counts, end)
        # In blocks nothing behind a block is heard; in any order all that is read is.
        return read_rows(end if chained else self.task.lengths, where, read), clean


@dataclass(frozen=True)
class CachedRows:
    """Reads the current block, and before it what is not yet in the cache: the last block, or a prompt's blocks.

    `clean` says of each row how many slots of `cache` hold clean blocks; the last of the `slots` takes what rows that
    need fewer positions than the widest have to read.
    """

    model: BlockReader
    task: Task
    pattern: Block
    cache: Any
    slots: int

    def read(
        self,
        x: Int[Tensor, "B T"],
        where: Bool[Tensor, "B T"],
        start: Int[Tensor, " B"],
        clean: Int[Tensor, " B"],
        counts: Counts,
    ) -> tuple[Float[Tensor, "N V"], Int[Tensor, " B"]]:
        """log q at the positions in `where`, row-major, and `clean` brought up to `start`."""
        work, end = where.any(1), start + self.pattern.size
        positions = clean[:, None] + torch.arange(int((end - clean)[work].max()), device=x.device)
        positions = torch.where(positions < end[:, None], positions, self.slots - 1).clamp(max=self.slots - 1)
        inside = positions < self.task.lengths[:, None]  # the last block is whole: beyond the row it is masked
        at = positions.clamp(max=x.shape[1] - 1)
        canvas = torch.where(inside, x.gather(1, at), self.task.mask_id)
        states = self.model.read_blocks(canvas, positions, self.pattern, self.cache)
        log_q = self.model.log_probs(states, inside & where.gather(1, at), "draft")
        counts.add(work, diffusion=1, computed=torch.minimum(end, self.task.lengths) - clean)
        return log_q, torch.where(work, start, clean)
