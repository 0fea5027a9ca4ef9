"""D3PM (Austin et al. 2021): diffusion in T discrete steps, absorbing or uniform, and its bound.

The bound (their eq. 1), in nats:

    L_T      KL(q(x_T | x0) || p(x_T)): zero, as lambda_T = 1 in both chains
    L_{t-1}  sum over t = 2..T of E KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))
    L_0      E -log p(x0 | x_1): the same KL at t = 1, where x_0 is known

The network gives p~(x0 | x_t) over the V real tokens, and a step back is (their eq. 4)

    p(x_{t-1} | x_t)  is proportional to  q(x_t | x_{t-1}) sum_x0 q(x_{t-1} | x0) p~(x0 | x_t).

At an unmasked position of the uniform chain the factor q(x_t | x_{t-1}) brings in what the token itself says of x0, so
the best p~ is p(x0_i | x_t but for its i-th token). Tokens are independent given x0, so all of this is token by token.

Where `scored` marks some positions, the chain is theirs alone: the others stay what they are, and L is the number of
the scored ones. A network of the uniform chain is not told which they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caddf.concrete_score import ProcessName
from caddf.errors import at_least
from caddf.evaluation.masks import Noise, counted, nth, strata, uniform
from caddf.evaluation.reading import Model, checked
from caddf.forward_process import mask_tokens, resample_tokens
from caddf.interface import AnyOrder, LanguageModel

LEAST_KEPT = 5e-4
"""The share of kept tokens that the network is told at the last step, where sbar is infinite."""
COSINE_OFFSET = 0.008
"""s of the cosine schedule (Nichol & Dhariwal 2021)."""


@dataclass(frozen=True)
class Chain(ABC):
    """A forward process in `steps` steps: `noised(t)` is lambda_t, the share of tokens noised by step t."""

    steps: int = 1000

    def __post_init__(self) -> None:
        at_least(1, self, "steps")

    @abstractmethod
    def noised(self, t: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """lambda_t, from 0 at t = 0 to 1 at t = T (float64)."""

    def level(self, t: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sbar at step t, which the network is told: -log(1 - lambda_t), finite at T too."""
        return -torch.log((1 - self.noised(t)).clamp(min=LEAST_KEPT))

    @abstractmethod
    def corrupt(
        self, x0: Int[Tensor, "B L"], t: Int[Tensor, " B"], vocab_size: int, generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """x_t ~ q(x_t | x0)."""

    @abstractmethod
    def divergence(
        self,
        model: LanguageModel,
        states: object,
        x0: Int[Tensor, "B L"],
        x_t: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
    ) -> Float[Tensor, "B L"]:
        """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) at each position (nats); L_{t-1}, and L_0 at t = 1."""

    @abstractmethod
    def estimate(
        self,
        model: LanguageModel,
        x0: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
        u: Float[Tensor, "B L1"],
        scored: Bool[Tensor, "B L"],
    ) -> Float[Tensor, " B"]:
        """T times the divergence at t, summed over the scored positions, as many in each row (on the CPU).

        For one x_t made of the uniforms `u`, L + 1 a row.
        """


class AbsorbingChain(Chain):
    """beta_t = 1 / (T - t + 1), their mutual-information schedule for `[M]`: lambda_t = t / T."""

    def noised(self, t: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """t / T."""
        return t.double() / self.steps

    def corrupt(
        self, x0: Int[Tensor, "B L"], t: Int[Tensor, " B"], vocab_size: int, generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """Each token masked with probability t / T."""
        return mask_tokens(x0, self.noised(t), vocab_size, generator)

    def divergence(
        self,
        model: LanguageModel,
        states: object,
        x0: Int[Tensor, "B L"],
        x_t: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
    ) -> Float[Tensor, "B L"]:
        """-log p~(x0 | x_t) / t where masked: q reveals with probability 1 / t, and p agrees on everything else."""
        nats = self._nats(model, states, x0, x_t == model.mask_id)
        return nats / t[:, None].to(nats)

    def estimate(
        self,
        model: LanguageModel,
        x0: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
        u: Float[Tensor, "B L1"],
        scored: Bool[Tensor, "B L"],
    ) -> Float[Tensor, " B"]:
        """L times the mean nats of the masked positions, one of which is masked whatever the others are.

        T / t times the sum over masked positions has weights up to T. Masked sets S drawn in proportion to |S| P(S)
        take them out: a uniform position, and the others with probability t / T, are such a set, and E_P |S| = L t / T.
        """
        count = scored.sum(-1)
        sure = F.one_hot(nth(scored, (u[:, -1] * count).long()), x0.shape[1]).bool()
        masked = ((u[:, :-1] < self.noised(t)[:, None]) & scored | sure).to(x0.device)
        x_t = torch.where(masked, model.mask_id, x0)
        states, _ = model(x_t, x_t, AnyOrder(self.level(t).to(x0.device)))
        nats = self._nats(model, states, x0, masked).double().sum(-1)
        return count * nats.cpu() / masked.sum(-1).cpu()

    def _nats(
        self, model: LanguageModel, states: object, x0: Int[Tensor, "B L"], masked: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        nats = model.nll(states, masked, x0, model.denoiser)
        return torch.zeros(x0.shape, dtype=nats.dtype, device=x0.device).masked_scatter(masked, nats)


class UniformChain(Chain):
    """Tokens are redrawn uniformly, on the cosine schedule (Hoogeboom et al. 2021): 1 - lambda_t = f(t) / f(0).

    f(t) = cos((t / T + s) / (1 + s) pi / 2), which is sin(a (1 - t / T)) with a = pi / 2 / (1 + s). The authors' code
    clips beta_T at 0.999; here lambda_T is 1, and there is no prior term.
    """

    def noised(self, t: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - sin(a (1 - t / T)) / sin(a)."""
        a = math.pi / 2 / (1 + COSINE_OFFSET)
        start = torch.full((), a, dtype=torch.float64, device=t.device).sin()
        return 1 - torch.sin(a * (1 - t.double() / self.steps)) / start

    def corrupt(
        self, x0: Int[Tensor, "B L"], t: Int[Tensor, " B"], vocab_size: int, generator: torch.Generator
    ) -> Int[Tensor, "B L"]:
        """Each token redrawn with probability lambda_t."""
        return resample_tokens(x0, self.noised(t), vocab_size, generator)

    def likelihood(
        self, x_t: Int[Tensor, " N"], t: Int[Tensor, " N"], like: Float[Tensor, "N V"]
    ) -> Float[Tensor, "N V"]:
        """q(x_t | x_{t-1}) for every x_{t-1}."""
        step = (1 - self.noised(t)) / (1 - self.noised(t - 1))
        fresh, stay = ((1 - step) / like.shape[-1])[:, None].to(like), step[:, None].to(like)
        return fresh + stay * F.one_hot(x_t, like.shape[-1])

    def back(self, p0: Float[Tensor, "N V"], x_t: Int[Tensor, " N"], t: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """p(x_{t-1} | x_t) of eq. 4, from p~(x0 | x_t)."""
        noised = self.noised(t - 1)[:, None].to(p0)
        weight = self.likelihood(x_t, t, p0) * ((1 - noised) * p0 + noised / p0.shape[-1])
        return weight / weight.sum(-1, keepdim=True)

    def divergence(
        self,
        model: LanguageModel,
        states: object,
        x0: Int[Tensor, "B L"],
        x_t: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
        elements: int = 1 << 25,
    ) -> Float[Tensor, "B L"]:
        """The KL at every position, for at most `elements` probabilities (or one row's) at a time.

        Beyond one chunk they are made again in the backward pass. In the precision of the log-probabilities, or in
        float64 where no gradient is asked for.
        """

        def divergence(states: object, where: Bool[Tensor, "B L"], at: Int[Tensor, " N"]) -> Tensor:
            log_p0 = model.log_probs(states, where, model.denoiser)
            return self._divergence(log_p0 if torch.is_grad_enabled() else log_p0.double(), x0[where], x_t[where], at)

        chunks = torch.arange(len(x0)).split(max(1, elements // (x0.shape[1] * model.vocab_size)))
        parts = []
        for rows in chunks:
            where = torch.zeros_like(x0, dtype=torch.bool)
            where[rows] = True
            at = t[:, None].expand_as(x0)[where]
            if len(chunks) == 1:
                parts.append(divergence(states, where, at))
            else:
                parts.append(checkpoint(divergence, states, where, at, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(parts).view(x0.shape)

    def _divergence(
        self, log_p0: Float[Tensor, "N V"], x0: Int[Tensor, " N"], x_t: Int[Tensor, " N"], t: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """Sum over x_{t-1} of q log(q / p)."""
        q = self.back(F.one_hot(x0, log_p0.shape[-1]).to(log_p0), x_t, t)
        noised = self.noised(t - 1)[:, None]
        kept, fresh = (1 - noised).log().to(log_p0), (noised / log_p0.shape[-1]).log().to(log_p0)
        log_p = self.likelihood(x_t, t, log_p0).log() + torch.logaddexp(kept + log_p0, fresh)
        log_p = log_p.log_softmax(-1)
        return (torch.xlogy(q, q) - q * log_p).sum(-1)

    def estimate(
        self,
        model: LanguageModel,
        x0: Int[Tensor, "B L"],
        t: Int[Tensor, " B"],
        u: Float[Tensor, "B L1"],
        scored: Bool[Tensor, "B L"],
    ) -> Float[Tensor, " B"]:
        """A uniform below lambda_t is a fresh token, and says which."""
        noised, u = self.noised(t)[:, None], u[:, :-1]
        fresh = (u / noised * model.vocab_size).long().clamp(max=model.vocab_size - 1)
        x_t = torch.where(((u < noised) & scored).to(x0.device), fresh.to(x0.device), x0)
        at = t.to(x0.device)
        states, _ = model(x_t, x_t, AnyOrder(self.level(at)))
        nats = self.divergence(model, states, x0, x_t, at).double().where(scored.to(x0.device), 0)
        return (self.steps * nats.sum(-1)).cpu()


CHAINS: dict[ProcessName, type[Chain]] = {"absorbing": AbsorbingChain, "uniform": UniformChain}


@torch.no_grad()
def d3pm_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    process: ProcessName = "absorbing",
    steps: int = 1000,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """The bound of the T-step chain, one evaluation per sample: t is uniform, stratified over the samples of a row."""
    model, chain = checked(model, x0, vocab_size), CHAINS[process](steps)
    scored, _ = counted(x0, scored)
    t = (strata(len(x0), samples, noise) * steps).long().clamp(max=steps - 1) + 1
    u = uniform((len(x0), samples, x0.shape[1] + 1), noise)
    return torch.stack([chain.estimate(model, x0, t[:, s], u[:, s], scored) for s in range(samples)], -1)
