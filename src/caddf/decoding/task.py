"""What every decoder is given and gives back: a task, frames, and an account of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import RowGenerators, Warp, inverse_cdf
from caddf.interface import AnyOrder, LanguageModel


@dataclass
class Counts:
    """The work of a decoder, per row: passes of each branch, and token-positions.

    `computed` token-positions went through a branch; `needed` would have without caches. Both sum the two branches.
    """

    causal: Int[Tensor, " B"]
    diffusion: Int[Tensor, " B"]
    computed: Int[Tensor, " B"]
    needed: Int[Tensor, " B"]
    rounds: Int[Tensor, " B"]

    @classmethod
    def zeros(cls, rows: int) -> Counts:
        """No work yet."""
        return cls(*(torch.zeros(rows, dtype=torch.long) for _ in range(5)))

    def add(
        self,
        rows: Bool[Tensor, " B"],
        *,
        causal: int | Tensor = 0,
        diffusion: int | Tensor = 0,
        computed: int | Tensor = 0,
        needed: int | Tensor = 0,
        rounds: int | Tensor = 0,
    ) -> None:
        """Adds to the marked rows; a row that has nothing left to do works no more."""
        rows = rows.cpu()
        for name, amount in (
            ("causal", causal), ("diffusion", diffusion), ("computed", computed), ("needed", needed), ("rounds", rounds)
        ):  # fmt: skip
            getattr(self, name).add_(rows * (amount.cpu() if isinstance(amount, Tensor) else amount))


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

    @property
    def wanted(self) -> Bool[Tensor, "B L"]:
        """The positions to fill."""
        inside = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]
        return inside & (self.tokens == self.mask_id)

    def unfinished(self, tokens: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """The rows that still have `[M]` in them and have not met their end."""
        open_rows = (self.wanted & (tokens == self.mask_id)).any(1)
        return open_rows & ~self.finished(tokens)


class Decoder(Protocol):
    """A way to fill a task: a frozen dataclass of settings that yields frames, the last of them complete."""

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Iterator[Frame]:
        """Frames as the canvas fills; work is added to `counts`, which frames carry."""


def denoise(
    model: LanguageModel, task: Task, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], counts: Counts
) -> Float[Tensor, "N V"]:
    """log q(x0_i | x) at the positions in `where`, row-major: the eq. 5 reading.

    Only rows with a position to read are evaluated: the absorbing property keeps a row's prediction valid until one of
    its tokens changes, and a decoder reads a row only to change it, so this is the canvas cache. Rows are evaluated
    with others of their own length.
    """
    out = None
    row_of = where.nonzero()[:, 0]
    for length in task.lengths[where.any(1)].unique().tolist():
        rows = where.any(1) & (task.lengths == length)
        part, read = x[rows, :length], where[rows, :length]
        states, _ = model(part, part, AnyOrder())
        log_q = model.log_probs(states, read, model.denoiser)
        if out is None:
            out = log_q.new_empty(len(row_of), log_q.shape[-1])
        out[rows[row_of]] = log_q
    branches = 2 if "causal" in model.heads else 1
    work = where.any(1)
    counts.add(work, causal=branches - 1, diffusion=1, computed=branches * task.lengths)
    assert out is not None
    return out


def fill(
    model: LanguageModel, task: Task, x: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], counts: Counts
) -> Int[Tensor, "B L"]:
    """`x` with the positions in `where` drawn from the warped q, independently of each other."""
    probs = task.warp(denoise(model, task, x, where, counts))
    u = task.generators.uniform(where)[where.cpu()].to(x.device)
    return x.masked_scatter(where, inverse_cdf(probs, u))


def full_pass(model: LanguageModel, lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Token-positions of one evaluation without caches: the whole row through every branch."""
    return lengths * (2 if "causal" in model.heads else 1)
