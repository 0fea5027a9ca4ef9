"""What tests of draws share: noise, tasks for decoders, and how likely what was drawn is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.categorical import RowGenerators, Warp
from caddf.decoding.task import Frame, Task


def generator(seed: int = 0) -> torch.Generator:
    """Noise of its own."""
    return torch.Generator().manual_seed(seed)


def task(
    model, tokens: Tensor | Sequence[Sequence[int]], *, seed: int = 0, rows: Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None, warp: Warp | None = None, **settings,
) -> Task:  # fmt: skip
    """Rows of `lengths` tokens, all if not given, which draw as `rows` of a batch do."""
    tokens = torch.as_tensor(tokens)
    lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else torch.as_tensor(lengths)
    generators = RowGenerators(seed, len(tokens) if rows is None else rows)
    return Task(tokens, lengths, model.mask_id, generators, warp or Warp(), **settings)


def last(frames: Iterable[Frame]) -> Frame:
    """The last of them."""
    return deque(frames, maxlen=1).pop()


def p_value(drawn: Int[Tensor, "N L"], p: Float[Tensor, " S"]) -> float:
    """By chi-squared, the chance of draws as far from `p`, which is of all V^L sequences in order; rare ones pooled."""
    size = round(len(p) ** (1 / drawn.shape[1]))
    seen = torch.bincount(drawn @ size ** torch.arange(drawn.shape[1] - 1, -1, -1), minlength=len(p)).double()
    expected = p.double() * len(drawn)
    assert expected.sum() == pytest.approx(len(drawn)) and not seen[p == 0].any()
    rare = expected < 5
    pooled = [torch.cat([n[~rare], n[rare].sum()[None]]) for n in (seen, expected)]
    seen, expected = (n[pooled[1] > 0] for n in pooled)
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2), statistic / 2))
