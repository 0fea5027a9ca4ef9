"""Reading left to right, with caches and without: what the autoregressive and speculative decoders ask of a model."""

from __future__ import annotations

from typing import Any, Protocol, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.cached_reader import CachedReader
from caddf.decoding.full_reader import FullReader
from caddf.decoding.plan import Plan
from caddf.decoding.task import Counts
from caddf.interface import ONE_TOKEN, Drafting, Incremental, LanguageModel, Round


class Reader(Protocol):
    """Readings of a task's rows `x`, `[M]` from each row's first open position n on but for drafts and given tokens.

    State in, state out: what has been read is the caller's to hold, and `keep` says how much of it still holds.
    """

    def start(self) -> Any:
        """The state before anything is read."""

    def target(
        self, state: Any, x: Int[Tensor, "B T"], n: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B m V"], Any]:
        """log p at positions n to `end - 1`, each given the tokens in `x` before it (0 behind a row's end)."""

    def look(
        self,
        state: Any,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        start: Int[Tensor, " B"],
        size: int,
        new: Bool[Tensor, " B"],
    ) -> tuple[Any, Any]:
        """One pass of the diffusion branch over the `new` windows of drafts, masked from n on; others are as they were.

        They are of `size`, from `start` on.
        """

    def drafts(
        self, look: Any, x: Int[Tensor, "B T"], at: Int[Tensor, " B"], end: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
    ) -> Float[Tensor, "B m V"]:
        """log q at positions `at` to `end - 1` of the window (0 behind a row's end)."""

    def chain(
        self,
        look: Any,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """Up to m chained drafts from n on at one go, where the model can: tokens, q, how many are to be verified.

        Where `given` is not -1 that token stands already.
        """

    def round(
        self,
        state: Any,
        x: Int[Tensor, "B T"],
        n: Int[Tensor, " B"],
        rows: Bool[Tensor, " B"],
        drafting: Drafting = ONE_TOKEN,
    ) -> tuple[Round | None, Any]:
        """A whole round, where the model can: what the other readings lead to, from the same uniforms."""

    def keep(self, state: Any, below: Int[Tensor, " B"]) -> Any:
        """Only slots below `below` still hold: the tokens that later ones read have changed."""


def reader_for(model: LanguageModel, plan: Plan, counts: Counts, drafting: bool, cache: bool) -> Reader:
    """Cached where the model can, the reference where it cannot or `cache` is off."""
    if cache and hasattr(model, "incremental"):
        incremental = cast(Incremental, model)
        if incremental.incremental(plan.pattern) or (plan.head == "causal" and (plan.aligned or not drafting)):
            return CachedReader(incremental, plan, counts)
    return FullReader(model, plan, counts)
