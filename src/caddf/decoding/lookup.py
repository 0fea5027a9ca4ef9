"""Prompt lookup (Saxena 2023; Yang et al. 2023): what followed the last tokens before is drafted to follow again."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def lookup(
    x: Int[Tensor, "B T"], n: Int[Tensor, " B"], width: int, count: int
) -> tuple[Int[Tensor, "B m"], Bool[Tensor, " B"]]:
    """`count` tokens from each row's n on, copied from behind the last place where the `width` before n stood before.

    A copy that has come to n copies itself, so that what repeats is drafted as far as is wanted. The second says which
    rows have such a place; it depends on what stands before n alone.
    """
    length = x.shape[1]
    if length <= width:
        return x.new_zeros(len(x), count), torch.zeros_like(n, dtype=torch.bool)
    last = x.gather(1, (n[:, None] + torch.arange(-width, 0, device=x.device)).clamp(min=0))
    follows = torch.arange(width, length + 1, device=x.device)
    same = (x.unfold(1, width, 1) == last[:, None]).all(-1) & (follows < n[:, None])
    start = torch.where(same, follows, -1).amax(1)
    place = start[:, None] + torch.arange(count, device=x.device) % (n - start)[:, None]
    return x.gather(1, place.clamp(0, length - 1)), start >= 0
