"""Equal numbers of parameters in all: the width and depth that bring a network to a given count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import nn

from caddf.errors import InputError
from caddf.models.config import BranchConfig

TOLERANCE = 0.02
"""How far, as a share, a matched count may be from what was asked for."""


def count(build: Callable[[], nn.Module]) -> int:
    """Parameters of a network, without making its weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def matched(build: Callable[[BranchConfig], nn.Module], base: BranchConfig, parameters: int) -> BranchConfig:
    """The branch closest in shape to `base` with which `build` has `parameters` parameters, within 2%.

    Depth and width vary; heads keep their size as nearly as they can. A network's count is linear in its depth.
    Raises `InputError` where no such branch exists.
    """

    def total(layers: int, width: int, heads: int) -> int:
        return count(lambda: build(_shape(base, layers, width, heads)))

    best: tuple[float, BranchConfig] | None = None
    for width, heads in _widths(base):
        one, two = total(1, width, heads), total(2, width, heads)
        for depth in {max(1, round((parameters - one) / (two - one)) + 1 + step) for step in (-1, 0, 1)}:
            error = abs(one + (depth - 1) * (two - one) - parameters) / parameters
            shape = abs(torch.tensor((width / depth) / (base.width / base.layers)).log().item())
            if error <= TOLERANCE and (best is None or shape + 10 * error < best[0]):
                best = (shape + 10 * error, _shape(base, depth, width, heads))
    if best is None:
        raise InputError(f"model.match is {parameters}; no width and depth come within 2% of so many parameters")
    return best[1]


def _shape(base: BranchConfig, layers: int, width: int, heads: int) -> BranchConfig:
    return dataclasses.replace(base, layers=layers, width=width, heads=heads)


@lru_cache
def _widths(base: BranchConfig) -> tuple[tuple[int, int], ...]:
    """Widths from half to twice the base's, with a number of heads whose size is even and near the base's."""

    def options() -> Iterator[tuple[int, int]]:
        size, step = base.width // base.heads, 16 if base.width >= 128 else 2
        for width in range(base.width // 2 // step * step, 2 * base.width + 1, step):
            fits = [h for h in range(1, width + 1) if width % h == 0 and width // h % 2 == 0]
            if fits:
                yield width, min(fits, key=lambda h: abs(width // h - size))

    return tuple(options())
