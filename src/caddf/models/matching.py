"""Equal numbers of parameters in all: the width and depth that bring a network to a given count."""

from __future__ import annotations

import dataclasses
import math
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


def matched(
    build: Callable[[BranchConfig], nn.Module], base: BranchConfig, parameters: int, step: int = 16
) -> BranchConfig:
    """The branch closest in shape to `base` with which `build` has `parameters` parameters, within 2%.

    Depth and width (in steps of `step`, where the base is wide) vary; heads keep their size as nearly as they can.
    A network's count is linear in its depth, or nearly so where another branch follows in proportion, in whole layers.
    Raises `InputError` where no such branch exists.
    """

    def total(branch: BranchConfig) -> int:
        return count(lambda: build(branch))

    found: list[tuple[float, BranchConfig]] = []
    for width, heads in _widths(base, step):
        two, four = (total(_shape(base, layers, width, heads)) for layers in (2, 4))
        depth = 2 + round(2 * (parameters - two) / (four - two))
        for layers in {max(1, depth + more) for more in (-1, 0, 1)}:
            error = abs(two + (layers - 2) * (four - two) / 2 - parameters) / parameters
            shape = abs(math.log((width / layers) / (base.width / base.layers)))
            if error <= TOLERANCE:
                found.append((shape + 10 * error, _shape(base, layers, width, heads)))
    for _, branch in sorted(found, key=lambda each: each[0]):
        if abs(total(branch) - parameters) <= TOLERANCE * parameters:
            return branch
    raise InputError(f"model.match is {parameters}; no width and depth come within 2% of so many parameters")


def _shape(base: BranchConfig, layers: int, width: int, heads: int) -> BranchConfig:
    return dataclasses.replace(base, layers=layers, width=width, heads=heads)


@lru_cache
def _widths(base: BranchConfig, step: int) -> tuple[tuple[int, int], ...]:
    """Widths from half to twice the base's, with a number of heads whose size is even and near the base's."""

    def options() -> Iterator[tuple[int, int]]:
        size, by = base.width // base.heads, step if base.width >= 128 else 2
        for width in range(base.width // 2 // by * by, 2 * base.width + 1, by):
            fits = [h for h in range(1, width + 1) if width % h == 0 and width // h % 2 == 0]
            if fits:
                yield width, min(fits, key=lambda h: abs(width // h - size))

    return tuple(options())
