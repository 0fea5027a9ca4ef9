"""The dual-branch model: causal branch, diffusion branch and fusion behind one forward signature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, KVCache
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Head, Infill, Pattern
from caddf.models.causal import CausalBranch
from caddf.models.config import ModelConfig
from caddf.models.diffusion import DiffusionBranch, DraftChain
from caddf.models.fusion import CrossFusion, Mixer
from caddf.models.layers import head_log_probs, head_nll


@dataclass(frozen=True)
class States:
    """What a forward pass leaves to be read: one state per position and head, None for a head that does not exist."""

    fused: Float[Tensor, "B L D"] | None
    draft: Float[Tensor, "B L d"] | None
    causal: Float[Tensor, "B L D"] | None


@dataclass(frozen=True)
class Canvas:
    """Canvas states as the fusion reads them: m states at `positions`, and what each output sees of them."""

    states: Float[Tensor, "B m d"]
    positions: Int[Tensor, "..."]
    visible: Bool[Tensor, "..."] | None


def _whole(pattern: Block, length: int) -> int:
    """`length`, brought up to the end of its last block."""
    return pattern.offset + -(-(length - pattern.offset) // pattern.size) * pattern.size


class DualBranch(nn.Module):
    """CAD-DF: `forward(prefix, canvas, pattern)` (eqs. 5-7, 10-12), a `caddf.interface.LanguageModel`.

    Each head is tied to its branch's embedding and is normalised over the V real tokens: `fused` and `causal` share the
    causal branch's, `draft` has the diffusion branch's. Without a causal branch there is the draft head alone, and with
    fusion `none` the fused head is the causal branch's own wherever the prefix is x0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.mask_id = config.vocab_size, config.mask_id
        mutual = config.causal is not None and config.exchange == "mutual"
        source_width = config.causal.width if config.causal is not None and mutual else None
        self.diffusion = DiffusionBranch(config.diffusion, config.rows, source_width)
        self.chain = DraftChain(config.diffusion) if config.draft == "chained" else None
        self.causal: CausalBranch | None = None
        self.fusion: CrossFusion | Mixer | None = None
        if config.causal is not None:
            width = config.diffusion.width
            within = width if config.fusion == "layers" else None
            self.causal = CausalBranch(config.causal, config.rows, config.context, within)
            self.fusion = Mixer(config.causal, width) if config.fusion == "none" else CrossFusion(config.causal, width)
        self.heads: frozenset[Head] = frozenset({"draft"} if self.causal is None else {"draft", "causal", "fused"})
        self.denoiser: Head = "draft" if self.causal is None else "fused"
        self.chained, self.block_size = self.chain is not None, config.block_size

    def forward(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, caches: Caches | None = None
    ) -> tuple[States, Caches | None]:
        """States of all positions; output i sees `prefix[<i]` and what `pattern` shows it of the canvas.

        `caches`, where given, are filled with what the causal branch made of the prefix, for decoding to go on from.
        Raises `InputError` where prefix and canvas differ in shape, or under `AnyOrder` in content.
        """
        if prefix.shape != canvas.shape:
            raise InputError(f"prefix has shape {tuple(prefix.shape)}, canvas {tuple(canvas.shape)}; they must agree")
        if isinstance(pattern, AnyOrder) and prefix is not canvas and not torch.equal(prefix, canvas):
            raise InputError("prefix and canvas differ under AnyOrder; there both are x_t (eq. 5)")
        inputs = self.shift(prefix)
        positions = torch.arange(prefix.shape[1], device=prefix.device)
        h_trans = None
        if self.causal is not None:
            if caches is None:
                h_trans = self.causal(inputs, positions)
            else:
                h_trans = self._read(inputs, positions.expand_as(inputs), caches)
        seen = self._canvas(prefix, canvas, pattern, h_trans)
        draft = self._drafts(seen, inputs, pattern) if isinstance(pattern, Block) else seen.states
        fused = None if h_trans is None else self._fused(h_trans, inputs, positions, seen, pattern)
        return States(fused, draft, h_trans), caches

    def shift(self, prefix: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """The causal branch's inputs: slot i reads token i-1, slot 0 reads BOS."""
        return F.pad(prefix[:, :-1], (1, 0), value=self.config.bos_id)

    def _canvas(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, h_trans: Tensor | None
    ) -> Canvas:
        """h_cad of the canvas as `pattern` arranges it."""
        positions, context = torch.arange(canvas.shape[1], device=canvas.device), self.config.context
        exchange = [] if h_trans is None else self.diffusion.exchange(h_trans, positions)
        if not isinstance(pattern, Block):
            if len(positions) > context:
                raise InputError(
                    f"a row has {len(positions)} tokens; a canvas that is read in both directions ends at the context, "
                    f"{context} (blocks go on)"
                )
            exchanged = None
            if isinstance(pattern, Infill):  # causal states up to the first masked position, which are free of x0 there
                first = torch.where(canvas == self.mask_id, positions, canvas.shape[1]).amin(-1)
                exchanged = positions <= first[:, None, None, None]
            return Canvas(self.diffusion(canvas, positions, None, exchange, exchanged), positions, None)

        # The last block is always whole: what lies beyond the row is masked.
        index = pattern.index(positions)
        whole = torch.arange(_whole(pattern, len(positions)), device=canvas.device)
        noised, own = F.pad(canvas, (0, len(whole) - len(positions)), value=self.mask_id), pattern.index(whole)
        same = own[:, None] == own
        if self.diffusion.mutual:  # the prefix reaches a block through the causal states up to its start
            start = pattern.start(whole)[:, None]
            exchanged = (positions <= start) & (positions > start - context)
            return Canvas(self.diffusion(noised, whole, same, exchange, exchanged), whole, same[: len(positions)])
        # [x0 ; x_t]: clean tokens see clean blocks up to their own, noised ones earlier clean blocks and their own.
        both, at = torch.cat([prefix, noised], 1), torch.cat([positions, whole])
        clean = torch.cat([index[:, None] >= index, index.new_zeros(len(index), len(whole), dtype=torch.bool)], 1)
        visible = torch.cat([clean, torch.cat([own[:, None] > index, same], 1)]) & (at > at[:, None] - context)
        read = visible[len(positions) :][: len(positions)]
        return Canvas(self.diffusion(both, at, visible), at, read)

    def _drafts(self, seen: Canvas, inputs: Int[Tensor, "B L"], pattern: Block) -> Float[Tensor, "B L d"]:
        """Draft states under `Block`: the noised part of the canvas, chained where the model has a chain."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        index = pattern.index(positions)
        offset = seen.states.shape[1] - _whole(pattern, len(positions))
        h_cad = seen.states[:, offset : offset + len(positions)]
        if self.chain is None:
            return h_cad
        visible = (index[:, None] == index) & (positions[:, None] >= positions)
        return self.chain(h_cad, self.diffusion.embedding(inputs), self.diffusion.rotary(positions), visible)

    def _fused(
        self, h_trans: Tensor, inputs: Int[Tensor, "B L"], positions: Tensor, seen: Canvas, pattern: Pattern
    ) -> Float[Tensor, "B L D"]:
        """Fused states of all positions (eq. 10; eq. 7 first, with fusion `layers`)."""
        assert self.causal is not None
        if isinstance(self.fusion, Mixer):
            return self.fusion(h_trans, seen.states) if isinstance(pattern, AnyOrder) else h_trans
        if self.config.fusion == "layers":
            visible = seen.visible
            if visible is not None:  # later blocks read these states: they may hold clean blocks, and no block's canvas
                visible = visible & (torch.arange(visible.shape[1], device=visible.device) < len(positions))
            h_trans = self.causal(inputs, positions, source=(seen.states, self.causal.rotary(seen.positions), visible))
        return self.fuse(h_trans, positions, seen)

    def fuse(
        self, h_trans: Float[Tensor, "B n D"], positions: Int[Tensor, "..."], seen: Canvas
    ) -> Float[Tensor, "B n D"]:
        """Eq. 10 at the slots `positions`, over canvas states (fusion `late` and `layers`)."""
        assert self.causal is not None and isinstance(self.fusion, CrossFusion)
        keys_values = self.fusion.cross.keys_values(seen.states, self.causal.rotary(seen.positions))
        return self.fusion(h_trans, self.causal.rotary(positions), keys_values, seen.visible)

    # Decoding (`caddf.interface.Incremental`): the same modules over caches.

    def incremental(self, pattern: Pattern) -> bool:
        """With fusion `late` the causal branch's caches hold for any canvas; in blocks, with mutual exchange."""
        return self.config.fusion == "late" and (self.diffusion.mutual or isinstance(pattern, Infill))

    def allocate(self, rows: int, length: int) -> Caches:
        """Empty caches for `rows` rows and the slots 0 to `length - 1`."""
        assert self.causal is not None
        like, causal, diffusion = self.causal.embedding.weight, self.causal.config, self.config.diffusion
        own = KVCache.allocate(causal.layers, rows, causal.heads, length, causal.width // causal.heads, like)
        if not self.diffusion.mutual:
            return Caches(own, None)
        size = diffusion.width // diffusion.heads
        return Caches(own, KVCache.allocate(diffusion.layers, rows, diffusion.heads, length, size, like))

    def read(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"], caches: Caches, seen: Canvas | None = None
    ) -> States:
        """States of the slots `positions`, whose keys and values go into `caches`; fused where `seen` is given."""
        h_trans = self._read(self.before(tokens, positions), positions, caches)
        return States(None if seen is None else self.fuse(h_trans, positions, seen), None, h_trans)

    def encode(
        self,
        canvas: Int[Tensor, "B n"],
        start: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        pattern: Pattern,
        caches: Caches,
    ) -> Canvas:
        """h_cad of one window per row over the cached causal states: up to the block's start, or the first mask."""
        positions = start[:, None] + torch.arange(canvas.shape[1], device=canvas.device)
        visible, until = None, start
        if isinstance(pattern, Infill):
            visible = (positions < lengths[:, None])[:, None, None, :]
            until = torch.where(canvas == self.mask_id, positions, canvas.shape[1]).amin(-1)
        exchange, exchanged = [], None
        if caches.exchange is not None:
            upto = min(int(until.max()) + 1, caches.exchange.length)
            exchange = [caches.exchange.read(layer, upto) for layer in range(len(self.diffusion.layers))]
            slots, last = torch.arange(upto, device=canvas.device), until[:, None, None, None]
            exchanged = (slots <= last) & (slots > last - self.config.context)
        return Canvas(self.diffusion(canvas, positions, visible, exchange, exchanged), positions, visible)

    def draft(self, seen: Canvas, tokens: Int[Tensor, "B T"]) -> States:
        """Draft states of a window, chained where the model has a chain and the window is a block."""
        h_cad = seen.states
        if self.chain is not None and seen.visible is None:
            turn, n = self.diffusion.rotary(seen.positions), h_cad.shape[1]
            before = self.diffusion.embedding(self.before(tokens, seen.positions))
            h_cad = self.chain(h_cad, before, turn, torch.ones(n, n, dtype=torch.bool, device=h_cad.device).tril())
        return States(None, h_cad, None)

    def before(self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """The token before each of `positions` (BOS at 0): what slots at them read."""
        index = (positions - 1).clamp(0, tokens.shape[1] - 1)
        return torch.where(positions > 0, tokens.gather(1, index), self.config.bos_id)

    def _read(
        self, inputs: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], caches: Caches
    ) -> Float[Tensor, "B n D"]:
        """h_trans of the slots `positions`; what both branches keep of them is written into `caches`."""
        assert self.causal is not None
        h_trans = self.causal(inputs, positions, caches.causal)
        if caches.exchange is not None:
            for layer, (keys, values) in enumerate(self.diffusion.exchange(h_trans, positions)):
                caches.exchange.write(layer, positions, keys, values)
        return h_trans

    # Block diffusion over the diffusion branch's own cache: blocks before are clean, and their keys and values stay.

    def allocate_blocks(self, rows: int, length: int) -> KVCache | None:
        """An empty cache for the slots 0 to `length - 1`; None where drafts read more than their branch's blocks."""
        if self.diffusion.mutual or self.chain is not None:
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
        for i, layer in enumerate(self.diffusion.layers):
            h = layer.attention_norm(x)
            cache.write(i, positions, *layer.attention.keys_values(h, turn))
            x = x + layer.attention(h, turn, cache.read(i, upto), visible)
            x = x + layer.mlp(layer.mlp_norm(x))
        return States(None, self.diffusion.norm(x), None)

    # Heads.

    def log_probs(self, states: States, where: Bool[Tensor, "B L"], head: Head = "fused") -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) at the positions in `where`, normalised over V in float32 or better."""
        return head_log_probs(*self._head(states, where, head))

    def nll(
        self, states: States, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "fused"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`, in chunks of logits."""
        return head_nll(*self._head(states, where, head), targets[where])

    def tokens_of(self, head: Head) -> Float[Tensor, "V D"]:
        """The head's output embeddings: the rows of the V real tokens alone."""
        branch = self.diffusion if head == "draft" or self.causal is None else self.causal
        return branch.embedding.weight[: self.vocab_size]

    def _head(self, states: States, where: Bool[Tensor, "B L"], head: Head) -> tuple[Tensor, Tensor]:
        read = getattr(states, head)
        if read is None:
            raise InputError(f"head is {head}; a model with causal off has the heads {sorted(self.heads)} alone")
        return read[where], self.tokens_of(head)

    # Accounts.

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part, the embeddings apart, and in all."""

        def count(*modules: nn.Module | None) -> int:
            return sum(p.numel() for module in modules if module is not None for p in module.parameters())

        causal = count(self.causal and self.causal.embedding, self.causal and self.causal.table)
        diffusion = count(self.diffusion.embedding)
        counts = {
            "embeddings": causal + diffusion,
            "causal": count(self.causal) - causal,
            "diffusion": count(self.diffusion, self.chain) - diffusion,
            "fusion": count(self.fusion),
        }
        return {**counts, "total": sum(counts.values())}

    def flops_per_position(self, context: int | None = None) -> dict[str, float]:
        """Floating-point operations of a forward pass over `context` positions, per position and part, heads included.

        Two per weight and position, and four per channel, layer and position seen in attention: half of `context` on
        average in causal self-attention, all of it elsewhere (the any-order reading; `Block` sees less of the canvas).
        """
        context = context or self.config.context
        counts, causal, diffusion = self.parameter_counts(), self.config.causal, self.config.diffusion
        rounds = 2 if self.diffusion.mutual else 1  # attention over the canvas, and over the causal states
        flops = {
            "diffusion": 2.0 * (counts["diffusion"] + self.vocab_size * diffusion.width)
            + 4 * rounds * context * diffusion.width * diffusion.layers
        }
        if causal is not None:
            crossed = {"late": 0, "layers": causal.layers, "none": -1}[self.config.fusion]
            flops["causal"] = (
                2.0 * (counts["causal"] + self.vocab_size * causal.width) + 2 * context * causal.width * causal.layers
            )
            flops["fusion"] = 2.0 * counts["fusion"] + 4 * context * causal.width * (1 + crossed)
        return flops

    def cached_per_position(self) -> int:
        """Numbers that decoding keeps of each position: keys and values of the causal layers and of the exchange."""
        if self.causal is None:
            return 0
        branches = [self.causal.config, *([self.config.diffusion] if self.diffusion.mutual else [])]
        return sum(2 * branch.layers * branch.width for branch in branches)
