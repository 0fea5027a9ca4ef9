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
    LevelScale,
    Modulation,
    Rotation,
    TiedEmbedding,
    among,
    initialise,
    modulate,
    nearness,
    rotation,
)


class DiffusionBranch(nn.Module):
    """Encoder of tokens and `[M]` into `h_cad` (section 4.1).

    With `source_width` its layers cross-attend to the causal branch's states (mutual exchange); with `level_width` they
    are told the noise level, sbar, through an embedding of that width (adaLN-zero) and of `level_scale`. With another
    branch's `embedding` its own is tied to it. `norm_bias` and `mlp_bias` are as in `Layer`.
    """

    def __init__(
        self,
        config: BranchConfig,
        rows: int,
        source_width: int | None = None,
        level_width: int | None = None,
        *,
        level_scale: LevelScale = "log",
        embedding: nn.Embedding | None = None,
        norm_bias: bool = False,
        mlp_bias: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.mutual = config, source_width is not None
        self.embedding = (
            nn.Embedding(rows, config.width) if embedding is None else TiedEmbedding(embedding, config.width)
        )
        self.layers = Layers(
            Layer(config, source_width, norm_bias=norm_bias, mlp_bias=mlp_bias) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=config.bias or norm_bias)
        self.level: LevelEmbedding | None = None
        if level_width is not None:
            self.level = LevelEmbedding(level_width, level_scale)
            self.modulations = nn.ModuleList(Modulation(level_width, config.width, 6) for _ in range(config.layers))
            self.last_modulation = Modulation(level_width, config.width, 2)
        initialise(self, config.layers)
        for module in self.modules():
            if isinstance(module, TiedEmbedding):
                module.reset()
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)

    def rotary(self, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Rotation:
        """Rotary angles of `positions`."""
        return rotation(positions, self.config.width // self.config.heads)

    def exchange(self, h_trans: Float[Tensor, "B m S"], positions: Int[Tensor, "..."] | Rotation) -> list[KeysValues]:
        """Keys and values that each layer makes of the causal states; none with `one_way` exchange."""
        turn = positions if isinstance(positions, tuple) else self.rotary(positions)
        return [layer.cross.keys_values(h_trans, turn) for layer in self.layers] if self.mutual else []

    def seen(
        self,
        queries: Int[Tensor, "... n"],
        keys: Int[Tensor, "... m"],
        visible: Bool[Tensor, "..."] | None,
        sides: bool = True,
    ) -> Bool[Tensor, "..."] | Float[Tensor, "..."] | None:
        """What positions of the canvas see of it: `visible`, or with `alibi` the scores that attention starts from.

        Without `sides`: of the causal states.
        """
        if not self.config.alibi:
            return visible
        return among(nearness(queries, keys, self.config.heads, self.norm.weight, sides), visible)

    def forward(
        self,
        canvas: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Rotation,
        visible: Bool[Tensor, "..."] | None = None,
        exchange: list[KeysValues] | None = None,
        exchanged: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        level: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B n d"]:
        """`h_cad` of the canvas at `positions`, or at consecutive ones turned by a rotation made before.

        `visible` says what a position sees of the canvas, `exchanged` (`seen` without sides) what it sees of the causal
        states behind `exchange`; None is everything. `level` is sbar of each row, where the branch is told it.
        """
        x = self.embedding(canvas)
        at = torch.arange(canvas.shape[1], device=canvas.device) if isinstance(positions, tuple) else positions
        visible = self.seen(at, at, visible)
        turn = positions if isinstance(positions, tuple) else self.rotary(positions)
        time = None if self.level is None or level is None else self.level(level)
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                turn,
                visible,
                crossed=(turn, exchange[i], exchanged) if exchange else None,
                modulation=None if time is None else self.modulations[i](time),
            )
        return modulate(self.norm(x), *((None, None) if time is None else self.last_modulation(time)))
