"""Key-value caches: explicit, preallocated objects that callers hold and pass on.

Slot j of a cache holds position j. A query at position i sees the slots j <= i, so what is valid is decided by the
positions that a caller reads from, not by a counter: going back is reading on from an earlier position, and slots
beyond it are overwritten before anything sees them. Rows of a batch may stand at different positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """The slots that one pass reads and fills: `[B, n]`, or `[n]` consecutive ones where all rows stand alike.

    `first` is the first slot where all rows stand alike, and then nothing needs an index; `upto` is behind the last.
    """

    positions: Int[Tensor, "B n"] | Int[Tensor, " n"]
    first: int | None
    upto: int

    @classmethod
    def of(cls, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Slots:
        """Those at `positions`."""
        if positions.ndim > 1:
            return cls(positions, None, int(positions.max()) + 1)
        first = int(positions[0])
        return cls(positions, first, first + len(positions))

    @classmethod
    def whole(cls, positions: Int[Tensor, " n"]) -> Slots:
        """Those at `positions`, which are 0 to n - 1: no number is asked of the device."""
        return cls(positions, 0, len(positions))

    @property
    def where(self) -> slice | Int[Tensor, "B n"]:
        """Where a cache holds them."""
        return self.positions if self.first is None else slice(self.first, self.upto)

    def since(self, context: int) -> int:
        """The first slot that any of them sees, `context` being how far attention reaches."""
        return 0 if self.first is None else max(0, self.first + 1 - context)

    def visible(self, context: int) -> Bool[Tensor, "..."] | None:
        """What each sees of the slots from `since` to `upto`: those up to itself; None where that is all of them."""
        if self.first is not None and self.upto == self.first + 1:
            return None
        slots = torch.arange(self.since(context), self.upto, device=self.positions.device)
        at = self.positions[..., None, :, None]
        visible = slots <= at
        return visible if self.upto <= context else visible & (slots > at - context)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a stack of attention layers, `[layers, B, H, T, size]`.

    `turns`, where given, are the rotary angles (cosines and sines) of all positions, made once for all passes.
    """

    keys: Float[Tensor, "layers B H T size"]
    values: Float[Tensor, "layers B H T size"]
    turns: tuple[Float[Tensor, "1 1 P size"], Float[Tensor, "1 1 P size"]] | None = None

    @classmethod
    def allocate(
        cls,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        size: int,
        like: Tensor,
        turns: tuple[Tensor, Tensor] | None = None,
    ) -> KVCache:
        """An empty cache for positions 0 to `length - 1`, of the device and dtype of `like`."""
        shape = (layers, rows, heads, length, size)
        cos_sin = None if turns is None else (turns[0].to(like.dtype), turns[1].to(like.dtype))
        return cls(like.new_zeros(shape), like.new_zeros(shape), cos_sin)

    @property
    def length(self) -> int:
        """The number of slots."""
        return self.keys.shape[3]

    def write(
        self,
        layer: int,
        where: slice | Int[Tensor, "B n"],
        keys: Float[Tensor, "B H n size"],
        values: Float[Tensor, "B H n size"],
    ) -> None:
        """Fills the slots `where` of one layer; other slots stay as they are."""
        if isinstance(where, slice):
            self.keys[layer, :, :, where] = keys
            self.values[layer, :, :, where] = values
            return
        at = where[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, at, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, at, values.to(self.values.dtype))

    def read(
        self, layer: int, upto: int, since: int = 0
    ) -> tuple[Float[Tensor, "B H m size"], Float[Tensor, "B H m size"]]:
        """Keys and values of the slots from `since` to `upto - 1`, without a copy."""
        return self.keys[layer, :, :, since:upto], self.values[layer, :, :, since:upto]

    def extended(
        self,
        layer: int,
        where: slice | Int[Tensor, "B n"],
        upto: int,
        since: int,
        new: tuple[Float[Tensor, "B H n size"], Float[Tensor, "B H n size"]],
    ) -> tuple[Float[Tensor, "B H m size"], Float[Tensor, "B H m size"]]:
        """Writes `new`, and reads what is there from `since` to `upto - 1` now."""
        self.write(layer, where, *new)
        return self.read(layer, upto, since)

    def turn(self, slots: Slots) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Cosines and sines of the angles at `slots`, `[1 or B, 1, n, size]`."""
        assert self.turns is not None
        cos, sin = self.turns
        if isinstance(where := slots.where, slice):
            return cos[:, :, where], sin[:, :, where]
        return cos[0, 0, where][:, None], sin[0, 0, where][:, None]


@dataclass(frozen=True)
class Caches:
    """What left-to-right decoding keeps: the causal branch's own cache, and what the diffusion branch reads of it.

    `exchange` holds the keys and values that the diffusion branch's layers make of the causal states (mutual exchange).
    """

    causal: KVCache
    exchange: KVCache | None = None
