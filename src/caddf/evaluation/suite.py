"""All likelihoods and accuracies over a set of windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from caddf.errors import InputError
from caddf.evaluation.accuracy import mtp
from caddf.evaluation.likelihood import (
    Model,
    Noise,
    at_least_one,
    block_nll,
    checked,
    draw,
    estimate,
    finite_step_bound,
    importance_weighted_bound,
    infilling,
    interval_weights,
    read_exact,
)
from caddf.interface import LanguageModel, as_model
from caddf.schedules import LogLinear


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures, and how closely.

    batch_size: windows per pass; no result depends on it. samples: Monte-Carlo samples per window of the diffusion
        bound, which `truncated`, the hybrid bounds and the diffusion accuracy share; a quarter as many (at least one)
        for the finite-step bounds and for the infilling of the hybrid bounds.
    anchors: the hybrid bounds' l*. nfe: numbers of steps of the finite-step bounds.
    importance_steps, paths: of the importance-weighted bound, which costs up to their product in passes (0 paths: off).
    max_windows: score so many windows, chosen with `seed`; null scores all.
    block_size: k of the block likelihood and of multi-token prediction; not set, the model's own.
    seed: of all noise, window by window.
    """

    batch_size: int = 16
    samples: int = 8
    anchors: tuple[float, ...] = (0.25, 0.5, 0.75)
    nfe: tuple[int, ...] = (4, 32)
    importance_steps: int = 4
    paths: int = 2
    max_windows: int | None = 200
    block_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(
            batch_size=self.batch_size,
            samples=self.samples,
            importance_steps=self.importance_steps,
        )
        if self.paths < 0:
            raise InputError(f"paths is {self.paths}; it must be 0 (off) or more")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or more")
        for name in ("max_windows", "block_size"):
            if (value := getattr(self, name)) is not None:
                at_least_one(**{name: value})
        for steps in self.nfe:
            at_least_one(nfe=steps)
        for anchor in self.anchors:
            if not 0 <= anchor <= 1:
                raise InputError(f"anchors holds {anchor}; each must lie in [0, 1]")


Bound = Callable[[LanguageModel, Tensor, int, Noise], Tensor]
"""`(model, x0, samples, noise) -> [B, samples]`: nats per sequence whose mean bounds -log p(x0) from above."""
Rows = dict[tuple[str | float, ...], Tensor]
"""One value per window of each measure: nats per sequence, or a share."""


