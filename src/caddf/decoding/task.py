"""What every decoder is given and gives back: a task, frames, and an account of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import RowGenerators, Warp, inverse_cdf
from caddf.errors import Failure
from caddf.interface import AnyOrder, LanguageModel


class DecodingError(Failure):
    """Decoding went wrong by itself: says where, and what to look at."""


NO_TOKEN = (
    "a token could not be drawn: the model's probabilities are not numbers; its weights may be damaged, or too large "
    "for their type"
)


@dataclass(frozen=True)
class Counts:
    """The work of a decoder, per row: passes of each branch, and token-positions.

    `computed` token-positions went through a branch; `needed` would have without caches. Both sum the two branches.
    `all` holds the six numbers of each row in the order of the properties.
    """

    all: Int[Tensor, "6 B"]

    @classmethod
    def zeros(cls, rows: int) -> Counts:
        """No work yet."""
        return cls(torch.zeros(6, rows, dtype=torch.long))

    def copy(self) -> Counts:
        """As they are now."""
        return Counts(self.all.clone())

    @property
    def causal(self) -> Int[Tensor, " B"]:
        """Passes of the causal branch."""
        return self.all[0]

    @property
    def diffusion(self) -> Int[Tensor, " B"]:
        """Passes of the diffusion branch."""
        return self.all[1]

    @property
    def computed(self) -> Int[Tensor, " B"]:
        """Token-positions that were read."""
        return self.all[2]

    @property
    def needed(self) -> Int[Tensor, " B"]:
        """Token-positions that would have been read without caches."""
        return self.all[3]

    @property
    def rounds(self) -> Int[Tensor, " B"]:
        """Rounds."""
        return self.all[4]

    @property
    def copied(self) -> Int[Tensor, " B"]:
        """Rounds whose drafts were copied from the text itself (`decoding.lookup`)."""
        return self.all[5]

    def add(
        self,
        rows: Bool[Tensor, " B"],
        *,
        causal: int | Tensor = 0,
        diffusion: int | Tensor = 0,
        computed: int | Tensor = 0,
        needed: int | Tensor = 0,
        rounds: int | Tensor = 0,
        copied: int | Tensor = 0,
    ) -> None:
        """Adds to the marked rows; a row that has nothing left to do works no more."""
        rows = rows.cpu()
        for total, amount in zip(self.all, (causal, diffusion, computed, needed, rounds, copied), strict=True):
            if isinstance(amount, Tensor) or amount:
                total.add_(rows * (amount.cpu() if isinstance(amount, Tensor) else amount))


def hit_rate(computed: float, needed: float) -> float:
    """Share of the token-positions of a decoder without caches that came from one: 0 where more were computed."""
    return max(0.0, 1 - computed / needed) if needed else 0.0


@dataclass(frozen=True)
class Frame:
    """The canvas at one moment, `[M]` where nothing stands yet.

    `fresh` marks what this frame filled, `corrected` those of them that replaced a rejected draft, and `drafts` holds
    the proposals of this frame (`[M]` where there was none).
    """

    tokens: Int[Tensor, "B L"]
    fresh: Bool[Tensor, "B L"]
    counts: Counts
    drafts: Int[Tensor, "B L"] | None = None
    corrected: Bool[Tensor, "B L"] | None = None


def _never(tokens: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
    return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


@dataclass(frozen=True)
class Task:
    """What is to be filled in: `[M]` in `tokens`, row r up to `lengths[r]`.

    tokens: prompts and templates, `[M]` where a token is wanted; beyond a row's length its content is ignored.
    generators: one per row, so that a row gets what it would get alone.
    warp: temperature and filters, the same for proposals and target.
    finished: says of each row whether what stands before its first `[M]` ends it (EOS, a stop string).
    template: whether tokens are given after the first `[M]`; if not, the row is a prompt to be continued.
    """

    tokens: Int[Tensor, "B L"]
    lengths: Int[Tensor, " B"]
    mask_id: int
    generators: RowGenerators
    warp: Warp = field(default_factory=Warp)
    finished: Callable[[Int[Tensor, "B L"]], Bool[Tensor, " B"]] = _never
    template: bool = False

    @cached_property
    def wanted(self) -> Bool[Tensor, "B L"]:
        """The positions to fill."""
        inside = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]
        return inside & (self.tokens == self.mask_id)

    def uniforms(self, where: Bool[Tensor, "B L"]) -> Float[Tensor, " N"]:
        """A uniform draw for each of the positions in `where`, row-major, each of its row's generator."""
        return self.generators.uniform(where)[where.cpu()].to(where.device)

    def unfinished(self, tokens: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """The rows that still have `[M]` in them and have not met their end."""
        open_rows = (self.wanted & (tokens == self.mask_id)).any(1)
        return open_rows & ~self.finished(tokens)


class Decoder(Protocol):
    """A way to fill a task: a frozen dataclass of settings that yields frames, the last of them complete."""

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """Frames as the canvas fills; work is added to `counts`, which frames carry."""


def read_rows(
    ends: Int[Tensor, " B"], where: Bool[Tensor, "B L"], read: Callable[[Bool[Tensor, " B"], int], Float[Tensor, "n V"]]
) -> Float[Tensor, "N V"]:
    """What `read(rows, length)` says of the positions in `where`, row-major, for the rows that end alike together.

    Rows with nothing to read are left out; at least one must have something.
    """
    work, row_of = where.any(1), where.nonzero()[:, 0]
    lengths = ends[work].unique().tolist()
    out = None
    for length in lengths:
        rows = work & (ends == length)
        part = read(rows, length)
        if len(lengths) == 1:
            return part
        if out is None:
            out = part.new_empty(len(row_of), part.shape[-1])
        out[rows[row_of]] = part
    assert out is not None
    return out


def evaluate(
    model: LanguageModel,
    task: Task,
    where: Bool[Tensor, "B L"],
    counts: Counts,
    read: Callable[[Bool[Tensor, " B"], int], Float[Tensor, "n V"]],
) -> Float[Tensor, "N V"]:
    """`read_rows` of whole rows, counted as one evaluation of each that it reads."""
    count_pass(model, where, counts, task.lengths)
    return read_rows(task.lengths, where, read)


def count_pass(model: LanguageModel, where: Bool[Tensor, "B L"], counts: Counts, upto: Int[Tensor, " B"]) -> None:
    """Counts one evaluation, of the positions below `upto`, of every row with a position in `where`."""
    causal = 1 if "causal" in model.heads else 0
    counts.add(where.any(1), causal=causal, diffusion=1, computed=full_pass(model, upto))


def told(level: Float[Tensor, ""] | None, x: Int[Tensor, "n L"]) -> AnyOrder:
    """The eq. 5 reading of the rows `x`, all at noise level `level` (sbar) where there is one."""
    return AnyOrder() if level is None else AnyOrder(level.to(x.device).expand(len(x)))


def denoise(
    model: LanguageModel,
    task: Task,
    x: Int[Tensor, "B L"],
    where: Bool[Tensor, "B L"],
    counts: Counts,
    level: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "N V"]:
    """log q(x0_i | x) at the positions in `where`, row-major: the eq. 5 reading, at `level` for networks told the time.

    Only rows with a position to read are evaluated, and heads only there. This is the canvas cache: decoders settle
    which positions a step draws without the network (times drawn beforehand; a q that sums to one), so that a row is
    read only to be changed. No prediction is wanted a second time, and so none is kept.
    """

    def read(rows: Bool[Tensor, " B"], length: int) -> Float[Tensor, "n V"]:
        part = x[rows, :length]
        states, _ = model(part, part, told(level, part))
        return model.log_probs(states, where[rows, :length], model.denoiser)

    return evaluate(model, task, where, counts, read)


def draw(
    task: Task, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], log_q: Float[Tensor, "N V"]
) -> Int[Tensor, "B L"]:
    """`x` with the positions in `where` drawn from the warped `log_q`, independently of each other."""
    return draw_from(task, x, where, task.warp(log_q))


def draw_from(
    task: Task, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], p: Float[Tensor, "N V"]
) -> Int[Tensor, "B L"]:
    """The same from probabilities. Raises `DecodingError` where they are no numbers."""
    drawn = inverse_cdf(p, task.uniforms(where))
    if (drawn >= p.shape[-1]).any():
        raise DecodingError(NO_TOKEN)
    return x.masked_scatter(where, drawn)


def fill(
    model: LanguageModel,
    task: Task,
    x: Int[Tensor, "B L"],
    where: Bool[Tensor, "B L"],
    counts: Counts,
    *,
    read: Bool[Tensor, "B L"] | None = None,
    level: Float[Tensor, ""] | None = None,
) -> Int[Tensor, "B L"]:
    """`x` with the positions in `where` drawn from the warped q, independently of each other.

    `read`, where given, are the positions that are evaluated, those in `where` among them: what a decoder without
    caches does.
    """
    read = where if read is None else read
    if not read.any():
        return x
    log_q = denoise(model, task, x, read, counts, level)
    return draw(task, x, where, log_q if read is where else log_q[where[read]])


def full_pass(model: LanguageModel, lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Token-positions of one evaluation without caches: the whole row through every branch."""
    return lengths * (2 if "causal" in model.heads else 1)
