"""How far the draft head is from the head that verifies it, to be trained on (DistillSpec; Zhou et al. 2024)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caddf.interface import Head, LanguageModel

Divergence = Literal["kl", "tv"]


def divergence_at(
    model: LanguageModel,
    states: Any,
    where: Bool[Tensor, "B L"],
    target: Head,
    form: Divergence,
    elements: int = 1 << 24,
) -> Float[Tensor, "B L"]:
    """The divergence of the drafts' q from p of the head `target`, at the positions in `where`, zero elsewhere.

    `kl`: sum_v p(v) log(p(v) / q(v)), in nats; `tv`: 1 - sum_v min(p(v), q(v)), the share of drafts that p rejects.
    Where q lives on a small vocabulary S, kl is p(S) KL(p(. | S) || q): in expectation the cross-entropy whose targets
    outside S are ignored. p is given no gradient: drafts learn the target, not the target the drafts. At most
    `elements` probabilities of each head are made at a time, and made again in the backward pass.
    """

    def part(rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        at = torch.zeros_like(where)
        at[rows, columns] = True
        with torch.no_grad():
            log_p = model.log_probs(states, at, target)
        return divergence(log_p, model.log_probs(states, at, "draft"), form)

    rows, columns = where.nonzero(as_tuple=True)
    size = max(1, elements // model.vocab_size)
    chunks = list(zip(rows.split(size), columns.split(size), strict=True))
    again = len(chunks) > 1
    parts = [
        checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) if again else part(*chunk)
        for chunk in chunks
    ]
    values = torch.cat(parts)
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def divergence(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"], form: Divergence) -> Float[Tensor, " N"]:
    """`kl` or `tv` of each pair, as above; log q is -inf outside its vocabulary."""
    if form == "tv":
        return 1 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    outside = log_q == -torch.inf
    log_p = log_p.masked_fill(outside, -torch.inf)
    gap = log_p - log_p.logsumexp(-1, keepdim=True) - log_q
    return (log_p.exp() * gap.masked_fill(outside, 0)).sum(-1)
