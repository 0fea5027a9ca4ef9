"""Masked positions: how many of a row, with what weight, and which, drawn from noise.

Where `scored` marks some positions of a row, the others are given, and never masked.

Noise comes from one generator, or from one per row, which makes a row's result independent of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import inverse_cdf
from caddf.errors import InputError, at_least

Noise = torch.Generator | Sequence[torch.Generator]
"""CPU generators, moved on: one for all rows, or one per row."""


# Scored positions.


def counted(x0: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"] | None) -> tuple[Bool[Tensor, "B L"], int]:
    """Which positions are scored (on the CPU; all of them, if not said), and how many of each row.

    Raises `InputError` where that is not one number, or 0: rows of different numbers have different weights.
    """
    if scored is None:
        return torch.ones(x0.shape, dtype=torch.bool), x0.shape[1]
    if scored.shape != x0.shape or scored.dtype != torch.bool:
        raise InputError(
            f"scored has shape {tuple(scored.shape)} and type {scored.dtype}; a bool for each of the tokens "
            f"{tuple(x0.shape)} is needed"
        )
    least, most = scored.sum(-1).aminmax()
    if not 0 < least == most:
        raise InputError(f"scored marks {least} to {most} positions of a row; it must be one number, 1 or more")
    return scored.cpu(), int(most)


def nth(marked: Bool[Tensor, "B L"], n: Int[Tensor, "B ..."]) -> Int[Tensor, "B ..."]:
    """Where the `n`-th of the marked positions of each row is, counted from 0."""
    first = (~marked).long().argsort(dim=-1, stable=True)
    return first.gather(-1, n.view(len(n), -1)).view_as(n)


# Weights of the any-order bounds.


def binomial(length: int, p: float | Tensor) -> Float[Tensor, "*n L1"]:
    """P(k of `length` positions are masked), k = 0..L, each masked with probability `p`."""
    p = torch.as_tensor(p, dtype=torch.float64)[..., None]
    k, n = torch.arange(length + 1, dtype=torch.float64), torch.tensor(float(length), dtype=torch.float64)
    choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.exp(choices + torch.xlogy(k, p) + torch.special.xlog1py(n - k, -p))


def interval_weights(length: int, low: float, high: float) -> Float[Tensor, " L"]:
    """w of `int_low^high 1/lambda E[sum over masked of -log q] dlambda`; their sum is L (high - low).

    `int C(L, k) lambda^(k-1) (1-lambda)^(L-k) dlambda` is a Beta integral: w_k is the probability that the k-th
    smallest of L uniforms lies between `low` and `high`.
    """
    below = (
        binomial(length, torch.tensor([low, high], dtype=torch.float64)).flip(-1).cumsum(-1).flip(-1)[:, 1:]
    )  # P(k or more)
    return (below[1] - below[0]).clamp(min=0)


def step_weights(length: int, grid: Float[Tensor, " n1"]) -> Float[Tensor, " L"]:
    """w of `sum_j (1 - lambda_{j-1} / lambda_j) E_{lambda_j}[sum over masked of -log q]` over an increasing `grid`."""
    reveal = 1 - grid[:-1] / grid[1:]
    return (torch.arange(length + 1) * (reveal @ binomial(length, grid[1:])))[1:]


# Draws.


def uniform(shape: tuple[int, ...], noise: Noise) -> Float[Tensor, "B ..."]:
    """Uniforms in [0, 1), float64, row b from its own generator where there are several."""
    if isinstance(noise, torch.Generator):
        return torch.rand(shape, dtype=torch.float64, generator=noise)
    if len(noise) != shape[0]:
        raise InputError(f"there are {len(noise)} generators for {shape[0]} rows; give one, or one per row")
    return torch.stack([torch.rand(shape[1:], dtype=torch.float64, generator=own) for own in noise])


def strata(rows: int, samples: int, noise: Noise) -> Float[Tensor, "B S"]:
    """Uniforms in [0, 1), one in each of `samples` equal parts."""
    at_least(1, samples=samples)
    return (torch.arange(samples) + uniform((rows, samples), noise)) / samples


def draw_masks(
    shape: torch.Size,
    counts: Float[Tensor, " n1"],
    samples: int,
    noise: Noise,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Bool[Tensor, "samples B L"]:
    """Sets of masked positions: their size k = 0..n from the probabilities `counts`, stratified; uniform given k.

    They lie among the `scored` positions, n of each row.
    """
    rows, length = shape
    k = inverse_cdf(counts.expand(rows, samples, -1), strata(rows, samples, noise))
    place = uniform((rows, samples, length), noise)
    if scored is not None:
        place = place.where(scored[:, None], 1.0)  # behind all others
    rank = place.argsort(-1).argsort(-1)
    return (rank < k[..., None]).transpose(0, 1)
