"""PLAID's bound (Gulrajani & Hashimoto 2023): a variational diffusion model (VDM, Kingma et al. 2021) over embeddings.

Each token v has an embedding e_v of length one. With x the embeddings of x0, the forward process is

    q(z_t | x) = N(alpha_t x, sigma_t^2 I),   alpha_t^2 = sigmoid(-gamma_t),   sigma_t^2 = sigmoid(gamma_t),

so that the signal-to-noise ratio is SNR = e^-gamma. gamma rises from gamma_0 at t = 0 to gamma_1 at t = 1, and (VDM,
sections 3.5 and 5; PLAID, section 2)

    -log p(x0) <= E[-log p(x0 | z_0)]  +  KL(q(z_1 | x) || N(0, I))  -  1/2 int_0^1 SNR'(t) E|x - xhat(z_t)|^2 dt
                  reconstruction          prior                         diffusion

Whatever the network, the schedule and its end points are, this is a bound; there is no piece of time that it misses.
Levels, weights and embeddings are in float64; z is too, and a network takes it in the type of its weights.

Where `scored` marks some positions, the diffusion is theirs alone: of the others the network is shown alpha_t x,
without noise, and x as their xhat. Whatever it makes of these, which it was not trained on, the sum bounds
-log p(scored | given).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.evaluation.masks import Noise, counted, strata, uniform
from caddf.evaluation.reading import checked
from caddf.interface import LanguageModel


class GaussianModel(Protocol):
    """What PLAID's objective, bound and sampler ask of a model: embeddings, a noise schedule, and p(x0_i | z_t)."""

    vocab_size: int
    mask_id: int

    def embeddings(self) -> Float[Tensor, "V d"]:
        """The embeddings e_v, each of length one, in float64."""

    def schedule(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Which share of the way from gamma_0 to gamma_1 is gone at `t` (0 at 0, 1 at 1, rising), and its slope."""

    def ends(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """gamma_0 and gamma_1, in float64."""

    def __call__(
        self,
        z: Float[Tensor, "B L d"],
        gamma: Float[Tensor, " B"],
        embeddings: Float[Tensor, "V d"],
        estimate: Float[Tensor, "B L d"] | None = None,
    ) -> Any:
        """States of all positions of z_t; `estimate` is an earlier xhat (self-conditioning), zero where not given."""

    def log_probs(self, states: Any, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """log p(x0_i | z_t) (nats) at the positions in `where`, row-major."""

    def nll(self, states: Any, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"]) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`."""

    def mean(self, states: Any, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N d"]:
        """xhat at the positions in `where`: the embedding expected under p(x0_i | z_t) (PLAID, section 3)."""


def alpha(gamma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Factor of the signal in z_t."""
    return torch.sigmoid(-gamma).sqrt()


def sigma(gamma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard deviation of the noise in z_t."""
    return torch.sigmoid(gamma).sqrt()


def level(model: GaussianModel, share: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """gamma, a `share` of the way from gamma_0 to gamma_1."""
    gamma_0, gamma_1 = model.ends()
    return gamma_0 + (gamma_1 - gamma_0) * share


def normal(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard normal draws from uniforms in [0, 1)."""
    return torch.special.ndtri(u.clamp(min=2**-54))


def diffuse(
    x: Float[Tensor, "B L d"], gamma: Float[Tensor, " B"], noise: Float[Tensor, "B L d"]
) -> Float[Tensor, "B L d"]:
    """z_t of the forward process."""
    gamma = gamma[:, None, None]
    return alpha(gamma) * x + sigma(gamma) * noise


def denoise(
    model: GaussianModel,
    z: Float[Tensor, "B L d"],
    gamma: Float[Tensor, " B"],
    embeddings: Float[Tensor, "V d"],
    self_condition: bool,
    known: Float[Tensor, "B L d"] | None = None,
    free: Bool[Tensor, "B L"] | None = None,
) -> Any:
    """States of z_t; with `self_condition` by a second pass that is given the xhat of the first (Chen et al. 2023).

    The first pass gets no gradient. Both see z_t alone, which is all that a bound needs of xhat. Positions that
    are not `free` have `known` as their xhat.
    """
    estimate = None
    if self_condition:
        with torch.no_grad():
            everywhere = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
            estimate = model.mean(model(z, gamma, embeddings), everywhere).view_as(z)
            if known is not None and free is not None:
                estimate = torch.where(free[..., None], estimate, known.to(estimate))
    return model(z, gamma, embeddings, estimate)


def reconstruction(
    model: GaussianModel, states: Any, where: Bool[Tensor, "B L"], x0: Int[Tensor, "B L"]
) -> Float[Tensor, " N"]:
    """-log p(x0_i | z_0) (nats) at the positions in `where`; `states` are those of z_0."""
    return model.nll(states, where, x0).double()


def prior(gamma_1: Float[Tensor, ""], width: int) -> Float[Tensor, ""]:
    """KL(q(z_1 | x) || N(0, I)) per token (nats), for embeddings of length one and dimension `width`."""
    signal, log_noise = torch.sigmoid(-gamma_1), F.logsigmoid(gamma_1)
    return (signal - width * (signal + log_noise)) / 2


def diffusion(
    model: GaussianModel,
    states: Any,
    where: Bool[Tensor, "B L"],
    x: Float[Tensor, "B L d"],
    gamma: Float[Tensor, " B"],
    slope: Float[Tensor, " B"],
) -> Float[Tensor, " N"]:
    """-1/2 SNR'(t) |x_i - xhat_i|^2 (nats) at the positions in `where`; `slope` is gamma'(t)."""
    weight = (torch.exp(-gamma) * slope / 2)[:, None].expand(where.shape)
    return weight[where] * (x[where] - model.mean(states, where).double()).square().sum(-1)


@torch.no_grad()
def plaid_bound(
    model: GaussianModel,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    self_condition: bool = True,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B samples"]:
    """The three terms (nats per sequence): t stratified over the samples of a row, z_0 and z_t drawn for each.

    Four evaluations per sample, or two without `self_condition`. Self-conditioning is part of the model that is
    measured: a network trained with it is better with it, and a bound is a bound either way.
    """
    checked(cast(LanguageModel, model), x0, None)
    (rows, length), (scored, count) = x0.shape, counted(x0, scored)
    free = scored.to(x0.device)
    embeddings, (gamma_0, gamma_1) = model.embeddings(), model.ends()
    x, width = embeddings[x0], embeddings.shape[1]
    times = strata(rows, samples, noise).to(x0.device)

    def draw(gamma: Tensor) -> tuple[Any, Tensor]:
        noises = normal(uniform((rows, length, width), noise)).where(scored[..., None], 0).to(x0.device)
        return denoise(model, diffuse(x, gamma, noises), gamma, embeddings, self_condition, x, free), gamma

    out = []
    for t in times.T:
        share, slope = model.schedule(t)
        at_0, _ = draw(gamma_0.expand(rows))
        at_t, gamma = draw(level(model, share))
        nats = reconstruction(model, at_0, free, x0)
        nats = nats + diffusion(model, at_t, free, x, gamma, (gamma_1 - gamma_0) * slope)
        out.append(nats.view(rows, count).sum(-1) + count * prior(gamma_1, width))
    return torch.stack(out, -1).cpu()
