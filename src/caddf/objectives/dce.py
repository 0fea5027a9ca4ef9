"""Denoising cross-entropy: lambda-DCE (eq. 9) and t-DCE (eq. 8), of Ou et al. 2025."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.errors import InputError
from caddf.forward_process import mask_tokens
from caddf.interface import AnyOrder, LanguageModel
from caddf.objectives.heads import Term
from caddf.objectives.loss import Loss, Times, draw_times, nats_at, weights_like
from caddf.objectives.reading import ByReadings, Reading
from caddf.schedules import LogLinear, Schedule


class Denoising(ByReadings):
    """E [ weight * sum over masked i of -log q(x0_i | x_t) ]: the forms differ in how x_t and its weight are drawn."""

    @abstractmethod
    def draw(
        self, x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
        """x_t, and the weight of each row."""

    def nats(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Float[Tensor, "B L"]:
        """Weighted nats; their sum over a row estimates the row's bound."""
        x_t, weight = self.draw(x0, model.mask_id, generator)
        states, _ = model(x_t, x_t, AnyOrder())
        nats = nats_at(model, states, x_t == model.mask_id, x0, model.denoiser)
        return weight[:, None].to(nats) * nats

    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """One, scored by the mean over tokens."""
        x_t, weight = self.draw(x0, model.mask_id, generator)
        weights = (x_t == model.mask_id) * weights_like(x0, weight[:, None])
        terms = {model.denoiser: Term(weights)}
        return [Reading(x0, x_t, x_t, AnyOrder(), terms, {model.denoiser: "denoise"})]


@dataclass(frozen=True)
class LambdaDCE(Denoising):
    """Eq. 9: lambda ~ U(0, 1], each token masked with probability lambda, weight 1 / lambda."""

    times: Times = "stratified"

    def draw(
        self, x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
        """x_lambda and 1 / lambda."""
        masked = draw_times(len(x0), self.times, generator)
        return mask_tokens(x0, masked, mask_id, generator), 1 / masked


@dataclass(frozen=True)
class TimeDCE(Denoising):
    """Eq. 8: t ~ U(0, 1], weight gamma e^-sbar / (1 - e^-sbar).

    The logarithm of eq. 8 also holds the time factor e^-sbar / (1 - e^-sbar). Over lambda in [0, 1] its part
    integrates to zero: it moves no gradient and is variance alone. `time_term` adds it, to see that.
    """

    schedule: Schedule = field(default_factory=LogLinear)
    times: Times = "stratified"
    time_term: bool = False

    def draw(
        self, x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
        """x_t and the time factor of eq. 8."""
        x_t, t = self._corrupt(x0, mask_id, generator)
        return x_t, self.schedule.weight(t)

    def nats(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Float[Tensor, "B L"]:
        """Weighted nats, with the time term where it is asked for."""
        if not self.time_term:
            return super().nats(model, x0, generator)
        x_t, t = self._corrupt(x0, model.mask_id, generator)
        where = x_t == model.mask_id
        states, _ = model(x_t, x_t, AnyOrder())
        nats = nats_at(model, states, where, x0, model.denoiser)
        term = where * self.schedule.score_factor(t).log()[:, None].to(nats)
        return self.schedule.weight(t)[:, None].to(nats) * (nats - term)

    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """One, as of all denoising; raises `InputError` with the time term, which no head is scored for."""
        if self.time_term:
            raise InputError("time_term is true, which is no cross-entropy of what is read; leave it out")
        return super().readings(model, x0, generator)

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The mean over tokens, with the time term where it is asked for."""
        if not self.time_term:
            return super().__call__(model, x0, generator)
        total = self.nats(model, x0, generator).mean()
        return Loss(total, {"denoise": total.detach()})

    def _corrupt(
        self, x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
        t = draw_times(len(x0), self.times, generator)
        return mask_tokens(x0, self.schedule.masked(t), mask_id, generator), t
