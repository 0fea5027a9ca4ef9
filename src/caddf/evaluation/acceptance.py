"""How many drafts stand: what a round of speculation is worth, without a decoder.

Of drafts d_1 .. d_n at least the first j stand with probability s_j (`decoding.verification`), so that of all rounds

    E_q [ sum_v min(s_{j-1} p(v), q(v)) ]

keep j or more, along drafts drawn from q, p and q being read behind d_1 .. d_{j-1}: the last draft is integrated out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from caddf.caches import Caches
from caddf.categorical import Warp, inverse_cdf
from caddf.decoding.verification import shares
from caddf.errors import InputError, at_least
from caddf.evaluation.masks import Noise, uniform
from caddf.evaluation.reading import Model, checked
from caddf.interface import Block, Head, Incremental, LanguageModel

Verifier = Literal["causal", "fused"]


@dataclass(frozen=True)
class Acceptance:
    """Rounds of speculation at places of held-out rows.

    reached: estimates of the probability that the first j drafts of a row's rounds stand, j = 1 .. n.
    bonus: whether a round that is accepted whole adds one more token.
    """

    reached: Float[Tensor, "B n"]
    bonus: bool

    @property
    def tokens(self) -> Float[Tensor, " B"]:
        """Expected tokens of a row's round: the drafts that stand, and the corrected or the bonus token."""
        return self.reached.sum(-1) + 1 - (0 if self.bonus else self.reached[:, -1])

    def by_offset(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The share of drafts accepted at each offset, of those reached, and its standard error over the rows."""
        before = F.pad(self.reached, (1, 0), value=1.0)[:, :-1]
        share = self.reached.mean(0) / before.mean(0)
        spread = (self.reached - share * before).std(0) / before.mean(0)  # of a ratio of means
        return share, spread / len(before) ** 0.5


def given_in_block(model: LanguageModel, target: Verifier, size: int, length: int) -> tuple[bool, int]:
    """Whether a round that is accepted whole adds a token, and how many of a window's are given, not drafted.

    Raises `InputError` where none is left, or no block fits a row.
    """
    bonus = target == "causal" or model.chained
    given = int(bonus and getattr(model, "sliding", True))
    if not given < size <= length:
        raise InputError(
            f"block_size is {size}; with target {target} it must lie between {given + 1} and the row's length"
        )
    return bonus, given


@torch.no_grad()
def acceptance(
    model: Model,
    x0: Int[Tensor, "B L"],
    target: Verifier,
    noise: Noise,
    *,
    rounds: int = 1,
    block_size: int | None = None,
    warp: Warp | None = None,
    elements: int = 1 << 24,
    vocab_size: int | None = None,
) -> Acceptance:
    """`rounds` rounds per row, each at a block of it drawn from `noise`, the text before it given.

    Where windows slide (`causal`, and `fused` where drafts chain) one starts with the last token that stands, so the
    block's first token is given, and the other k-1 are drafted; else, and where the diffusion branch reads clean
    blocks, they are the k drafts of an all-masked block.
    `block_size` is the model's if not given. At most `elements` probabilities (or one round's) are made at a time.
    Raises `InputError` where the model does not have the head, or a block has no draft.
    """
    model = checked(model, x0, vocab_size)
    size = model.block_size if block_size is None else block_size
    at_least(1, rounds=rounds, block_size=size)
    if {target, "draft"} - model.heads:
        raise InputError(f"target is {target}; this model has the heads {', '.join(sorted(model.heads))} alone")
    (bonus, given), blocks = given_in_block(model, target, size, x0.shape[1]), x0.shape[1] // size
    u = uniform((len(x0), rounds, 1 + size), noise).to(x0.device)
    start = (u[..., 0] * blocks).long() * size
    reached, last = u.new_empty(len(x0), rounds, size - given), start.amax(1)
    # Nothing behind a row's last window is read: rows that end at like places share a batch.
    for some in last.argsort(stable=True).split(max(1, elements // (size * model.vocab_size))):
        rows, caches = x0[some, : int(last[some].max()) + size], None
        if hasattr(model, "incremental") and cast(Incremental, model).incremental(Block(size)):
            caches = _filled(cast(Incremental, model), rows)
        for i in range(rounds):
            window = start[some, i, None] + torch.arange(size, device=x0.device)
            reached[some, i] = _reached(model, rows, window, u[some, i, 1 + given :], target, warp or Warp(), caches)
            if caches is not None and i + 1 < rounds:  # drafts were read in the text's place
                cast(Incremental, model).read(rows, window, caches)
    return Acceptance(reached.mean(1).cpu(), bonus=bonus)


def _filled(model: Incremental, x: Int[Tensor, "m T"]) -> Caches:
    """Caches that hold the rows."""
    caches = model.allocate(len(x), x.shape[1])
    model.read(x, torch.arange(x.shape[1], device=x.device), caches)
    return caches


def _reached(
    model: LanguageModel,
    x: Int[Tensor, "m T"],
    window: Int[Tensor, "m k"],
    u: Float[Tensor, "m n"],
    target: Verifier,
    warp: Warp,
    caches: Caches | None,
) -> Float[Tensor, "m n"]:
    """One round per row, in its `window`, of whose places the last n are drafted with `u`."""
    n, size = u.shape[1], window.shape[1]
    if caches is not None:
        read = _cached(cast(Incremental, model), x, window, size - n, caches)
    else:
        read = _full(model, x, window, size - n)
    parts, step = [], 1 if model.chained else n
    for j in range(0, n, step):  # all at once, or one after the other where drafts chain
        at = window[:, size - n + j :][:, :step]
        parts.append(warp(read(x, at, "draft")))
        x = x.scatter(1, at, inverse_cdf(parts[-1], u[:, j : j + step]))
    drafted = window[:, size - n :]
    q, p = torch.cat(parts, 1), warp(read(x, drafted, target))
    p_d, q_d = (probs.gather(-1, x.gather(1, drafted)[..., None])[..., 0] for probs in (p, q))
    return torch.minimum(shares(p_d, q_d)[:, :-1, None] * p, q).sum(-1)


ReadPlaces = Callable[[Int[Tensor, "m T"], Int[Tensor, "m j"], Head], Float[Tensor, "m j V"]]
"""`(rows, places, head) -> log-probabilities` at places of each row's window, given the row's tokens before them."""


def _full(model: LanguageModel, x: Int[Tensor, "m T"], window: Int[Tensor, "m k"], given: int) -> ReadPlaces:
    """Whole rows, in one pass per reading."""
    shown = window[:, :given]
    masked = torch.full_like(x, model.mask_id)
    canvas = masked.scatter(1, shown, x.gather(1, shown))

    def read(x: Int[Tensor, "m T"], at: Int[Tensor, "m j"], head: Head) -> Float[Tensor, "m j V"]:
        states, _ = model(x, canvas if head == "draft" else masked, Block(window.shape[1]))
        where = torch.zeros_like(x, dtype=torch.bool).scatter(1, at, True)
        return model.log_probs(states, where, head).view(*at.shape, -1)

    return read


def _cached(
    model: Incremental, x: Int[Tensor, "m T"], window: Int[Tensor, "m k"], given: int, caches: Caches
) -> ReadPlaces:
    """Windows alone, over `caches` that hold the rows."""
    masked = torch.full_like(window, model.mask_id)
    canvas = torch.cat([x.gather(1, window[:, :given]), masked[:, given:]], 1)
    lengths, block = torch.full_like(window[:, 0], x.shape[1]), Block(window.shape[1])
    seen = model.encode(canvas, window[:, 0], lengths, block, caches)

    def read(x: Int[Tensor, "m T"], at: Int[Tensor, "m j"], head: Head) -> Float[Tensor, "m j V"]:
        if head == "draft":
            states = model.draft(seen, x)
        else:
            states = model.read(x, window, caches)
            if head == "fused":
                own = model.encode(masked, window[:, 0], lengths, block, caches) if given else seen
                states = model.fuse(states, window, caches, own)
        where = (window[..., None] == at[:, None]).any(-1)
        return model.log_probs(states, where, head).view(*at.shape, -1)

    return read
