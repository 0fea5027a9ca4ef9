"""Denoising score entropy (DSE; Lou, Meng and Ermon 2024), for score networks and for denoisers (Ou et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.concrete_score import process_of, score_entropy
from caddf.errors import Checked, InputError
from caddf.interface import LanguageModel
from caddf.objectives.loss import Loss, Times, draw_times
from caddf.schedules import SCHEDULES, LogLinear, Schedule, ScheduleName


@dataclass(frozen=True)
class ScoreEntropy:
    """E_t [ gamma(t) sum_i sum_{v != x_t,i} Q(x_t,i, v) (s_v - r_v log s_v + K(r_v)) ] (SEDD, eq. 10).

    With a score network this is SEDD: the process, and whether the score is scaled, are the network's. With a denoiser
    it is RADD-DSE, s = q e^-sbar / (1 - e^-sbar) (Ou et al. 2025): since q sums to one it equals t-DCE,
    term by term. `earliest` is the smallest t that is drawn (both papers' code has 1e-3).
    """

    schedule: Schedule = field(default_factory=LogLinear)
    times: Times = "stratified"
    earliest: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.earliest < 1:
            raise InputError(f"earliest is {self.earliest}; it must be 0 or more, and below 1")

    def nats(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Float[Tensor, "B L"]:
        """Weighted nats; their sum over a row estimates the diffusion term of the row's bound."""
        t = self.earliest + (1 - self.earliest) * draw_times(len(x0), self.times, generator)
        x_t = process_of(model).corrupt(x0, self.schedule.masked(t), generator)
        nats = score_entropy(model, x0, x_t, self.schedule.cumulative_rate(t))
        return (1 - self.earliest) * self.schedule.rate(t)[:, None].to(nats) * nats

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The mean over tokens."""
        total = self.nats(model, x0, generator).mean()
        return Loss(total, {"score_entropy": total.detach()})


@dataclass(frozen=True)
class ScoreEntropyConfig(Checked):
    """Settings of `ScoreEntropy`.

    schedule: of the noise.
    times: how the times of a batch are drawn.
    earliest: the smallest time that is drawn.
    """

    schedule: ScheduleName = "loglinear"
    times: Times = "stratified"
    earliest: float = 1e-3

    def build(self) -> ScoreEntropy:
        """The loss."""
        return ScoreEntropy(SCHEDULES[self.schedule](), self.times, self.earliest)
