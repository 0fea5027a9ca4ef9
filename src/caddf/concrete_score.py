"""Concrete scores `s(x_t)[i, v] = p_t(x_t with v at i) / p_t(x_t)`: what is learned of them, and steps made of them.

A process is the forward chain of one token in the cumulative rate sbar. Its rate matrix Q says which scores count
(absorbing: those of the V tokens at a masked position; uniform: of all tokens, at rate 1/V each), and turns scores into
steps of the reverse chain. Lou, Meng and Ermon 2024 (SEDD); N marks positions, W is V.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caddf.forward_process import mask_tokens, resample_tokens
from caddf.interface import AnyOrder, LanguageModel

ProcessName = Literal["absorbing", "uniform"]


@runtime_checkable
class ScoreModel(LanguageModel, Protocol):
    """A network whose output is a score: `process` names the chain it belongs to."""

    process: ProcessName

    def log_scores(self, states: Any, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """log s at the marked positions, in float32 or better; 0 at the token that stands there."""


def log_scores(
    model: LanguageModel, states: Any, where: Bool[Tensor, "B L"], level: Float[Tensor, " B"]
) -> Float[Tensor, "N V"]:
    """log s of a score network, or of a denoiser of the absorbing process: s = q e^-sbar / (1 - e^-sbar) (eq. 3)."""
    if isinstance(model, ScoreModel):
        return model.log_scores(states, where)
    log_q = model.log_probs(states, where, model.denoiser)
    return log_q - torch.expm1(marked(level, where)).log()[:, None].to(log_q)


def marked(level: Float[Tensor, " B"], where: Bool[Tensor, "B L"]) -> Float[Tensor, " N"]:
    """The level of the row that each marked position lies in."""
    return level.to(where.device)[where.nonzero()[:, 0]]


@dataclass(frozen=True)
class Step:
    """One reverse step of each position: whether it moves, and if so, where to (`log_to` need not be normalised)."""

    move: Float[Tensor, " N"]
    log_to: Float[Tensor, "N V"]


@dataclass(frozen=True)
class Process(ABC):
    """The forward chain of one token over `vocab_size` tokens (and `[M]`, for absorbing)."""

    vocab_size: int

    @abstractmethod
    def corrupt(
        self, x0: Int[Tensor, "B L"], noised: Float[Tensor, " B"], generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """x_t, each token hit with probability `noised` = 1 - e^-sbar."""

    @abstractmethod
    def noisy(self, x_t: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """The positions that the reverse chain may change."""

    @abstractmethod
    def entropy(
        self,
        log_s: Float[Tensor, "N V"],
        x_t: Int[Tensor, " N"],
        x0: Int[Tensor, " N"],
        level: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """`sum over v != x_t of Q(x_t, v) (s_v - r_v log s_v + K(r_v))`, r_v = p(v | x0) / p(x_t | x0) at `level`.

        K(a) = a (log a - 1) makes each term 0 at s_v = r_v, and positive elsewhere (SEDD, eqs. 5, 10).
        """

    @abstractmethod
    def euler(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """A step of length `distance` in sbar at the reverse rates Q(x_t, v) s_v (SEDD, eq. 17)."""

    @abstractmethod
    def tweedie(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """p(x_s | x_t) for s at `distance` in sbar below: exact for a single position with the true score.

        `(exp(-distance Q) s)_v exp(distance Q)(x_t, v)` (SEDD, eq. 19; authors' "analytic").
        """

    @abstractmethod
    def denoise(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], level: float) -> Step:
        """All that is left of the way, from `level` to clean tokens: what still is noise is removed (SEDD, eq. 18)."""


class Absorbing(Process):
    """Q takes each token to `[M]` at rate 1: a masked token has a way back to each v, any other has none."""

    def corrupt(
        self, x0: Int[Tensor, "B L"], noised: Float[Tensor, " B"], generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """Masks."""
        return mask_tokens(x0, noised, self.vocab_size, generator)

    def noisy(self, x_t: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """The masked positions."""
        return x_t == self.vocab_size

    def entropy(
        self,
        log_s: Float[Tensor, "N V"],
        x_t: Int[Tensor, " N"],
        x0: Int[Tensor, " N"],
        level: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """r is `a = 1 / (e^sbar - 1)` at x0 and 0 elsewhere, so `a (sum_v s_v / a - 1 - log(s_x0 / a))`."""
        log_a = -torch.expm1(level).log().to(log_s)
        at_x0 = log_s.gather(-1, x0[:, None])[:, 0] - log_a
        return log_a.exp() * ((log_s.logsumexp(-1) - log_a).exp() - 1 - at_x0)

    def euler(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """Reveals at the rate of all tokens together."""
        return Step((distance * log_s.logsumexp(-1).exp()).clamp(max=1), log_s)

    def tweedie(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """Reveals v with probability `(e^distance - 1) s_v`."""
        return Step((math.expm1(distance) * log_s.logsumexp(-1).exp()).clamp(max=1), log_s)

    def denoise(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], level: float) -> Step:
        """Reveals, in proportion to the scores."""
        return Step(torch.ones_like(log_s[:, 0]), log_s)


class Uniform(Process):
    """Q takes each token to each other one at rate 1/V (as the authors' code has it; their eq. 15 has rate 1)."""

    def corrupt(
        self, x0: Int[Tensor, "B L"], noised: Float[Tensor, " B"], generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """Resamples."""
        return resample_tokens(x0, noised, self.vocab_size, generator)

    def noisy(self, x_t: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """All positions."""
        return torch.ones_like(x_t, dtype=torch.bool)

    def entropy(
        self,
        log_s: Float[Tensor, "N V"],
        x_t: Int[Tensor, " N"],
        x0: Int[Tensor, " N"],
        level: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """With `rho = p(v | x0) / p(x0 | x0)`, v != x0: r is rho where x_t = x0, else 1 / rho at x0 and 1 elsewhere.

        With s = r = 1 at x_t itself that token's term is 0, and the sums may run over all V.
        """
        size = self.vocab_size
        rho = 1 / (1 + size / torch.expm1(level))
        log_rho, rho = rho.log().to(log_s), rho.to(log_s)
        others, at_x0 = log_s.sum(-1), log_s.gather(-1, x0[:, None])[:, 0]
        unmoved = rho * others - (size - 1) * rho * (log_rho - 1) + 1
        moved = others + (1 / rho - 1) * at_x0 - (-log_rho - 1) / rho + (size - 1)
        return (log_s.logsumexp(-1).exp() - torch.where(x_t == x0, unmoved, moved)) / size

    def euler(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """Moves at the rate of all other tokens together."""
        log_to = log_s.scatter(-1, x_t[:, None], -torch.inf)
        return Step((distance / self.vocab_size * log_to.logsumexp(-1).exp()).clamp(max=1), log_to)

    def tweedie(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], distance: float) -> Step:
        """`e^distance (s_v - (1 - e^-distance) mean_u s_u)` times the way from v to x_t; below 0 it counts as 0.

        It is the true probability with the true score; a network's may miss.
        """
        noised, s = -math.expm1(-distance), log_s.double().exp()
        earlier = (s - noised * s.mean(-1, keepdim=True)).clamp(min=0)
        p = earlier * noised / self.vocab_size
        stay = earlier.gather(-1, x_t[:, None])[:, 0] * (1 - noised + noised / self.vocab_size)
        p = p.scatter(-1, x_t[:, None], 0.0)
        move = p.sum(-1)
        # Nothing to move to: then `move` is 0 too, and where to does not matter.
        return Step((move / (move + stay)).nan_to_num(0), torch.where(move > 0, p.T, 1.0).T.log())

    def denoise(self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], level: float) -> Step:
        """Tweedie's step all the way."""
        return self.tweedie(log_s, x_t, level)

    def log_posterior(
        self, log_s: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], level: Float[Tensor, " N"]
    ) -> Float[Tensor, "N V"]:
        """A normalised log p(x0_i | x_t), positive everywhere: in proportion to `s_v p(x_t | v)`.

        It is `tweedie` to first order in `level`; unlike that it cannot call the truth impossible.
        """
        moved = -torch.expm1(-level) / self.vocab_size
        log_way = (
            moved.log()[:, None].expand_as(log_s).scatter(-1, x_t[:, None], (moved + (-level).exp()).log()[:, None])
        )
        return (log_s + log_way).log_softmax(-1)


PROCESSES: dict[ProcessName, type[Process]] = {"absorbing": Absorbing, "uniform": Uniform}


def process_of(model: LanguageModel) -> Process:
    """The chain whose scores `model` gives; a denoiser's is the absorbing one."""
    return PROCESSES[model.process if isinstance(model, ScoreModel) else "absorbing"](model.vocab_size)


def score_entropy(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    x_t: Int[Tensor, "B L"],
    level: Float[Tensor, " B"],
    elements: int = 1 << 24,
) -> Float[Tensor, "B L"]:
    """Score entropy of each position, in nats per unit of sbar; 0 where nothing can change.

    At most `elements` scores (or one row's) at a time; beyond one part they are made again in the backward pass.
    """
    process = process_of(model)
    where, level = process.noisy(x_t), level.to(x_t.device)
    states, _ = model(x_t, x_t, AnyOrder(level))

    def entropy(part: Bool[Tensor, "B L"]) -> Float[Tensor, " N"]:
        return process.entropy(log_scores(model, states, part, level), x_t[part], x0[part], marked(level, part))

    rows = torch.arange(len(x0), device=x0.device)
    size = max(1, elements // (x0.shape[1] * model.vocab_size))
    if len(rows) <= size:
        nats = entropy(where)
    else:
        parts = [where & (rows // size == i)[:, None] for i in range(-(-len(rows) // size))]
        nats = torch.cat([checkpoint(entropy, part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    return torch.zeros(x0.shape, dtype=nats.dtype, device=x0.device).masked_scatter(where, nats)
