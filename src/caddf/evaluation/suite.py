"""All likelihoods and accuracies over a set of windows.

Windows are read together with others of their length and number of scored tokens. A figure per token is the total over
windows by the total of scored tokens, with the standard error of such a ratio; shares are averaged in proportion to
scored tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.denoiser import as_model
from caddf.errors import Checked, InputError, a_share, at_least, check_seed
from caddf.evaluation.accuracy import mtp
from caddf.evaluation.bounds import draw, finite_step_bound, importance_weighted_bound, infilling
from caddf.evaluation.estimates import estimate
from caddf.evaluation.likelihood import Likelihood, read_exact
from caddf.evaluation.masks import Noise, interval_weights
from caddf.evaluation.protocol import Window, chosen, stacked
from caddf.evaluation.reading import Model, checked
from caddf.interface import Head, LanguageModel
from caddf.schedules import LogLinear

LIKELIHOODS = ("causal", "ar", "block", "diffusion", "hybrid", "nfe", "importance_weighted")
"""Those that a choice can be made of."""


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What `evaluate` measures, and how closely.

    batch_size: windows per pass; no result depends on it. samples: Monte-Carlo samples per window of the diffusion
        bound, which `truncated`, the hybrid bounds and the diffusion accuracy share; a quarter as many (at least one)
        for the finite-step bounds and for the infilling of the hybrid bounds.
    anchors: the hybrid bounds' l*; empty for none. nfe: numbers of steps of the finite-step bounds; empty for none.
    importance_steps: of each path of the importance-weighted bound, which costs up to steps times paths in passes.
    paths: that the importance-weighted bound draws per window; 0 leaves it out.
    max_windows: score so many windows, chosen with `seed`; null scores all.
    block_size: k of the block likelihood and of multi-token prediction; not set, the model's own.
    seed: of all noise, window by window.
    likelihoods: those of causal, ar, block, diffusion, hybrid, nfe and importance_weighted to measure, with what comes
        of the same passes, and no multi-token prediction; empty for all that the model has. Exact ones alone are cheap.
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
    likelihoods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.likelihoods:
            if name not in LIKELIHOODS:
                raise InputError(f"likelihoods holds {name!r}; it must be of {', '.join(LIKELIHOODS)}")
        at_least(1, self, "batch_size", "samples", "nfe", "importance_steps", "max_windows", "block_size")
        at_least(0, self, "paths", note="0: off")
        a_share(self, "anchors")
        check_seed(self.seed)

    def wants(self, *names: str) -> bool:
        """Whether one of these likelihoods is measured."""
        return not self.likelihoods or any(name in self.likelihoods for name in names)


class Bound(Protocol):
    """What bounds -log p(scored | given) from above, in the mean."""

    def __call__(
        self,
        model: Any,
        x0: Int[Tensor, "B L"],
        samples: int,
        noise: Noise,
        *,
        scored: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B samples"]:
        """Nats per sequence; all positions are scored unless told, as many in each row."""


Rows = dict[tuple[str | float, ...], Tensor]
"""One value (or one per sample) for each window of each measure: nats per sequence, or a share."""


@torch.no_grad()
def evaluate(
    model: Model,
    windows: Int[Tensor, "N L"] | Sequence[Window],
    settings: EvaluationConfig = EvaluationConfig(),
    *,
    byte_lengths: Int[Tensor, " V"] | None = None,
    vocab_size: int | None = None,
    bound: Bound | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Likelihoods (nats per token), accuracies and multi-token prediction over `windows`, as plain values for JSON.

    `per_window` has the nats of each window, by which two models are compared (`pairing.paired`): 'tokens' of each that
    are scored, a digest of the 'text', and, where windows know them, the 'documents' that they are of.

    Of a tensor every token is scored; a `Window` says which of its are, given the others.
    Likelihoods that the model does not have are absent. `bound` is the diffusion bound of a model that is no time-free
    denoiser, and then the only one of its kind. Bits per byte need `byte_lengths`, the bytes of each token.
    `device` is where the model is; `progress` is told the windows done and their number. A window's noise comes from
    `settings.seed` and its index alone. Raises `InputError` where there are no windows, or they are no tokens.
    """
    if isinstance(windows, Tensor):
        if windows.ndim != 2:
            raise InputError(f"windows has shape {tuple(windows.shape)}; at least one window [N, L] is needed")
        if windows.dtype.is_floating_point or windows.dtype.is_complex or windows.dtype == torch.bool:
            raise InputError(f"windows is of {windows.dtype}; it must be whole numbers, the ids of tokens")
        windows = [Window(row.long(), torch.ones(len(row), dtype=torch.bool)) for row in windows]
    if not windows:
        raise InputError("windows is empty; at least one window is needed")
    if other := next((each for each in windows if not isinstance(each, Window)), None):
        raise InputError(f"windows holds a {type(other).__name__}; each must be a Window, or give a tensor [N, L]")
    model = as_model(model, vocab_size)
    block_size = settings.block_size or model.block_size
    parts: list[Rows] = []
    documents: list[int | None] = []
    text_bytes, done, text = 0, 0, hashlib.sha256()
    indices = chosen(len(windows), settings.max_windows, settings.seed).tolist()
    for batch in _batches(windows, indices, settings.batch_size):
        x0, scored = stacked([windows[i] for i in batch])
        own = [windows[i].index for i in batch]
        documents += [windows[i].document for i in batch]
        noise = [window_generator(settings.seed, i if at is None else at) for i, at in zip(batch, own, strict=True)]
        model = checked(model, x0, vocab_size)
        parts.append(_measure(model, x0.to(device), scored, settings, block_size, noise, bound))
        text.update(torch.cat([x0, scored], 1).numpy().tobytes())
        if byte_lengths is not None:
            text_bytes += int(byte_lengths[x0[scored]].sum())
        done += len(batch)
        if progress is not None:
            progress(done, len(indices))
    known = [document for document in documents if document is not None]
    which = known if len(known) == len(documents) else None
    summary, tokens, nats = _summary(parts, text_bytes or None, which, settings, block_size)
    per_window = {"text": text.hexdigest(), "tokens": tokens, "nats": nats}
    return {**summary, "per_window": per_window if which is None else {**per_window, "documents": which}}


