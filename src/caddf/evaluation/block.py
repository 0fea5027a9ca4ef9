"""The bound of block diffusion: BD3-LM (Arriola et al. 2025)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import InputError, at_least
from caddf.evaluation.masks import Noise, counted, strata, uniform
from caddf.evaluation.reading import Model, checked, read
from caddf.interface import Block


@torch.no_grad()
def block_diffusion_bound(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    block_size: int | None = None,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Sum over blocks of the diffusion bound of -log p(block | blocks before it), over all of lambda in [0, 1].

    In the any-order form, whose weights stay small: of a block's n positions k ~ U{1..n} are masked, weight n / k, in
    every block at once. A block of one token is always masked, so that blocks of one give the exact chain rule.
    Prefix and canvas differ here, and yet it is a bound: a draft sees of the prefix only what lies before its block.
    Where `scored` marks some positions, n counts those of a block, and its others are seen.
    `block_size` is the model's if not given. Raises `InputError` on a chained draft head, of which that is not true.
    """
    model = checked(model, x0, vocab_size)
    if "draft" not in model.heads or model.chained:
        raise InputError("the block diffusion bound reads a factorised draft head, which this model does not have")
    size = model.block_size if block_size is None else block_size
    at_least(1, block_size=size)
    pattern, positions, rows = Block(size), torch.arange(x0.shape[1]), len(x0)
    scored, _ = counted(x0, scored)
    block = pattern.index(positions)
    blocks = int(block[-1]) + 1
    length = torch.zeros(rows, blocks, dtype=torch.int64).scatter_add(-1, block.expand(rows, -1), scored.long())
    u = strata(rows * blocks, samples, _repeated(noise, blocks)).view(rows, blocks, samples)
    count = ((u * length[..., None]).long().clamp(max=length[..., None] - 1) + 1).mT  # [B, samples, blocks]
    place = uniform((rows, samples, len(block)), noise).where(scored[:, None], 1.0)  # given: behind the block's others
    order = (block + place).argsort(-1).argsort(-1)
    masked = (order - pattern.start(positions) < count[..., block]) & scored[:, None]
    weight = (length[:, None] / count.clamp(min=1).double())[..., block]
    nats = []
    for s in range(samples):
        where = masked[:, s].to(x0.device)
        states, _ = model(x0, torch.where(where, model.mask_id, x0), pattern)
        nats.append((weight[:, s] * read(model, states, where, x0, "draft").nats.cpu()).sum(-1))
    return torch.stack(nats, -1)


def _repeated(noise: Noise, times: int) -> Noise:
    """One generator per block of each row."""
    return noise if isinstance(noise, torch.Generator) else [own for own in noise for _ in range(times)]
