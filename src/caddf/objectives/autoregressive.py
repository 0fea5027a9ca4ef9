"""Left-to-right cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.interface import Infill, LanguageModel
from caddf.objectives.heads import Term, score
from caddf.objectives.loss import Loss, weights_like


@dataclass(frozen=True)
class AutoregressiveLoss:
    """-sum log p_causal(x_i | x_<i), at every position."""

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The mean over tokens; nothing is drawn."""
        states, _ = model(x0, torch.full_like(x0, model.mask_id), Infill())
        total = score(model, states, x0, {"causal": Term(weights_like(x0, 1.0))}).total
        return Loss(total, {"causal": total.detach()})
