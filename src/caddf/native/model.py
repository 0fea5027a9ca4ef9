"""A model's decoding through the kernels: its passes over caches, its drafts, and whole rounds."""

from __future__ import annotations

import ctypes
import threading
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, KVCache, Slots
from caddf.categorical import Warp
from caddf.interface import Block, Drafting
from caddf.models.causal import CausalBranch
from caddf.models.chain import DraftChain
from caddf.models.diffusion import DiffusionBranch
from caddf.models.fusion import CrossFusion
from caddf.models.layers import Attention, KeysValues, TiedEmbedding, nearest, state_of
from caddf.models.states import Canvas
from caddf.native.build import library
from caddf.native.passes import KINDS, WIDEST, Biases, FusionPass, NativeHead, StackPass, Weights, few, threads_for
from caddf.native.rounds import Rounds
from caddf.native.structures import CDraft, CMap, CWarp, address, cache_of, warp_of
from caddf.quantise import Quantisation, is_bf16

PROPOSED: Quantisation = "int8"
"""How what only proposes is read."""
NEAR = 24 << 20
"""Bytes of a model up to which its weights stay in a processor's caches; beyond, they are fetched ahead."""


def _readable(*modules: nn.Module | None) -> bool:
    """Whether the kernels can read the modules' weights: float32 on a CPU, in plain maps, heads that fit."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    heads = [part for module in modules if module is not None for part in module.modules()]
    return (
        all(p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous() for p in parameters)
        and all(part.size <= 256 for part in heads if isinstance(part, Attention))
        and all(isinstance(part.query, nn.Linear) for part in heads if isinstance(part, Attention))
    )


class Native:
    """A model's passes through the kernels: each gives None where a pass is not theirs, for the modules to do it.

    Matrices whose numbers are all of bfloat16, as those of most models on disk, are read as that: half the bytes, and
    the same bits of every result. What only proposes is read in int8 always (a round's window, the chain and its head):
    whatever drafts are drawn from, what stands is the target's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        self.numbers = sum(parameter.numel() for parameter in model.parameters())
        self.context = cast(int, model.config.context)  # type: ignore[union-attr]
        self.branch = cast(CausalBranch, model.causal)
        diffusion, of = getattr(model, "diffusion", None), self.model.tokens_of
        self.diffusion: DiffusionBranch | None = diffusion if diffusion is not None and diffusion.mutual else None
        self.heads: dict[str, nn.Module] = {
            head: NativeHead(partial(of, head), lambda: self.weights()) for head in self.model.heads
        }
        if "fused" in self.heads:
            self.heads["fused"] = self.heads["causal"]  # of the same embeddings
        if diffusion is not None and isinstance(diffusion.embedding, TiedEmbedding):
            self.heads["draft"] = NativeHead(partial(of, "draft"))  # a product of matrices is none that was rounded
        if getattr(model, "chain", None) is not None:
            small, drafting = self.model.draft_tokens is not None, lambda: self.weights(drafting=True)
            self.heads["chain"] = NativeHead(self.model.small_table if small else partial(of, "draft"), drafting)
        self._laid_out: tuple[object, ...] | None = None
        self._refreshing = threading.Lock()
        self.stacks: dict[str, StackPass] = {}
        self.fusion: FusionPass | None = None
        self.kind: Quantisation | None = getattr(model, "weights_kind", None)
        library()  # raises

    def weights(self, drafting: bool = False) -> Weights:
        """Room for matrices as this model's are, or as those of its drafts."""
        far = self.numbers * (4 >> KINDS.index(self.kind)) > NEAR
        return Weights(PROPOSED if drafting else self.kind, far)

    def refresh(self) -> None:
        """Lays the weights out for the kernels, if they have changed since that was done: with each new cache.

        Of a model that was moved or converted to what the kernels do not read, all is left to its modules.
        """
        with self._refreshing:  # others wait until all is laid out
            which = state_of(*self.model.parameters())
            if which != self._laid_out:
                if self.suits(self.model):
                    self._lay_out()
                else:
                    self.stacks, self.fusion = {}, None
                self._laid_out = which

    def _lay_out(self) -> None:
        branch, chain = self.branch, getattr(self.model, "chain", None)
        self.kind = getattr(self.model, "weights_kind", None) or ("bf16" if is_bf16(self.model) else None)
        exchange = [layer.cross for layer in self.diffusion.layers] if self.diffusion is not None else []
        weights = self.weights()
        layers = [weights.layer(layer, False) for layer in branch.layers]
        self.stacks["causal"] = StackPass(weights, layers, branch.norm, self.context, exchange=exchange)
        if self.diffusion is not None:
            self.stacks["window"] = _window_pass(self.weights(), self.diffusion)
        fusion, self.fusion = getattr(self.model, "fusion", None), None
        if self.diffusion is not None and isinstance(fusion, CrossFusion):
            slopes, sides = nearest(fusion.cross.heads, torch.device("cpu"), torch.float32)
            biases = (slopes, torch.zeros_like(sides)) if self.diffusion.config.alibi else None
            self.fusion = FusionPass(self.weights(), fusion, biases)
        if isinstance(chain, DraftChain):
            if self.diffusion is not None:
                same = self.kind == PROPOSED
                rounded = self.stacks["window"] if same else _window_pass(self.weights(drafting=True), self.diffusion)
                self.stacks["look"] = rounded
            weights = self.weights(drafting=True)
            join = (chain.before_norm, chain.join)
            self.stacks["chain"] = StackPass(
                weights, [weights.layer(chain.layer, False)], chain.norm, self.context, join
            )
        for name in self.heads.keys() & {"causal", "chain"}:
            cast(NativeHead, self.heads[name]).tokens()

    @property
    def bytes(self) -> int:
        """Of the matrices of all passes, once they are laid out; a head's are not among them."""
        passes = {*self.stacks.values()} | ({self.fusion} if self.fusion is not None else set())
        return sum(each.weights.bytes for each in passes)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has weights of its own, which these passes do not read."""
        return None

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether the kernels can do this model's passes over caches."""
        branch, diffusion = getattr(model, "causal", None), getattr(model, "diffusion", None)
        plain = isinstance(branch, CausalBranch) and not hasattr(branch.layers[0], "cross")
        return plain and _readable(branch, diffusion, getattr(model, "chain", None), getattr(model, "fusion", None))

    def causal(
        self, inputs: Int[Tensor, "B n"], slots: Slots, caches: Caches, earlier: Int[Tensor, "B n"] | None
    ) -> Float[Tensor, "B n D"] | None:
        """h_trans of `slots` over the causal branch's cache, and what the diffusion branch reads of it.

        Long prompts are read in pieces, which changes none of their bits.
        """
        stack, rotary, size = self.stacks.get("causal"), self.branch.table is None, WIDEST // len(inputs)
        if stack is None or not size or torch.is_grad_enabled() or not (rotary or slots.upto <= self.context):
            return None
        pieces = zip(
            self.branch.embed(inputs, slots, earlier).split(size, 1), slots.positions.split(size, -1), strict=True
        )
        states = [
            stack(x.contiguous(), at.contiguous(), caches.causal, turns=rotary, exchange=caches.exchange)
            for x, at in pieces
        ]
        return states[0] if len(states) == 1 else torch.cat(states, 1)

    def window(
        self,
        canvas: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"],
        until: Int[Tensor, " B"],
        caches: Caches,
        proposing: bool = False,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B n d"] | None:
        """h_cad of a window per row, each position seeing all of it and the causal states up to slot `until`.

        Where rows are shorter, `lengths` says how many of its places each sees.

        `proposing`: it is for a chain's drafts alone.
        """
        stack = self.stacks.get("look" if proposing and "look" in self.stacks else "window")
        if stack is None or self.diffusion is None or caches.exchange is None or not few(canvas[0]):
            return None
        if canvas.shape[1] > self.context:  # angles end there
            return None
        config, (rows, n) = self.diffusion.config, canvas.shape
        x = F.embedding(canvas, self.diffusion.embedding.weight)
        own = x.new_empty(2, config.layers, rows, config.heads, n, config.width // config.heads)
        return stack(
            x, positions, KVCache(own[0], own[1]), turns=True, angles=caches.exchange.turns, source=caches.exchange,
            until=until.expand(rows).contiguous(), source_context=self.context, lengths=lengths,
        )  # fmt: skip

    def prepare(self, seen: Canvas, caches: Caches) -> KeysValues | None:
        """What the fusion reads of a canvas."""
        if self.fusion is None or caches.causal.turns is None or not few(seen.states[0, :, 0]):
            return None
        positions = seen.positions.expand(len(seen.states), -1)
        return self.fusion.prepare(seen.states, positions, caches.causal.turns)

    def fuse(
        self,
        h_trans: Float[Tensor, "B n D"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        caches: Caches,
        seen: Canvas,
    ) -> Float[Tensor, "B n D"] | None:
        """Fused states of slots at `positions` over a canvas that is prepared, at consecutive positions.

        What each sees of it are consecutive slots as well.
        """
        if self.fusion is None or caches.causal.turns is None or not few(h_trans[0, :, 0]) or seen.keys_values is None:
            return None
        (rows, n), m = h_trans.shape[:2], seen.keys_values[0].shape[2]
        positions = positions.expand(rows, n).contiguous()
        since, count = torch.zeros_like(positions), torch.full_like(positions, m)
        if seen.visible is not None:
            visible = seen.visible.expand(rows, 1, n, m)[:, 0]
            since, count = visible.int().argmax(-1), visible.sum(-1)
        slots = torch.stack([positions - seen.positions.expand(rows, m)[:, :1], since, since + count])
        return self.fusion(h_trans, positions, caches.causal.turns, seen.keys_values, seen.states, slots)

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
        """Whole rounds over `caches` (`caddf.interface.Incremental.rounds`)."""
        if not Rounds.fit(self, len(lengths), drafting, caches, over):
            return None
        return Rounds(self, lengths, drafting, caches, warp, over)

    def drafts(
        self,
        h_cad: Float[Tensor, "B k d"],
        x: Int[Tensor, "B T"],
        start: Int[Tensor, " B"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        cache: KVCache,
        *,
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """m drafts of each row from position n on, one after the other: tokens, q, and how many are to be verified.

        `h_cad` is of the window from `start` on, before n stand the tokens `x`, and `u` has a uniform for each draft.
        Where `given` is not -1 that token stands, with q = 0, and drafts behind it hear it. Drafting ends when the
        product of the largest draft probabilities falls below `least`, never without a draft.
        """
        stack = self.stacks.get("chain")
        if stack is None or not few(h_cad[0, :, 0]):
            return None
        (rows, count), width = u.shape, h_cad.shape[1]
        places = (start[:, None] + torch.arange(width)).expand(rows, -1)
        before, earlier = (self.model.before(x, places, by) for by in (1, 2))
        first = (n - start).clamp(0, width - 1)
        tokens, q = before.new_empty(rows, count), u.new_zeros(rows, count, self.model.vocab_size)
        held, heard = cast(NativeHead, self.heads["chain"]).tokens(), self.heard()
        banned, drafted = self.banned(warp), torch.empty_like(first)
        settings = self.draft_settings(held[0], heard, rows, width, cache, warp_of(warp, banned), least)
        made = {"states": h_cad, "before": before, "earlier": earlier, "first": first, "u": u}
        made |= {} if given is None else {"given": given}
        made = {name: each.contiguous() for name, each in made.items()} | {"tokens": tokens, "q": q, "drafts": drafted}
        settings.count = count
        for name, each in made.items():
            setattr(settings, name, each.data_ptr())
        if library().caddf_draft(ctypes.addressof(stack.stack), ctypes.addressof(settings)):
            raise MemoryError("the kernels' working memory could not be had")
        return tokens, q, drafted

    def banned(self, warp: Warp) -> Int[Tensor, " N"]:
        """The draft head's logits of banned tokens."""
        banned, small = torch.arange(self.model.vocab_size)[list(warp.banned)], self.model.draft_tokens
        return banned if small is None else torch.isin(small, banned).nonzero()[:, 0]

    def heard(self) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R d"] | None]:
        """What a chain hears of a token: where it is the one before, and where it is the one before that."""
        shifted = self.model.chain.shifted
        return self.model.diffusion.embedding.weight, None if shifted is None else shifted.weight

    def draft_settings(
        self,
        head: CMap,
        heard: tuple[Float[Tensor, "R d"], Float[Tensor, "R d"] | None],
        rows: int,
        width: int,
        cache: KVCache,
        warp: CWarp,
        least: float,
    ) -> CDraft:
        """What windows of `width` are drafted by; what they are drafted from, and go to, is for the caller.

        `head` is the chain's, whose panels the caller holds, as it does what is `heard`.
        """
        (table, shifted), (cos, sin) = heard, cache.turns or (None, None)
        read = self.stacks["chain"].weights.bytes + (4 >> head.type) * head.out * table.shape[1]
        return CDraft(
            rows=rows, width=width, embedding=address(table), shifted=address(shifted), head=head,
            ids=address(self.model.draft_tokens), vocabulary=self.model.vocab_size, warp=warp,
            least=least, cache=cache_of(cache), cos=address(cos), sin=address(sin), threads=threads_for(read, rows),
        )  # fmt: skip


def _window_pass(weights: Weights, diffusion: DiffusionBranch) -> StackPass:
    config = diffusion.config
    biases: tuple[Biases, Biases] = (None, None)
    if config.alibi:
        slopes, sides = nearest(config.heads, torch.device("cpu"), torch.float32)
        biases = (slopes, sides), (slopes, torch.zeros_like(sides))
    layers = [weights.layer(layer, True, biases) for layer in diffusion.layers]
    return StackPass(weights, layers, diffusion.norm, 0)
