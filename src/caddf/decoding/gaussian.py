"""PLAID's sampler (Gulrajani & Hashimoto 2023): the ancestral chain of a Gaussian diffusion over embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from caddf.categorical import arg_max
from caddf.decoding.task import Counts, Frame, Task, draw, read_rows
from caddf.errors import Checked, InputError, at_least
from caddf.evaluation.plaid import GaussianModel, alpha, level, normal, sigma


@dataclass(frozen=True)
class Gaussian(Checked):
    """From z_1 ~ N(0, I) in `steps` steps, even in t, to z_0; then tokens from the warped p(x0_i | z_0).

    Exact for the n-step chain, and for the model as n grows and the ends of its schedule move out, where no tokens are
    given and nothing is changed: `score_temperature` 1, `self_condition` false.

    steps: even in t.
    score_temperature: the predicted noise is divided by it; below 1 text is likelier and less varied (PLAID uses 0.9).
        The warp is another thing: it acts on the last draw alone, which at gamma_0 has little left to decide.
    self_condition: each step is told the xhat of the step before, as in PLAID's code (its bound takes a second pass
        over the same z instead).

    Given tokens are held by replacement: their xhat is their embedding, so that their z runs through the forward
    process as if backwards, from q(z_1 | x) on. This is approximate: a wanted token sees what was given only as far as
    the noise of the moment lets it (Song et al. 2021; PLAID itself guides by gradients). No token is final before the
    last step, so an end of text stops nothing.
    """

    steps: int = 256
    score_temperature: float = 1.0
    self_condition: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps")
        if not self.score_temperature > 0:
            raise InputError(f"score_temperature is {self.score_temperature}; it must be above 0")

    def __call__(self, model: GaussianModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per step, with the likeliest tokens so far (`fresh`: those that changed); the last has the draw."""
        counts, device = counts or Counts.zeros(len(task.tokens)), task.tokens.device
        active = task.unfinished(task.tokens)
        wanted = task.wanted & active[:, None]
        if not wanted.any():
            return
        inside = torch.arange(task.tokens.shape[1], device=device) < task.lengths.where(active, 0)[:, None]
        given, embeddings = (inside & ~wanted)[..., None], model.embeddings()
        known = embeddings[task.tokens.where(given[..., 0], 0)]
        share, _ = model.schedule(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64, device=device))
        gammas = level(model, share)

        noise = self._noise(task, inside, embeddings)
        z = torch.where(given, alpha(gammas[0]) * known + sigma(gammas[0]) * noise, noise)
        x, estimate = task.tokens, torch.zeros_like(z)
        for gamma_t, gamma_s in pairwise(gammas):
            log_p = self._read(model, task, z, gamma_t, embeddings, estimate, inside, counts)
            after = x.masked_scatter(wanted, arg_max(log_p[wanted[inside]]))
            yield Frame(after, after != x, counts)
            x = after
            xhat = torch.zeros_like(z)
            xhat[inside] = log_p.double().exp() @ embeddings
            xhat = torch.where(given, known, xhat)
            estimate = xhat if self.self_condition else estimate
            cooled = (z - (z - alpha(gamma_t) * xhat) / self.score_temperature) / alpha(gamma_t)
            noise = self._noise(task, inside, embeddings)
            z = self._back(z, torch.where(given, known, cooled), gamma_t, gamma_s, noise)
        log_p = self._read(model, task, z, gammas[-1], embeddings, estimate, inside, counts)
        drawn = draw(task, x, wanted, log_p[wanted[inside]])
        yield Frame(drawn, drawn != x, counts)

    @staticmethod
    def _back(
        z: Float[Tensor, "B L d"],
        xhat: Float[Tensor, "B L d"],
        gamma_t: Float[Tensor, ""],
        gamma_s: Float[Tensor, ""],
        noise: Float[Tensor, "B L d"],
    ) -> Float[Tensor, "B L d"]:
        """z_s ~ q(z_s | z_t, x = xhat), s < t (VDM, eq. 33, appendix A.4)."""
        c = -torch.expm1(gamma_s - gamma_t)
        mean = alpha(gamma_s) * ((1 - c) * z / alpha(gamma_t) + c * xhat)
        return mean + sigma(gamma_s) * c.sqrt() * noise

    @staticmethod
    def _read(
        model: GaussianModel,
        task: Task,
        z: Float[Tensor, "B L d"],
        gamma: Float[Tensor, ""],
        embeddings: Float[Tensor, "V d"],
        estimate: Float[Tensor, "B L d"],
        inside: Bool[Tensor, "B L"],
        counts: Counts,
    ) -> Float[Tensor, "N V"]:
        """log p(x0_i | z_t) at the positions `inside`, row-major."""

        def read(rows: Bool[Tensor, " B"], length: int) -> Float[Tensor, "n V"]:
            states = model(z[rows, :length], gamma.expand(int(rows.sum())), embeddings, estimate[rows, :length])
            return model.log_probs(states, inside[rows, :length])

        counts.add(inside.any(1), diffusion=1, computed=task.lengths, needed=task.lengths, rounds=1)
        return read_rows(task.lengths, inside, read)

    @staticmethod
    def _noise(task: Task, inside: Bool[Tensor, "B L"], embeddings: Float[Tensor, "V d"]) -> Float[Tensor, "B L d"]:
        """Standard normal draws, each row's from its own generator."""
        return normal(task.generators.uniform(inside[..., None].expand(-1, -1, embeddings.shape[1]))).to(inside.device)
