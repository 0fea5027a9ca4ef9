"""A plain function `x_t -> log-probabilities` in the place of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Head, Infill, LanguageModel, Pattern


@dataclass(frozen=True)
class _Readings:
    prefix: Int[Tensor, "B L"]
    canvas: Int[Tensor, "B L"]
    pattern: Pattern


class DenoiserModel:
    """A function `x_t [B, L] -> log-probabilities [B, L, V]` in the place of a model.

    All readings follow from the one conditional q(x0_i | unmasked part): a fused output at i is q at i given the
    canvas with `prefix[<i]` revealed; a causal output is q at i given `prefix[<i]` alone. Nothing is cached: reading N
    positions left to right costs N evaluations.

    Raises `InputError` where the function's result has another shape or does not sum to one over the V tokens.
    """

    heads: frozenset[Head] = frozenset({"fused", "draft", "causal"})
    denoiser: Head = "fused"
    chained: bool = False
    block_size: int = 8

    def __init__(self, function: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        self.function = function
        self.vocab_size = vocab_size
        self.mask_id = vocab_size

    def __call__(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, caches: Any = None
    ) -> tuple[_Readings, Any]:
        """Only remembers what is to be read: the function runs in `log_probs`."""
        return _Readings(prefix, canvas, pattern), caches

    def log_probs(self, states: _Readings, where: Bool[Tensor, "B L"], head: Head = "fused") -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) at the positions in `where`, row-major."""
        if head != "causal" and (
            isinstance(states.pattern, AnyOrder) or (head == "draft" and states.pattern == Infill())
        ):
            return self._evaluate(states.canvas)[where]
        rows, columns = where.nonzero(as_tuple=True)
        revealed = self._revealed(states, rows, columns, head)
        parts = [self._evaluate(x)[torch.arange(len(i), device=i.device), i] for x, i in revealed]
        empty = torch.empty(0, self.vocab_size, dtype=torch.float64, device=states.prefix.device)
        return torch.cat(parts) if parts else empty

    def nll(
        self, states: _Readings, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "fused"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` of `targets` at the positions in `where`."""
        return -self.log_probs(states, where, head).gather(-1, targets[where][:, None])[:, 0]

    def _revealed(
        self, states: _Readings, rows: Tensor, columns: Tensor, head: Head, chunk: int = 1024
    ) -> Iterator[tuple[Int[Tensor, "n L"], Int[Tensor, " n"]]]:
        """One canvas per position read: what that output may see."""
        positions = torch.arange(states.prefix.shape[1], device=states.prefix.device)
        for r, i in zip(rows.split(chunk), columns.split(chunk), strict=True):
            prefix, canvas = states.prefix[r], states.canvas[r]
            upto = i
            if isinstance(states.pattern, Block):
                inside = states.pattern.index(positions) == states.pattern.index(i)[:, None]
                canvas = torch.where(inside, canvas, self.mask_id)
                upto = states.pattern.start(i) if head == "draft" else i
            if head == "causal":
                canvas = torch.full_like(canvas, self.mask_id)
            yield torch.where(positions < upto[:, None], prefix, canvas), i

    def _evaluate(self, x_t: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        log_q = self.function(x_t)
        if log_q.shape[:2] != x_t.shape or log_q.shape[2] < self.vocab_size:
            raise InputError(
                f"the denoiser returned shape {tuple(log_q.shape)} for x_t of shape {tuple(x_t.shape)}; "
                f"log-probabilities of shape {(*x_t.shape, self.vocab_size)} are needed"
            )
        log_q = log_q[..., : self.vocab_size]
        masked = x_t == self.mask_id
        total = log_q[masked].logsumexp(-1)
        if masked.any() and not torch.allclose(total, torch.zeros_like(total), atol=1e-3):
            worst = total[total.abs().argmax()].exp().item()
            raise InputError(
                f"the denoiser's probabilities sum to {worst:.4g} at a masked position; they must sum to 1 over the "
                f"{self.vocab_size} tokens (return log-softmax, not logits)"
            )
        return log_q


def as_model(model: LanguageModel | Callable[[Tensor], Tensor], vocab_size: int | None = None) -> LanguageModel:
    """`model` itself, or a plain function `x_t -> log-probabilities` wrapped (then `vocab_size` must be given)."""
    if hasattr(model, "log_probs"):
        return cast(LanguageModel, model)
    if vocab_size is None:
        raise InputError("vocab_size is not set; with a plain function give the number of real tokens, V")
    return DenoiserModel(model, vocab_size)
