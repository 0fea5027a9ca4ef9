"""Reading left to right over caches: each slot once, and each block's canvas once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.plan import Plan, first_open, padded, width_of
from caddf.decoding.task import Counts
from caddf.interface import Block, Head, Incremental, Infill, Round, Rounds


@dataclass(frozen=True)
class Progress:
    """What a cached reader has read: caches whose slots below `read` hold, and the canvas that the target sees.

    `seen_start` is the first position of the block that `seen` is of, -1 where there is none yet. `chain` is the cache
    of the drafts of one window, of which the next makes use again, and `rounds` the model's own rounds, None until they
    were asked for; `settled` says that every slot before a row's first open position has been read.
    """

    caches: Any
    read: Int[Tensor, " B"]
    seen: Any
    seen_start: Int[Tensor, " B"]
    chain: Any = None
    rounds: tuple[Rounds | None] | None = None
    settled: bool = False


@dataclass(frozen=True)
class Window:
    """A window of drafts as the diffusion branch sees it: `width` positions from each row's `start` on.

    Drafts begin at `n`; where they chain, `chain` is the cache of what the chain has read.
    """

    seen: Any
    start: Int[Tensor, " B"]
    width: int
    n: Int[Tensor, " B"]
    chain: Any = None


@dataclass(frozen=True)
class CachedReader:
    """Reads each slot once (again only after its token changed), and each block's canvas once."""

    model: Incremental
    plan: Plan
    counts: Counts

    def start(self) -> Progress:
        """Empty caches."""
        rows, length = self.plan.task.tokens.shape
        none = torch.zeros(rows, dtype=torch.long, device=self.plan.task.tokens.device)
        return Progress(self.model.allocate(rows, length), none, None, none - 1)

    def target(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B m V"], Progress]:
        """Reads the slots from the first that does not hold.

        With the fused target also the slot behind, where its token is drafted: the next block starts from it.
        """
        fused, upto = self.plan.head == "fused", end
        if fused and isinstance(self.plan.pattern, Block):
            upto = end + (rows & (end < self.plan.task.lengths) & (_at(x, end - 1) != self.plan.task.mask_id))
        states, positions, state = self._read(state, x, torch.minimum(state.read, n), upto, rows)
        if fused:
            state = self._see(state, x, n, rows)
            states = self.model.fuse(states, positions.clamp(max=x.shape[1] - 1), state.caches, state.seen)
        self.counts.add(rows, needed=self.plan.needed(end, 2 if fused else 1))
        return self._log_probs(states, positions, n, end, rows, self.plan.head), state

    def look(
        self, state: Progress, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], size: int, rows: Bool[Tensor, " B"]
    ) -> tuple[Window, Progress]:
        """Encodes the window; a block of which nothing stands yet has been seen by the target already."""
        start, end = self.plan.window(n, size)
        self.counts.add(rows, needed=self.plan.needed(end))
        if self.plan.head == "fused" and not self.plan.sliding:
            state = self._see(state, x, n, rows)
        if isinstance(self.plan.pattern, Infill) and not self.plan.chained:
            state, whole = self._catch_up(state, x, n, rows), torch.zeros_like(n)
            self.counts.add(rows, diffusion=1, computed=self.plan.task.lengths)
            seen = self.model.encode(x, whole, self.plan.task.lengths, Infill(), state.caches)
            return Window(seen, whole, x.shape[1], n), state
        if state.chain is None:
            state = replace(state, chain=self.model.allocate_drafts(len(x), size))
        chain = state.chain
        if not self.plan.sliding and bool((n == start)[rows].all()):
            return Window(state.seen, start, size, n, chain), state
        state = self._catch_up(state, x, start, rows)
        new = rows if self.plan.sliding else rows & (n != start)
        self.counts.add(new, diffusion=1, computed=size)
        canvas = _gather(x, start[:, None] + torch.arange(size, device=x.device), self.model.mask_id)
        return Window(self._encode(state, canvas, start, Block(size), rows), start, size, n, chain), state

    def drafts(
        self,
        look: Window,
        x: Int[Tensor, "B T"],
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B m V"]:
        """The draft head over the window; a chain steps on, at first from the window's start."""
        places = torch.arange(look.width, device=x.device)
        if look.chain is None:
            states = self.model.draft(look.seen, x)
        else:
            last = at - look.start
            first = torch.where(at == look.n, 0, last)
            wide = places[: int((last - first)[rows].max()) + 1]
            if len(shared := _alike(first, rows)) == 1:
                places = shared + wide
            else:
                places = (first[:, None] + wide).clamp(max=look.width - 1)
            states = self.model.draft_step(look.seen, x, places, look.chain)
        return self._log_probs(states, look.start[:, None] + places, at, end, rows, "draft")

    def chain(
        self,
        look: Window,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """By the model itself, where it can."""
        if look.chain is None:
            return None
        return self.model.draw_drafts(look.seen, x, look.start, n, u, look.chain, warp=warp, least=least, given=given)

    def round(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        size: int = 0,
        least: float = 0.0,
    ) -> tuple[Round, Progress] | None:
        """By the model itself, where the target is causal and no token is banned."""
        task = self.plan.task
        if self.plan.head != "causal" or task.warp.banned or (size and not self.plan.chained):
            return None
        if state.rounds is None:
            made = self.model.rounds(task.lengths, size, state.caches, warp=task.warp, least=least)
            state = replace(state, rounds=(made,))
        assert state.rounds is not None
        (rounds,) = state.rounds
        if rounds is None:
            return None
        if not state.settled:
            if bool((self.plan.window(n, size)[1] > n)[rows].any()):  # drafts see what stands before them
                state = self._catch_up(state, x, (n - 1).clamp(min=0), rows)
            if bool((state.read < n)[rows].any()):
                return None
        done = rounds(x, n, rows, state.read, task.generators.several(rows, 2 * size + 1))
        self.counts.all.add_(done.work.to(self.counts.all.device))
        return done, replace(state, read=done.read, settled=True)

    def keep(self, state: Progress, below: Int[Tensor, " B"]) -> Progress:
        """Going back is a smaller number."""
        return replace(state, read=torch.minimum(state.read, below))

    def _see(self, state: Progress, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], rows: Bool[Tensor, " B"]) -> Progress:
        """The canvas that the target at n is fused with: encoded once per block, once per template.

        A row whose block goes on gets the same states again when another row enters a block.
        """
        task, pattern = self.plan.task, self.plan.pattern
        if isinstance(pattern, Infill):
            start = torch.zeros_like(n)
            new = rows & (state.seen_start < 0)
            if new.any():
                state = self._catch_up(state, x, first_open(task, task.tokens), new)
                seen = self.model.encode(task.tokens, start, task.lengths, pattern, state.caches)
                seen = self.model.prepare(seen, state.caches)
                self.counts.add(new, diffusion=1, computed=task.lengths)
                state = replace(state, seen=seen, seen_start=start)
            return state
        start = pattern.start(n)
        new = rows & (state.seen_start != start)
        if new.any():
            state = self._catch_up(state, x, start, new)
            masked = torch.full((len(x), pattern.size), self.model.mask_id, device=x.device)
            self.counts.add(new, diffusion=1, computed=pattern.size)
            seen = self._encode(state, masked, start, pattern, rows)
            state = replace(state, seen=self.model.prepare(seen, state.caches), seen_start=start)
        return state

    def _encode(
        self, state: Progress, canvas: Int[Tensor, "B k"], start: Int[Tensor, " B"], block: Block, rows: Tensor
    ) -> Any:
        """One pass of the diffusion branch over a block of each row; windows that slide are for drafts alone."""
        start, sliding = _alike(start, rows), self.plan.sliding
        return self.model.encode(canvas, start, self.plan.task.lengths, block, state.caches, sliding)

    def _catch_up(
        self, state: Progress, x: Int[Tensor, "B T"], slot: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> Progress:
        """Reads what is missing of the slots up to and including `slot`."""
        behind = rows & (state.read <= slot)
        if behind.any():
            _, _, state = self._read(state, x, state.read, slot + 1, behind)
        return state

    def _read(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        start: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> tuple[Any, Int[Tensor, "B n"] | Int[Tensor, " n"], Progress]:
        """One pass of the causal branch over slots `start` to `end - 1`, as wide as the widest row needs.

        Other rows go along: what they held they read again as it was, and slots behind that are not counted as read.
        """
        wide = torch.arange(int((end - start)[rows].max()), device=x.device)
        if len(first := _alike(start, rows)) == 1:
            positions = first + wide
        else:
            positions = start[:, None] + wide
        states = self.model.read(x, positions.clamp(max=x.shape[1] - 1), state.caches)
        self.counts.add(rows, causal=1, computed=end - start)
        read = torch.where(rows, torch.maximum(state.read, end), state.read)
        return states, positions, replace(state, read=read)

    def _log_probs(
        self,
        states: Any,
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        head: Head,
    ) -> Float[Tensor, "B m V"]:
        """The head at `at` to `end - 1` of states at `positions`; 0 where a row has nothing to read."""
        where = (positions >= at[:, None]) & (positions < end[:, None]) & rows[:, None]
        log_p, width = self.model.log_probs(states, where, head), width_of(at, end)
        if len(log_p) == len(at) * width:
            return log_p.view(len(at), width, -1)
        return padded(log_p, (torch.arange(width, device=at.device) < (end - at)[:, None]) & rows[:, None])


def _alike(start: Int[Tensor, " B"], rows: Bool[Tensor, " B"]) -> Int[Tensor, " B"] | Int[Tensor, " 1"]:
    """`start`, or the one start that all `rows` share."""
    if len(start) == 1:
        return start
    shared = start[rows]
    return shared[:1] if bool((shared == shared[0]).all()) else start


def _at(x: Int[Tensor, "B T"], position: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at one position of each row."""
    return x.gather(1, position.clamp(0, x.shape[1] - 1)[:, None])[:, 0]


def _gather(x: Int[Tensor, "B T"], positions: Int[Tensor, "B n"], beyond: int) -> Int[Tensor, "B n"]:
    """`x` at `positions`, `beyond` past its end."""
    inside = positions < x.shape[1]
    return torch.where(inside, x.gather(1, positions.clamp(max=x.shape[1] - 1)), beyond)
