"""PLAID's objective (Gulrajani & Hashimoto 2023): the bound, and a noise schedule that lowers its variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.errors import InputError, a_share
from caddf.evaluation.plaid import GaussianModel, denoise, diffuse, diffusion, level, prior, reconstruction
from caddf.objectives.loss import Loss, Times, draw_times, whole


@dataclass(frozen=True)
class PlaidLoss:
    """Reconstruction + prior + diffusion (`caddf.evaluation.plaid`), each row paying for one of the first and the last.

    reconstruction: share of the rows that are noised to z_0 and reconstructed; the others are drawn a time.
    self_conditioned: share of the rows that get a first pass's estimate (PLAID: a quarter).
    times: how the times of a batch are drawn.

    PLAID moves the share of reconstruction rows with the two terms' running deviations; here it is a setting, the
    eighth that its evaluation takes.
    """

    reconstruction: float = 0.125
    self_conditioned: float = 0.25
    times: Times = "stratified"

    def __post_init__(self) -> None:
        if not 0 < self.reconstruction < 1:
            raise InputError(f"reconstruction is {self.reconstruction}; a share of rows between 0 and 1 is needed")
        a_share(self, "self_conditioned")

    def __call__(self, model: GaussianModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The mean over tokens: an unbiased estimate of the bound, whatever the number of rows.

        All parameters descend the loss but those of the schedule between its ends, which cannot change its mean: they
        descend the mean of its square, and so its variance (VDM, section 5), by gradients that are multiplied on their
        way by twice the loss of their row.
        """
        rows, length = x0.shape
        at_0, estimated = (whole(rows * s, generator) for s in (self.reconstruction, self.self_conditioned))
        is_start, is_estimated = (torch.randperm(rows, generator=generator) < n for n in (at_0, estimated))
        t = torch.zeros(rows, dtype=torch.float64)
        t[~is_start] = draw_times(rows - at_0, self.times, generator)
        embeddings, ends = model.embeddings(), model.ends()
        noise = torch.randn((rows, length, embeddings.shape[1]), dtype=torch.float64, generator=generator)
        t, noise, is_start, is_estimated = (tensor.to(x0.device) for tensor in (t, noise, is_start, is_estimated))

        share, slope = model.schedule(t)
        nats = torch.zeros(rows, dtype=torch.float64, device=x0.device)  # per token
        for of_schedule in (share, slope):
            if of_schedule.requires_grad:
                of_schedule.register_hook(lambda gradient: 2 * nats.detach() * gradient)
        gamma, gamma_slope = level(model, share), (ends[1] - ends[0]) * slope

        kl = torch.zeros((), dtype=torch.float64, device=x0.device)
        for self_condition in (False, True):
            chosen = is_estimated == self_condition
            if not chosen.any():
                continue
            # The first pass has no gradient: with it on, what it shares with the second learns nothing either.
            e, g, g_slope, g_1 = (
                tensor.detach() if self_condition else tensor for tensor in (embeddings, gamma, gamma_slope, ends[1])
            )
            tokens, x = x0[chosen], e[x0[chosen]]
            z = diffuse(x, g[chosen], noise[chosen])
            states = denoise(model, z, g[chosen], e, self_condition)
            start = is_start[chosen, None].expand(tokens.shape)
            terms = torch.zeros(tokens.shape, dtype=torch.float64, device=x0.device)
            terms = terms.masked_scatter(start, reconstruction(model, states, start, tokens))
            moved = diffusion(model, states, ~start, x, g[chosen], g_slope[chosen])
            nats = nats.masked_scatter(chosen, terms.masked_scatter(~start, moved).mean(-1))
            kl = kl + prior(g_1, x.shape[-1]) * chosen.sum() / rows

        parts = {
            "reconstruction": nats[is_start].sum() / (rows * self.reconstruction),
            "prior": kl,
            "diffusion": nats[~is_start].sum() / (rows * (1 - self.reconstruction)),
        }
        total = torch.stack(list(parts.values())).sum()
        return Loss(total, {name: part.detach() for name, part in parts.items()})
