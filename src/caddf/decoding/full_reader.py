"""Reading left to right without caches: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.plan import Plan, padded, width_of
from caddf.decoding.task import Counts
from caddf.interface import Block, Drafting, Head, Infill, LanguageModel

Look = tuple[Int[Tensor, "B T"], Int[Tensor, " B"], int]
"""Canvases of windows, their starts, and their size."""


@dataclass(frozen=True)
class FullReader:
    """The reference: every reading is a pass over whole rows.

    Its state is the canvas of each row's window of drafts, as it was when that was looked at, and the window's start.
    """

    model: LanguageModel
    plan: Plan
    counts: Counts

    def start(self) -> None:
        """Nothing is kept."""

    def target(
        self,
        state: Look | None,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B m V"], Look | None]:
        """The canvas is the template, or all masked."""
        canvas = (
            self.plan.task.tokens if isinstance(self.plan.pattern, Infill) else torch.full_like(x, self.model.mask_id)
        )
        branches = 1 if self.plan.head == "causal" else 2
        needed = self.plan.needed(end, branches)
        self.counts.add(rows, causal=1, diffusion=branches - 1, computed=needed, needed=needed)
        return self._read(x, canvas, self.plan.pattern, self.plan.head, n, end, rows), state

    def look(
        self,
        state: Look | None,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        start: Int[Tensor, " B"],
        size: int,
        new: Bool[Tensor, " B"],
    ) -> tuple[Look, Look]:
        """Only remembers the canvas and the windows."""
        needed = self.plan.needed(torch.minimum(start + size, self.plan.task.lengths))
        self.counts.add(new, causal=1, diffusion=1, computed=needed, needed=needed)
        if state is not None:
            x, start = torch.where(new[:, None], x, state[0]), torch.where(new, start, state[1])
        return (x, start, size), (x, start, size)

    def drafts(
        self,
        look: Look,
        x: Int[Tensor, "B T"],
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B m V"]:
        """One pass for all rows whose windows start at the same offset in their blocks."""
        canvas, start, size = look
        if isinstance(self.plan.pattern, Infill) and not self.plan.chained:
            return self._read(x, canvas, Infill(), "draft", at, end, rows)
        out = None
        for offset in (start % size)[rows].unique().tolist():
            some = rows & (start % size == offset)
            part = self._read(x, canvas, Block(size, offset), "draft", at, torch.where(rows, end, at), some)
            out = part if out is None else out + part
        assert out is not None
        return out

    def chain(self, look: Any, x: Tensor, n: Tensor, u: Tensor, warp: Warp, least: float, given: Any = None) -> None:
        """The reference drafts step by step."""

    def round(
        self, state: Look | None, x: Tensor, n: Tensor, rows: Tensor, drafting: Drafting | None = None
    ) -> tuple[None, Look | None]:
        """The reference works step by step."""
        return None, state

    def keep(self, state: Look | None, below: Int[Tensor, " B"]) -> Look | None:
        """Windows stay: what has come to stand in them does."""
        return state

    def _read(
        self,
        prefix: Int[Tensor, "B T"],
        canvas: Int[Tensor, "B T"],
        pattern: Block | Infill,
        head: Head,
        at: Int[Tensor, " B"],
        end: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B m V"]:
        lengths, out = self.plan.task.lengths, None
        inside = torch.arange(width_of(at, end), device=at.device) < (end - at)[:, None]
        for length in lengths[rows].unique().tolist():
            some = rows & (lengths == length)
            states, _ = self.model(prefix[some, :length], canvas[some, :length], pattern)
            positions = torch.arange(length, device=at.device)
            where = (positions >= at[some, None]) & (positions < end[some, None])
            part = padded(self.model.log_probs(states, where, head), inside & some[:, None])
            out = part if out is None else out + part
        assert out is not None
        return out
