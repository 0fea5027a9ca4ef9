"""An evaluation's likelihoods by name, and two evaluations of the same windows compared window by window.

What the windows have in common cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from caddf.errors import InputError
from caddf.evaluation.estimates import Estimate, estimate

EXACT = ("causal", "ar", "block")
"""Likelihoods that may be compared with a left-to-right model's."""


def named(likelihoods: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every likelihood of an evaluation that a table may show, by name: exact ones and bounds, never `truncated`."""
    for name in (*EXACT, "hybrid", "diffusion"):
        if name == "hybrid":
            yield from ((f"hybrid {each['lambda']:g}", each) for each in likelihoods.get(name, []))
        elif name in likelihoods:
            yield name, likelihoods[name]


@dataclass(frozen=True)
class Ratio:
    """A perplexity over another's, of the same windows, with its standard error over them (None with one window).

    document_error: the same over documents, the windows of one taken together (None with one, or where they are not
        known).
    likelihood, against: which of the two evaluations' likelihoods these are.
    """

    likelihood: str
    against: str
    ratio: float
    standard_error: float | None
    document_error: float | None = None


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    tokens: Sequence[int] | int = 1,
    documents: Sequence[int] | None = None,
) -> Estimate:
    """Nats per token of `ours` less those of `theirs`, window by window: the logarithm of the ratio of perplexities.

    `tokens` are those of each window (1 where the nats are per token already), `documents` what each is of.
    """
    less = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return estimate(less, tokens if isinstance(tokens, int) else torch.tensor(tokens), documents=documents)


def ratio_of(
    ours: Sequence[float], theirs: Sequence[float], tokens: Sequence[int] | int = 1
) -> tuple[float, float | None]:
    """Ratio of the perplexities of two lists of nats, window by window, and its standard error over windows."""
    found = difference(ours, theirs, tokens)
    return found.ppl, _of_ratio(found.ppl, found.standard_error)


def _of_ratio(ppl: float, error: float | None) -> float | None:
    """A perplexity's error, of that of its nats (the delta method)."""
    return None if error is None else ppl * error


def paired(ours: Mapping[str, Any], theirs: Mapping[str, Any], likelihood: str, against: str | None = None) -> Ratio:
    """The ratio of one likelihood of `ours` to one of `theirs` (not given: the same), as `evaluate` gives both.

    Raises `InputError` where they are of other windows, or do not have the likelihood.
    """
    against = against or likelihood
    one, other = _per_window(ours), _per_window(theirs)
    if (one["text"], one["tokens"]) != (other["text"], other["tokens"]):
        raise InputError(
            f"the evaluations are of other windows ({len(one['tokens'])} and {len(other['tokens'])}); data, protocol, "
            "max_windows and seed must be the same"
        )
    for name, found in ((likelihood, one), (against, other)):
        if name not in found["nats"]:
            raise InputError(f"likelihood is {name}; this evaluation has {', '.join(found['nats'])}")
    less = difference(one["nats"][likelihood], other["nats"][against], one["tokens"], one.get("documents"))
    errors = (_of_ratio(less.ppl, error) for error in (less.standard_error, less.document_error))
    return Ratio(likelihood, against, less.ppl, *errors)


def _per_window(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises `InputError` where an evaluation does not have it."""
    if "per_window" not in evaluation:
        raise InputError("an evaluation has no per_window; it is another file, or of an older version: evaluate again")
    return evaluation["per_window"]


def comparisons(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Ratio]:
    """Every likelihood of `ours` to its like in `theirs`: exact ones to a left-to-right model's only one.

    Raises `InputError` as `paired` does.
    """
    names, others = (list(_per_window(evaluation)["nats"]) for evaluation in (ours, theirs))
    exact = [name for name in others if name in EXACT]
    for name in names:
        if name in others:
            yield paired(ours, theirs, name)
        elif name in EXACT and exact:
            yield paired(ours, theirs, name, exact[0])
