"""How far the draft head is from the head that verifies it, to be trained on (DistillSpec; Zhou et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from caddf.interface import Head

Divergence = Literal["kl", "tv"]


@dataclass(frozen=True)
class Distillation:
    """`share` of the draft's loss is its divergence of that `form` from the head `source`."""

    share: float
    source: Head
    form: Divergence


def divergence(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"], form: Divergence) -> Float[Tensor, " N"]:
    """The divergence of the drafts' q from p, the head that verifies them; log q is -inf outside its vocabulary.

    `kl`: sum_v p(v) log(p(v) / q(v)), in nats; `tv`: 1 - sum_v min(p(v), q(v)), the share of drafts that p rejects.
    Where q lives on a small vocabulary S, kl is p(S) KL(p(. | S) || q): in expectation the cross-entropy whose targets
    outside S are ignored.
    """
    if form == "tv":
        return 1 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    outside = log_q == -torch.inf
    log_p = log_p.masked_fill(outside, -torch.inf)
    gap = log_p - log_p.logsumexp(-1, keepdim=True) - log_q
    return (log_p.exp() * gap.masked_fill(outside, 0)).sum(-1)
