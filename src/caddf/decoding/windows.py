"""Where a chain's windows start, and where drafts and copies end: tensor operations alone, that wait for no number.

Whole rounds on a GPU (`caddf.graphs`) are made of these; the kernels (`native/rounds.c`) state them once more, in C.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.interface import Drafting


def new_start(n: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Where a new window that slides starts: at the last token that stands, since the slots up to it must be read."""
    return (n - 1).clamp(min=0)


def start_of(
    new: Int[Tensor, " B"], n: Int[Tensor, " B"], since: Int[Tensor, " B"], drafting: Drafting
) -> Int[Tensor, " B"]:
    """Where the window that drafts come from starts: a `new` one, or the one that a chain has.

    A chain hears what has come to stand in its window, and goes on in it, from `since` on (-1: there is none), as long
    as enough of it is left.
    """
    held = (since >= 0) & (since + drafting.size - n >= drafting.renew)
    return torch.where(held, since, new)


def drafts_end(
    start: Int[Tensor, " B"], n: Int[Tensor, " B"], lengths: Int[Tensor, " B"], drafting: Drafting
) -> Int[Tensor, " B"]:
    """Where a chain's drafts from n on end at the latest: with the window from `start` on, or by `most`."""
    return torch.minimum(torch.minimum(start + drafting.size, n + drafting.most), lengths)


def copies_end(
    start: Int[Tensor, " B"],
    n: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    matched: Int[Tensor, " B"],
    drafting: Drafting,
) -> Int[Tensor, " B"]:
    """Where copies from n on end, the target being known everywhere: with a new window from `start` on, or further.

    What has gone on alike for longer is copied further: as many tokens as have `matched`.
    """
    far = torch.maximum(start + drafting.size, n + matched.clamp(max=drafting.copies))
    return torch.minimum(far, lengths)
