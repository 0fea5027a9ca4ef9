"""Whole rounds of a causal target as one CUDA graph: a window, its drafts, their verification, and the token behind.

On a GPU the time of a round is that of launching its hundreds of kernels, one after the other. Here they are recorded
once, on buffers that stay where they are, and launched together ever after. What is recorded is `FixedRound.round`.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import Caches
from caddf.categorical import Warp
from caddf.decoding.lookup import lookup
from caddf.decoding.windows import new_start, start_of
from caddf.fixed_round import FixedRound, Shape
from caddf.interface import Drafting, Round, Uniforms
from caddf.models.causal import CausalBranch
from caddf.models.chain import DraftChain
from caddf.models.layers import TiedEmbedding

MOST = 256
"""Places of all rows of a round, each of which has probabilities of all tokens; where rows copy they may be more."""
NARROWEST, STEP = 128, 256
"""Slots that the narrowest graph attends to (others: twice as many, and so on), and of which caches hold a multiple."""
IDLE = 4
"""Engines that wait for another generation like theirs: each holds caches and graphs."""
WARM = 3
"""Rounds before one is recorded, in which libraries choose their kernels and tables are made."""


class Graphs:
    """A model's rounds (`caddf.interface.Incremental.rounds`), whose engines go from one generation to the next.

    Where there is no GPU the same rounds run step by step. A copied model has no graphs: they read the first's weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.idle, self.failed = cast(Any, model), list[Engine](), False
        self._taking = threading.RLock()  # of one thread more than once: what ends a generation may run within

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
        engine = self._take(shape, read) or Engine(self.model, shape, read)
        rounds = GraphRounds(engine, lengths, caches)
        weakref.finalize(rounds, self._back, engine).atexit = False
        return rounds

    def _take(self, shape: Shape, read: Any) -> Engine | None:
        """An idle engine of this shape, no longer idle; None where there is none."""
        with self._taking:
            current = [each for each in self.idle if each.reads(read)]
            engine = next((each for each in current if each.shape == shape), None)
            self.idle = [each for each in current if each is not engine]
            return engine

    def _back(self, engine: Engine) -> None:
        """`engine` is free; of those that are, the last ones used are kept."""
        with self._taking:
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


class Engine(FixedRound):
    """A round on its buffers, and its graphs, one for each width of attention."""

    def __init__(self, model: Any, shape: Shape, read: list[Tensor]) -> None:
        super().__init__(model, shape)
        self.read_by, self.failed, self.capture = read, False, shape.device.type == "cuda"
        self.graphs: dict[tuple[int, bool, bool, bool], Any] = {}
        self.pool: Any = None

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
