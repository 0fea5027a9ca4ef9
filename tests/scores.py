"""Exact scores of known sources, and score networks made of tables, as models (float64)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caddf.interface import AnyOrder, Pattern


def transitions(process: str, size: int, level: float | Tensor) -> Tensor:
    """P[..., v, u] = p(x_t = v | x_0 = u), exponentials of the rate matrix; `[M]` is the last state of absorbing."""
    if process == "uniform":
        rates = torch.full((size, size), 1 / size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)
    else:
        rates = -torch.eye(size + 1, dtype=torch.float64)
        rates[size] += 1
    return torch.linalg.matrix_exp(torch.as_tensor(level, dtype=torch.float64)[..., None, None] * rates)


@dataclass(frozen=True)
class Read:
    canvas: Tensor
    level: Tensor


class Source:
    """The exact score of p0 (a table), from the table of p_t; times exp of `noise` where a network's errors are wanted.

    Scores of impossible neighbours are 0, and given as 1e-300.
    """

    heads, denoiser, chained, block_size = frozenset({"draft"}), "draft", False, 1

    def __init__(self, p0: Tensor, process: str, noise: float = 0.0, seed: int = 0) -> None:
        self.p0, self.process, self.vocab_size = p0, process, p0.shape[0]
        self.mask_id = self.vocab_size
        width = self.vocab_size + (process == "absorbing")
        generator = torch.Generator().manual_seed(seed)
        self.noise = noise * torch.randn(
            (*[width] * p0.ndim, p0.ndim, self.vocab_size), dtype=torch.float64, generator=generator
        )

    def marginals(self, levels: Tensor) -> Tensor:
        """The tables of p_t at each level, `[n, ...]`."""
        way = transitions(self.process, self.vocab_size, levels)[..., : self.vocab_size]
        tables = self.p0.expand(len(levels), *self.p0.shape)
        for axis in range(1, tables.ndim):
            front = tables.movedim(axis, 1)
            moved = way @ front.reshape(len(levels), self.vocab_size, -1)
            tables = moved.reshape(len(levels), -1, *front.shape[2:]).movedim(1, axis)
        return tables

    def __call__(self, prefix: Tensor, canvas: Tensor, pattern: Pattern, caches: Any = None) -> tuple[Read, None]:
        assert isinstance(pattern, AnyOrder) and pattern.level is not None and torch.equal(prefix, canvas)
        return Read(canvas, pattern.level), None

    def log_scores(self, states: Read, where: Tensor) -> Tensor:
        """From p_t, at all places; then those that are read."""
        x, size = states.canvas, self.vocab_size
        row, tables = torch.arange(len(x)), self.marginals(states.level)
        here, out = tables[row, *x.unbind(-1)], []
        for i in range(x.shape[1]):
            neighbours = x[:, None].repeat(1, size, 1)
            neighbours[..., i] = torch.arange(size)
            ratio = tables[row[:, None], *neighbours.unbind(-1)] / here[:, None]
            out.append(ratio.clamp(min=1e-300).log() + self.noise[(*x.unbind(-1), i)])
        out = torch.stack(out, 1)
        if self.process == "uniform":
            out = out.scatter(-1, states.canvas[..., None], 0.0)
        return out[where]

    def log_probs(self, states: Read, where: Tensor, head: str = "draft") -> Tensor:
        """The absorbing posterior."""
        return self.log_scores(states, where).log_softmax(-1)

    def nll(self, states: Read, where: Tensor, targets: Tensor, head: str = "draft") -> Tensor:
        """-log_probs of targets."""
        return -self.log_probs(states, where).gather(-1, targets[where][:, None])[:, 0]
