"""The causal branch ("Transformer branch"): a GPT-like decoder over the prefix, shifted by one.

Slot i reads token i-1 (BOS for i = 0) and carries position i, the position that it predicts.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import KVCache, Slots
from caddf.errors import InputError
from caddf.models.config import BranchConfig
from caddf.models.layers import Layer, Layers, Rotation, TiedEmbedding, among, initialise, rotation


def tokens_before(tokens: Int[Tensor, "B T"], slots: Slots, bos_id: int, by: int = 1) -> Int[Tensor, "B n"]:
    """The token `by` places before each of `slots`, BOS before the first: with `by` 1, what they read."""
    if slots.first is not None:
        read = tokens[:, max(slots.first - by, 0) : max(slots.upto - by, 0)]
        missing = min(max(by - slots.first, 0), slots.upto - slots.first)
        return F.pad(read, (missing, 0), value=bos_id) if missing else read
    index = (slots.positions - by).clamp(0, tokens.shape[1] - 1)
    return torch.where(slots.positions >= by, tokens.gather(1, index), bos_id)


class CausalBranch(nn.Module):
    """Decoder whose state `h_trans[i]` sees the tokens before i (eqs. 5, 7).

    With `source_width` every layer also cross-attends to the canvas states (eq. 7, fusion `layers`).
    """

    def __init__(self, config: BranchConfig, rows: int, context: int, source_width: int | None = None) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.embedding = nn.Embedding(rows, config.width)
        self.table = nn.Embedding(context, config.width) if config.positions == "learned" else None
        self.layers = Layers(Layer(config, source_width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.shifted = TiedEmbedding(self.embedding, config.width) if config.token_shift else None
        initialise(self, config.layers)
        if self.shifted is not None:
            nn.init.zeros_(self.shifted.map)  # starts as the model without it

    def rotary(self, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Rotation:
        """Rotary angles of `positions`, for attention between the branches (and within, without a learned table)."""
        return rotation(positions, self.config.width // self.config.heads)

    def allocate(self, rows: int, length: int) -> KVCache:
        """An empty cache for the slots 0 to `length - 1`, with the angles of a context more (windows reach beyond)."""
        size, positions = self.config.width // self.config.heads, torch.arange(length + self.context)
        like = self.embedding.weight
        turns = self.rotary(positions.to(like.device))
        return KVCache.allocate(self.config.layers, rows, self.config.heads, length, size, like, turns)

    def embed(
        self, inputs: Int[Tensor, "B n"], slots: Slots, earlier: Int[Tensor, "B n"] | None = None
    ) -> Float[Tensor, "B n D"]:
        """What the first layer reads at `slots`.

        `earlier` are the inputs of the slots before them, where there is a token shift; not given, the slots count from
        0. Raises `InputError` where a learned table ends.
        """
        x = self.embedding(inputs)
        if self.shifted is not None:
            x = x + self.shifted(torch.cat([inputs[:, :1], inputs[:, :-1]], 1) if earlier is None else earlier)
        if self.table is None:
            return x
        if slots.upto > self.context:
            raise InputError(
                f"position {slots.upto - 1} is beyond the learned positions; the context is {self.context}"
            )
        return x + self.table(slots.positions)

    def earlier(self, tokens: Int[Tensor, "B T"], slots: Slots, bos_id: int) -> Int[Tensor, "B n"] | None:
        """The inputs of the slots before `slots`, BOS before the first; None without a token shift."""
        return None if self.shifted is None else tokens_before(tokens, slots, bos_id, 2)

    def forward(
        self,
        inputs: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots,
        cache: KVCache | None = None,
        source: tuple[Float[Tensor, "B m S"], Rotation, Bool[Tensor, "..."] | None] | None = None,
        earlier: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """States of the slots `positions`, whose inputs are already shifted; `earlier` as in `embed`.

        Without a cache the slots are 0 to n-1. With one, the slots' keys and values are written into it and every slot
        before them is read from it. `source` is the canvas states, their rotation and what each slot may see of them.
        Beyond the context attention slides: a slot sees the last `context` slots, at distances known from training.
        Raises `InputError` where a learned table ends.
        """
        slots = positions if isinstance(positions, Slots) else Slots.of(positions)
        x, turn = self.embed(inputs, slots, earlier), None
        if self.table is None:
            turn = self.rotary(slots.positions) if cache is None or cache.turns is None else cache.turn(slots)
        whole = slots.first == 0 and slots.upto <= self.context
        visible, causal = (None, inputs.shape[1] > 1) if whole else (slots.visible(self.context), False)
        visible = visible if visible is None else among(x.new_zeros(()), visible)  # once, and not by every layer
        since = slots.since(self.context) if cache is not None else 0
        for i, layer in enumerate(self.layers):
            kept, crossed = None, None
            if cache is not None:
                kept = partial(cache.extended, i, slots.where, slots.upto, since)
            if source is not None:
                states, source_turn, seen = source
                crossed = (self.rotary(slots.positions), layer.cross.keys_values(states, source_turn), seen)
            x = layer(x, turn, visible, causal, kept=kept, crossed=crossed)
        return self.norm(x)
