"""The forward process (eq. 1): absorbing and uniform, token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
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
