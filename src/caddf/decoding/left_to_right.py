"""Reading left to right, with caches and without: what the autoregressive and speculative decoders ask of a model.

The target is a distribution over the next token that stays the same whatever is drafted:
`causal`  log p_causal(x_i | x_<i), the causal branch's own head;
`fused`   log p_fused(x_i | x_<i, h), h being that of i's block all masked, or in a template that of the template.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.task import NO_TOKEN, Counts, DecodingError, Task
from caddf.errors import InputError
from caddf.interface import Block, Head, Incremental, Infill, LanguageModel, Round, Rounds

Target = Literal["causal", "fused"]


@dataclass(frozen=True)
class Plan:
    """What the target is and where drafts stand: the head, the pattern of its canvas, and whether windows slide.

    They do where a target's canvas is no block's: that of a causal head, which reads none, and a template's, which a
    chain drafts for as for any other text, from windows that know of what stands behind them what they hold of it.

    `chained` says whether drafts are made one after the other, by a model with a chain.
    """

    task: Task
    head: Head
    pattern: Block | Infill
    sliding: bool
    chained: bool

    @classmethod
    def of(cls, model: LanguageModel, task: Task, target: Target, block_size: int) -> Plan:
        """Templates always have the fused target: a causal one ignores what comes after.

        Raises `InputError` where the model does not have the head.
        """
        head: Head = "fused" if task.template else target
        if head not in model.heads:
            raise InputError(
                f"target is {head}; this model does not read left to right, it only has {sorted(model.heads)}"
            )
        pattern = Infill() if task.template else Block(block_size)
        return cls(task, head, pattern, head == "causal" or (task.template and model.chained), model.chained)

    def window(self, n: Int[Tensor, " B"], size: int) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Where the window of drafts from n on starts and ends.

        A window that slides starts at the last token that stands, since the slots up to a window's start must be read;
        one that does not is n's block, or the template's next `size` positions.
        """
        if self.sliding:
            start = (n - 1).clamp(min=0)
        else:
            start = self.pattern.start(n) if isinstance(self.pattern, Block) else n
        end = start + size
        return start, torch.minimum(end, self.task.lengths)

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


def _width(start: Int[Tensor, " B"], end: Int[Tensor, " B"]) -> int:
    """What the widest row needs."""
    return int((end - start).max())


def _padded(log_p: Float[Tensor, "N V"], where: Bool[Tensor, "B n"]) -> Float[Tensor, "B n V"]:
    """Row-major readings back in their places, 0 where nothing was read."""
    if len(log_p) == where.numel():
        return log_p.view(*where.shape, -1)
    out = log_p.new_zeros(*where.shape, log_p.shape[-1])
    out[where] = log_p
    return out


