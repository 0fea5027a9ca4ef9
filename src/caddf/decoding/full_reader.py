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
from caddf.interface import Block, Head, Infill, LanguageModel


@dataclass(frozen=True)
class FullReader:
    """The reference: every reading is a pass over whole rows."""

    model: LanguageModel
    plan: Plan
    counts: Counts

    def start(self) -> None:
        """Nothing is kept."""

    def target(
        self, state: None, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B m V"], None]:
        """The canvas is the template, or all masked."""
        canvas = (
            self.plan.task.tokens if isinstance(self.plan.pattern, Infill) else torch.full_like(x, self.model.mask_id)
        )
        branches = 1 if self.plan.head == "causal" else 2
        needed = self.plan.needed(end, branches)
        self.counts.add(rows, causal=1, diffusion=branches - 1, computed=needed, needed=needed)
        return self._read(x, canvas, self.plan.pattern, self.plan.head, n, end, rows), None

    def look(
        self, state: None, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], size: int, rows: Bool[Tensor, " B"]
    ) -> tuple[tuple[Tensor, Tensor, int], None]:
        """Only remembers the canvas and the windows."""
        start, end = self.plan.window(n, size)
        needed = self.plan.needed(end)
        self.counts.add(rows, causal=1, diffusion=1, computed=needed, needed=needed)
        return (x, start, size), None

    def drafts(
        self,
        look: tuple[Tensor, Tensor, int],
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
        self, state: None, x: Tensor, n: Tensor, rows: Tensor, size: int = 0, least: float = 0.0, lookup: int = 0
    ) -> tuple[None, None]:
        """The reference works step by step."""
        return None, None

    def keep(self, state: None, below: Int[Tensor, " B"]) -> None:
        """Nothing is kept."""

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
