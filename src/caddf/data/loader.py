"""Shuffled batches of windows: position in, position out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from caddf.errors import InputError, at_least, check_seed


@dataclass(frozen=True)
class Position:
    """What comes next: window number `offset` of the order of `epoch`."""

    epoch: int = 0
    offset: int = 0


class Batches:
    """Batches `[B, L]` of windows of `length` tokens, in an order drawn from `seed` and the epoch.

    An epoch cuts the tokens into windows from a random start in [0, L), so that borders move, and visits each window
    once; batches run on into the next epoch. `batch_size` counts the rows of all ranks together.
    Raises `InputError` where the tokens do not fill one window.
    """

    def __init__(self, tokens: Integer[np.ndarray, " T"], length: int, batch_size: int, seed: int) -> None:
        at_least(1, batch_size=batch_size)
        check_seed(seed)
        if len(tokens) < length:
            raise InputError(f"the training data has {len(tokens)} tokens; one window needs {length}")
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch_size, seed
        # Only remembers: the order is a function of the epoch.
        self._order: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(self._draw)

    def take(self, position: Position, rank: int = 0, world: int = 1) -> tuple[Int[Tensor, "b L"], Position]:
        """This rank's rows of the batch at `position` (b = B / world), int64, and the position after it."""
        if self.batch_size % world:
            raise InputError(f"batch_size is {self.batch_size}; it must be a multiple of the {world} processes")
        epoch, offset = position.epoch, position.offset
        if not 0 <= offset < len(self._order(epoch)):
            windows = len(self._order(epoch))
            raise InputError(
                f"the data position is window {offset} of {windows} in its epoch; it is that of other data"
            )
        starts: list[int] = []
        while len(starts) < self.batch_size:
            order = self._order(epoch)
            some = order[offset : offset + self.batch_size - len(starts)].tolist()
            starts += some
            offset += len(some)
            if offset == len(order):
                epoch, offset = epoch + 1, 0
        rows = [self.tokens[start : start + self.length] for start in starts[rank::world]]
        return torch.from_numpy(np.stack(rows).astype(np.int64)), Position(epoch, offset)

    def _draw(self, epoch: int) -> Integer[np.ndarray, " N"]:
        """Starts of the windows of an epoch, in the order in which they are visited."""
        draws = np.random.default_rng([self.seed, epoch])
        spare = len(self.tokens) - self.length
        first = draws.integers(min(self.length, spare + 1))
        return draws.permutation(np.arange(first, spare + 1, self.length))
