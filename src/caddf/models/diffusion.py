"""The diffusion branch: an encoder over the canvas, with a draft head of its own; it is told the time only if asked."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.models.config import BranchConfig
from caddf.models.layers import (
    KeysValues,
    Layer,
    Layers,
    LevelEmbedding,
    Modulation,
    Rotation,
    initialise,
    modulate,
    rotation,
)


class DiffusionBranch(nn.Module):
    """Encoder of tokens and `[M]` into `h_cad` (section 4.1).

    With `source_width` its layers cross-attend to the causal branch's states (mutual exchange); with `level_width` they
    are told the noise level, sbar, through an embedding of that width (adaLN-zero).
    """

    def __init__(
        self, config: BranchConfig, rows: int, source_width: int | None = None, level_width: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.mutual = config, source_width is not None
        self.embedding = nn.Embedding(rows, config.width)
        self.layers = Layers(Layer(config.width, config.heads, source_width, config.bias) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.level: LevelEmbedding | None = None
        if level_width is not None:
            self.level = LevelEmbedding(level_width)
            self.modulations = nn.ModuleList(Modulation(level_width, config.width, 6) for _ in range(config.layers))
            self.last_modulation = Modulation(level_width, config.width, 2)
        initialise(self, config.layers)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)

    def rotary(self, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Rotation:
        """Rotary angles of `positions`."""
        return rotation(positions, self.config.width // self.config.heads)

    def exchange(self, h_trans: Float[Tensor, "B m S"], positions: Int[Tensor, "..."]) -> list[KeysValues]:
        """Keys and values that each layer makes of the causal states; none with `one_way` exchange."""
        turn = self.rotary(positions)
        return [layer.cross.keys_values(h_trans, turn) for layer in self.layers] if self.mutual else []

    def forward(
        self,
        canvas: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        visible: Bool[Tensor, "..."] | None = None,
        exchange: list[KeysValues] | None = None,
        exchanged: Bool[Tensor, "..."] | None = None,
        level: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B n d"]:
        """`h_cad` of the canvas.

        `visible` says what a position sees of the canvas, `exchanged` what it sees of the causal states behind
        `exchange`; None is everything. `level` is sbar of each row, where the branch is told it.
        """
        x = self.embedding(canvas)
        turn = self.rotary(positions)
        time = None if self.level is None or level is None else self.level(level)
        for i, layer in enumerate(self.layers):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
                (None, None, 1, None, None, 1) if time is None else self.modulations[i](time)
            )
            h = modulate(layer.attention_norm(x), shift, scale)
            x = x + gate * layer.attention(h, turn, layer.attention.keys_values(h, turn), visible)
            if exchange:
                x = x + layer.cross(layer.cross_norm(x), turn, exchange[i], exchanged)
            x = x + mlp_gate * layer.mlp(modulate(layer.mlp_norm(x), mlp_shift, mlp_scale))
        return modulate(self.norm(x), *((None, None) if time is None else self.last_modulation(time)))


class DraftChain(nn.Module):
    """One causal layer within each block, so that a draft knows the drafts before it (draft `chained`).

    Its input at i is `h_cad[i]` and the embedding of token i-1; its proposal probabilities are those of the chain.
    """

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.join = nn.Linear(2 * config.width, config.width, bias=config.bias)
        self.layer = Layer(config.width, config.heads, bias=config.bias)
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        initialise(self, 1)

    def forward(
        self,
        h_cad: Float[Tensor, "B n d"],
        before: Float[Tensor, "B n d"],
        turn: Rotation,
        visible: Bool[Tensor, "..."],
    ) -> Float[Tensor, "B n d"]:
        """Draft states; `before` embeds token i-1 of each position, `visible` is causal within the block."""
        x = h_cad + self.join(torch.cat([h_cad, before], -1))
        h = self.layer.attention_norm(x)
        x = x + self.layer.attention(h, turn, self.layer.attention.keys_values(h, turn), visible)
        x = x + self.layer.mlp(self.layer.mlp_norm(x))
        return self.norm(x)