@torch.no_grad()
def evaluate(
    model: Model,
    windows: Int[Tensor, "N L"],
    settings: EvaluationConfig = EvaluationConfig(),
    *,
    byte_lengths: Int[Tensor, " V"] | None = None,
    vocab_size: int | None = None,
    bound: Bound | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Likelihoods (nats per token), accuracies and multi-token prediction over `windows`, as plain values for JSON.

    Likelihoods that the model does not have are absent. `bound` is the diffusion bound of a model that is no time-free
    denoiser, and then the only one of its kind. Bits per byte need `byte_lengths`, the bytes of each token.
    `device` is where the model is; `progress` is told the windows done and their number. A window's noise comes from
    `settings.seed` and its index alone. Raises `InputError` where there are no windows, or they are no tokens.
    """
    if windows.ndim != 2 or not len(windows):
        raise InputError(f"windows has shape {tuple(windows.shape)}; at least one window [N, L] is needed")
    chosen = torch.arange(len(windows))
    if settings.max_windows is not None and settings.max_windows < len(windows):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
        chosen = order[: settings.max_windows].sort().values
    model = as_model(model, vocab_size)
    block_size = settings.block_size or model.block_size
    parts: list[Rows] = []
    text_bytes, done = 0, 0
    for indices in chosen.split(settings.batch_size):
        x0 = windows[indices].long()
        noise = [window_generator(settings.seed, i) for i in indices.tolist()]
        parts.append(_measure(checked(model, x0, vocab_size), x0.to(device), settings, block_size, noise, bound))
        if byte_lengths is not None:
            text_bytes += int(byte_lengths[x0].sum())
        done += len(indices)
        if progress is not None:
            progress(done, len(chosen))
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _summary(rows, windows.shape[1], text_bytes or None, settings, block_size)


def window_generator(seed: int, index: int) -> torch.Generator:
    """The noise of one window: no two (seed, index) share a stream."""
    state = np.random.SeedSequence((seed, index)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def _measure(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    settings: EvaluationConfig,
    block_size: int,
    noise: Noise,
    bound: Bound | None,
) -> Rows:
    """Every measure of one batch."""
    rows: Rows = {}
    for name in ("causal", "ar"):
        if {"causal": "causal", "ar": "fused"}[name] in model.heads:
            exact = read_exact(model, x0, name)
            rows[name,], rows["accuracy", "ar"] = exact.nats.sum(-1), (exact.best == x0).double().mean(-1)
    if "fused" in model.heads:
        rows["block",] = block_nll(model, x0, block_size)
    if bound is not None:
        rows["diffusion",] = bound(model, x0, settings.samples, noise).mean(-1, keepdim=True)
    elif model.denoiser != "causal":
        rows |= _any_order(model, x0, settings, noise, rows.get(("ar",)))
        if block_size <= x0.shape[1]:
            drafts = mtp(model, x0, block_size, noise)
            rows["mtp", "accuracy"] = drafts.accuracy
            if drafts.agreement is not None:
                rows["mtp", "agreement"] = drafts.agreement
    return {name: value.cpu() for name, value in rows.items()}


def _any_order(
    model: LanguageModel, x0: Int[Tensor, "B L"], settings: EvaluationConfig, noise: Noise, ar: Tensor | None
) -> Rows:
    """What a time-free denoiser bounds, from one set of draws; `ar` (nats) steadies the parts of the hybrid bounds."""
    length, few = x0.shape[1], max(1, settings.samples // 4)
    level = None if ar is None else ar.cpu() / length
    everything = interval_weights(length, 0, 1)
    draws = draw(model, x0, everything, settings.samples, noise)
    rows: Rows = {
        ("diffusion",): draws.average(everything),
        ("truncated",): draws.average(interval_weights(length, *LogLinear().limits), level),
        ("accuracy", "diffusion"): draws.right / draws.counts,
    }
    for steps in settings.nfe:
        rows["nfe", steps] = finite_step_bound(model, x0, steps, few, noise)
    if settings.paths:
        steps, paths = settings.importance_steps, settings.paths
        rows["importance_weighted",] = importance_weighted_bound(model, x0, steps, paths, noise)
    if ar is not None:
        for anchor in settings.anchors:
            tail = draws.average(interval_weights(length, anchor, 1), level)
            rows["hybrid", anchor] = tail + infilling(model, x0, anchor, few, noise).mean(-1, keepdim=True)
    return rows


def _summary(
    rows: Rows, length: int, text_bytes: int | None, settings: EvaluationConfig, block_size: int
) -> dict[str, Any]:
    """Averages over the windows, named as they are reported."""

    def nats(*name: str | float) -> dict[str, Any]:
        return dict(estimate(rows[name], length, text_bytes).to_dict())

    plain = ("causal", "ar", "block", "diffusion", "truncated")
    likelihoods: dict[str, Any] = {name: nats(name) for name in plain if (name,) in rows}
    if any(name[0] == "hybrid" for name in rows):
        likelihoods["hybrid"] = [{"lambda": anchor, **nats("hybrid", anchor)} for anchor in settings.anchors]
    if any(name[0] == "nfe" for name in rows):
        likelihoods["nfe"] = [{"steps": steps, **nats("nfe", steps)} for steps in settings.nfe]
    if ("importance_weighted",) in rows:
        which = {"steps": settings.importance_steps, "paths": settings.paths}
        likelihoods["importance_weighted"] = [{**which, **nats("importance_weighted")}]
    windows = len(next(iter(rows.values())))
    drafts = {name[1]: value.mean().item() for name, value in rows.items() if name[0] == "mtp"}
    return {
        "likelihoods": likelihoods,
        "accuracy": {str(name[1]): value.mean().item() for name, value in rows.items() if name[0] == "accuracy"},
        "mtp": {**drafts, "block_size": block_size},
        "tokens": windows * length,
        "samples": settings.samples,
        "windows": windows,
    }
