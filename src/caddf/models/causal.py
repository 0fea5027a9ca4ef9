"""The causal branch ("Transformer branch"): a GPT-like decoder over the prefix, shifted by one.

Slot i reads token i-1 (BOS for i = 0) and carries position i, the position that it predicts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import KVCache
from caddf.errors import InputError
from caddf.models.config import BranchConfig
from caddf.models.layers import KeysValues, Layer, Layers, Rotation, initialise, rotation


class CausalBranch(nn.Module):
    """Decoder whose state `h_trans[i]` sees the tokens before i (eqs. 5, 7).

    With `source_width` every layer also cross-attends to the canvas states (eq. 7, fusion `layers`).
    """

    def __init__(self, config: BranchConfig, rows: int, context: int, source_width: int | None = None) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.embedding = nn.Embedding(rows, config.width)
        self.table = nn.Embedding(context, config.width) if config.positions == "learned" else None
        self.layers = Layers(Layer(config.width, config.heads, source_width, config.bias) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        initialise(self, config.layers)

    def rotary(self, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Rotation:
        """Rotary angles of `positions`, for attention between the branches (and within, without a learned table)."""
        return rotation(positions, self.config.width // self.config.heads)

    def forward(
        self,
        inputs: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        cache: KVCache | None = None,
        source: tuple[Float[Tensor, "B m S"], Rotation, Bool[Tensor, "..."] | None] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """States of the slots `positions`, whose inputs are already shifted.

        Without a cache the slots are 0 to n-1. With one, the slots' keys and values are written into it and every slot
        before them is read from it. `source` is the canvas states, their rotation and what each slot may see of them.
        Beyond the context attention slides: a slot sees the last `context` slots, at distances known from training.
        Raises `InputError` where a learned table ends.
        """
        x = self.embedding(inputs)
        if self.table is not None:
            if (last := int(positions.max())) >= self.context:
                raise InputError(f"position {last} is beyond the learned positions; the context is {self.context}")
            x = x + self.table(positions)
        turn = self.rotary(positions) if self.table is None else None
        visible, upto = None, int(positions.max()) + 1 if cache is not None else inputs.shape[1]
        if cache is not None or upto > self.context:
            slots, at = torch.arange(upto, device=inputs.device), positions[..., None, :, None]
            visible = (slots <= at) & (slots > at - self.context)
        for i, layer in enumerate(self.layers):
            h = layer.attention_norm(x)
            keys_values: KeysValues = layer.attention.keys_values(h, turn)
            if cache is not None:
                cache.write(i, positions, *keys_values)
                keys_values = cache.read(i, upto)
            x = x + layer.attention(h, turn, keys_values, visible, causal=visible is None)
            if source is not None:
                states, source_turn, seen = source
                looked_up = layer.cross.keys_values(states, source_turn)
                x = x + layer.cross(layer.cross_norm(x), self.rotary(positions), looked_up, seen)
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.norm(x)
