"""Categorical distributions: warping, and draws that do not depend on the batch.

Draws are by inverse CDF in float64 from uniforms that belong to the row: float32 Gumbel noise lowers the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import Checked, InputError, a_share, at_least

COLDEST = 1e-6
"""The least temperature above 0: log-probabilities are divided by it."""


@dataclass(frozen=True)
class Warp(Checked):
    """Temperature, top-k, top-p and min-p, applied in this order; the same warp serves drafts and target.

    `temperature` 0 is greedy: all probability on the arg max. `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.
    `banned` tokens are never drawn (EOS inside a template, say).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature == 0 or COLDEST <= self.temperature < math.inf):
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (greedy), or finite and at least {COLDEST:g}"
            )
        at_least(0, self, "top_k", note="0: off")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        a_share(self, "min_p")

    @property
    def plain(self) -> bool:
        """Whether there is nothing but a temperature."""
        return not self.banned and self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    def __call__(self, log_probs: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """Probabilities (not logs) in float64 after the warp; they sum to one, or are NaN where `log_probs` are."""
        log_probs = log_probs.double()
        if self.banned:
            log_probs = log_probs.index_fill(-1, torch.tensor(self.banned, device=log_probs.device), -torch.inf)
        if self.temperature == 0:
            top, token = log_probs.max(-1, keepdim=True)
            return torch.zeros_like(log_probs).scatter_(-1, token, 1 + 0 * top)
        p = torch.softmax(log_probs if self.temperature == 1 else log_probs / self.temperature, -1)
        if self.top_k and self.top_k < p.shape[-1]:
            kept = torch.zeros_like(p).scatter(-1, p.topk(self.top_k, -1).indices, 1.0)
            p = p * kept
            p = p / p.sum(-1, keepdim=True)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            p = torch.zeros_like(p).scatter(-1, index, ordered * (before < self.top_p))
            p = p / p.sum(-1, keepdim=True)
        if self.min_p > 0:
            p = p * (p >= self.min_p * p.amax(-1, keepdim=True))
            p = p / p.sum(-1, keepdim=True)
        return p

    def draw(self, log_probs: Float[Tensor, "*N V"], u: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """A token of each distribution after the warp, by inverse CDF; the arg max, and no float64, where greedy."""
        if self.temperature == 0 and not self.banned:
            return arg_max(log_probs)
        return inverse_cdf(self(log_probs), u)


def arg_max(log_probs: Float[Tensor, "*N V"]) -> Int[Tensor, "*N"]:
    """The most probable token; V, which is no token, where probabilities are not numbers."""
    top, token = log_probs.max(-1)
    return torch.where(top.isfinite(), token, log_probs.shape[-1])


def inverse_cdf(probs: Float[Tensor, "*N V"], u: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """The token whose cumulative probability first exceeds `u` in [0, 1); never one of probability zero.

    V, which is no token, where probabilities are not numbers.
    """
    cdf = probs.double().cumsum(-1)
    # In float64 too, 1 - 2^-53 times the total is less than the total.
    below = u.double().clamp(max=1 - 2**-53)[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, below, right=True)[..., 0]


class RowGenerators:
    """One generator per row, seeded `seed + row`: a row draws what it would draw alone."""

    def __init__(self, seed: int, rows: int | Sequence[int]) -> None:
        indices = range(rows) if isinstance(rows, int) else rows
        self.generators = [torch.Generator().manual_seed(seed + r) for r in indices]

    def several(self, rows: Bool[Tensor, " B"], count: int) -> Float[Tensor, "B n"]:
        """As many uniforms of each of the marked rows, and 0 for others."""
        if len(self.generators) == 1 and rows.item():
            return torch.rand(1, count, dtype=torch.float64, generator=self.generators[0])
        return self.uniform(rows[:, None].expand(-1, count))

    def uniform(self, where: Bool[Tensor, " B *N"]) -> Float[Tensor, " B *N"]:
        """Uniforms in [0, 1), float64 on the CPU, at the marked places and 0 elsewhere.

        Row r draws as many as it has marks, in order: what other rows mark, or how wide the tensor is, changes nothing.
        """
        where, most = where.cpu(), math.prod(where.shape[1:])
        counts = where.reshape(len(where), most).sum(1).tolist()
        drawn = [torch.rand(n, dtype=torch.float64, generator=g) for n, g in zip(counts, self.generators, strict=True)]
        if all(n == most for n in counts):
            return torch.stack(drawn).view(where.shape)
        return torch.zeros(where.shape, dtype=torch.float64).masked_scatter_(where, torch.cat(drawn))
