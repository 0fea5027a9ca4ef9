"""The draft chain: one light causal layer within a block, so that a draft knows the drafts before it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.caches import KVCache, Slots
from caddf.models.config import BranchConfig
from caddf.models.layers import Layer, Rotation, TiedEmbedding, initialise, rotation


class DraftChain(nn.Module):
    """q(x_i | canvas, the drafts before i in its block), of the diffusion branch's width (draft `chained`).

    Its input at i is `h_cad[i]` and the embedding of token i-1, normed, since beside a state it would go unheard (as in
    DeepSeek-V3's multi-token prediction, eq. 21); its attention is that of a decoder over the block, whose places count
    from 0. Training reads whole blocks, drafting one place after the other. With `shifted` (a token shift), which is
    tied to an `embedding`, it hears a map of token i-2 as well, which starts at 0.
    """

    def __init__(self, config: BranchConfig, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        self.before_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.join = nn.Linear(2 * config.width, config.width, bias=config.bias)
        self.layer = Layer(config)
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.shifted = None if embedding is None else TiedEmbedding(embedding, config.width)
        initialise(self, 1)
        if self.shifted is not None:
            nn.init.zeros_(self.shifted.map)

    def forward(self, h_cad: Float[Tensor, "N k d"], before: Float[Tensor, "N k d"]) -> Float[Tensor, "N k d"]:
        """Draft states of N blocks at once; `before` is what it hears at each place."""
        turn = self._rotary(torch.arange(h_cad.shape[1], device=h_cad.device))
        x, h = self._join(h_cad, before)
        return self._out(x + self.layer.attention(h, turn, self.layer.attention.keys_values(h, turn), causal=True))

    def allocate(self, rows: int, size: int) -> KVCache:
        """An empty cache for windows of `size` places."""
        width, heads, like = self.config.width, self.config.heads, self.norm.weight
        turns = self._rotary(torch.arange(size, device=like.device))
        return KVCache.allocate(1, rows, heads, size, width // heads, like, turns)

    def step(
        self,
        h_cad: Float[Tensor, "B n d"],
        before: Float[Tensor, "B n d"],
        places: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots,
        cache: KVCache,
    ) -> Float[Tensor, "B n d"]:
        """Draft states at `places` of each row's window, given what `cache` holds of the places before them.

        Their own keys and values are written into `cache`: going back is stepping on from an earlier place.
        """
        slots = places if isinstance(places, Slots) else Slots.of(places)
        x, h = self._join(h_cad, before)
        keys_values = self.layer.attention.keys_values(h, turn := cache.turn(slots))
        seen = cache.extended(0, slots.where, slots.upto, 0, keys_values)
        return self._out(x + self.layer.attention(h, turn, seen, slots.visible(cache.length)))

    def _rotary(self, places: Int[Tensor, "..."]) -> Rotation:
        return rotation(places, self.config.width // self.config.heads)

    def _join(self, h_cad: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and what attention reads of it."""
        x = h_cad + self.join(torch.cat([h_cad, self.before_norm(before)], -1))
        return x, self.layer.attention_norm(x)

    def _out(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer.mlp(self.layer.mlp_norm(x)))
