"""Averages of nats over rows, with standard errors, and the perplexity and bits per byte that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An average over rows.

    nll: nats per token. standard_error: of `nll`, over rows, so that Monte-Carlo noise is in it; None with one row.
    document_error: the same over documents, the rows of one taken together, since they are alike; None with one
        document, or where documents are not known.
    samples: Monte-Carlo samples per row (1 for exact likelihoods). bytes: of text scored, where known.
    """

    nll: float
    standard_error: float | None
    tokens: int
    rows: int
    samples: int
    bytes: int | None = None
    document_error: float | None = None

    @property
    def ppl(self) -> float:
        """exp(nll), per token."""
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which compares across tokenisers; None where the bytes are not known."""
        return self.nll * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, for JSON."""
        return {
            "nll": self.nll,
            "standard_error": self.standard_error,
            "document_error": self.document_error,
            "ppl": self.ppl,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "rows": self.rows,
            "samples": self.samples,
        }


def estimate(
    nats: Float[Tensor, " B"] | Float[Tensor, "B S"],
    tokens: int | Int[Tensor, " B"],
    bytes: int | None = None,
    documents: Sequence[int] | None = None,
) -> Estimate:
    """Averages per-row nats (one value, or S samples, per row) over `tokens` (of each row, or of every row).

    documents: the number of each row's document, where rows of one document are not independent of each other.
    """
    samples = nats.shape[1] if nats.ndim == 2 else 1
    per_row = nats.double().reshape(len(nats), samples).mean(-1)
    count = torch.as_tensor(tokens, dtype=torch.float64).expand(len(nats))
    nll, n = (per_row.sum() / count.sum()).item(), len(nats)
    rest = per_row - nll * count
    error = _error(rest, count)
    document_error = None
    if documents is not None:
        names, which = torch.tensor(documents).unique(return_inverse=True)
        document_error = _error(torch.zeros(len(names), dtype=torch.float64).index_add(0, which, rest), count)
    return Estimate(nll, error, int(count.sum()), n, samples, bytes, document_error)


def _error(rest: Float[Tensor, " G"], count: Float[Tensor, " B"]) -> float | None:
    """The ratio estimator's error, of what independent groups of rows are off; None with one of them.

    With rows of one length, each a group, it is the standard deviation over sqrt(n). With groups it is the sandwich
    estimate of Liang and Zeger (1986), with their number's correction.
    """
    n = len(rest)
    return (rest.square().sum().sqrt() / count.sum()).item() * math.sqrt(n / (n - 1)) if n > 1 else None
