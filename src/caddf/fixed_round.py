"""A round of a causal target on buffers that stay where they are: what a CUDA graph records, and nothing it could not.

It is made of the model's own modules, and writes what `decoding.speculative` and `decoding.autoregressive` write from
the same uniforms, with no step that waits for a number to come back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from caddf.caches import Caches, KVCache, Slots
from caddf.categorical import Warp, arg_max, inverse_cdf
from caddf.decoding.verification import at_place, residual, verify
from caddf.decoding.windows import copies_end, drafts_end, new_start
from caddf.interface import Drafting
from caddf.models.layers import head_log_probs, over_all
from caddf.models.states import Canvas, States


@dataclass(frozen=True)
class Shape:
    """What the buffers are made for."""

    rows: int
    length: int
    drafting: Drafting
    warp: Warp
    dtype: torch.dtype
    device: torch.device


class FixedRound:
    """Buffers of one shape, and the round on them.

    What a round is given it only reads, and what it writes into the caches is the same each time: it can be run again.
    """

    def __init__(self, model: Any, shape: Shape) -> None:
        self.model, self.shape, self.warp, self.how = model, shape, shape.warp, shape.drafting
        rows, length, size = shape.rows, shape.length, self.how.size
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written in either mode
            self.caches: Caches = model.allocate(rows, length)
            self.chain: KVCache | None = model.allocate_drafts(rows, size) if self.how.proposes else None
            self.x, self.lengths, self.beyond = self._new(rows, length + 1), self._new(rows), self._new()
            self.x.fill_(model.mask_id)  # the last place is for what has none
            self.mask, self.at = self.x[0, -1].clone(), torch.arange(length + 1, device=shape.device)
            self.n, self.held, self.rows = self._new(rows), self._new(rows), self._new(rows, dtype=torch.bool)
            self.u = self._new(rows, self.how.uniforms, dtype=torch.float64)
            self.tokens, self.marks = self._new(2, rows, length + 1), self._new(2, rows, length + 1, dtype=torch.bool)
            self.numbers = self._new(8, rows)
            self.copies, self.matched = self._new(rows, self.how.places), self._new(rows)
            # The windows that are held, from where on, which rows draft from theirs, and whose are new.
            width = model.config.diffusion.width if self.how.proposes else 0
            self.states = self._new(rows, size, width, dtype=shape.dtype)
            self.start, self.since = self._new(rows), self._new(rows)
            self.looking, self.renewed = self._new(2, rows, dtype=torch.bool)

    def _new(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.shape.device)

    def round(self, upto: int, looks: bool, renews: bool, wide: bool, opening: bool = False) -> None:
        """A round of rows that attend to the slots below `upto`, from what was given to what is made of it.

        With `looks` what is not copied is drafted, and with `renews` new windows are read for that; with `wide` copies
        may be longer than windows. With `opening` rows may have no token yet, and so a draft more. Rows that do not go
        on are read like the others.
        """
        rows, lengths, how, size = self.rows, self.lengths, self.how, self.how.size
        count = min(how.places, self.shape.length) if wide else size if opening else max(size - 1, 0)
        if not how.lookup:
            count = min(count, how.most)
        n = self.n.clamp(max=upto - 1)
        at, column = self.at, n[:, None]
        x = torch.where(at < column, self.x, self.mask)  # what stands, and `[M]` whatever a row holds behind it
        copyable = copies_end(new_start(n), n, lengths, self.matched, how) if how.lookup else n
        copying = (self.matched > 0) & rows & (copyable > n)
        place, end, q = column + at[: count + 1], n, None
        if count and looks:
            end = torch.where(self.looking, drafts_end(self.start, n, lengths, how), n)
            x, q, end = self._draft(x, n, place[:, :count], end, upto, renews, opening)
        end = torch.where(copying, copyable, end)
        if count and how.lookup:
            x, q = self._put(x, q, place[:, :count], copying[:, None] & (place[:, :count] < end[:, None]))

        # Verify in one pass, and read behind the drafts for one token more.
        slots = Slots(place.clamp(max=upto - 1), None, upto)
        log_p = self._log_probs(self.model.read(x, slots, self.caches), "causal")
        place, shown = place[:, :count], torch.where(rows, torch.minimum(end + 1, lengths), n)
        drafted, drafting = x.gather(1, place.clamp(max=x.shape[1] - 1)), place < end[:, None]
        stands, token = self._verify(log_p, q, drafted, drafting, end - n)

        stop = n + stands
        more = stop < shown
        after, behind = stop + more, at >= column
        here = (at == stop[:, None]) & more[:, None]
        tokens = torch.where(behind & (at < stop[:, None]), x, self.x)
        torch.where(here, token[:, None], tokens, out=self.tokens[0])
        torch.where(behind & (at < end[:, None]), x, self.mask, out=self.tokens[1])
        torch.logical_and(behind & (at < after[:, None]), rows[:, None], out=self.marks[0])
        torch.logical_and(here, (stop < end)[:, None], out=self.marks[1])
        one, renewed = rows.long(), self.renewed.long() if renews else torch.zeros_like(n)
        first_open = torch.where(after < lengths, after, self.beyond)
        read = torch.minimum(torch.maximum(self.held, shown), stop + 1)
        made = (
            torch.where(rows, first_open, self.n),
            torch.where(rows, read, self.held),
            one,
            renewed,
            shown - n + renewed * size,
            one * shown + renewed * 2 * torch.minimum(self.start + size, lengths),
            one,
            copying.long(),
        )
        torch.stack(made, out=self.numbers)

    def _draft(
        self,
        x: Int[Tensor, "B T+1"],
        n: Int[Tensor, " B"],
        place: Int[Tensor, "B m"],
        end: Int[Tensor, " B"],
        upto: int,
        renews: bool,
        opening: bool,
    ) -> tuple[Int[Tensor, "B T+1"], Float[Tensor, "B m V"] | None, Int[Tensor, " B"]]:
        """`x` with drafts at those of `place` before their end, what they were drawn from (None: greedy), their end."""
        model, how, size = self.model, self.how, self.how.size
        assert self.caches.exchange is not None and self.chain is not None
        start = torch.minimum(self.start, n)  # n is not where a row has ended
        count = min(size if opening else size - 1, how.most)
        window, first = start[:, None] + self.at[:size], (n - start).clamp(max=size - 1)
        if renews:
            until = Slots(start[:, None], None, upto)
            canvas = x.gather(1, window.clamp(max=x.shape[1] - 1))
            states = model.encode_over(canvas, Slots(window, None, upto), until, self.caches.exchange).states
            self.states.copy_(torch.where(self.renewed[:, None, None], states, self.states))
        seen = Canvas(self.states, window, None)
        token, before = model.before(x, n[:, None]), None
        tokens, drawn_from, largest = [], [], []
        alike = not opening and (how.renew >= size or (renews and len(n) == 1))  # windows start at the last token
        furthest = 1 if alike else max(1, size - how.renew)
        for j in range(count):
            if alike:
                slots = Slots(self.at[j + bool(j) : j + 2], j + bool(j), j + 2)
            else:
                opened = self.at[: min(size, furthest + 1)].expand(len(n), -1)
                slots = Slots((first + j).clamp(max=size - 1)[:, None] if j else opened, None, size)
            # The first step reads what stands before the first draft, too.
            states = model.draft_step(seen, x, slots, self.chain, before).draft
            states = states if j else at_place(states, first)[:, None]
            log_q = self._log_probs(States(None, states, None, chained=True), "draft")[:, 0]
            if how.least:
                largest.append(log_q.amax(-1))
            if self._greedy:
                drawn = log_q.argmax(-1)
            else:
                drawn_from.append(self.warp(log_q))
                drawn = inverse_cdf(drawn_from[-1], self.u[:, j])
            before = drawn[:, None], token
            token = before[0]
            tokens.append(drawn)
        drafted = place[:, :count]
        drafting = drafted < end[:, None]
        if how.least:
            chance = (torch.stack(largest, 1).double() * drafting).cumsum(1).exp()
            good = (chance >= how.least).long().cumprod(1).sum(1)
            end = torch.where(good < count, torch.minimum(end, n + good.clamp(min=1)), end)
            drafting = drafted < end[:, None]
        x = x.scatter(1, torch.where(drafting, drafted, x.shape[1] - 1), torch.stack(tokens, 1))
        if self._greedy:
            return x, None, end
        q = torch.stack(drawn_from, 1) * drafting[..., None]
        return x, pad(q, (0, 0, 0, place.shape[1] - count)), end  # there may be room for more copies

    def _put(
        self,
        x: Int[Tensor, "B T+1"],
        q: Float[Tensor, "B m V"] | None,
        place: Int[Tensor, "B m"],
        copying: Bool[Tensor, "B m"],
    ) -> tuple[Int[Tensor, "B T+1"], Float[Tensor, "B m V"] | None]:
        """`x`, and what its drafts are drawn from, with copies at the places that are `copying`."""
        copies, vocabulary = self.copies[:, : place.shape[1]], self.model.vocab_size
        x = x.scatter(1, torch.where(copying, place, x.shape[1] - 1), copies)
        if self._greedy:
            return x, None
        sure = torch.zeros(*copies.shape, vocabulary, dtype=torch.float64, device=x.device)
        sure.scatter_(-1, copies.clamp(max=vocabulary - 1)[..., None], copying[..., None].double())
        return x, sure if q is None else torch.where(copying[..., None], sure, q)

    def _verify(
        self,
        log_p: Float[Tensor, "B m+1 V"],
        q: Float[Tensor, "B m V"] | None,
        drafted: Int[Tensor, "B m"],
        drafting: Bool[Tensor, "B m"],
        count: Int[Tensor, " B"],
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """How many of a row's first `count` places stand, and the token behind them."""
        if self._greedy:
            best = arg_max(log_p)
            stands = ((drafted == best[:, :-1]) & drafting).long().cumprod(1).sum(1)
            return stands, best.gather(1, stands[:, None])[:, 0]
        p, size = self.warp(log_p), self.how.size
        if q is None:
            return torch.zeros_like(count), inverse_cdf(p[:, 0], self.u[:, -1])
        drafted = drafted.clamp(max=self.model.vocab_size - 1)
        stands, share = verify(p, q, drafted, drafting, count, self.u[:, size : size + q.shape[1]])
        q_stop = at_place(q, stands) * (stands < count)[:, None]
        return stands, inverse_cdf(residual(share[:, None] * at_place(p, stands), q_stop), self.u[:, -1])

    def _log_probs(self, states: States, head: str) -> Float[Tensor, "B n V"]:
        """A head's log-probabilities at all of the states, `states` having those of that head."""
        made = self.model.projection(states, head)
        log_p = head_log_probs(made.states.flatten(0, 1), made.tokens, made.bias)
        return over_all(log_p, made.small, self.model.vocab_size).view(*made.states.shape[:2], -1)

    @property
    def _greedy(self) -> bool:
        return self.warp.temperature == 0
