"""Discrete-time diffusion with an x0 prediction: D3PM (Austin et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.concrete_score import ProcessName
from caddf.errors import InputError, at_least
from caddf.evaluation.d3pm import CHAINS, Chain
from caddf.interface import AnyOrder, LanguageModel
from caddf.objectives.loss import Loss, Times, draw_times


@dataclass(frozen=True)
class D3PM:
    """T E_t [ KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) + auxiliary * -log p~(x0 | x_t) ], t ~ U{1..T}.

    The first part is the bound (their eq. 1; the KL at t = 1 is the reconstruction term, and the prior term is zero),
    the second the cross-entropy of their eq. 5 over all positions, weighed per step as in the authors' code (which
    uses 0.01 for absorbing text models and 0 for uniform ones).

    process: absorbing or uniform.
    steps: T.
    auxiliary: weight of the cross-entropy.
    times: how the times of a batch are drawn.
    """

    process: ProcessName = "absorbing"
    steps: int = 1000
    auxiliary: float = 0.0
    times: Times = "stratified"

    def __post_init__(self) -> None:
        if self.process not in CHAINS:
            raise InputError(f"process is {self.process}; it must be one of {', '.join(CHAINS)}")
        at_least(1, self, "steps")
        at_least(0, self, "auxiliary")

    @property
    def chain(self) -> Chain:
        """The forward process."""
        return CHAINS[self.process](self.steps)

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The mean over tokens."""
        t = (draw_times(len(x0), self.times, generator) * self.steps).ceil().long()
        x_t, t = self.chain.corrupt(x0, t, model.vocab_size, generator), t.to(x0.device)
        states, _ = model(x_t, x_t, AnyOrder(self.chain.level(t)))
        bound = self.steps * self.chain.divergence(model, states, x0, x_t, t).mean()
        parts, total = {"denoise": bound.detach()}, bound
        if self.auxiliary:
            entropy = model.nll(states, torch.ones_like(x0, dtype=torch.bool), x0, model.denoiser).mean()
            parts["cross_entropy"], total = entropy.detach(), total + self.steps * self.auxiliary * entropy
        return Loss(total, parts)
