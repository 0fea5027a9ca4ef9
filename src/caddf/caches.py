"""Key-value caches: explicit, preallocated objects that callers hold and pass on.

Slot j of a cache holds position j. A query at position i sees the slots j <= i, so what is valid is decided by the
positions that a caller reads from, not by a counter: going back is reading on from an earlier position, and slots
beyond it are overwritten before anything sees them. Rows of a batch may stand at different positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a stack of attention layers, `[layers, B, H, T, size]`."""

    keys: Float[Tensor, "layers B H T size"]
    values: Float[Tensor, "layers B H T size"]

    @classmethod
    def allocate(cls, layers: int, rows: int, heads: int, length: int, size: int, like: Tensor) -> KVCache:
        """An empty cache for positions 0 to `length - 1`, of the device and dtype of `like`."""
        shape = (layers, rows, heads, length, size)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    @property
    def length(self) -> int:
        """The number of slots."""
        return self.keys.shape[3]

    def write(
        self,
        layer: int,
        positions: Int[Tensor, "B n"],
        keys: Float[Tensor, "B H n size"],
        values: Float[Tensor, "B H n size"],
    ) -> None:
        """Fills the slots `positions` of one layer; other slots stay as they are."""
        index = positions[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, index, values.to(self.values.dtype))

    def read(self, layer: int, upto: int) -> tuple[Float[Tensor, "B H upto size"], Float[Tensor, "B H upto size"]]:
        """Keys and values of the slots below `upto`, without a copy."""
        return self.keys[layer, :, :, :upto], self.values[layer, :, :, :upto]


@dataclass(frozen=True)
class Caches:
    """What left-to-right decoding keeps: the causal branch's own cache, and what the diffusion branch reads of it.

    `exchange` holds the keys and values that the diffusion branch's layers make of the causal states (mutual exchange).
    """

    causal: KVCache
    exchange: KVCache | None = None
