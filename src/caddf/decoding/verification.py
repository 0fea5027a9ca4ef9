"""Which drafts stand: block verification (Sun et al. 2025, "Block Verification Accelerates Speculative Decoding").

Drafts d_1 .. d_m come from q, each given those before it; p is the target. What verification may keep of a path is

    s_0 = 1,    s_i = min(1, s_{i-1} p(d_i) / q(d_i)),

the probability, given d_1 .. d_i, that at least they stand. That is the most that any verification can keep, and more
than to accept d_i with min(1, p/q) as long as all before it were: a draft that p likes better than q pays for the next.
Round by round and over whole texts what comes out is distributed as p.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def shares(p: Float[Tensor, "B m"], q: Float[Tensor, "B m"]) -> Float[Tensor, "B m+1"]:
    """s_0 .. s_m of drafts of probabilities p and q."""
    product = torch.cat([p.new_ones(len(p), 1), p / q], 1).cumprod(1)
    return product / product.cummax(1).values


def verify(
    p: Float[Tensor, "B n V"],
    q: Float[Tensor, "B m V"],
    drafted: Int[Tensor, "B m"],
    drafting: Bool[Tensor, "B m"],
    count: Int[Tensor, " B"],
    u: Float[Tensor, "B m"],
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """How many of a row's first `count` places stand, and s there: where one was rejected `residual` gives the next.

    p and q at place i are given the tokens `drafted` before it, and count may follow from q, never from a token that
    was drawn but is not before it. Places that are not `drafting` hold given tokens, of which the draft before decides.
    """
    m = q.shape[1]
    p_d, q_d = (probs.gather(-1, drafted[..., None])[..., 0] for probs in (p[:, :m], q))
    s = shares(torch.where(drafting, p_d, 1), torch.where(drafting, q_d, 1))

    # i drafts stand at least with s_i, i + 1 with the sum of min(s_i p, q): what is spared is for those that end here.
    spared = (s[:, :m, None] * p[:, :m] - q).clamp(min=0).sum(-1) * drafting
    stands = spared / (spared + 1 - s[:, :m])
    stands = torch.where((spared == 0) & (s[:, :m] == 1), 1, stands)  # 0 / 0: p is q, and what follows stands as well
    stands = torch.cat([stands, s[:, m:]], 1)[:, 1:]  # where p is no number nothing stands
    place = torch.arange(1, m + 1, device=q.device)
    stands = torch.where(place == count[:, None], s[:, 1:], stands)

    decides = (place * drafting).cummax(1).values.clamp(min=1) - 1
    good = (u.gather(1, decides) < stands) & (place <= count[:, None])
    stop = (place * good).amax(1) if m else count
    return stop, s.gather(1, stop[:, None])[:, 0]


def at_place(probs: Float[Tensor, "B n V"], index: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """What stands at one place of each row, or beyond the last at the last."""
    index = index.clamp(max=probs.shape[1] - 1)[:, None, None]
    return probs.gather(1, index.expand(-1, 1, probs.shape[-1]))[:, 0]


def residual(p: Float[Tensor, "B V"], q: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """(p - q)+, unnormalised: what follows where drafts end; p itself where nothing was drafted (q = 0).

    p is the target's probabilities times s.
    """
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: nothing is left of it
