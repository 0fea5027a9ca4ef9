"""Noise schedules: the probability of being masked, and all that follows from it.

A schedule is two primitives, `sbar(t)` (cumulative rate) or `lambda(t)`, and its derivative; the rest is derived.
Times run from 0 (clean) to 1 (noisy); rates are per unit of t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from caddf.errors import InputError

MOST_STEPS = 1_000_000
"""Of a chain; with far fewer no two positions of a row are revealed in one step."""


class Schedule(ABC):
    """`masked(t)` is lambda(t), the probability that a token is masked at t; `slope(t)` its derivative."""

    @abstractmethod
    def masked(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """lambda(t) = 1 - exp(-sbar(t))."""

    @abstractmethod
    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d lambda / dt."""

    @abstractmethod
    def inverse(self, masked: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The time at which the probability of being masked is `masked`; within `limits` it lies in [0, 1]."""

    def kept(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - lambda(t) = e^-sbar; a schedule whose lambda reaches 1 gives it in a form that keeps its digits there."""
        return 1 - self.masked(t)

    def cumulative_rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sbar(t) = -log(1 - lambda(t)), from the smaller of lambda and 1 - lambda, which has the digits."""
        masked, kept = self.masked(t), self.kept(t)
        return torch.where(masked < kept, -torch.log1p(-masked), -torch.log(kept))

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """gamma(t) = d sbar / dt = lambda'(t) / (1 - lambda(t))."""
        return self.slope(t) / self.kept(t)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The time factor of t-DCE (eq. 8): gamma e^-sbar / (1 - e^-sbar) = lambda'(t) / lambda(t)."""
        return self.slope(t) / self.masked(t)

    def score_factor(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """e^-sbar / (1 - e^-sbar), which turns a conditional into a concrete score (eqs. 2, 3, 12)."""
        return self.kept(t) / self.masked(t)

    @property
    def limits(self) -> tuple[float, float]:
        """lambda(0) and lambda(1): what part of [0, 1] an integral over t covers."""
        low, high = self.masked(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def grid(self, steps: int, until: float = 0.0) -> Float[Tensor, " steps+1"]:
        """lambda at `steps + 1` evenly spaced times, rising from `until` to 1: the levels of an n-step chain.

        The ends are exactly those, whatever the schedule's limits: a chain starts all masked.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise InputError(f"steps is {steps}; it must lie between 1 and {MOST_STEPS:,}")
        start = self.inverse(torch.tensor(until, dtype=torch.float64)).clamp(0, 1).item()
        masked = self.masked(torch.linspace(start, 1, steps + 1, dtype=torch.float64)).clamp(min=until)
        masked[0], masked[-1] = until, 1.0
        return masked


@dataclass(frozen=True)
class LogLinear(Schedule):
    """sbar = -log1p(-(1 - eps) t), so lambda = (1 - eps) t (Lou et al. 2024; `eps` 1e-3)."""

    eps: float = 1e-3

    def masked(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(1 - eps) t."""
        return (1 - self.eps) * t

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - eps."""
        return torch.full_like(t, 1 - self.eps)

    def inverse(self, masked: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """lambda / (1 - eps)."""
        return masked / (1 - self.eps)


@dataclass(frozen=True)
class Geometric(Schedule):
    """sbar = smin^(1-t) smax^t (Lou et al. 2024; 1e-4 and 20)."""

    smin: float = 1e-4
    smax: float = 20.0

    def cumulative_rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """smin^(1-t) smax^t."""
        return self.smin ** (1 - t) * self.smax**t

    def masked(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - exp(-sbar)."""
        return -torch.expm1(-self.cumulative_rate(t))

    def kept(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """exp(-sbar)."""
        return torch.exp(-self.cumulative_rate(t))

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """gamma e^-sbar."""
        return self.rate(t) * self.kept(t)

    def rate(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """gamma = sbar log(smax / smin)."""
        return self.cumulative_rate(t) * math.log(self.smax / self.smin)

    def inverse(self, masked: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """log(sbar / smin) / log(smax / smin)."""
        return torch.log(-torch.log1p(-masked) / self.smin) / math.log(self.smax / self.smin)


@dataclass(frozen=True)
class Cosine(Schedule):
    """lambda = 1 - cos(pi t / 2) (Shi et al. 2024)."""

    def masked(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - cos(pi t / 2), as 2 sin^2(pi t / 4), which loses nothing near 0."""
        return 2 * torch.sin(math.pi * t / 4) ** 2

    def kept(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """cos(pi t / 2), as sin(pi (1 - t) / 2), which loses nothing near 1."""
        return torch.sin(math.pi * (1 - t) / 2)

    def slope(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(pi / 2) sin(pi t / 2)."""
        return math.pi / 2 * torch.sin(math.pi * t / 2)

    def inverse(self, masked: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(4 / pi) asin(sqrt(lambda / 2))."""
        return 4 / math.pi * torch.asin(torch.sqrt(masked / 2))


ScheduleName = Literal["loglinear", "geometric", "cosine"]
SCHEDULES: dict[ScheduleName, type[Schedule]] = {"loglinear": LogLinear, "geometric": Geometric, "cosine": Cosine}
LOG_LINEAR = LogLinear()
"""The schedule of a bound that is given none."""
