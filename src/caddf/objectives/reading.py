"""Objectives as readings: all that is random is drawn first; then the model reads, and its heads are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.interface import Head, LanguageModel, Pattern
from caddf.objectives.distillation import Distillation
from caddf.objectives.heads import Term, score
from caddf.objectives.loss import Loss


@dataclass(frozen=True)
class Reading:
    """One pass over some rows: what the model reads, and what is scored of it.

    `names` are those of the parts, by head; `share` is the weight of the reading's loss in the whole.
    """

    x0: Int[Tensor, "b L"]
    prefix: Int[Tensor, "b L"]
    canvas: Int[Tensor, "b L"]
    pattern: Pattern
    terms: Mapping[Head, Term]
    names: Mapping[str, str]
    distillation: Distillation | None = None
    share: float = 1.0


class ByReadings(ABC):
    """An objective that can say what it reads before it is read."""

    @abstractmethod
    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """Draws what the readings of a batch are."""

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The loss of one batch (`caddf.objectives.loss.Objective`)."""
        return read(model, self.readings(model, x0, generator))


def read(model: LanguageModel, readings: Sequence[Reading]) -> Loss:
    """The sum of the readings' losses. On a device nothing here waits for a result where the heads are compiled."""
    totals, parts = [], dict[str, Tensor]()
    for each in readings:
        states, _ = model(each.prefix, each.canvas, each.pattern)
        scores = score(model, states, each.x0, each.terms, each.distillation)
        totals.append(scores.total * each.share)
        parts |= {each.names[name]: part.detach() for name, part in scores.parts.items()}
    return Loss(torch.as_tensor(sum(totals)), parts)
