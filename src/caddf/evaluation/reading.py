"""What a model says of given tokens: nats and arg max of a head, at the positions that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.interface import AnyOrder, Head, Infill, LanguageModel

Model = LanguageModel | Callable[[Tensor], Tensor]
"""A model, or a function `x_t -> log-probabilities` (then `vocab_size` must be given)."""


def checked(model: Model, x0: Int[Tensor, "B L"], vocab_size: int | None) -> LanguageModel:
    """The model of `as_model`; raises `InputError` where `x0` is not rows of its tokens."""
    model = as_model(model, vocab_size)
    if x0.ndim != 2 or not x0.numel() or x0.dtype != torch.int64:
        raise InputError(f"x0 has shape {tuple(x0.shape)} and type {x0.dtype}; token ids [B, L] in int64 are needed")
    if x0.min() < 0 or x0.max() >= model.vocab_size:
        worst = int(x0.min()) if x0.min() < 0 else int(x0.max())
        raise InputError(f"x0 holds the id {worst}; the model's tokens are 0 to {model.vocab_size - 1}")
    return model


@dataclass(frozen=True)
class Readout:
    """What a head says of `x0`: nats `-log p(x0_i)` (float64, 0 where not read) and its arg max (-1 where not read)."""

    nats: Float[Tensor, "B L"]
    best: Int[Tensor, "B L"]


def read(
    model: LanguageModel,
    states: object,
    where: Bool[Tensor, "B L"],
    x0: Int[Tensor, "B L"],
    head: Head,
    elements: int = 1 << 25,
) -> Readout:
    """Nats and arg max at the positions in `where`; at most `elements` log-probabilities (or one row's) at a time."""
    nats = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    best = torch.full_like(x0, -1)
    for rows in torch.arange(len(x0)).split(max(1, elements // (x0.shape[1] * model.vocab_size))):
        part = torch.zeros_like(where)
        part[rows] = where[rows]
        log_p = model.log_probs(states, part, head)
        nats[part] = -log_p.gather(-1, x0[part][:, None])[:, 0].double()
        best[part] = log_p.argmax(-1)
    return Readout(nats, best)


def denoised(model: LanguageModel, x0: Int[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Readout:
    """q(x0_i | x_t) at the masked positions, `prefix = x_t` (eq. 5)."""
    x_t = torch.where(where, model.mask_id, x0)
    states, _ = model(x_t, x_t, AnyOrder())
    return read(model, states, where, x0, model.denoiser)


def infilled(model: LanguageModel, x0: Int[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Readout:
    """p_fused(x0_i | x0_<i, z) at the masked positions of the canvas z (eq. 6); their product is one chain rule."""
    states, _ = model(x0, torch.where(where, model.mask_id, x0), Infill())
    return read(model, states, where, x0, "fused")
