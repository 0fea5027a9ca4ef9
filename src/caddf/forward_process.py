"""The forward process (eq. 1): absorbing and uniform, marginals and reverse posteriors, token by token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def mask_tokens(
    x0: Int[Tensor, "B L"], masked: Float[Tensor, " B"], mask_id: int, generator: torch.Generator
) -> Int[Tensor, "B L"]:
    """Absorbing: each token of row b becomes `[M]` independently with probability `masked[b]` (eq. 1)."""
    u = torch.rand(x0.shape, generator=generator, dtype=torch.float64).to(x0.device)
    return torch.where(u < masked[:, None].to(x0.device), mask_id, x0)


def mask_exactly(
    x0: Int[Tensor, "B L"], count: Int[Tensor, " B"], mask_id: int, generator: torch.Generator
) -> Int[Tensor, "B L"]:
    """Absorbing, given the number of masks: `count[b]` positions of row b, chosen uniformly."""
    rank = torch.rand(x0.shape, generator=generator, dtype=torch.float64).argsort(-1).argsort(-1)
    return torch.where((rank < count[:, None].cpu()).to(x0.device), mask_id, x0)


def resample_tokens(
    x0: Int[Tensor, "B L"], noised: Float[Tensor, " B"], vocab_size: int, generator: torch.Generator
) -> Int[Tensor, "B L"]:
    """Uniform: each token of row b is redrawn uniformly from the V tokens with probability `noised[b]`."""
    u = torch.rand(x0.shape, generator=generator, dtype=torch.float64).to(x0.device)
    fresh = torch.randint(vocab_size, x0.shape, generator=generator).to(x0.device)
    return torch.where(u < noised[:, None].to(x0.device), fresh, x0)


def absorbing_posterior(
    q0: Float[Tensor, "*N V"], is_masked: Bool[Tensor, "*N"], x_t: Int[Tensor, "*N"], masked_s: float, masked_t: float
) -> Float[Tensor, "*N W"]:
    """p(x_s | x_t) over the V tokens and `[M]` (W = V + 1), for s < t, with q0 = p(x0_i | x_t).

    An unmasked token stays; a masked one stays masked with probability lambda_s / lambda_t, else is drawn from q0.
    """
    stay = masked_s / masked_t
    reveal = torch.cat([(1 - stay) * q0, torch.full_like(q0[..., :1], stay)], -1)
    keep = torch.nn.functional.one_hot(x_t, reveal.shape[-1]).to(reveal)
    return torch.where(is_masked[..., None], reveal, keep)


def uniform_posterior(
    q0: Float[Tensor, "*N V"], x_t: Int[Tensor, "*N"], noised_s: float, noised_t: float
) -> Float[Tensor, "*N V"]:
    """p(x_s | x_t) for the uniform process, s < t, with q0 = p(x0_i | x_t), averaged over x0.

    q(x_s | x_t, x0) is q(x_t | x_s) q(x_s | x0) / q(x_t | x0) (Austin et al. 2021, eq. 3).
    """
    size = q0.shape[-1]
    kept_s, kept_t = 1 - noised_s, 1 - noised_t
    step = kept_t / kept_s
    at = torch.nn.functional.one_hot(x_t, size).to(q0)
    likelihood = step * at + (1 - step) / size  # q(x_t | x_s) for each x_s
    evidence = kept_t * at + (1 - kept_t) / size  # q(x_t | x0) for each x0
    weight = q0 / evidence
    return likelihood * (kept_s * weight + (1 - kept_s) / size * weight.sum(-1, keepdim=True))
