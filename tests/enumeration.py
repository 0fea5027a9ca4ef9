"""Known sources over V^L, and networks as small: everything about them is a sum over a float64 table.

Besides, what decoders and chains are compared with: the any-order reading, and reverse steps in closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.interface import AnyOrder, Infill, LanguageModel
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig


def sequences(vocab_size: int, length: int) -> Int[Tensor, "N L"]:
    """All V^L sequences, in the order of a flattened table."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).reshape(-1, length)


def masks(length: int) -> Bool[Tensor, "M L"]:
    """All 2^L sets of masked positions."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def random_source(vocab_size: int, length: int, seed: int = 0) -> Float[Tensor, "..."]:
    """A joint distribution p0 with all probabilities above 0, far from independent tokens."""
    logits = torch.randn((vocab_size,) * length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(2 * logits.flatten(), 0).view_as(logits)


def two_bits() -> Float[Tensor, "2 2"]:
    """Two identical fair bits: the truth is ln 2 per sequence."""
    return torch.eye(2, dtype=torch.float64) / 2


def entropy(p0: Float[Tensor, "..."]) -> float:
    """Nats per sequence."""
    return -torch.xlogy(p0, p0).sum().item()


def support(p0: Float[Tensor, "..."]) -> tuple[Int[Tensor, "N L"], Float[Tensor, " N"]]:
    """The sequences of probability above 0, and their probabilities."""
    probs = p0.flatten()
    return sequences(p0.shape[0], p0.ndim)[probs > 0], probs[probs > 0]


def exact_denoiser(p0: Float[Tensor, "..."]) -> Callable[[Tensor], Tensor]:
    """`x_t [B, L] -> log p0(x_i | unmasked part) [B, L, V]`; uniform where p0 excludes the unmasked part."""
    size, every, probs = p0.shape[0], sequences(p0.shape[0], p0.ndim), p0.flatten()
    is_token = torch.nn.functional.one_hot(every, size).double()

    def denoise(x_t: Tensor) -> Tensor:
        agrees = ((x_t[:, None] == every) | (x_t[:, None] == size)).all(-1)
        joint = torch.einsum("bn,nlv->blv", agrees * probs, is_token)
        total = joint.sum(-1, keepdim=True)
        return torch.where(total > 0, joint / total, 1 / size).log()

    return denoise


def random_denoiser(vocab_size: int, length: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """`x_t -> log-probabilities` random for each x_t: the conditionals of no joint, like a network's."""
    contexts = (vocab_size + 1) ** torch.arange(length)
    shape = ((vocab_size + 1) ** length, length, vocab_size)
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = torch.log_softmax(1.5 * logits, -1)
    return lambda x_t: table[x_t @ contexts]


CONFIGS = [
    {"causal": None, "exchange": "one_way"},
    *(
        {"fusion": fusion, "exchange": exchange, "draft": draft}
        for fusion, exchange in (("late", "mutual"), ("late", "one_way"), ("layers", "one_way"), ("none", "one_way"))
        for draft in ("factorised", "chained")
    ),
]
"""Choices of a dual branch that change what its heads read."""


def random_network(vocab_size: int, length: int, **settings: object) -> DualBranch:
    """A random network in float64, its weights large enough to be far from uniform."""
    torch.manual_seed(1)
    values = {"causal": BranchConfig(2, 8, 2), **settings}
    model = DualBranch(ModelConfig(vocab_size, length, BranchConfig(1, 8, 2), block_size=2, **values)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def masked_nats(model: LanguageModel, x0: Tensor, where: Tensor, infill: bool) -> Tensor:
    """Sum of nats over the masked positions, from `model.nll` (what is under test reads `log_probs`)."""
    if not where.any():
        return torch.zeros(len(x0), dtype=torch.float64)
    where = where.expand_as(x0)
    canvas = torch.where(where, model.mask_id, x0)
    states, _ = model(x0, canvas, Infill()) if infill else model(canvas, canvas, AnyOrder())
    nats = model.nll(states, where, x0, "fused" if infill else model.denoiser)
    return nats.view(len(x0), -1).sum(-1).detach()


def denoiser_of(model: LanguageModel) -> Callable[[Tensor, Tensor], Tensor]:
    """The eq. 5 reading of a model: `(x_t, where) -> log q(x0_i | x_t)` at the positions in `where`, row-major."""

    def denoise(x_t: Int[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        states, _ = model(x_t, x_t, AnyOrder())
        return model.log_probs(states, where, model.denoiser)

    return denoise


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
