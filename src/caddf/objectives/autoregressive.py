"""Left-to-right cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.interface import Head, Infill, LanguageModel
from caddf.objectives.heads import Term
from caddf.objectives.loss import weights_like
from caddf.objectives.reading import ByReadings, Reading


@dataclass(frozen=True)
class AutoregressiveLoss(ByReadings):
    """-sum log p_causal(x_i | x_<i), at every position: the mean over tokens."""

    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """One; nothing is drawn."""
        terms: dict[Head, Term] = {"causal": Term(weights_like(x0, 1.0))}
        return [Reading(x0, x0, torch.full_like(x0, model.mask_id), Infill(), terms, {"causal": "causal"})]
