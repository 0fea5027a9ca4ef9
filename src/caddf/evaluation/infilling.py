"""Infilling, measured: spans of text given what stands around them, or given what stands before them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import Autoregressive, Confidence, Decoder, Task
from caddf.errors import InputError, at_least
from caddf.evaluation.bounds import diffusion_bound
from caddf.evaluation.likelihood import read_exact
from caddf.evaluation.reading import infilled
from caddf.interface import LanguageModel

SpanReading = Literal["infill", "diffusion", "causal"]
"""How a span is read: `infill`, left to right given both sides (eq. 6; exact); `diffusion`, in any order given both
sides (eq. 9 over the span; an upper bound, exact for one token); `causal`, given the left alone (exact)."""


@dataclass(frozen=True)
class Filled:
    """Of each row: nats per token of its span, and whether filling it greedily gives the text itself."""

    nats: Float[Tensor, " B"]
    exact: Bool[Tensor, " B"]


def readings(model: LanguageModel) -> tuple[SpanReading, ...]:
    """What a model can say of a span. One that is told the time can say nothing, and is the caller's to leave out."""
    found: list[SpanReading] = ["infill"] if "fused" in model.heads else []
    found += ["diffusion"] if model.denoiser != "causal" else []
    return (*found, "causal") if "causal" in model.heads else tuple(found)


@torch.no_grad()
def fill_spans(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    start: Int[Tensor, " B"],
    size: int,
    reading: SpanReading,
    samples: int,
    noise: Sequence[torch.Generator],
) -> Filled:
    """Scores and fills the `size` tokens from `start` on of every row; the rest of the row is given.

    `samples` masked sets per row make the bound; greedy filling is one token at a time, for `diffusion` the surest
    first. Raises `InputError` where a span leaves its row, or the model does not have the reading.
    """
    at_least(1, size=size, samples=samples)
    if reading not in readings(model):
        raise InputError(f"reading is {reading}; this model has {', '.join(readings(model))}")
    if start.min() < 0 or start.max() + size > x0.shape[1]:
        raise InputError(f"size is {size}; spans from {int(start.max())} on leave rows of {x0.shape[1]} tokens")
    at = torch.arange(x0.shape[1], device=x0.device)
    where = (at >= start[:, None]) & (at < start[:, None] + size)
    tokens, lengths = torch.where(where, model.mask_id, x0), torch.full_like(start, x0.shape[1])
    decoder: Decoder
    if reading == "infill":
        nats = infilled(model, x0, where).nats.sum(-1)
        decoder = Autoregressive(target="fused")
    elif reading == "diffusion":
        nats = diffusion_bound(model, x0, samples, noise, scored=where).mean(-1)
        decoder = Confidence(threshold=2.0)
    else:
        nats = read_exact(model, x0, "causal").nats.where(where, 0).sum(-1)
        tokens, lengths = tokens.where(at < start[:, None] + size, 0), start + size
        decoder = Autoregressive(target="causal")
    filled = _greedy(model, decoder, tokens, lengths, template=reading != "causal")
    return Filled(nats.cpu() / size, ((filled == x0) | ~where).all(-1).cpu())


def _greedy(
    model: LanguageModel, decoder: Decoder, tokens: Int[Tensor, "B L"], lengths: Int[Tensor, " B"], template: bool
) -> Int[Tensor, "B L"]:
    task = Task(tokens, lengths, model.mask_id, RowGenerators(0, len(tokens)), Warp(0.0), template=template)
    *_, last = decoder(model, task)
    return last.tokens
