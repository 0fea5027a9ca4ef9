"""The fusion of the branches (eqs. 10, 11)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from caddf.models.config import BranchConfig
from caddf.models.layers import MLP, Attention, KeysValues, Rotation, initialise


class Mixer(nn.Module):
    """`h_trans + MLP([h_trans ; context])`: eq. 10 as a residual, so that fusion starts as the causal branch.

    With `own_width` the MLP reads a state of that width besides, through a map of its own that starts at 0.
    """

    def __init__(self, config: BranchConfig, context_width: int, own_width: int | None = None) -> None:
        super().__init__()
        self.mlp = MLP(config.width + context_width, 2 * config.width, config.width, bias=config.bias)
        self.own = None if own_width is None else nn.Linear(own_width, 2 * config.width, bias=False)
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        initialise(self, config.layers)
        if self.own is not None:
            nn.init.zeros_(self.own.weight)  # starts as the fusion without it

    def forward(
        self,
        h_trans: Float[Tensor, "B n D"],
        context: Float[Tensor, "B n C"],
        own: Float[Tensor, "B n d"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Fused states, normed for the head."""
        more = None if self.own is None else self.own(own)
        return self.norm(h_trans + self.mlp(torch.cat([h_trans, context], -1), more))


class CrossFusion(nn.Module):
    """Eq. 10: `MLP([h_trans ; CrossAtt(h_trans, h_cad)])`, the cross-attention rotary; with `own` `h_cad[i]`, too."""

    def __init__(self, config: BranchConfig, source_width: int, own: bool = False) -> None:
        super().__init__()
        self.cross = Attention(config.width, config.heads, source_width, config.bias)
        initialise(self, config.layers)
        self.mixer = Mixer(config, config.width, source_width if own else None)

    def forward(
        self,
        h_trans: Float[Tensor, "B n D"],
        turn: Rotation,
        keys_values: KeysValues,
        visible: Bool[Tensor, "..."] | Float[Tensor, "..."] | None,
        own: Float[Tensor, "B n d"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Fused states; `keys_values` are the fusion's keys and values of `h_cad`, `visible` what i sees of them.

        `own` are the slots' own canvas states, where it reads them.
        """
        return self.mixer(h_trans, self.cross(h_trans, turn, keys_values, visible), own)
