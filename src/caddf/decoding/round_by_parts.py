"""A round of drafts by its parts: they are proposed, verified in one pass of the target, and corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, pad

from caddf.categorical import inverse_cdf
from caddf.decoding.left_to_right import Reader
from caddf.decoding.lookup import lookup
from caddf.decoding.plan import Plan, at_places, first_open, width_of
from caddf.decoding.task import Counts, Frame
from caddf.decoding.verification import at_place, residual, verify
from caddf.interface import Drafting, LanguageModel


@dataclass(frozen=True)
class Proposal:
    """What is to be verified of each row: positions from its n on, at most m.

    x: the canvas with drafts.
    place: the positions.
    drafted: where a draft stands; elsewhere there is a given token, or the row has ended.
    q: what drafts were drawn from, one_hot where they were copied, 0 elsewhere.
    end: behind the last of a row.
    known: the target is known before this position, which is end where drafts were cut short.
    copying: whose drafts were copied.
    """

    x: Int[Tensor, "B T"]
    place: Int[Tensor, "B m"]
    drafted: Bool[Tensor, "B m"]
    q: Float[Tensor, "B m V"]
    end: Int[Tensor, " B"]
    known: Int[Tensor, " B"]
    copying: Bool[Tensor, " B"]


@dataclass(frozen=True)
class RoundByParts:
    """Rounds of a model that has none at one go, and the reference of those that have."""

    model: LanguageModel
    plan: Plan
    reader: Reader
    how: Drafting
    counts: Counts

    def __call__(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        since: Int[Tensor, " B"],
        state: Any,
    ) -> tuple[Frame, Int[Tensor, " B"], Int[Tensor, " B"], Any]:
        """A round of `rows`, from their first open positions n on: the frame, and n, `since` and the state behind it.

        `since` is where the windows that are held start (-1: there is none).
        """
        u = self.plan.task.generators.several(rows, self.how.uniforms).to(x.device)
        proposal, since, state = self.propose(x, n, rows, since, state, u)
        frame, n, state = self.verify(x, n, rows, proposal, state, u)
        return frame, n, since, state

    def propose(
        self,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        since: Int[Tensor, " B"],
        state: Any,
        u: Float[Tensor, "B u"],
    ) -> tuple[Proposal, Int[Tensor, " B"], Any]:
        """Copies where a row's last tokens have stood before; else drafts from a new window, or the one that it has."""
        plan, how = self.plan, self.how
        start, whole = plan.drafted(n, how, since)
        copies, matched = lookup(x, n, how.lookup, how.places) if how.lookup else (x, torch.zeros_like(n))
        copyable = plan.copied(n, how, matched)
        copying = rows & (matched > 0) & (copyable > n)
        looking = rows & (whole > n) & ~copying & how.proposes
        known = torch.where(looking, whole, torch.where(copying, copyable, n))
        place = n[:, None] + torch.arange(width_of(n, known), device=x.device)
        drafted = (place < known[:, None]) & at_places(plan.task.wanted, place)

        look = None
        if looking.any():
            look, state = self.reader.look(state, x, n, start, how.size, looking & (start != since))
        since = torch.where(looking & plan.chained, start, since)
        own = (drafted & looking[:, None])[:, : how.size]
        end = torch.where(looking, whole, n)
        x, q, end = self._draw(look, x, place[:, : how.size], own, end, looking, u[:, : min(how.size, place.shape[1])])

        end = torch.where(copying, copyable, end)
        count = width_of(n, end)
        place, q = place[:, :count], pad(q, (0, 0, 0, count - q.shape[1]))
        drafted = drafted[:, :count] & (place < end[:, None])
        if copying.any():
            copies, copied = copies[:, :count].clamp(max=self.model.vocab_size - 1), drafted & copying[:, None]
            x = _put(x, place, copied, copies)
            q = torch.where(copied[..., None], one_hot(copies, self.model.vocab_size).to(q), q)
        return Proposal(x, place, drafted, q, end, known, copying), since, state

    def verify(
        self,
        before: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        drafts: Proposal,
        state: Any,
        u: Float[Tensor, "B u"],
    ) -> tuple[Frame, Int[Tensor, " B"], Any]:
        """One pass of the target; what is given counts as accepted, and drafts behind the first rejected are forgotten.

        Where the target is known behind the drafts it is read there too, for one token more.
        """
        task, x, end, count = self.plan.task, drafts.x, drafts.end, drafts.place.shape[1]
        at = torch.arange(x.shape[1], device=x.device)
        within = torch.minimum(end + 1, drafts.known if self.plan.within else task.lengths)
        shown = torch.where(rows, within, n)
        log_p, state = self.reader.target(state, x, n, shown, rows)
        p, tokens = task.warp(log_p), at_places(x, drafts.place).clamp(max=self.model.vocab_size - 1)
        first = self.how.size  # of the uniforms that decide
        stands, share = verify(p, drafts.q, tokens, drafts.drafted, end - n, u[:, first : first + count])
        stop = n + stands

        more = (stop < shown) & at_places(task.wanted, stop[:, None])[:, 0]
        q_stop = at_place(drafts.q, stands) * (stop < end)[:, None] if count else torch.zeros_like(p[:, 0])
        token = inverse_cdf(residual(share[:, None] * at_place(p, stands), q_stop), u[:, -1])
        drawn = torch.where((at >= n[:, None]) & (at < end[:, None]) & task.wanted, x, task.mask_id)
        x = torch.where(task.wanted & (at >= stop[:, None]) & rows[:, None], task.mask_id, x)
        here = (at == stop[:, None]) & more[:, None]
        x = torch.where(here, token[:, None], x)
        self.counts.add(rows, rounds=1, copied=drafts.copying)
        frame = Frame(x, (x != before) & rows[:, None], self.counts, drawn, here & (stop < end)[:, None])
        return frame, first_open(task, x), self.reader.keep(state, stop + 1)

    def _draw(
        self,
        look: Any,
        x: Int[Tensor, "B T"],
        place: Int[Tensor, "B m"],
        drafting: Bool[Tensor, "B m"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        u: Float[Tensor, "B m"],
    ) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B j V"], Int[Tensor, " B"]]:
        """`x` with drafts at the places that are `drafting`, q (0 elsewhere), and the end of each row's.

        The end comes sooner, and j <= m, where drafts are less sure than `least`.
        """
        task, n, least = self.plan.task, place[:, 0] if place.shape[1] else end, self.how.least
        count = width_of(n, end)
        q = torch.zeros(len(x), count, self.model.vocab_size, dtype=torch.float64, device=x.device)
        if look is None:
            return x, q, end
        given = torch.where(drafting, -1, at_places(x, place)) if task.template else None
        chained = self.plan.chained
        if chained and count and (drawn := self.reader.chain(look, x, n, u, task.warp, least, given)) is not None:
            tokens, q, sure = drawn
            end = torch.minimum(end, n + sure)
            drafting = drafting & (place < end[:, None])
            x = _put(x, place, drafting, tokens)
            return x, (q * drafting[..., None])[:, : width_of(n, end)], end
        chance = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        step, j = 1 if chained else max(count, 1), 0
        while j < count:
            log_q = self.reader.drafts(look, x, n + j, torch.minimum(n + j + step, end).clamp(min=n + j), rows)
            if least:  # it is from q that a window's end follows, never from what is drawn there or behind
                sure = chance[:, -1:] + (log_q.amax(-1).double() * drafting[:, j : j + step]).cumsum(1)
                chance = torch.cat([chance, sure], 1)
                good = (chance[:, 1:].exp() >= least).cumprod(1).sum(1)
                end = torch.where(good < j + step, torch.minimum(end, n + good.clamp(min=1)), end)
                drafting, count = drafting & (place < end[:, None]), width_of(n, end)
            now = drafting[:, j : j + step]
            q[:, j : j + step] = task.warp(log_q) * now[..., None]
            x = _put(x, place[:, j : j + step], now, inverse_cdf(q[:, j : j + step], u[:, j : j + step]))
            j += step
        return x, q[:, :count], end


def _put(
    x: Int[Tensor, "B T"], place: Int[Tensor, "B n"], where: Bool[Tensor, "B n"], tokens: Int[Tensor, "B n"]
) -> Int[Tensor, "B T"]:
    """`x` with `tokens` at the marked of the positions `place`."""
    extended = torch.cat([x, x.new_zeros(len(x), 1)], 1)
    return extended.scatter(1, torch.where(where, place, x.shape[1]), tokens)[:, :-1]
