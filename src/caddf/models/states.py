"""What a pass of the dual branch leaves to be read, and what its fusion reads."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.models.layers import KeysValues


@dataclass(frozen=True)
class States:
    """What a forward pass leaves to be read: one state per position and head, None for a head that does not exist.

    `chained` says whether the draft states are those of a chain, whose vocabulary may be a small one.
    """

    fused: Float[Tensor, "B L D"] | None
    draft: Float[Tensor, "B L d"] | None
    causal: Float[Tensor, "B L D"] | None
    chained: bool = False


@dataclass(frozen=True)
class Canvas:
    """Canvas states as the fusion reads them: m states at `positions`, and what each output sees of them.

    `keys_values` are what the fusion reads of them, where these have been made before. From the index `first` on they
    are those of the canvas itself, at consecutive positions.
    """

    states: Float[Tensor, "B m d"]
    positions: Int[Tensor, "..."]
    visible: Bool[Tensor, "..."] | None
    keys_values: KeysValues | None = None
    first: int = 0

    def at(self, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Float[Tensor, "B n d"]:
        """The states of the canvas at `positions` (at its ends, for positions beyond them)."""
        index = positions - self.positions[..., self.first : self.first + 1] + self.first
        index = index.clamp(self.first, self.states.shape[1] - 1)
        if index.ndim == 1:
            return self.states[:, index]
        return self.states.gather(1, index[..., None].expand(len(self.states), -1, self.states.shape[-1]))
