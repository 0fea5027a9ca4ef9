"""Exact likelihoods, by the chain rule: nats per sequence, or of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf.errors import InputError, at_least
from caddf.evaluation.reading import Model, Readout, checked, read
from caddf.interface import Block, Head, Infill, LanguageModel, Pattern

Likelihood = Literal["causal", "ar", "block"]


def read_exact(
    model: LanguageModel, x0: Int[Tensor, "B L"], likelihood: Likelihood, block_size: int | None = None
) -> Readout:
    """Every position of `x0` under one exact likelihood, in one pass; `block_size` is the model's if not given.

    Raises `InputError` on a likelihood that the model does not have.
    """
    size = model.block_size if block_size is None else block_size
    at_least(1, block_size=size)
    readings: dict[str, tuple[Pattern, Head]] = {
        "causal": (Infill(), "causal"),
        "ar": (Infill(), "fused"),
        "block": (Block(size), "fused"),
    }
    if likelihood not in readings:
        raise InputError(f"likelihood is {likelihood}; it must be one of {', '.join(readings)}")
    pattern, head = readings[likelihood]
    if head not in model.heads:
        raise InputError(f"likelihood is {likelihood}; this model has no {head} head (causal branch off)")
    states, _ = model(x0, torch.full_like(x0, model.mask_id), pattern)
    return read(model, states, torch.ones_like(x0, dtype=torch.bool), x0, head)


@overload
def score(
    model: Model,
    x0: Tensor,
    likelihood: Likelihood = ...,
    block_size: int | None = ...,
    *,
    vocab_size: int | None = ...,
) -> Tensor: ...
@overload
def score(
    model: Model,
    x0: Sequence[Sequence[int]],
    likelihood: Likelihood = ...,
    block_size: int | None = ...,
    *,
    vocab_size: int | None = ...,
) -> list[Tensor]: ...
@torch.no_grad()
def score(
    model: Model,
    x0: Tensor | Sequence[Sequence[int]],
    likelihood: Likelihood = "causal",
    block_size: int | None = None,
    *,
    vocab_size: int | None = None,
) -> Tensor | list[Tensor]:
    """log p(x0_i | x0_<i) of every token (nats, float64): `[B, L]`, or for a list of rows a list of `[L_r]`.

    `causal`, `ar` and `block` as in `causal_nll`, `ar_nll` and `block_nll`. A list's rows are scored one by one.
    """
    if not isinstance(x0, Tensor):
        rows = [torch.tensor([list(row)], dtype=torch.int64) for row in x0]
        return [score(model, row, likelihood, block_size, vocab_size=vocab_size)[0] for row in rows]
    return -read_exact(checked(model, x0, vocab_size), x0, likelihood, block_size).nats


def causal_nll(model: Model, x0: Int[Tensor, "B L"], *, vocab_size: int | None = None) -> Float[Tensor, " B"]:
    """-sum_i log p_causal(x_i | x_<i): the causal branch's own head."""
    return -score(model, x0, "causal", vocab_size=vocab_size).sum(-1)


def ar_nll(model: Model, x0: Int[Tensor, "B L"], *, vocab_size: int | None = None) -> Float[Tensor, " B"]:
    """-sum_i log p_fused(x_i | x_<i, h(all-masked canvas)).

    The canvas is as long as the row. An encoder without absolute positions, as the diffusion branch is, makes equal
    states of equal tokens, so that an all-masked canvas of the training length would say the same.
    """
    return -score(model, x0, "ar", vocab_size=vocab_size).sum(-1)


def block_nll(
    model: Model, x0: Int[Tensor, "B L"], block_size: int, *, vocab_size: int | None = None
) -> Float[Tensor, " B"]:
    """-sum_i log p_fused(x_i | x_<i, h(x_<start of i's block)), blocks counted from position 0."""
    return -score(model, x0, "block", block_size, vocab_size=vocab_size).sum(-1)