class Reader(Protocol):
    """Readings of a task's rows `x`, `[M]` from each row's first open position n on but for drafts and given tokens.

    State in, state out: what has been read is the caller's to hold, and `keep` says how much of it still holds.
    """

    def start(self) -> Any:
        """The state before anything is read."""

    def target(
        self, state: Any, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B m V"], Any]:
        """log p at positions n to `end - 1`, each given the tokens in `x` before it (0 behind a row's end)."""

    def look(
        self, state: Any, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], size: int, rows: Bool[Tensor, " B"]
    ) -> tuple[Any, Any]:
        """One pass of the diffusion branch over the window of drafts, masked from n on."""

    def drafts(
        self, look: Any, x: Int[Tensor, "B T"], at: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> Float[Tensor, "B m V"]:
        """log q at positions `at` to `end - 1` of the window (0 behind a row's end)."""

    def chain(
        self,
        look: Any,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """Up to m chained drafts from n on at one go, where the model can: tokens, q, how many are to be verified.

        Where `given` is not -1 that token stands already.
        """

    def round(
        self,
        state: Any,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        size: int = 0,
        least: float = 0.0,
    ) -> tuple[Round, Any] | None:
        """A whole round, where the model can: what the other readings lead to, from the same uniforms.

        Windows are of `size`; 0: one token of each row, and no drafts.
        """

    def keep(self, state: Any, below: Int[Tensor, " B"]) -> Any:
        """Only slots below `below` still hold: the tokens that later ones read have changed."""


@dataclass(frozen=True)
class FullReader:
    """The reference: every reading is a pass over whole rows."""

    model: LanguageModel
    plan: Plan
    counts: Counts

    def start(self) -> None:
        """Nothing is kept."""

    def target(
        self, state: None, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B m V"], None]:
        """The canvas is the template, or all masked."""
        canvas = (
            self.plan.task.tokens if isinstance(self.plan.pattern, Infill) else torch.full_like(x, self.model.mask_id)
        )
        branches = 1 if self.plan.head == "causal" else 2
        needed = self.plan.needed(end, branches)
        self.counts.add(rows, causal=1, diffusion=branches - 1, computed=needed, needed=needed)
        return self._read(x, canvas, self.plan.pattern, self.plan.head, n, end, rows), None

    def look(
        self, state: None, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], size: int, rows: Bool[Tensor, " B"]
    ) -> tuple[tuple[Tensor, Tensor, int], None]:
        """Only remembers the canvas and the windows."""
        start, end = self.plan.window(n, size)
        needed = self.plan.needed(end)
        self.counts.add(rows, causal=1, diffusion=1, computed=needed, needed=needed)
        return (x, start, size), None

    def drafts(
        self,
        look: tuple[Tensor, Tensor, int],
        x: Int[Tensor, "B T"],
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B m V"]:
        """One pass for all rows whose windows start at the same offset in their blocks."""
        canvas, start, size = look
        if isinstance(self.plan.pattern, Infill) and not self.plan.chained:
            return self._read(x, canvas, Infill(), "draft", at, end, rows)
        out = None
        for offset in (start % size)[rows].unique().tolist():
            some = rows & (start % size == offset)
            part = self._read(x, canvas, Block(size, offset), "draft", at, torch.where(rows, end, at), some)
            out = part if out is None else out + part
        assert out is not None
        return out

    def chain(self, look: Any, x: Tensor, n: Tensor, u: Tensor, warp: Warp, least: float, given: Any = None) -> None:
        """The reference drafts step by step."""

    def round(self, state: None, x: Tensor, n: Tensor, rows: Tensor, size: int = 0, least: float = 0.0) -> None:
        """The reference works step by step."""

    def keep(self, state: None, below: Int[Tensor, " B"]) -> None:
        """Nothing is kept."""

    def _read(
        self,
        prefix: Int[Tensor, "B T"],
        canvas: Int[Tensor, "B T"],
        pattern: Block | Infill,
        head: Head,
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B m V"]:
        lengths, out = self.plan.task.lengths, None
        inside = torch.arange(_width(at, end), device=at.device) < (end - at)[:, None]
        for length in lengths[rows].unique().tolist():
            some = rows & (lengths == length)
            states, _ = self.model(prefix[some, :length], canvas[some, :length], pattern)
            positions = torch.arange(length, device=at.device)
            where = (positions >= at[some, None]) & (positions < end[some, None])
            part = _padded(self.model.log_probs(states, where, head), inside & some[:, None])
            out = part if out is None else out + part
        assert out is not None
        return out


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
        log_p, width = self.model.log_probs(states, where, head), _width(at, end)
        if len(log_p) == len(at) * width:
            return log_p.view(len(at), width, -1)
        return _padded(log_p, (torch.arange(width, device=at.device) < (end - at)[:, None]) & rows[:, None])


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


def reader_for(model: LanguageModel, plan: Plan, counts: Counts, drafting: bool, cache: bool) -> Reader:
    """Cached where the model can, the reference where it cannot or `cache` is off."""
    if cache and hasattr(model, "incremental"):
        incremental = cast(Incremental, model)
        if incremental.incremental(plan.pattern) or (plan.head == "causal" and not drafting):
            return CachedReader(incremental, plan, counts)
    return FullReader(model, plan, counts)
