"""The dual-branch model: causal branch, diffusion branch and fusion behind one forward signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, Slots
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Head, Infill, Pattern, Projection
from caddf.models.causal import CausalBranch
from caddf.models.chain import DraftChain
from caddf.models.config import ModelConfig
from caddf.models.diffusion import DiffusionBranch
from caddf.models.fusion import CrossFusion, Mixer
from caddf.models.layers import Readout, head_log_probs, head_nll, over_all, state_of, states_at
from caddf.models.over_caches import OverCaches
from caddf.models.states import Canvas, States

if TYPE_CHECKING:
    from caddf.graphs import Graphs
    from caddf.native import Native


def _whole(pattern: Block, length: int) -> int:
    """`length`, brought up to the end of its last block."""
    return pattern.offset + -(-(length - pattern.offset) // pattern.size) * pattern.size


class DualBranch(OverCaches):
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
        self.causal: CausalBranch | None = None
        self.fusion: CrossFusion | Mixer | None = None
        if config.causal is not None:
            width = config.diffusion.width
            within = width if config.fusion == "layers" else None
            self.causal = CausalBranch(config.causal, config.rows, config.context, within)
            self.fusion = (
                Mixer(config.causal, width)
                if config.fusion == "none"
                else CrossFusion(config.causal, width, config.own_state)
            )
        tied = self.causal.embedding if self.causal is not None and config.embeddings == "tied" else None
        self.diffusion = DiffusionBranch(config.diffusion, config.rows, source_width, embedding=tied)
        self.chain: DraftChain | None = None
        if config.draft == "chained":
            shift = self.causal is not None and self.causal.shifted is not None
            embedding = cast(nn.Embedding, self.diffusion.embedding) if tied is None else tied
            self.chain = DraftChain(config.diffusion, embedding if shift else None)
        self.draft_tokens: Tensor | None
        small = None if config.draft_vocab is None else torch.arange(config.draft_vocab)
        self.register_buffer("draft_tokens", small)
        self._small: tuple[Tensor, tuple[object, ...], Tensor] | None = None
        self.heads: frozenset[Head] = frozenset({"draft"} if self.causal is None else {"draft", "causal", "fused"})
        self.denoiser: Head = "draft" if self.causal is None else "fused"
        self.chained, self.block_size = self.chain is not None, config.block_size
        self.sliding, self.fuses = mutual, config.fusion != "none"
        self.native: Native | None = None  # passes of a few positions, in another form than the modules'
        self.graphs: Graphs | None = None  # whole rounds

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
        slots, h_trans = Slots.whole(positions), None
        if self.causal is not None:
            h_trans = self.causal(inputs, slots) if caches is None else self._read(inputs, slots, caches)
        seen = self._canvas(prefix, canvas, pattern, h_trans)
        chained = self.chain is not None and isinstance(pattern, Block)
        draft = self._drafts(seen, prefix, pattern) if isinstance(pattern, Block) else seen.states
        fused = None if h_trans is None else self._fused(h_trans, inputs, positions, seen, pattern)
        return States(fused, draft, h_trans, chained), caches

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
            if exchange:
                exchanged = self.diffusion.seen(positions, positions, exchanged, sides=False)
            return Canvas(self.diffusion(canvas, positions, None, exchange, exchanged), positions, None)

        # The last block is always whole: what lies beyond the row is masked.
        index = pattern.index(positions)
        whole = torch.arange(_whole(pattern, len(positions)), device=canvas.device)
        noised, own = F.pad(canvas, (0, len(whole) - len(positions)), value=self.mask_id), pattern.index(whole)
        same = own[:, None] == own
        if self.diffusion.mutual:  # the prefix reaches a block through the causal states up to its start
            start = pattern.start(whole)[:, None]
            visible = (positions <= start) & (positions > start - context)
            exchanged = self.diffusion.seen(whole, positions, visible, sides=False)
            return Canvas(self.diffusion(noised, whole, same, exchange, exchanged), whole, same[: len(positions)])
        # [x0 ; x_t]: clean tokens see clean blocks up to their own, noised ones earlier clean blocks and their own.
        both, at = torch.cat([prefix, noised], 1), torch.cat([positions, whole])
        clean = torch.cat([index[:, None] >= index, index.new_zeros(len(index), len(whole), dtype=torch.bool)], 1)
        visible = torch.cat([clean, torch.cat([own[:, None] > index, same], 1)]) & (at > at[:, None] - context)
        read = visible[len(positions) :][: len(positions)]
        return Canvas(self.diffusion(both, at, visible), at, read, first=len(positions))

    def _drafts(self, seen: Canvas, prefix: Int[Tensor, "B L"], pattern: Block) -> Float[Tensor, "B L d"]:
        """Draft states under `Block`: the noised part of the canvas, chained where the model has a chain."""
        positions = torch.arange(prefix.shape[1], device=prefix.device)
        h_cad = seen.states[:, seen.first : seen.first + len(positions)]
        if self.chain is None:
            return h_cad
        index, size = pattern.index(positions), min(pattern.size, len(positions))
        count = (len(positions) - 1 - pattern.offset) // pattern.size - (-pattern.offset) // pattern.size + 1
        place = (index - index[0]) * size + positions - pattern.start(positions)

        def blocks(x: Float[Tensor, "B L d"]) -> Float[Tensor, "N k d"]:
            whole = x.new_zeros(len(x), size * count, x.shape[-1])
            return whole.index_copy(1, place, x).view(-1, size, x.shape[-1])

        drafts = self.chain(blocks(h_cad), blocks(self._heard(prefix, Slots.whole(positions))))
        return drafts.view(len(h_cad), -1, h_cad.shape[-1])[:, place]

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
            slots = Slots.whole(positions)
            h_trans = self.causal(inputs, slots, source=(seen.states, self.causal.rotary(seen.positions), visible))
        return self._cross(h_trans, positions, self.causal.rotary(positions), seen)

    # Heads.

    def log_probs(self, states: States, where: Bool[Tensor, "B L"], head: Head = "fused") -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) at the positions in `where`, normalised over V in float32 or better.

        A chain's drafts over a small vocabulary are -inf outside it.
        """
        read, table, small = self._head(states, where, head)
        return over_all(head_log_probs(read, table), small, self.vocab_size)

    def nll(
        self, states: States, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "fused"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`, in chunks of logits."""
        read, table, small = self._head(states, where, head)
        targets = targets[where]
        if small is None:
            return head_nll(read, table, targets)
        index = torch.searchsorted(small, targets).clamp(max=len(small) - 1)
        inside = small[index] == targets
        nats = head_nll(read[inside], table, index[inside])
        return nats.new_full(targets.shape, torch.inf).masked_scatter(inside, nats)

    def projection(self, states: States, head: Head) -> Projection:
        """What makes the logits of all positions; a chain's may be of a small vocabulary."""
        read = getattr(states, head)
        if read is None:
            raise InputError(f"head is {head}; a model with causal off has the heads {sorted(self.heads)} alone")
        small = self.draft_tokens if head == "draft" and states.chained else None
        return Projection(read, self.tokens_of(head) if small is None else self.small_table(), small=small)

    def tokens_of(self, head: Head) -> Float[Tensor, "V D"]:
        """The head's output embeddings: the rows of the V real tokens alone."""
        branch = self.diffusion if head == "draft" or self.causal is None else self.causal
        return branch.embedding.weight[: self.vocab_size]

    def choose_draft_tokens(self, counts: Int[Tensor, " V"]) -> None:
        """Makes the most frequent tokens the small draft vocabulary (`draft_tokens`, by id), where there is one."""
        if self.config.draft_vocab is not None:
            frequent = counts.argsort(descending=True, stable=True)[: self.config.draft_vocab]
            self.draft_tokens = frequent.sort().values.to(self.diffusion.embedding.weight.device)
            self._small = None

    def small_table(self) -> Float[Tensor, "n d"]:
        """The small vocabulary's draft embeddings, kept where nothing can be learnt, since a copy costs like a pass."""
        weight, small = self.diffusion.embedding.weight, self.draft_tokens
        assert small is not None
        if torch.is_grad_enabled() and weight.requires_grad:
            return weight[small]
        which = state_of(weight)
        if self._small is None or self._small[0] is not weight or self._small[1] != which:
            self._small = (weight, which, weight[small])  # held, so that no other table is where it was
        return self._small[2]

    def _head(
        self, states: States, where: Bool[Tensor, "B L"], head: Head
    ) -> tuple[Float[Tensor, "N D"], Readout, Int[Tensor, " n"] | None]:
        """States, what makes logits of them, and the small vocabulary where the head has one here."""
        made, readouts = self.projection(states, head), {} if self.native is None else self.native.heads
        readout = readouts.get(head, made.tokens) if made.small is None else made.tokens
        return states_at(made.states, where), readout, made.small

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
