"""Two evaluations of the same windows, compared window by window: what the windows have in common cancels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from caddf.errors import InputError
from caddf.evaluation.likelihood import estimate

EXACT = ("causal", "ar", "block")
"""Likelihoods that may be compared with a left-to-right model's."""


@dataclass(frozen=True)
class Ratio:
    """A perplexity over another's, of the same windows, with its standard error over them (None with one window).

    likelihood, against: which of the two evaluations' likelihoods these are.
    """

    likelihood: str
    against: str
    ratio: float
    standard_error: float | None


def paired(ours: Mapping[str, Any], theirs: Mapping[str, Any], likelihood: str, against: str | None = None) -> Ratio:
    """The ratio of one likelihood of `ours` to one of `theirs` (not given: the same), as `evaluate` gives both.

    Raises `InputError` where they are of other windows, or do not have the likelihood.
    """
    against = against or likelihood
    one, other = (evaluation.get("per_window") for evaluation in (ours, theirs))
    if one is None or other is None:
        raise InputError("an evaluation has no per_window; it was made by an older version: evaluate again")
    if (one["text"], one["tokens"]) != (other["text"], other["tokens"]):
        raise InputError(
            f"the evaluations are of other windows ({len(one['tokens'])} and {len(other['tokens'])}); data, protocol, "
            "max_windows and seed must be the same"
        )
    for name, found in ((likelihood, one), (against, other)):
        if name not in found["nats"]:
            raise InputError(f"likelihood is {name}; this evaluation has {', '.join(found['nats'])}")
    nats = [torch.tensor(found["nats"][name]).double() for name, found in ((likelihood, one), (against, other))]
    less = estimate(nats[0] - nats[1], torch.tensor(one["tokens"]))
    error = None if less.standard_error is None else less.ppl * less.standard_error
    return Ratio(likelihood, against, less.ppl, error)


def comparisons(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Ratio]:
    """Every likelihood of `ours` to its like in `theirs`: exact ones to a left-to-right model's only one."""
    names, others = (list(evaluation.get("per_window", {}).get("nats", ())) for evaluation in (ours, theirs))
    exact = [name for name in others if name in EXACT]
    for name in names:
        if name in others:
            yield paired(ours, theirs, name)
        elif name in EXACT and exact:
            yield paired(ours, theirs, name, exact[0])
