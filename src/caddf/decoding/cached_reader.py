"""Reading left to right over caches: what stands is read once, and so is the canvas of its block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.plan import Plan, at_places, first_open, padded, width_of
from caddf.decoding.task import Counts
from caddf.interface import ONE_TOKEN, Block, BlockReader, Drafting, Head, Incremental, Infill, Round, Rounds


@dataclass(frozen=True)
class Progress:
    """What a cached reader has read: caches whose slots below `read` hold, and the canvases that the target sees.

    `seen` are those of blocks of even and of odd number, `seen_start` the first positions of these blocks, -1 where
    there is none; a template's is the first. `look` is the last windows of drafts, `chain` the cache of their chain, of
    which the next make use again; `blocks`, where the diffusion branch reads clean ones, its own cache, of which the
    slots below `clean` hold; and `rounds` the model's own rounds, None until they were asked for; `settled` says
    that every slot before a row's first open position has been read.
    """

    caches: Any
    read: Int[Tensor, " B"]
    seen: tuple[Any, Any]
    seen_start: Int[Tensor, "2 B"]
    look: Window | None = None
    chain: Any = None
    blocks: Any = None
    clean: Int[Tensor, " B"] | None = None
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
    """Reads each slot once, again only after its token changed, and so each block's canvas."""

    model: Incremental
    plan: Plan
    counts: Counts

    def start(self) -> Progress:
        """Empty caches."""
        rows, length = self.plan.task.tokens.shape
        none = torch.zeros(rows, dtype=torch.long, device=self.plan.task.tokens.device)
        return Progress(self.model.allocate(rows, length), none, (None, None), none.expand(2, -1) - 1)

    def target(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B m V"], Progress]:
        """Reads the slots from the first that does not hold; those of a prompt by themselves, in blocks."""
        fused, upto = self.plan.head == "fused", end
        if fused and isinstance(self.plan.pattern, Block):
            state = self._catch_up(state, x, n - 1, rows)
            if not self.plan.sliding:  # the next block starts from the slot behind
                drafted = at_places(x, end[:, None] - 1)[:, 0] != self.plan.task.mask_id
                upto = end + (rows & (end < self.plan.task.lengths) & drafted)
        states, positions, state = self._read(state, x, torch.minimum(state.read, n), upto, rows)
        if fused:
            if isinstance(self.plan.pattern, Infill):
                seen, state = self._see_template(state, x, rows)
            else:
                seen, state = self._see_blocks(state, x, positions, end, rows, self.plan.pattern)
            states = self.model.fuse(states, positions.clamp(max=x.shape[1] - 1), state.caches, seen)
        self.counts.add(rows, needed=self.plan.needed(end, 2 if fused else 1))
        return self._log_probs(states, positions, n, end, rows, self.plan.head), state

    def look(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        start: Int[Tensor, " B"],
        size: int,
        new: Bool[Tensor, " B"],
    ) -> tuple[Window, Progress]:
        """Encodes new windows; a block of which nothing stands yet has been seen by the target already."""
        if not new.any():
            assert state.look is not None
            return replace(state.look, n=n), state
        self.counts.add(new, needed=self.plan.needed(torch.minimum(start + size, self.plan.task.lengths)))
        if self.plan.aligned:
            return self._look_at_blocks(state, x, n, start, size, new)
        if self.plan.head == "fused" and not self.plan.sliding and isinstance(self.plan.pattern, Block):
            _, state = self._see_blocks(state, x, n[:, None], n + 1, new, self.plan.pattern)
        if isinstance(self.plan.pattern, Infill) and not self.plan.chained:
            state, whole = self._catch_up(state, x, n, new), torch.zeros_like(n)
            self.counts.add(new, diffusion=1, computed=self.plan.task.lengths)
            seen = self.model.encode(x, whole, self.plan.task.lengths, Infill(), state.caches)
            return Window(seen, whole, x.shape[1], n), state
        if state.chain is None:
            state = replace(state, chain=self.model.allocate_drafts(len(x), size))
        if not self.plan.sliding and bool((n == start)[new].all()):
            odd = (start // size % 2)[new]
            if bool((odd == odd[0]).all()):
                return Window(state.seen[int(odd[0])], start, size, n, state.chain), state
        state = self._catch_up(state, x, start, new)
        self.counts.add(new if self.plan.sliding else new & (n != start), diffusion=1, computed=size)
        places = start[:, None] + torch.arange(size, device=x.device)
        canvas = torch.where(places < self.plan.task.lengths[:, None], at_places(x, places), self.model.mask_id)
        seen = self._encode(state, canvas, start, Block(size), new, proposing=self.plan.sliding)
        return self._held(state, Window(seen, start, size, n, state.chain), new)

    def _held(self, state: Progress, look: Window, new: Bool[Tensor, " B"]) -> tuple[Window, Progress]:
        """The new windows beside those that a chain goes on in."""
        if state.look is not None and not new.all():
            start = torch.where(new, look.start, state.look.start)
            look = replace(look, seen=self.model.choose(new, look.seen, state.look.seen), start=start)
        return look, replace(state, look=look) if self.plan.chained else state

    def _look_at_blocks(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        start: Int[Tensor, " B"],
        size: int,
        new: Bool[Tensor, " B"],
    ) -> tuple[Window, Progress]:
        """Encodes new blocks, and in the same pass what the cache does not hold of the clean blocks before them."""
        slots = -(-x.shape[1] // size) * size + 1  # the last takes what rows that need fewer positions have to read
        model = cast(BlockReader, self.model)
        if state.blocks is None:
            blocks = model.allocate_blocks(len(x), slots, chained=True)
            chain = self.model.allocate_drafts(len(x), size)
            state = replace(state, chain=chain, blocks=blocks, clean=torch.zeros_like(n))
        assert state.clean is not None
        end = torch.where(new, start + size, 0)
        positions = state.clean[:, None] + torch.arange(int((end - state.clean).max()), device=x.device)
        positions = torch.where(positions < end[:, None], positions, slots - 1)
        canvas = torch.where(positions < self.plan.task.lengths[:, None], at_places(x, positions), self.model.mask_id)
        states = model.read_blocks(canvas, positions, Block(size), state.blocks).draft
        self.counts.add(new, diffusion=1, computed=end - state.clean)
        within = (torch.where(new, start - state.clean, 0)[:, None] + torch.arange(size, device=x.device))[..., None]
        seen = model.window_of(states.gather(1, within.expand(-1, -1, states.shape[-1])), start)
        state = replace(state, clean=torch.where(new, start, state.clean))
        return self._held(state, Window(seen, start, size, n, state.chain), new)

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
        drafting: Drafting = ONE_TOKEN,
    ) -> tuple[Round | None, Progress]:
        """By the model itself, where all slots before n have been read, and drafts chain if there are any.

        With drafts all rounds are the model's, or none: each goes on in the windows of those before.
        """
        task, fused = self.plan.task, self.plan.head == "fused"
        if drafting.proposes and not self.plan.chained:
            return None, state
        if task.template:  # read in the same passes where steps follow, so that a row's work is what it is alone
            if fused:
                _, state = self._see_template(state, x, rows)
            if drafting.most:  # drafts see what stands before them
                state = self._catch_up(state, x, (n - 1).clamp(min=0), rows)
        if state.rounds == (None,):
            return None, state
        if not state.settled or task.template:
            if not task.template and (drafting.most or fused):
                state = self._catch_up(state, x, (n - 1).clamp(min=0) if drafting.most else n - 1, rows)
            if bool((state.read < n)[rows].any()):
                return None, state
        if state.rounds is None:
            over = None if not fused else state.seen[0] if task.template else self.plan.pattern
            made = self.model.rounds(
                task.lengths, drafting, state.caches, warp=task.warp, over=over, template=task.template
            )
            state = replace(state, rounds=(made,))
        assert state.rounds is not None
        (rounds,) = state.rounds
        if rounds is None:
            return None, state
        done = rounds(x, n, rows, state.read, task.generators.several)
        self.counts.all.add_(done.work.to(self.counts.all.device))
        return done, replace(state, read=done.read, settled=True)

    def keep(self, state: Progress, below: Int[Tensor, " B"]) -> Progress:
        """Going back is a smaller number; a block whose first slot does not hold has not been seen."""
        seen_start = torch.where(state.seen_start < below, state.seen_start, -1)
        return replace(state, read=torch.minimum(state.read, below), seen_start=seen_start)

    def _see_template(self, state: Progress, x: Int[Tensor, "B T"], rows: Bool[Tensor, " B"]) -> tuple[Any, Progress]:
        """The template's canvas, encoded once."""
        task, (seen, _) = self.plan.task, state.seen
        if seen is not None:
            return seen, state
        state = self._catch_up(state, x, first_open(task, task.tokens), rows)
        start = torch.zeros_like(task.lengths)
        seen = self.model.encode(task.tokens, start, task.lengths, Infill(), state.caches)
        self.counts.add(rows, diffusion=1, computed=task.lengths)
        seen = self.model.prepare(seen, state.caches)
        return seen, replace(state, seen=(seen, None))

    def _see_blocks(
        self,
        state: Progress,
        x: Int[Tensor, "B T"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        pattern: Block,
    ) -> tuple[Any, Progress]:
        """The canvases of the one or two blocks that a row's positions lie in, encoded once while their starts hold.

        A row whose block goes on gets the same states again when another row enters a block.
        """
        n = positions[..., 0].expand(len(x))
        first, last = pattern.start(n), pattern.start(end - 1)
        odd, other = pattern.index(n) % 2 == 1, torch.where(last > first, last, -1)
        wanted = torch.stack([torch.where(odd, other, first), torch.where(odd, first, other)])
        wanted = torch.where(rows, wanted, -1)
        seen, starts = list(state.seen), state.seen_start
        masked = torch.full((len(x), pattern.size), self.model.mask_id, device=x.device)
        for i, new in enumerate((wanted >= 0) & (wanted != starts)):
            if new.any():
                start = torch.where(new, wanted[i], starts[i].clamp(min=0))
                state = self._catch_up(state, x, start, new)
                self.counts.add(new, diffusion=1, computed=pattern.size)
                seen[i] = self._encode(state, masked, start, pattern, rows)
                seen[i] = self.model.prepare(seen[i], state.caches)
        state = replace(state, seen=(seen[0], seen[1]), seen_start=torch.where(wanted >= 0, wanted, starts))
        used = [bool((each >= 0).any()) for each in wanted]
        if not all(used):
            return seen[used.index(True)], state
        return self.model.beside(seen[0], seen[1], positions), state

    def _encode(
        self,
        state: Progress,
        canvas: Int[Tensor, "B k"],
        start: Int[Tensor, " B"],
        block: Block,
        rows: Bool[Tensor, " B"],
        proposing: bool = False,
    ) -> Any:
        """One pass of the diffusion branch over a block of each row."""
        return self.model.encode(canvas, _alike(start, rows), self.plan.task.lengths, block, state.caches, proposing)

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
