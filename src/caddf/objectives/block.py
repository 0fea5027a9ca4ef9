"""Block diffusion: BD3-LM (Arriola et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.errors import InputError
from caddf.interface import Block, Head, LanguageModel
from caddf.objectives.heads import Term
from caddf.objectives.loss import Times, draw_times, weights_like
from caddf.objectives.reading import ByReadings, Reading


@dataclass(frozen=True)
class BlockDiffusion(ByReadings):
    """Sum over blocks b of E_lambda [ 1/lambda * sum over masked i of b of -log q(x0_i | x_<b, x_lambda of b) ].

    One pass over `[x0 ; x_t]`, in blocks of the model's size, lambda drawn for each by itself (Arriola et al. 2025).
    Clipped, it is U[beta, omega] (near 0 and 1 the gradient is mostly noise): the weight stays 1 / lambda, as
    published, and the result is no bound any more. beta = omega = 1 trains all-masked blocks, which is all there is to
    learn in blocks of one token. Raises `InputError` on a chained draft head, which reads x0 within its block.

    beta: the least lambda.
    omega: the largest lambda.
    times: how the noise levels of a batch are drawn.
    """

    beta: float = 0.0
    omega: float = 1.0
    times: Times = "stratified"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= self.omega <= 1 or self.omega == 0:
            raise InputError(
                f"beta and omega are {self.beta} and {self.omega}; they clip the share of masks, so "
                "0 <= beta <= omega <= 1, and omega above 0"
            )

    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """One, scored by the mean over tokens."""
        if model.chained:
            raise InputError("draft is chained; block diffusion needs a factorised draft head")
        pattern = Block(model.block_size)
        block = pattern.index(torch.arange(x0.shape[1]))
        times = draw_times(len(x0) * (int(block[-1]) + 1), self.times, generator).view(len(x0), -1)
        rate = (self.beta + (self.omega - self.beta) * times)[:, block]
        masked = (torch.rand(x0.shape, generator=generator, dtype=torch.float64) < rate).to(x0.device)
        canvas = torch.where(masked, model.mask_id, x0)
        terms: dict[Head, Term] = {"draft": Term(masked * weights_like(x0, 1 / rate))}
        return [Reading(x0, x0, canvas, pattern, terms, {"draft": "block_diffusion"})]
