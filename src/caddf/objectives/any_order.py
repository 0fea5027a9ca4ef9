"""The any-order autoregressive form of the bound (AO; Hoogeboom et al. 2022, Ou et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.forward_process import mask_exactly
from caddf.objectives.dce import Denoising
from caddf.objectives.loss import Times, draw_times


@dataclass(frozen=True)
class AnyOrderLoss(Denoising):
    """k ~ U{1..L}, exactly k positions masked, weight L / k: lambda-DCE with lambda integrated out."""

    times: Times = "stratified"

    def draw(
        self, x0: Int[Tensor, "B L"], mask_id: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
        """x_k and L / k."""
        length = x0.shape[1]
        count = (draw_times(len(x0), self.times, generator) * length).ceil().long()
        return mask_exactly(x0, count, mask_id, generator), length / count.double()
