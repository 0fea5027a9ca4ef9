"""What a pass of the dual branch leaves to be read, and what its fusion reads."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.models.layers import Rotation


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

    `turn` is their rotation in the fusion, where it has been made before.
    """

    states: Float[Tensor, "B m d"]
    positions: Int[Tensor, "..."]
    visible: Bool[Tensor, "..."] | None
    turn: Rotation | None = None
