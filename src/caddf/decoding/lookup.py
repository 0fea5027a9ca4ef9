"""Prompt lookup (Saxena 2023; Yang et al. 2023): what followed the last tokens before is drafted to follow again."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def lookup(
    x: Int[Tensor, "B T"], n: Int[Tensor, " B"], width: int, count: int
) -> tuple[Int[Tensor, "B m"], Int[Tensor, " B"]]:
    """`count` tokens from each row's n on, copied from behind the last place where the `width` before n stood before.

    A copy that has come to n copies itself, so that what repeats is drafted as far as is wanted. The second says how
    many tokens before n stood there, 0 where it is fewer than `width`; more than `count` are not looked at. It depends
    on what stands before n alone.
    """
    length = x.shape[1]
    if length <= width:
        return x.new_zeros(len(x), count), torch.zeros_like(n)
    last = x.gather(1, (n[:, None] + torch.arange(-width, 0, device=x.device)).clamp(min=0))
    follows = torch.arange(width, length + 1, device=x.device)
    same = (x.unfold(1, width, 1) == last[:, None]).all(-1) & (follows < n[:, None])
    start = torch.where(same, follows, -1).amax(1)
    place = start[:, None] + torch.arange(count, device=x.device) % (n - start)[:, None]
    back = 1 + torch.arange(max(count, width), device=x.device)
    before, there = (each[:, None] - back for each in (n, start))
    same = (x.gather(1, before.clamp(min=0)) == x.gather(1, there.clamp(min=0))) & (there >= 0)
    return x.gather(1, place.clamp(0, length - 1)), same.long().cumprod(1).sum(1)
