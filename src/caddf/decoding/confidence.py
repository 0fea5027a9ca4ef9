"""Commit what is sure: confidence, margin and entropy-bounded decoding. Heuristics, without a likelihood."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from caddf.decoding.task import NO_TOKEN, Counts, DecodingError, Frame, Task, denoise, draw, full_pass
from caddf.errors import Checked, at_least
from caddf.interface import LanguageModel


class SurestFirst:
    """Each step reads every open position, and draws those that `commit` picks, at least one a row.

    Sureness is compared in units far above rounding, and of equals the first comes first, so that a row is decoded as
    it is alone: to a network without a clock the places of an all-masked canvas look the same.
    """

    @abstractmethod
    def sureness(self, log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """How sure the denoiser is of a position (float64); larger is surer."""

    @abstractmethod
    def commit(self, sureness: Float[Tensor, "B L"], steps_done: int) -> Bool[Tensor, "B L"]:
        """The positions to commit, of those with a finite sureness."""

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per step."""
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        step = 0
        while (active := task.unfinished(x)).any():
            open_ = task.wanted & (x == task.mask_id) & active[:, None]
            log_q = denoise(model, task, x, open_, counts)
            sureness = torch.full(x.shape, -torch.inf, dtype=torch.float64, device=x.device)
            unit = 2.0**-40 if log_q.dtype == torch.float64 else 2.0**-14
            sureness = sureness.masked_scatter(open_, (self.sureness(log_q) / unit).round() * unit)
            if sureness.isnan().any():
                raise DecodingError(NO_TOKEN)
            surest = sureness == sureness.amax(1, keepdim=True)
            where = open_ & (self.commit(sureness, step) | (surest & (surest.cumsum(1) == 1)))
            x = draw(task, x, where, log_q[where[open_]])
            counts.add(active, needed=full_pass(model, task.lengths), rounds=1)
            step += 1
            yield Frame(x, where, counts)


@dataclass(frozen=True)
class Confidence(SurestFirst, Checked):
    """Sureness is the probability of the arg max (Chang et al. 2022; Nie et al. 2025).

    threshold: commit all that is as sure, or surer.
    steps: commit an equal share of the positions each step instead.
    """

    threshold: float = 0.9
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "threshold", note="above 1: one position at a time")
        at_least(1, self, "steps")

    def sureness(self, log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """max_v q(v)."""
        return log_q.amax(-1).double().exp()

    def commit(self, sureness: Float[Tensor, "B L"], steps_done: int) -> Bool[Tensor, "B L"]:
        """All above the threshold, or the surest of an equal share."""
        if self.steps is None:
            return sureness >= self.threshold
        left = max(1, self.steps - steps_done)
        count = (sureness > -torch.inf).sum(1).div(left, rounding_mode="floor").clamp(min=1)
        return sureness.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < count[:, None]


@dataclass(frozen=True)
class Margin(Confidence):
    """Sureness is the gap between the two most probable tokens (Kim et al. 2025)."""

    threshold: float = 0.8

    def sureness(self, log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """q of the most probable token less q of the next."""
        first, second = log_q.topk(2, -1).values.double().exp().unbind(-1)
        return first - second


@dataclass(frozen=True)
class EntropyBound(SurestFirst, Checked):
    """Commits the positions of lowest entropy while their joint dependence stays bounded (Ben-Hamu et al. 2025).

    The sum of their entropies less the largest of them bounds the mutual information that drawing them independently
    ignores.

    bound: nats of dependence that may be ignored.
    """

    bound: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "bound", note="nats")

    def sureness(self, log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The negative entropy (nats)."""
        log_q = log_q.clamp(min=-1e4)  # a token without probability adds nothing
        return (log_q.exp() * log_q).sum(-1, dtype=torch.float64)

    def commit(self, sureness: Float[Tensor, "B L"], steps_done: int) -> Bool[Tensor, "B L"]:
        """The longest run of surest positions within the bound."""
        entropy, order = (-sureness).sort(dim=1, stable=True)  # closed positions are infinite, and last
        within = entropy.isfinite() & (entropy.cumsum(1) - entropy <= self.bound)
        return torch.zeros_like(within).scatter(1, order, within)
