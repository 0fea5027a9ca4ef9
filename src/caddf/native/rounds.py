"""Whole rounds by the kernels: a window, its drafts, their verification, and the token behind them.

Where models are small, a round's time is that of the steps between its passes: here it is one call. It writes what
`decoding.speculative` and `decoding.autoregressive` write from the same uniforms by the same passes.
"""

from __future__ import annotations

import ctypes
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from caddf.caches import Caches
from caddf.categorical import Warp
from caddf.interface import Block, Drafting, Round, Uniforms
from caddf.models.states import Canvas
from caddf.native.build import library
from caddf.native.passes import FusionPass, NativeHead, StackPass, threads_for
from caddf.native.structures import CCache, CCanvas, CDraft, CFusing, CPass, CRound, address, cache_of, warp_of

if TYPE_CHECKING:
    from caddf.native.model import Native


MOST = 96
"""Places of all rows of a round, each of which keeps room for what the heads say of all tokens; copies aside."""
AHEAD, MOST_AHEAD = 0.02, 16
"""For how many seconds a single row goes ahead, and for how many rounds at most."""


class Rounds:
    """Rounds of rows that end at `lengths`, over caches that hold all slots before a row's first open position.

    The target is causal, or fused with each block's all-masked start, or with one canvas that has been prepared.
    Buffers are made once, and used by every round, and a window's states by those that draft from it.

    A single row goes some rounds ahead, as long as no slot is left for others to read: what is done between rounds is
    done much faster for several together, since the weights of a round drive it out of the processor's caches.
    """

    def __init__(
        self,
        native: Native,
        lengths: Int[Tensor, " B"],
        drafting: Drafting,
        caches: Caches,
        warp: Warp,
        over: Block | Canvas | None = None,
    ) -> None:
        size, self.draws = drafting.size, drafting.uniforms
        places = (size if over is not None else drafting.places) + 1  # over a canvas copies are a window's
        rows, self.size, self.caches = len(lengths), size, caches
        model, branch, self.stacks, self.kept = native.model, native.branch, native.stacks.copy(), list[Any]()
        self.lengths, self.mask_id = self._keep(lengths.contiguous()), model.mask_id
        causal, head, table = self.stacks["causal"], cast(NativeHead, native.heads["causal"]), branch.table
        shifted = None if branch.shifted is None else self._keep(branch.shifted.weight)
        read, *_ = self._keep(head.tokens())
        turns = (caches.causal.turns if table is None else None) or (None, None)
        exchange_turns = (caches.exchange.turns if caches.exchange is not None else None) or (None, None)
        self.passes = CPass(
            rows=rows, n=places, x=self._new(rows, places, causal.width),
            positions=self._new(rows, places, dtype=torch.long), cos=address(turns[0]), sin=address(turns[1]),
            own=cache_of(caches.causal), exchange=cache_of(caches.exchange), exchange_cos=address(exchange_turns[0]),
            exchange_sin=address(exchange_turns[1]), threads=threads_for(causal.weights.bytes, rows * places),
            first=self._new(rows + 1, dtype=torch.long),
        )  # fmt: skip
        self.look, self.draft = CPass(), CDraft()
        if drafting.proposes:
            self._draft(native, rows, warp, drafting.least)
            self.draft.q = self._new(rows, size, model.vocab_size, dtype=torch.double)
            for name, shape in (("tokens", 2), ("given", 2), ("drafts", 1)):
                setattr(self.draft, name, self._new(*(rows, size)[:shape], dtype=torch.long))
        banned = self._keep(torch.arange(len(head))[list(warp.banned)])
        if isinstance(over, Block):
            self._see_blocks(native, rows, over)
        elif over is not None:
            self._see(native, rows, over)
        self.given = CRound(
            rows=rows, size=size, mask=model.mask_id, bos=model.config.bos_id, lookup=drafting.lookup,
            copies=drafting.copies, places=drafting.places, most=drafting.most, renew=drafting.renew,
            since=self._keep(torch.full((rows,), -1)).data_ptr(), lengths=self.lengths.data_ptr(),
            causal=ctypes.addressof(causal.stack), head=read, warp=warp_of(warp, banned),
            head_threads=threads_for((4 >> read.type) * read.out * causal.width, rows * places),
            embedding=address(branch.embedding.weight), shifted=address(shifted),
            table=None if table is None else address(table.weight),
            logits=self._new(rows, places, len(head)), look=ctypes.addressof(self.look),
            draft=ctypes.addressof(self.draft), canvas=None if over is None else ctypes.addressof(self.canvas),
        )  # fmt: skip
        setattr(self.given, "pass", ctypes.addressof(self.passes))
        for part, name in (("window", "look"), ("chain", "chain")) if drafting.proposes else ():
            setattr(self.given, part, ctypes.addressof(self.stacks[name].stack))
        self.run = library().caddf_round
        self.alone = rows == 1
        self.ahead: deque[Round] = deque()
        self.seconds = AHEAD  # of a round

    @staticmethod
    def fit(native: Native, rows: int, drafting: Drafting, caches: Caches, over: Block | Canvas | None = None) -> bool:
        """Whether the kernels can do such rounds."""
        if over is not None and (native.fusion is None or caches.causal.turns is None):
            return False
        if isinstance(over, Block) and (
            caches.exchange is None or over.size > native.context or rows * over.size > MOST
        ):
            return False
        size, table = drafting.size, native.branch.table
        if drafting.proposes and (caches.exchange is None or not {"look", "chain"} <= native.stacks.keys()):
            return False
        reach = size <= native.context and (table is None or caches.causal.length <= native.context)
        return "causal" in native.stacks and reach and rows * (size + 1) <= MOST

    def _draft(self, native: Native, rows: int, warp: Warp, least: float) -> None:
        """The window's pass and the chain's drafts."""
        assert native.diffusion is not None
        model, size = native.model, self.size
        cache = model.allocate_drafts(rows, size)
        self.look = self._window(native, self.stacks["look"], rows, size)
        head, *_ = self._keep(cast(NativeHead, native.heads["chain"]).tokens())
        heard, warped = self._keep(native.heard()), warp_of(warp, self._keep(native.banned(warp)))
        self.draft = native.draft_settings(head, heard, rows, size, self._keep(cache), warped, least)
        self.draft.states = self._new(rows, size, self.stacks["look"].width)
        self.draft.u = self._new(rows, size, dtype=torch.double)
        for name, shape in (("before", 2), ("earlier", 2), ("first", 1), ("heard", 1)):
            setattr(self.draft, name, self._new(*(rows, size)[:shape], dtype=torch.long))

    def _fuse(self, native: Native, rows: int) -> FusionPass:
        """The fusion over a round's places; its canvas is for the caller."""
        fusion, turns = native.fusion, self.caches.causal.turns
        assert fusion is not None and turns is not None
        slots = {name: self._new(rows, self.size + 1, dtype=torch.long) for name in ("slot", "from", "to")}
        self.fusing = CFusing(
            rows=rows, x=self.passes.x, positions=self.passes.positions, cos=address(turns[0]), sin=address(turns[1]),
            **slots,
        )  # fmt: skip
        self.canvas = CCanvas(ctypes.addressof(fusion.fusion), ctypes.addressof(self.fusing))
        return cast(FusionPass, self._keep(fusion))

    def _see(self, native: Native, rows: int, canvas: Canvas) -> None:
        """One canvas, which has been prepared."""
        assert canvas.keys_values is not None
        self._fuse(native, rows)
        (keys, values), states = self._keep(canvas.keys_values), self._keep(canvas.states.contiguous())
        slots = keys.shape[2]
        seen = torch.full((rows,), slots)
        if canvas.visible is not None:
            seen = canvas.visible.expand(rows, 1, 1, slots).sum(-1).view(rows).contiguous()
        self.canvas.seen, self.fusing.own = self._keep(seen).data_ptr(), states.data_ptr()
        self.fusing.canvas = CCache(keys.data_ptr(), values.data_ptr(), slots)

    def _see_blocks(self, native: Native, rows: int, block: Block) -> None:
        """Room for two blocks of each row, and the pass that reads them."""
        assert native.diffusion is not None
        fusion, embedding, slots = self._fuse(native, rows), native.diffusion.embedding.weight, 2 * block.size
        shape, stack = (rows, fusion.heads, slots, fusion.width // fusion.heads), self.stacks["window"]
        self.fusing.canvas = CCache(self._new(*shape), self._new(*shape), slots)
        self.fusing.own = self._new(rows, slots, stack.width)
        self.block = self._window(native, stack, rows, block.size)
        self.canvas.block, self.canvas.stack = block.size, ctypes.addressof(stack.stack)
        setattr(self.canvas, "pass", ctypes.addressof(self.block))
        self.canvas.mask = self._keep(embedding[self.mask_id].clone()).data_ptr()
        self.canvas.start = self._keep(torch.full((2, rows), -1)).data_ptr()
        self.canvas.into = self._new(rows, dtype=torch.long)

    def _window(self, native: Native, window: StackPass, rows: int, size: int) -> CPass:
        """A pass over `size` positions of each row's canvas."""
        diffusion, exchange = native.diffusion, self.caches.exchange
        assert diffusion is not None and exchange is not None and exchange.turns is not None
        config, turns = diffusion.config, exchange.turns
        own = (config.layers, rows, config.heads, size, config.width // config.heads)
        return CPass(
            rows=rows, n=size, x=self._new(rows, size, window.width), positions=self._new(rows, size, dtype=torch.long),
            cos=address(turns[0]), sin=address(turns[1]), own=CCache(self._new(*own), self._new(*own), size),
            source=cache_of(exchange), until=self._new(rows, dtype=torch.long), source_context=native.context,
            threads=threads_for(window.weights.bytes, rows * size), first=self._new(rows + 1, dtype=torch.long),
        )  # fmt: skip

    def _keep(self, held: Any) -> Any:
        """`held` lives as long as these rounds."""
        self.kept.append(held)
        return held

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        """The address of a new array of zeros."""
        return self._keep(torch.zeros(shape, dtype=dtype)).data_ptr()

    def __call__(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        read: Int[Tensor, " B"],
        uniforms: Uniforms,
    ) -> Round:
        """One round of the rows that go on."""
        if not self.ahead:
            rounds = min(int(AHEAD / self.seconds), MOST_AHEAD) if self.alone else 1
            self.ahead.extend(self._go(x, n, rows, read, uniforms, max(rounds, 1)))
        return self.ahead.popleft()

    def _go(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        read: Int[Tensor, " B"],
        uniforms: Uniforms,
        rounds: int,
    ) -> list[Round]:
        """So many rounds, or as many as it takes to the end, or to slots that are left for others to read."""
        (count, length), given, draws = x.shape, self.given, self.draws
        x, n, rows, read = (tensor.contiguous() for tensor in (x, n, rows, read))
        tokens = x.new_empty(2 * rounds, count, length).unbind()
        marks = rows.new_empty(2 * rounds, count, length).unbind()
        numbers = n.new_empty(rounds, 8, count).unbind()
        made = list(zip(tokens[::2], marks[::2], tokens[1::2], marks[1::2], numbers, strict=True))
        given.length, given.before, given.n, given.active = length, x.data_ptr(), n.data_ptr(), rows.data_ptr()
        given.held, of_rows = read.data_ptr(), count * n.element_size()
        begun = perf_counter()
        # Rounds may leave what is given for others to read, who draw next; where nothing is, nobody draws in between.
        several = rounds if bool((x[0, int(n[0]) : int(self.lengths[0])] == self.mask_id).all()) else 1
        for done, (text, fresh, drafts, corrected, number) in enumerate(made, 1):
            if not (drawn := (done - 1) % several):
                u = uniforms(rows, draws * several).contiguous()
            given.u = u.data_ptr() + drawn * draws * u.element_size()
            given.x, given.fresh = text.data_ptr(), fresh.data_ptr()
            given.drafts, given.corrected = drafts.data_ptr(), corrected.data_ptr()
            given.next = number.data_ptr()
            given.read, given.work = given.next + of_rows, given.next + 2 * of_rows
            if self.run(ctypes.addressof(given)):
                raise MemoryError("the kernels' working memory could not be had")
            following, held = (ctypes.c_int64.from_address(each).value for each in (given.next, given.read))
            if done == rounds or following >= length or held < following:
                break
            given.before, given.n, given.held = given.x, given.next, given.read
        self.seconds = (perf_counter() - begun) / done
        return [
            Round(text, fresh, drafts, corrected, number[0], number[1], number[2:])
            for text, fresh, drafts, corrected, number in made[:done]
        ]
