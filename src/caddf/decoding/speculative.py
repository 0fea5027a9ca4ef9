"""Lossless block speculation: the diffusion branch drafts, or the text itself; the target verifies (`verification`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, pad

from caddf.categorical import inverse_cdf
from caddf.decoding.left_to_right import Reader, reader_for
from caddf.decoding.lookup import lookup
from caddf.decoding.plan import Plan, Target, first_open, most_rounds, width_of
from caddf.decoding.task import Counts, Frame, Task
from caddf.decoding.verification import at_place, residual, verify
from caddf.errors import InputError
from caddf.interface import Drafting, LanguageModel

MOST_COPIES = 64
"""Each has room for what the target says of all tokens, in every row."""


@dataclass(frozen=True)
class Speculative:
    """Each round the diffusion branch drafts and one causal pass verifies: the target's distribution exactly.

    target: `causal` (the causal branch's own head) or `fused` (in blocks of `block_size`, each fused with its
        all-masked start; templates always). Where windows slide (`plan`) a round that is accepted whole adds a token.
    block_size: k; not set, the model's own.
    drafts: of a chain, in a round at most, and at most k; not set, two thirds of k.
    renew: a chain, which hears what has come to stand in its window, drafts from it in later rounds too, as long as so
        many places are left; not set, half of a round's drafts. With k each round has a window of its own.
    lookup: where so many last tokens have stood before, drafts are copied from behind them, and the diffusion branch is
        not read; 0: never. A model that has nothing to draft with copies, or writes one token a round.
    copies: copied drafts of a round at most, which are as many as tokens have matched, and at least what a window has;
        not set, four times k; 64 at most. With the fused target a round copies a window's.
    least: drafts are verified while the product of their largest draft probabilities is at least this; 0 verifies all.
    cache: false reads whole rows each time, for comparison.
    """

    target: Target = "causal"
    block_size: int | None = None
    drafts: int | None = None
    renew: int | None = None
    lookup: int = 3
    copies: int | None = None
    least: float = 0.0
    cache: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise InputError(f"least is {self.least}; it must lie in [0, 1]")
        if self.lookup < 0:
            raise InputError(f"lookup is {self.lookup}; it must be a number of tokens, or 0 for never")
        for name in ("drafts", "renew", "copies"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1, or not set")

        if self.copies is not None and self.copies > MOST_COPIES:
            raise InputError(f"copies is {self.copies}; it must be at most {MOST_COPIES}")

    def drafting(self, size: int) -> Drafting:
        """How rounds are drafted in windows of `size`; raises `InputError` where they have no room for `drafts`."""
        most = self.drafts or max(2 * size // 3, 1)
        if most > size:
            raise InputError(f"drafts is {self.drafts}; it must be at most the block size, which is {size}")
        renew, copies = self.renew or (most + 1) // 2, self.copies or min(4 * size, MOST_COPIES)
        return Drafting(size, most, renew, self.least, self.lookup, copies)

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """A frame per round."""
        x, counts = task.tokens.clone(), counts or Counts.zeros(len(task.tokens))
        size, at, wanted = self.block_size or model.block_size, torch.arange(x.shape[1], device=x.device), task.wanted
        plan, proposes, how = Plan.of(model, task, self.target, size), "draft" in model.heads, self.drafting(size)
        if not (proposes or self.lookup):
            raise InputError("this model has nothing to draft with but lookup, which is 0")
        reader = reader_for(model, plan, counts, drafting=proposes, cache=self.cache)
        state = reader.start()
        n, since = first_open(task, x), torch.full_like(task.lengths, -1)
        for _ in most_rounds(task):
            if not (rows := (n < x.shape[1]) & ~task.finished(x)).any():
                return
            done, state = reader.round(state, x, n, rows, how)
            if done is not None:
                x, n = done.tokens, done.n
                yield Frame(x, done.fresh, counts, done.drafts, done.corrected)
                continue
            before, (start, whole) = x, plan.drafted(n, how, since)
            copies, matched = lookup(x, n, self.lookup, how.places) if self.lookup else (x, torch.zeros_like(n))
            copyable = plan.copied(n, how, matched)
            copying = rows & (matched > 0) & (copyable > n)
            looking = rows & (whole > n) & ~copying & proposes
            whole = torch.where(looking, whole, torch.where(copying, copyable, n))
            place = n[:, None] + torch.arange(int((whole - n).max()), device=x.device)
            drafting = (place < whole[:, None]) & _at(wanted, place)
            u = task.generators.several(rows, how.uniforms).to(x.device)

            # Draft: q at the masked positions of the window, all at once, or one after the other where drafts chain; a
            # copied draft is sure of itself.
            new = looking & (start != since)
            look, state = reader.look(state, x, n, start, size, new) if looking.any() else (None, state)
            since = torch.where(looking & plan.chained, start, since)
            own, end = drafting & looking[:, None], torch.where(looking, whole, n)
            its, own, draws = (each[:, :size] for each in (place, own, u[:, : min(size, place.shape[1])]))
            x, q, end = self._draft(model, plan, reader, look, x, its, own, end, looking, draws)
            end = torch.where(copying, whole, end)
            place, q = place[:, : (count := width_of(n, end))], pad(q, (0, 0, 0, count - q.shape[1]))
            drafting = drafting[:, :count] & (place < end[:, None])
            if copying.any():
                copies, copied = copies[:, :count].clamp(max=model.vocab_size - 1), drafting & copying[:, None]
                x = _put(x, place, copied, copies)
                q = torch.where(copied[..., None], one_hot(copies, model.vocab_size).to(q), q)

            # Verify in one pass of the target; what is given counts as accepted. Where the target is known behind the
            # drafts it is read there too, for one token more.
            shown = torch.where(rows, torch.minimum(end + 1, whole if plan.within else task.lengths), n)
            log_p, state = reader.target(state, x, n, shown, rows)
            p, drafted = task.warp(log_p), _at(x, place).clamp(max=model.vocab_size - 1)
            stands, share = verify(p, q, drafted, drafting, end - n, u[:, size : size + count])
            stop = n + stands

            # Correct the first rejected draft, or add the bonus token; drafts behind it are forgotten.
            more = (stop < shown) & _at(wanted, stop[:, None])[:, 0]
            q_stop = at_place(q, stands) * (stop < end)[:, None] if count else torch.zeros_like(p[:, 0])
            token = inverse_cdf(residual(share[:, None] * at_place(p, stands), q_stop), u[:, -1])
            drafts = torch.where((at >= n[:, None]) & (at < end[:, None]) & wanted, x, task.mask_id)
            x = torch.where(wanted & (at >= stop[:, None]) & rows[:, None], task.mask_id, x)
            here = (at == stop[:, None]) & more[:, None]
            x = torch.where(here, token[:, None], x)
            state, n = reader.keep(state, stop + 1), first_open(task, x)
            counts.add(rows, rounds=1, copied=copying)
            yield Frame(x, (x != before) & rows[:, None], counts, drafts, here & (stop < end)[:, None])

    def _draft(
        self,
        model: LanguageModel,
        plan: Plan,
        reader: Reader,
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
        task, n, j = plan.task, place[:, 0] if place.shape[1] else end, 0
        count = width_of(n, end)
        q = torch.zeros(len(x), count, model.vocab_size, dtype=torch.float64, device=x.device)
        if look is None:
            return x, q, end
        given = torch.where(drafting, -1, _at(x, place)) if task.template else None
        if plan.chained and count and (drawn := reader.chain(look, x, n, u, task.warp, self.least, given)) is not None:
            tokens, q, sure = drawn
            end = torch.minimum(end, n + sure)
            drafting = drafting & (place < end[:, None])
            x = _put(x, place, drafting, tokens)
            return x, (q * drafting[..., None])[:, : width_of(n, end)], end
        chance = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        step = 1 if plan.chained else max(count, 1)
        while j < count:
            log_q = reader.drafts(look, x, n + j, torch.minimum(n + j + step, end).clamp(min=n + j), rows)
            if self.least:  # it is from q that a window's end follows, never from what is drawn there or behind
                sure = chance[:, -1:] + (log_q.amax(-1).double() * drafting[:, j : j + step]).cumsum(1)
                chance = torch.cat([chance, sure], 1)
                good = (chance[:, 1:].exp() >= self.least).cumprod(1).sum(1)
                end = torch.where(good < j + step, torch.minimum(end, n + good.clamp(min=1)), end)
                drafting, count = drafting & (place < end[:, None]), width_of(n, end)
            now = drafting[:, j : j + step]
            q[:, j : j + step] = task.warp(log_q) * now[..., None]
            x = _put(x, place[:, j : j + step], now, inverse_cdf(q[:, j : j + step], u[:, j : j + step]))
            j += step
        return x, q[:, :count], end


def _at(values: Tensor, place: Int[Tensor, "B n"]) -> Tensor:
    """`values` at the positions `place`; 0 or False beyond the row."""
    inside = place < values.shape[1]
    return values.gather(1, place.clamp(max=values.shape[1] - 1)) * inside


def _put(
    x: Int[Tensor, "B T"], place: Int[Tensor, "B n"], where: Bool[Tensor, "B n"], tokens: Int[Tensor, "B n"]
) -> Int[Tensor, "B T"]:
    """`x` with `tokens` at the marked of the positions `place`."""
    extended = torch.cat([x, x.new_zeros(len(x), 1)], 1)
    return extended.scatter(1, torch.where(where, place, x.shape[1]), tokens)[:, :-1]
