"""The dual branch's modules over caches, as decoding asks for them (`caddf.interface.Incremental`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, KVCache, Slots
from caddf.categorical import Warp
from caddf.errors import InputError
from caddf.interface import Block, Drafting, Infill, Pattern, Rounds
from caddf.models.causal import CausalBranch, tokens_before
from caddf.models.chain import DraftChain
from caddf.models.config import ModelConfig
from caddf.models.diffusion import DiffusionBranch
from caddf.models.fusion import CrossFusion, Mixer
from caddf.models.layers import KeysValues, Rotation, among, nearness
from caddf.models.states import Canvas, States

if TYPE_CHECKING:
    from caddf.graphs import Graphs
    from caddf.native import Native


class OverCaches(nn.Module):
    """Reading left to right piece by piece, windows of drafts, and blocks; the modules are those of `DualBranch`."""

    config: ModelConfig
    mask_id: int
    causal: CausalBranch | None
    diffusion: DiffusionBranch
    chain: DraftChain | None
    fusion: CrossFusion | Mixer | None
    native: Native | None
    graphs: Graphs | None

    def _cross(
        self, h_trans: Float[Tensor, "B n D"], positions: Int[Tensor, "..."], turn: Rotation, seen: Canvas
    ) -> Float[Tensor, "B n D"]:
        """Eq. 10 at the slots `positions`, turned by `turn`, over canvas states (fusion `late` and `layers`)."""
        assert self.causal is not None and isinstance(self.fusion, CrossFusion)
        keys_values = seen.keys_values or self._read_by_fusion(seen, self.causal.rotary(seen.positions))
        visible = seen.visible
        if self.config.diffusion.alibi:
            scores = nearness(positions, seen.positions, self.fusion.cross.heads, self.causal.norm.weight)
            visible = among(scores, visible)
        own = seen.at(positions) if self.config.own_state else None
        return self.fusion(h_trans, turn, keys_values, visible, own)

    def _read_by_fusion(self, seen: Canvas, turn: Rotation) -> KeysValues:
        assert isinstance(self.fusion, CrossFusion)
        return self.fusion.cross.keys_values(seen.states, turn)

    def incremental(self, pattern: Pattern) -> bool:
        """With fusion `late` the causal branch's caches hold for any canvas; in blocks, with mutual exchange."""
        return self.config.fusion == "late" and (self.diffusion.mutual or isinstance(pattern, Infill))

    def allocate(self, rows: int, length: int) -> Caches:
        """Empty caches for `rows` rows and the slots 0 to `length - 1`."""
        assert self.causal is not None
        if self.native is not None:
            self.native.refresh()
        own = self.causal.allocate(rows, length)
        if not self.diffusion.mutual:
            return Caches(own, None)
        config, like = self.config.diffusion, self.diffusion.embedding.weight
        turns = self.diffusion.rotary(torch.arange(length + self.config.context, device=like.device))
        size = config.width // config.heads
        return Caches(own, KVCache.allocate(config.layers, rows, config.heads, length, size, like, turns))

    def read(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots,
        caches: Caches,
    ) -> States:
        """States of the slots `positions`, whose keys and values go into `caches`."""
        slots = positions if isinstance(positions, Slots) else Slots.of(positions)
        assert self.causal is not None
        bos_id = self.config.bos_id
        inputs, earlier = tokens_before(tokens, slots, bos_id), self.causal.earlier(tokens, slots, bos_id)
        return States(None, None, self._read(inputs, slots, caches, earlier))

    def fuse(
        self, states: States, positions: Int[Tensor, "B n"] | Int[Tensor, " n"], caches: Caches, seen: Canvas
    ) -> States:
        """The states of slots that have been read, fused with `seen`."""
        assert states.causal is not None
        seen = self.prepare(seen, caches)
        fused = None if self.native is None else self.native.fuse(states.causal, positions, caches, seen)
        if fused is None:
            fused = self._cross(states.causal, positions, caches.causal.turn(Slots.of(positions)), seen)
        return replace(states, fused=fused)

    def prepare(self, seen: Canvas, caches: Caches) -> Canvas:
        """What is seen, with what the fusion reads of it made once for all slots."""
        if seen.keys_values is not None:
            return seen
        if self.native is not None and (made := self.native.prepare(seen, caches)) is not None:
            return replace(seen, keys_values=made)
        keys, values = self._read_by_fusion(seen, caches.causal.turn(Slots.of(seen.positions)))
        return replace(seen, keys_values=(keys.contiguous(), values.contiguous()))

    def beside(self, one: Canvas, two: Canvas, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Canvas:
        """Two blocks' canvases, prepared, as one; outputs at `positions` see their own block's.

        These are consecutive, of one block or of two that follow each other; what a row has of another is not seen.
        """
        assert one.keys_values is not None and two.keys_values is not None
        rows, size, _ = one.states.shape
        first, at = positions.expand(rows, -1), [each.positions.expand(rows, -1) for each in (one, two)]
        swapped = (first[:, 0] < at[0][:, 0]) | (first[:, 0] >= at[0][:, 0] + size)

        def join(one: Tensor, two: Tensor, dim: int) -> Tensor:
            other = swapped.view(-1, *[1] * (one.ndim - 1))
            return torch.cat([torch.where(other, two, one), torch.where(other, one, two)], dim)

        joined = join(at[0], at[1], 1)
        block = (first - joined[:, :1]) // size
        visible = torch.arange(2 * size, device=first.device) // size == block[..., None]
        keys, values = (join(a, b, 2) for a, b in zip(one.keys_values, two.keys_values, strict=True))
        return Canvas(join(one.states, two.states, 1), joined, visible[:, None], (keys, values))

    def encode(
        self,
        canvas: Int[Tensor, "B n"],
        start: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        pattern: Pattern,
        caches: Caches,
        proposing: bool = False,
    ) -> Canvas:
        """h_cad of one window per row over the cached causal states: up to the block's start, or the first mask."""
        window = torch.arange(canvas.shape[1], device=canvas.device)
        if isinstance(pattern, Block) and pattern.size > self.config.context:
            raise InputError(f"block_size is {pattern.size}; it must be at most the context, {self.config.context}")
        positions = window + start[:, None] if len(start) > 1 else window + start
        slots = Slots.of(positions)
        visible, until, whole = None, start, None
        if isinstance(pattern, Infill):
            visible, whole = (positions < lengths[:, None])[:, None, None, :], lengths
            until = torch.where(canvas == self.mask_id, positions, canvas.shape[1]).amin(-1)
        if self.native is not None:
            shown = until.clamp(max=caches.causal.length - 1)
            if (states := self.native.window(canvas, positions, shown, caches, proposing, whole)) is not None:
                return Canvas(states, positions, visible)
        if caches.exchange is None:
            return Canvas(self.diffusion(canvas, positions, visible), positions, visible)
        until = until.clamp(max=caches.exchange.length - 1)
        alike = bool((until == until[0]).all())
        last = Slots.of(until[:1] if alike else until[:, None])
        return self.encode_over(canvas, slots, last, caches.exchange, visible)

    def encode_over(
        self,
        canvas: Int[Tensor, "B n"],
        slots: Slots,
        last: Slots,
        exchange: KVCache,
        visible: Bool[Tensor, "..."] | None = None,
    ) -> Canvas:
        """h_cad of a window at `slots`, which sees of the causal states what the slot `last` sees."""
        since = last.since(self.config.context)
        states_at = torch.arange(since, last.upto, device=canvas.device)
        exchanged = self.diffusion.seen(slots.positions, states_at, last.visible(self.config.context), sides=False)
        keys_values = [exchange.read(layer, last.upto, since) for layer in range(len(self.diffusion.layers))]
        states = self.diffusion(canvas, exchange.turn(slots), visible, keys_values, exchanged)
        return Canvas(states, slots.positions, visible)

    def window_of(self, states: Float[Tensor, "B k d"], start: Int[Tensor, " B"]) -> Canvas:
        """What is seen of windows from `start` on whose states were read by `read_blocks`."""
        return Canvas(states, start[:, None] + torch.arange(states.shape[1], device=start.device), None)

    def choose(self, new: Bool[Tensor, " B"], one: Canvas, other: Canvas) -> Canvas:
        """What is seen of windows: of the `new` rows' in `one`, of the rest in `other`."""
        rows = (len(new), -1)
        positions = torch.where(new[:, None], one.positions.expand(rows), other.positions.expand(rows))
        return Canvas(torch.where(new[:, None, None], one.states, other.states), positions, None)

    def draft(self, seen: Canvas, tokens: Int[Tensor, "B T"]) -> States:
        """Draft states of a window, chained where the model has a chain and the window is a block."""
        if self.chain is None or seen.visible is not None:
            return States(None, seen.states, None)
        return States(None, self.chain(seen.states, self._heard(tokens, seen.positions)), None, chained=True)

    def allocate_drafts(self, rows: int, size: int) -> KVCache | None:
        """An empty cache for the drafts of a window of `size`; None where they do not chain."""
        return None if self.chain is None else self.chain.allocate(rows, size)

    def draft_step(
        self,
        seen: Canvas,
        tokens: Int[Tensor, "B T"],
        places: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots,
        cache: KVCache,
        before: tuple[Int[Tensor, "B n"], Int[Tensor, "B n"]] | None = None,
    ) -> States:
        """Chained draft states at `places` of a window alone; `cache` holds what the chain read of those before.

        `before`, where it is known already: the tokens before the places, and those before them.
        """
        assert self.chain is not None
        slots = places if isinstance(places, Slots) else Slots.of(places)
        if slots.first is None:
            h_cad = seen.states.gather(1, slots.positions[..., None].expand(-1, -1, seen.states.shape[-1]))
            positions = seen.positions.expand(len(tokens), -1).gather(1, slots.positions)
        else:
            h_cad, positions = seen.states[:, slots.where], seen.positions[..., slots.where]
        heard = self._heard(tokens, positions) if before is None else self._hear(*before)
        return States(None, self.chain.step(h_cad, heard, slots, cache), None, chained=True)

    def draw_drafts(
        self,
        seen: Canvas,
        tokens: Int[Tensor, "B T"],
        start: Int[Tensor, " B"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        cache: KVCache,
        *,
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """All steps of the chain at one go, where there are kernels for it."""
        if self.native is None:
            return None
        return self.native.drafts(seen.states, tokens, start, n, u, cache, warp=warp, least=least, given=given)

    def rounds(
        self,
        lengths: Int[Tensor, " B"],
        drafting: Drafting,
        caches: Caches,
        *,
        warp: Warp,
        over: Block | Canvas | None = None,
        template: bool = False,
    ) -> Rounds | None:
        """Whole rounds at one go, where there are kernels or graphs for it."""
        whole = self.native or self.graphs
        if whole is None:
            return None
        return whole.rounds(lengths, drafting, caches, warp=warp, over=over, template=template)

    def before(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots, by: int = 1
    ) -> Int[Tensor, "B n"]:
        """The token `by` places before each of `positions` (BOS before the first): what slots at them read."""
        if isinstance(positions, Slots):
            slots = positions
        else:
            slots = Slots.of(positions) if positions.ndim == 1 else Slots(positions, None, 0)
        return tokens_before(tokens, slots, self.config.bos_id, by)

    def _heard(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots
    ) -> Float[Tensor, "B n d"]:
        """What the chain hears at `positions`."""
        assert self.chain is not None
        before = self.before(tokens, positions)
        return self._hear(before, before if self.chain.shifted is None else self.before(tokens, positions, 2))

    def _hear(self, before: Int[Tensor, "B n"], earlier: Int[Tensor, "B n"]) -> Float[Tensor, "B n d"]:
        """What the chain hears of the token before a place, and where it shifts tokens of the one before that."""
        assert self.chain is not None
        heard = self.diffusion.embedding(before)
        return heard if self.chain.shifted is None else heard + self.chain.shifted(earlier)

    def _read(
        self, inputs: Int[Tensor, "B n"], slots: Slots, caches: Caches, earlier: Int[Tensor, "B n"] | None = None
    ) -> Float[Tensor, "B n D"]:
        """h_trans of `slots`; what both branches keep of them is written into `caches`."""
        assert self.causal is not None
        if self.native is not None and (states := self.native.causal(inputs, slots, caches, earlier)) is not None:
            return states
        h_trans = self.causal(inputs, slots, caches.causal, earlier=earlier)
        if caches.exchange is not None:
            for layer, keys_values in enumerate(self.diffusion.exchange(h_trans, caches.exchange.turn(slots))):
                caches.exchange.write(layer, slots.where, *keys_values)
        return h_trans

    # Block diffusion over the diffusion branch's own cache: blocks before are clean, and their keys and values stay.

    def allocate_blocks(self, rows: int, length: int, chained: bool = False) -> KVCache | None:
        """An empty cache for the slots 0 to `length - 1`; None where drafts read more than their branch's blocks.

        With `chained` the caller makes the chain's steps over them.
        """
        if self.diffusion.mutual or (self.chain is not None and not chained):
            return None
        config = self.config.diffusion
        size, like = config.width // config.heads, self.diffusion.embedding.weight
        return KVCache.allocate(config.layers, rows, config.heads, length, size, like)

    def read_blocks(
        self, canvas: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], pattern: Block, cache: KVCache
    ) -> States:
        """Draft states at `positions` of `canvas`, each seeing its own block and, in `cache`, those before it.

        What is read is written into `cache`: a block is read while it has masks in it, and once more when it has none
        (in the pass that first reads the next block), before later blocks may see it.
        """
        x, turn = self.diffusion.embedding(canvas), self.diffusion.rotary(positions)
        upto = int(positions.max()) + 1
        slots, at = torch.arange(upto, device=canvas.device), positions[:, None, :, None]
        visible = (pattern.index(slots) <= pattern.index(at)) & (slots > at - self.config.context)
        seen = self.diffusion.seen(positions, slots, visible)
        for i, layer in enumerate(self.diffusion.layers):
            x = layer(x, turn, seen, kept=partial(cache.extended, i, positions, upto, 0))
        return States(None, self.diffusion.norm(x), None)
