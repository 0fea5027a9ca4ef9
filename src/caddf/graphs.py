"""Whole rounds of a causal target as one CUDA graph: a window, its drafts, their verification, and the token behind.

On a GPU the time of a round is that of launching its hundreds of kernels, one after the other. Here they are recorded
once, on buffers that stay where they are, and launched together ever after. What is recorded is `Engine.round`, made of
the model's own modules: it writes what `decoding.speculative` and `decoding.autoregressive` write from the same
uniforms, with no step that waits for a number to come back from the GPU.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from caddf.caches import Caches, KVCache, Slots
from caddf.categorical import Warp, arg_max, inverse_cdf
from caddf.decoding.lookup import lookup
from caddf.decoding.verification import at_place, residual, verify
from caddf.decoding.windows import copies_end, drafts_end, new_start, start_of
from caddf.interface import Drafting, Round, Uniforms
from caddf.models.causal import CausalBranch
from caddf.models.chain import DraftChain
from caddf.models.layers import TiedEmbedding, head_log_probs, over_all
from caddf.models.states import Canvas, States

MOST = 256
"""Places of all rows of a round, each of which has probabilities of all tokens; where rows copy they may be more."""
NARROWEST, STEP = 128, 256
"""Slots that the narrowest graph attends to (others: twice as many, and so on), and of which caches hold a multiple."""
IDLE = 4
"""Engines that wait for another generation like theirs: each holds caches and graphs."""
WARM = 3
"""Rounds before one is recorded, in which libraries choose their kernels and tables are made."""


@dataclass(frozen=True)
class Shape:
    """What a graph is recorded for."""

    rows: int
    length: int
    drafting: Drafting
    warp: Warp
    dtype: torch.dtype
    device: torch.device


class Graphs:
    """A model's rounds (`caddf.interface.Incremental.rounds`), whose engines go from one generation to the next.

    Where there is no GPU the same rounds run step by step. A copied model has no graphs: they read the first's weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.idle, self.failed = cast(Any, model), list[Engine](), False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has weights of its own."""
        return None

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether the model has rounds at all: a causal branch that reads no canvas."""
        branch = getattr(model, "causal", None)
        return hasattr(model, "graphs") and isinstance(branch, CausalBranch) and not hasattr(branch.layers[0], "cross")

    def fit(self, rows: int, drafting: Drafting, caches: Caches) -> bool:
        """Whether there are such rounds: drafts need a chain, and what the diffusion branch reads of causal states."""
        model, branch, size = self.model, self.model.causal, drafting.size
        chained = isinstance(getattr(model, "chain", None), DraftChain)
        drafts = not drafting.proposes or (caches.exchange is not None and chained)
        reach = size <= branch.context and (branch.table is None or caches.causal.length <= branch.context)
        return self.suits(model) and drafts and reach and rows * (size + 1) <= MOST

    def rounds(
        self,
        lengths: Int[Tensor, " B"],
        drafting: Drafting,
        caches: Caches,
        *,
        warp: Warp,
        over: object = None,
        template: bool = False,
    ) -> GraphRounds | None:
        """Whole rounds over what `caches` hold at the first of them; None where they do not fit, or recording failed.

        The target is causal, no token banned, and nothing given behind what is open: there are none for others.

        Engines whose weights stand elsewhere by now, or whose tables were made of others, are let go.
        """
        if over is not None or template or warp.banned or self.failed:
            return None
        if not self.fit(len(lengths), drafting, caches):
            return None
        branch, weight = self.model.causal, self.model.causal.embedding.weight
        length = -(-caches.causal.length // STEP) * STEP
        length = length if branch.table is None else min(length, branch.context)
        shape = Shape(len(lengths), length, drafting, warp, weight.dtype, weight.device)
        read = _read_by(self.model)
        self.idle = [each for each in self.idle if each.reads(read)]
        engine = next((each for each in self.idle if each.shape == shape), None)
        if engine is None:
            engine = Engine(self.model, shape, read)
        else:
            self.idle.remove(engine)
        rounds = GraphRounds(engine, lengths, caches)
        weakref.finalize(rounds, self._back, engine).atexit = False
        return rounds

    def _back(self, engine: Engine) -> None:
        """`engine` is free; of those that are, the last ones used are kept."""
        self.failed = self.failed or engine.failed
        self.idle = [] if self.failed else [*self.idle, engine][-IDLE:]


class GraphRounds:
    """The rounds of one generation; its engine is its own until it ends."""

    def __init__(self, engine: Engine, lengths: Int[Tensor, " B"], caches: Caches) -> None:
        self.engine, self.lengths, self.caches = engine, lengths, cast("Caches | None", caches)
        self.most = self.upto = 0

    @torch.no_grad()
    def __call__(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        read: Int[Tensor, " B"],
        uniforms: Uniforms,
    ) -> Round:
        """One round of the rows that go on."""
        engine, opening = self.engine, False
        if self.caches is not None:
            self.most = int(torch.where(rows, n, 0).max())
            engine.begin(self.lengths, x.shape[1], self.caches, max(self.most, 1))  # drafts from 0 on see slot 0
            self.caches, opening = None, bool(((n == 0) & rows).any())
        engine.give(x, n, rows, read, uniforms(rows, engine.how.uniforms))
        looks, renews, wide = engine.ready(x, n, rows)
        # How far the rows have come is known from above, and looked at only where that asks for a wider graph.
        places = (engine.how.places if wide else engine.how.size) + 1
        if engine.bucket(self.most + places) > self.upto:
            self.most = int(torch.where(rows, n, 0).max())
            self.upto = max(self.upto, engine.bucket(self.most + places))
        engine.run(self.upto, opening, looks, renews, wide)
        self.most += places
        return engine.made(x.shape[1])


class Engine:
    """Buffers of one shape, the round on them, and its graphs, one for each width of attention.

    What a round is given it only reads, and what it writes into the caches is the same each time: it can be run again.
    """

    def __init__(self, model: Any, shape: Shape, read: list[Tensor]) -> None:
        self.model, self.shape, self.read_by, self.warp, self.how = model, shape, read, shape.warp, shape.drafting
        self.capture, self.failed = shape.device.type == "cuda", False
        self.graphs: dict[tuple[int, bool, bool, bool], Any] = {}
        self.pool: Any = None
        rows, length, size = shape.rows, shape.length, self.how.size
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written in either mode
            self.caches: Caches = model.allocate(rows, length)
            self.chain: KVCache | None = model.allocate_drafts(rows, size) if self.how.proposes else None
            self.x, self.lengths, self.beyond = self._new(rows, length + 1), self._new(rows), self._new()
            self.x.fill_(model.mask_id)  # the last place is for what has none
            self.mask, self.at = self.x[0, -1].clone(), torch.arange(length + 1, device=shape.device)
            self.n, self.held, self.rows = self._new(rows), self._new(rows), self._new(rows, dtype=torch.bool)
            self.u = self._new(rows, self.how.uniforms, dtype=torch.float64)
            self.tokens, self.marks = self._new(2, rows, length + 1), self._new(2, rows, length + 1, dtype=torch.bool)
            self.numbers = self._new(8, rows)
            self.copies, self.matched = self._new(rows, self.how.places), self._new(rows)
            # The windows that are held, from where on, which rows draft from theirs, and whose are new.
            width = model.config.diffusion.width if self.how.proposes else 0
            self.states = self._new(rows, size, width, dtype=shape.dtype)
            self.start, self.since = self._new(rows), self._new(rows)
            self.looking, self.renewed = self._new(2, rows, dtype=torch.bool)

    def _new(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.shape.device)

    def reads(self, read: list[Tensor]) -> bool:
        """Whether what it reads is still where these are."""
        return len(read) == len(self.read_by) and all(
            one.data_ptr() == other.data_ptr() for one, other in zip(read, self.read_by, strict=True)
        )

    def bucket(self, slots: int) -> int:
        """How many slots a round attends to where `slots` are wanted."""
        width = NARROWEST
        while width < slots:
            width *= 2
        return min(width, self.shape.length)

    def begin(self, lengths: Int[Tensor, " B"], beyond: int, caches: Caches, upto: int) -> None:
        """A generation of rows that end at `lengths`, of which `caches` hold the slots below `upto`."""
        self.lengths.copy_(lengths)
        self.beyond.fill_(beyond)
        self.since.fill_(-1)
        for own, other in ((self.caches.causal, caches.causal), (self.caches.exchange, caches.exchange)):
            if own is not None and other is not None:
                own.keys[:, :, :, :upto].copy_(other.keys[:, :, :, :upto])
                own.values[:, :, :, :upto].copy_(other.values[:, :, :, :upto])

    def give(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        read: Int[Tensor, " B"],
        u: Float[Tensor, "B d"],
    ) -> None:
        """What the next round starts from."""
        self.x[:, : x.shape[1]].copy_(x)
        for own, given in ((self.n, n), (self.rows, rows), (self.held, read), (self.u, u)):
            own.copy_(given, non_blocking=True)

    def ready(self, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], rows: Bool[Tensor, " B"]) -> tuple[bool, bool, bool]:
        """Looks up what the next round's rows may copy, and where the others' windows start.

        Whether some have drafts to make, whether windows are to be read for that, and whether some copy more than these
        have.
        """
        how, looking = self.how, rows
        if how.lookup:
            copies, matched = lookup(x, n, how.lookup, how.places)
            self.copies.copy_(copies)
            self.matched.copy_(matched)
            looking = rows & (matched == 0)
        far = rows & (self.matched >= how.size)
        if not how.proposes:
            return False, False, bool(how.lookup and far.any())
        self.start.copy_(start_of(new_start(n), n, self.since, how))
        torch.logical_and(looking, torch.minimum(self.start + how.size, self.lengths) > n, out=self.looking)
        torch.logical_and(self.looking, self.start != self.since, out=self.renewed)
        torch.where(self.looking, self.start, self.since, out=self.since)
        looks, renews, wide = torch.stack([self.looking.any(), self.renewed.any(), far.any()]).tolist()
        return looks, renews, wide

    def run(self, upto: int, opening: bool, looks: bool, renews: bool, wide: bool) -> None:
        """One round: its graph where there is one; the first round of a text without a prompt has none."""
        if opening or not self.capture:
            self.round(upto, looks, renews, wide, opening)
            return
        key = upto, looks, renews, wide
        with torch.cuda.device(self.shape.device):
            if key not in self.graphs:
                try:
                    self.graphs[key] = self._record(*key)
                except RuntimeError as error:
                    self.capture, self.failed = False, True
                    self.graphs.clear()
                    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                    warnings.warn(f"a CUDA graph could not be recorded; going on without: {said}", stacklevel=2)
                    self.round(*key)
                    return
            self.graphs[key].replay()

    def _record(self, upto: int, looks: bool, renews: bool, wide: bool) -> Any:
        """A graph of one round."""
        current, stream = torch.cuda.current_stream(), _side(self.shape.device)
        try:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    self.round(upto, looks, renews, wide)
            current.wait_stream(stream)
            self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                self.round(upto, looks, renews, wide)
            return graph
        finally:
            torch.cuda.set_stream(current)  # where recording fails, it may leave its own

    def made(self, length: int) -> Round:
        """What the last round came to, in tensors of its own; rows are `length` long."""
        tokens, marks, numbers = self.tokens[..., :length].clone(), self.marks[..., :length].clone(), self.numbers
        numbers = numbers.clone()
        return Round(tokens[0], marks[0], tokens[1], marks[1], numbers[0], numbers[1], numbers[2:])

    def round(self, upto: int, looks: bool, renews: bool, wide: bool, opening: bool = False) -> None:
        """A round of rows that attend to the slots below `upto`, from what was given to what is made of it.

        With `looks` what is not copied is drafted, and with `renews` new windows are read for that; with `wide` copies
        may be longer than windows. With `opening` rows may have no token yet, and so a draft more. Rows that do not go
        on are read like the others.
        """
        rows, lengths, how, size = self.rows, self.lengths, self.how, self.how.size
        count = min(how.places, self.shape.length) if wide else size if opening else max(size - 1, 0)
        if not how.lookup:
            count = min(count, how.most)
        n = self.n.clamp(max=upto - 1)
        at, column = self.at, n[:, None]
        x = torch.where(at < column, self.x, self.mask)  # what stands, and `[M]` whatever a row holds behind it
        copyable = copies_end(new_start(n), n, lengths, self.matched, how) if how.lookup else n
        copying = (self.matched > 0) & rows & (copyable > n)
        place, end, q = column + at[: count + 1], n, None
        if count and looks:
            end = torch.where(self.looking, drafts_end(self.start, n, lengths, how), n)
            x, q, end = self._draft(x, n, place[:, :count], end, upto, renews, opening)
        end = torch.where(copying, copyable, end)
        if count and how.lookup:
            x, q = self._put(x, q, place[:, :count], copying[:, None] & (place[:, :count] < end[:, None]))

        # Verify in one pass, and read behind the drafts for one token more.
        slots = Slots(place.clamp(max=upto - 1), None, upto)
        log_p = self._log_probs(self.model.read(x, slots, self.caches), "causal")
        place, shown = place[:, :count], torch.where(rows, torch.minimum(end + 1, lengths), n)
        drafted, drafting = x.gather(1, place.clamp(max=x.shape[1] - 1)), place < end[:, None]
        stands, token = self._verify(log_p, q, drafted, drafting, end - n)

        stop = n + stands
        more = stop < shown
        after, behind = stop + more, at >= column
        here = (at == stop[:, None]) & more[:, None]
        tokens = torch.where(behind & (at < stop[:, None]), x, self.x)
        torch.where(here, token[:, None], tokens, out=self.tokens[0])
        torch.where(behind & (at < end[:, None]), x, self.mask, out=self.tokens[1])
        torch.logical_and(behind & (at < after[:, None]), rows[:, None], out=self.marks[0])
        torch.logical_and(here, (stop < end)[:, None], out=self.marks[1])
        one, renewed = rows.long(), self.renewed.long() if renews else torch.zeros_like(n)
        first_open = torch.where(after < lengths, after, self.beyond)
        read = torch.minimum(torch.maximum(self.held, shown), stop + 1)
        made = (
            torch.where(rows, first_open, self.n),
            torch.where(rows, read, self.held),
            one,
            renewed,
            shown - n + renewed * size,
            one * shown + renewed * 2 * torch.minimum(self.start + size, lengths),
            one,
            copying.long(),
        )
        torch.stack(made, out=self.numbers)

    def _draft(
        self,
        x: Int[Tensor, "B T+1"],
        n: Int[Tensor, " B"],
        place: Int[Tensor, "B m"],
        end: Int[Tensor, " B"],
        upto: int,
        renews: bool,
        opening: bool,
    ) -> tuple[Int[Tensor, "B T+1"], Float[Tensor, "B m V"] | None, Int[Tensor, " B"]]:
        """`x` with drafts at those of `place` before their end, what they were drawn from (None: greedy), their end."""
        model, how, size = self.model, self.how, self.how.size
        assert self.caches.exchange is not None and self.chain is not None
        start = torch.minimum(self.start, n)  # n is not where a row has ended
        count = min(size if opening else size - 1, how.most)
        window, first = start[:, None] + self.at[:size], (n - start).clamp(max=size - 1)
        if renews:
            until = Slots(start[:, None], None, upto)
            canvas = x.gather(1, window.clamp(max=x.shape[1] - 1))
            states = model.encode_over(canvas, Slots(window, None, upto), until, self.caches.exchange).states
            self.states.copy_(torch.where(self.renewed[:, None, None], states, self.states))
        seen = Canvas(self.states, window, None)
        token, before = model.before(x, n[:, None]), None
        tokens, drawn_from, largest = [], [], []
        alike = not opening and (how.renew >= size or (renews and len(n) == 1))  # windows start at the last token
        furthest = 1 if alike else max(1, size - how.renew)
        for j in range(count):
            if alike:
                slots = Slots(self.at[j + bool(j) : j + 2], j + bool(j), j + 2)
            else:
                opened = self.at[: min(size, furthest + 1)].expand(len(n), -1)
                slots = Slots((first + j).clamp(max=size - 1)[:, None] if j else opened, None, size)
            # The first step reads what stands before the first draft, too.
            states = model.draft_step(seen, x, slots, self.chain, before).draft
            states = states if j else at_place(states, first)[:, None]
            log_q = self._log_probs(States(None, states, None, chained=True), "draft")[:, 0]
            if how.least:
                largest.append(log_q.amax(-1))
            if self._greedy:
                drawn = log_q.argmax(-1)
            else:
                drawn_from.append(self.warp(log_q))
                drawn = inverse_cdf(drawn_from[-1], self.u[:, j])
            before = drawn[:, None], token
            token = before[0]
            tokens.append(drawn)
        drafted = place[:, :count]
        drafting = drafted < end[:, None]
        if how.least:
            chance = (torch.stack(largest, 1).double() * drafting).cumsum(1).exp()
            good = (chance >= how.least).long().cumprod(1).sum(1)
            end = torch.where(good < count, torch.minimum(end, n + good.clamp(min=1)), end)
            drafting = drafted < end[:, None]
        x = x.scatter(1, torch.where(drafting, drafted, x.shape[1] - 1), torch.stack(tokens, 1))
        if self._greedy:
            return x, None, end
        q = torch.stack(drawn_from, 1) * drafting[..., None]
        return x, pad(q, (0, 0, 0, place.shape[1] - count)), end  # there may be room for more copies

    def _put(
        self,
        x: Int[Tensor, "B T+1"],
        q: Float[Tensor, "B m V"] | None,
        place: Int[Tensor, "B m"],
        copying: Bool[Tensor, "B m"],
    ) -> tuple[Int[Tensor, "B T+1"], Float[Tensor, "B m V"] | None]:
        """`x`, and what its drafts are drawn from, with copies at the places that are `copying`."""
        copies, vocabulary = self.copies[:, : place.shape[1]], self.model.vocab_size
        x = x.scatter(1, torch.where(copying, place, x.shape[1] - 1), copies)
        if self._greedy:
            return x, None
        sure = torch.zeros(*copies.shape, vocabulary, dtype=torch.float64, device=x.device)
        sure.scatter_(-1, copies.clamp(max=vocabulary - 1)[..., None], copying[..., None].double())
        return x, sure if q is None else torch.where(copying[..., None], sure, q)

    def _verify(
        self,
        log_p: Float[Tensor, "B m+1 V"],
        q: Float[Tensor, "B m V"] | None,
        drafted: Int[Tensor, "B m"],
        drafting: Bool[Tensor, "B m"],
        count: Int[Tensor, " B"],
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """How many of a row's first `count` places stand, and the token behind them."""
        if self._greedy:
            best = arg_max(log_p)
            stands = ((drafted == best[:, :-1]) & drafting).long().cumprod(1).sum(1)
            return stands, best.gather(1, stands[:, None])[:, 0]
        p, size = self.warp(log_p), self.how.size
        if q is None:
            return torch.zeros_like(count), inverse_cdf(p[:, 0], self.u[:, -1])
        drafted = drafted.clamp(max=self.model.vocab_size - 1)
        stands, share = verify(p, q, drafted, drafting, count, self.u[:, size : size + q.shape[1]])
        q_stop = at_place(q, stands) * (stands < count)[:, None]
        return stands, inverse_cdf(residual(share[:, None] * at_place(p, stands), q_stop), self.u[:, -1])

    def _log_probs(self, states: States, head: str) -> Float[Tensor, "B n V"]:
        """A head's log-probabilities at all of the states, `states` having those of that head."""
        made = self.model.projection(states, head)
        log_p = head_log_probs(made.states.flatten(0, 1), made.tokens, made.bias)
        return over_all(log_p, made.small, self.model.vocab_size).view(*made.states.shape[:2], -1)

    @property
    def _greedy(self) -> bool:
        return self.warp.temperature == 0


@functools.cache
def _side(device: torch.device) -> Any:
    """The stream on which graphs are recorded: one for all, since libraries hold memory for each."""
    return torch.cuda.Stream(device)


@torch.no_grad()
def _read_by(model: Any) -> list[Tensor]:
    """All that a graph of the model reads by its address: its weights, and the tables that are made of them and kept.

    Weights may change where they are; a table is then made anew, elsewhere as long as someone holds the old one.
    """
    held = [each.detach() for each in (*model.parameters(), *model.buffers())]
    held += [each.weight for each in model.modules() if isinstance(each, TiedEmbedding)]
    if getattr(model, "draft_tokens", None) is not None:
        held.append(model.small_table())
    return held
