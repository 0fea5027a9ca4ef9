"""Accuracies: how often an arg max is the true token. All are shares in [0, 1], one per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import InputError, at_least
from caddf.evaluation.bounds import draw
from caddf.evaluation.likelihood import read_exact
from caddf.evaluation.masks import Noise, counted, interval_weights, nth, uniform
from caddf.evaluation.reading import Model, checked, read
from caddf.interface import Block, LanguageModel


@dataclass(frozen=True)
class MultiToken:
    """Drafts of an all-masked block, given its true prefix; a chain hears what it found likeliest before.

    accuracy: share of drafts that are the true token. agreement: share that are the fused head's arg max given the
    true prefix of the token; None for a model without that head.
    """

    accuracy: Float[Tensor, " B"]
    agreement: Float[Tensor, " B"] | None


@torch.no_grad()
def autoregressive_accuracy(
    model: Model,
    x0: Int[Tensor, "B L"],
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, " B"]:
    """Arg max of the head of the `ar` likelihood (fused, all-masked canvas), over all scored positions."""
    best = read_exact(checked(model, x0, vocab_size), x0, "ar").best
    scored, count = counted(x0, scored)
    return ((best == x0) & scored.to(x0.device)).sum(-1).double() / count


@torch.no_grad()
def diffusion_accuracy(
    model: Model,
    x0: Int[Tensor, "B L"],
    samples: int,
    noise: Noise,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "B samples"]:
    """Arg max of the denoiser over masked positions, averaged over lambda: the k masked have one share, k ~ U{1..L}."""
    model = checked(model, x0, vocab_size)
    scored, count = counted(x0, scored)
    out = draw(model, x0, interval_weights(count, 0, 1), samples, noise, scored=scored)
    return out.right / out.counts


@torch.no_grad()
def mtp(
    model: Model,
    x0: Int[Tensor, "B L"],
    block_size: int,
    noise: Noise | None = None,
    *,
    scored: Bool[Tensor, "B L"] | None = None,
    vocab_size: int | None = None,
) -> MultiToken:
    """Multi-token prediction: the k arg maxes of the draft head for each whole block of `x0` that is scored throughout.

    A chained draft knows the drafts before it: it is rolled on its own arg maxes, never on the text. What it drafts
    would be the later blocks' prefix, so one block per row is rolled, drawn from `noise` (by default from seed 0).
    """
    at_least(1, block_size=block_size)
    model, (rows, length) = checked(model, x0, vocab_size), x0.shape
    if not (blocks := length // block_size):
        raise InputError(f"block_size is {block_size}; it must be at most the row's length, {length}")
    scored, _ = counted(x0, scored)
    whole = scored[:, : blocks * block_size].view(rows, blocks, block_size).all(-1)
    if not whole.any(-1).all():
        raise InputError(f"block_size is {block_size}; a row has no block of so many scored tokens")
    if model.chained:
        noise = torch.Generator().manual_seed(0) if noise is None else noise
        one = nth(whole, (uniform((rows, 1), noise) * whole.sum(-1, keepdim=True)).long())
        whole = torch.zeros_like(whole).scatter(-1, one, True)
    where = F.pad(whole.repeat_interleave(block_size, -1), (0, length - blocks * block_size)).to(x0.device)
    canvas = torch.full_like(x0, model.mask_id)
    states, _ = model(x0, canvas, Block(block_size))
    drafts = read(model, states, where, x0, "draft").best
    if model.chained:
        drafts = _rolled(model, x0, where, drafts, block_size)
    agreement = None
    if "fused" in model.heads:
        agreement = _share(drafts == read(model, states, where, x0, "fused").best, where)
    return MultiToken(_share(drafts == x0, where), agreement)


def _rolled(
    model: LanguageModel, x0: Int[Tensor, "B L"], where: Bool[Tensor, "B L"], drafts: Int[Tensor, "B L"], size: int
) -> Int[Tensor, "B L"]:
    """The chain's drafts for the blocks in `where`, each reading the drafts before it, from teacher-forced `drafts`.

    Within its block the prefix reaches the draft head through the chain alone, and a draft reads only earlier ones:
    after j rounds the first j + 1 are final, and drafts that reproduce themselves are those of the chain.
    """
    for _ in range(size - 1):
        prefix = torch.where(where, drafts, x0)
        states, _ = model(prefix, torch.full_like(x0, model.mask_id), Block(size))
        before, drafts = drafts, read(model, states, where, x0, "draft").best
        if torch.equal(before, drafts):
            break
    return drafts


def _share(right: Bool[Tensor, "B L"], where: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    return ((right & where).sum(-1) / where.sum(-1)).double().cpu()