def _batches(windows: Sequence[Window], indices: list[int], size: int) -> Iterator[list[int]]:
    """Indices of windows to read together: of one length, and one number of scored tokens."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        alike.setdefault((len(windows[i].tokens), int(windows[i].scored.sum())), []).append(i)
    for group in alike.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def window_generator(seed: int, index: int, *use: int) -> torch.Generator:
    """The noise of one window: no two (seed, index), nor two uses of one, share a stream."""
    state = np.random.SeedSequence((seed, index, *use)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def _measure(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    scored: Bool[Tensor, "B L"],
    settings: EvaluationConfig,
    block_size: int,
    noise: Noise,
    bound: Bound | None,
) -> Rows:
    """Every measure of one batch, whose given tokens are as many in each window."""
    (length, count), here = (x0.shape[1], int(scored[0].sum())), scored.to(x0.device)
    rows: Rows = {("scored",): scored.sum(-1)}
    exact: tuple[tuple[Likelihood, Head], ...] = (("causal", "causal"), ("ar", "fused"), ("block", "fused"))
    for name, head in exact:
        wanted = settings.wants(name, "hybrid") if name == "ar" else settings.wants(name)
        if head in model.heads and wanted:
            out = read_exact(model, x0, name, block_size)
            rows[name,] = out.nats.where(here, 0).sum(-1)
            if name != "block":
                rows["accuracy", "ar"] = ((out.best == x0) & here).sum(-1).double() / count
    if bound is not None and settings.wants("diffusion"):
        rows["diffusion",] = bound(model, x0, settings.samples, noise, scored=scored)
    elif bound is None and model.denoiser != "causal":
        rows |= _any_order(model, x0, scored, settings, noise, rows.get(("ar",)))
        last_whole = length // block_size * block_size - block_size
        if not settings.likelihoods and last_whole >= length - count:  # it is scored
            drafts = mtp(model, x0, block_size, noise, scored=scored)
            rows["mtp", "accuracy"] = drafts.accuracy
            if drafts.agreement is not None:
                rows["mtp", "agreement"] = drafts.agreement
    if len(rows) == 1:
        raise InputError(f"likelihoods is {', '.join(settings.likelihoods)}, of which this model has none")
    return {name: value.cpu() for name, value in rows.items()}


def _any_order(
    model: LanguageModel,
    x0: Int[Tensor, "B L"],
    scored: Bool[Tensor, "B L"],
    settings: EvaluationConfig,
    noise: Noise,
    ar: Tensor | None,
) -> Rows:
    """What a time-free denoiser bounds, from one set of draws; `ar` (nats) steadies the parts of the hybrid bounds."""
    count, few = int(scored[0].sum()), max(1, settings.samples // 4)
    level = None if ar is None else ar.cpu() / count
    everything = interval_weights(count, 0, 1)
    rows: Rows = {}
    hybrid = ar is not None and bool(settings.anchors) and settings.wants("hybrid")
    if hybrid or settings.wants("diffusion"):
        draws = draw(model, x0, everything, settings.samples, noise, scored=scored)
        rows = {
            ("diffusion",): draws.average(everything),
            ("truncated",): draws.average(interval_weights(count, *LogLinear().limits), level),
            ("accuracy", "diffusion"): draws.right / draws.counts,
        }
    for steps in settings.nfe if settings.wants("nfe") else ():
        rows["nfe", steps] = finite_step_bound(model, x0, steps, few, noise, scored=scored)
    if settings.paths and settings.wants("importance_weighted"):
        steps, paths = settings.importance_steps, settings.paths
        rows["importance_weighted",] = importance_weighted_bound(model, x0, steps, paths, noise, scored=scored)
    if hybrid:
        for anchor in settings.anchors:
            tail = draws.average(interval_weights(count, anchor, 1), level)
            rows["hybrid", anchor] = tail + infilling(model, x0, anchor, few, noise, scored).mean(-1, keepdim=True)
    return rows


def _summary(
    parts: list[Rows],
    text_bytes: int | None,
    documents: list[int] | None,
    settings: EvaluationConfig,
    block_size: int,
) -> tuple[dict[str, Any], list[int], dict[str, list[float]]]:
    """Averages over the windows, named as they are reported; and of each window, its scored tokens and its nats."""
    # A short window may have no block of drafts: each measure has its own windows.
    names = dict.fromkeys(name for part in parts for name in part)
    rows = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
    counts = {name: torch.cat([part["scored",] for part in parts if name in part]) for name in names}
    tokens = rows["scored",]

    def nats(*name: str | float) -> dict[str, Any]:
        return dict(estimate(rows[name], tokens, text_bytes, documents).to_dict())

    def shares(kind: str) -> dict[str, float]:
        weights = {name: counts[name] / counts[name].double().mean() for name in rows if name[0] == kind}
        return {str(name[1]): (rows[name].view(len(w), -1) * w[:, None]).mean().item() for name, w in weights.items()}

    plain = ("causal", "ar", "block", "diffusion", "truncated")
    likelihoods: dict[str, Any] = {name: nats(name) for name in plain if (name,) in rows}
    if any(name[0] == "hybrid" for name in rows):
        likelihoods["hybrid"] = [{"lambda": anchor, **nats("hybrid", anchor)} for anchor in settings.anchors]
    if any(name[0] == "nfe" for name in rows):
        likelihoods["nfe"] = [{"steps": steps, **nats("nfe", steps)} for steps in settings.nfe]
    if ("importance_weighted",) in rows:
        which = {"steps": settings.importance_steps, "paths": settings.paths}
        likelihoods["importance_weighted"] = [{**which, **nats("importance_weighted")}]
    each = {
        f"{name[0]} {name[1]:g}" if len(name) > 1 else str(name[0]): [
            round(x, 4) for x in value.view(len(tokens), -1).double().mean(1).tolist()
        ]
        for name, value in rows.items()
        if name[0] not in ("scored", "accuracy", "mtp")
    }
    summary = {
        "likelihoods": likelihoods,
        "accuracy": shares("accuracy"),
        "mtp": {**shares("mtp"), "block_size": block_size},
        "tokens": int(tokens.sum()),
        "samples": settings.samples,
        "windows": len(tokens),
    }
    return summary, tokens.tolist(), each
