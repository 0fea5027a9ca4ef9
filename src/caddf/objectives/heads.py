"""Losses of several heads at once, with their gradients: logits are made once, a few rows at a time, and not kept.

A cross-entropy and its gradient need the same softmax, and so does the divergence of drafts from the head that verifies
them. Kept for the backward pass are the gradients of states and tables alone (as in Liger Kernel, Hsu et al. 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from caddf.interface import Head, LanguageModel, Projection
from caddf.objectives.distillation import Distillation, divergence
from caddf.objectives.loss import nats_at

FEWEST, ELEMENTS, LAUNCHED = 256, 1 << 20, 1 << 24
"""Rows of a chunk at least, since a table is read for each chunk, and its logits at most where that is more rows: on a
CPU what its caches hold, elsewhere what is worth its launches."""


@dataclass(frozen=True)
class Term:
    """A head's part in a loss: `coefficient` times the sum of `weights` times -log p(x0); weight 0 is not scored."""

    weights: Float[Tensor, "B L"]
    coefficient: float = 1.0


@dataclass(frozen=True)
class Scores:
    """`total`: a scalar to descend; `parts`: each head's sum without its coefficient, and the divergence, `distill`."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


def score(
    model: LanguageModel,
    states: Any,
    x0: Int[Tensor, "B L"],
    terms: Mapping[Head, Term],
    distillation: Distillation | None = None,
) -> Scores:
    """The sum of `terms`; with `distillation` a share of the draft's is its divergence from another head instead.

    A token that a small draft vocabulary lacks must have weight 0 there. A model without a `projection` is asked for
    its log-probabilities, and autograd does the rest.
    """
    if getattr(model, "projection", None) is None:
        return _by_log_probs(model, states, x0, terms, distillation)
    compiled: str | None = getattr(model, "compiled_training", None)
    weights = {head: term.weights.flatten() for head, term in terms.items()}
    if distillation is not None:
        weights.setdefault(distillation.source, torch.zeros_like(weights["draft"]))
    where: dict[Head, Tensor | None] = dict.fromkeys(weights)
    if compiled is None:  # elsewhere all is read, so that nothing waits for a count, and shapes stay what they are
        where = {head: weight.nonzero()[:, 0] for head, weight in weights.items()}
        if distillation is not None:  # the head that drafts are compared with is read where they are
            source = distillation.source
            where[source] = ((weights[source] != 0) | (weights["draft"] != 0)).nonzero()[:, 0]
    heads: dict[str, _Rows] = {}
    tensors: list[Tensor | None] = []
    for head, at in where.items():
        read: Projection = model.projection(states, head)  # type: ignore[attr-defined]
        flat = read.states.flatten(0, 1)
        tensors += [flat if at is None or len(at) == len(flat) else flat[at], read.tokens, read.bias]
        targets, weight = (each if at is None else each[at] for each in (x0.flatten(), weights[head]))
        if read.small is not None:
            targets = torch.searchsorted(read.small, targets).clamp(max=len(read.small) - 1)
        coefficient = terms[head].coefficient if head in terms else 0.0
        heads[head] = _Rows(at, targets, weight, coefficient, read.small)
    total, values = _Score.apply(heads, distillation, torch.is_grad_enabled(), compiled, *tensors)
    parts = dict(zip([*heads, "distill"], values.unbind(), strict=True))
    return Scores(total, {name: parts[name] for name in [*terms, *(["distill"] if distillation is not None else [])]})


def _by_log_probs(
    model: LanguageModel,
    states: Any,
    x0: Int[Tensor, "B L"],
    terms: Mapping[Head, Term],
    distillation: Distillation | None,
) -> Scores:
    """The same as a user of the model would write it."""
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=x0.device)
    for head, term in terms.items():
        nats = nats_at(model, states, term.weights != 0, x0, head)
        value = (term.weights.to(nats) * nats).sum()
        parts[head], share = value.detach(), 1.0
        if head == "draft" and distillation is not None:
            where, share = term.weights != 0, 1 - distillation.share
            with torch.no_grad():
                log_p = model.log_probs(states, where, distillation.source)
            gaps = divergence(log_p, model.log_probs(states, where, "draft"), distillation.form)
            gap = (term.weights[where].to(gaps) * gaps).sum()
            parts["distill"] = gap.detach()
            total = total + term.coefficient * distillation.share * gap
        total = total + term.coefficient * share * value
    return Scores(total, parts)


@dataclass(frozen=True)
class _Rows:
    """What a head scores: flat positions in order, the tokens there, weights, and which tokens it has where not all.

    Without `where`: all positions.
    """

    where: Int[Tensor, " N"] | None
    targets: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    coefficient: float
    small: Int[Tensor, " n"] | None


class _Work:
    """A head's rows as they are scored, and the gradients that come of it.

    Not compiled, log-probabilities are made in place, in room that the next chunk takes; compiled, logits stay what
    they are, and are normalised where they are used.
    """

    def __init__(
        self, rows: _Rows, states: Tensor, tokens: Tensor, bias: Tensor | None, learns: bool, compiled: str | None
    ) -> None:
        device = states.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        exact = torch.promote_types(kind, torch.float32)
        self.rows, self.learns, self.compiled = rows, learns, compiled
        self.states, self.tokens, self.bias = states.to(kind), tokens.to(kind), bias
        self.weights, self.value = rows.weights.to(exact), states.new_zeros((), dtype=exact)
        self.gradients: tuple[Tensor, Tensor, Tensor | None] | None = None
        if learns:
            into = None if bias is None else torch.zeros_like(bias)
            self.gradients = torch.empty_like(self.states), torch.zeros_like(tokens), into
        self.size = max(FEWEST, (ELEMENTS if device == "cpu" else LAUNCHED) // len(tokens))
        self.room = states.new_empty(min(self.size, len(states)), len(tokens), dtype=kind)
        self.exact = self.room if kind == exact or compiled is not None else torch.empty_like(self.room, dtype=exact)

    def chunks(self) -> Iterator[slice]:
        """The rows, a few at a time."""
        return (slice(i, min(i + self.size, len(self.states))) for i in range(0, len(self.states), self.size))

    def read(self, rows: slice) -> Float[Tensor, "n V"]:
        """A chunk's log-probabilities (compiled: logits), in room that the next one takes."""
        n = rows.stop - rows.start
        logits = torch.mm(self.states[rows], self.tokens.t(), out=self.room[:n])
        if self.compiled is not None:
            return logits if self.bias is None else logits.add_(self.bias)
        if self.exact is not self.room:
            logits = self.exact[:n].copy_(logits)
        if self.bias is not None:
            logits += self.bias
        return torch.log_softmax(logits, -1, out=logits)

    def learn(self, rows: slice, gradient: Float[Tensor, "n V"]) -> None:
        """Takes the gradient of a chunk's logits."""
        assert self.gradients is not None
        states, tokens, bias = self.gradients
        if bias is not None:
            bias += gradient.sum(0)
        gradient = gradient.to(self.states.dtype)
        torch.mm(gradient, self.tokens, out=states[rows])
        if tokens.dtype == gradient.dtype:
            tokens.addmm_(gradient.t(), self.states[rows])
        else:
            tokens += gradient.t() @ self.states[rows]

    def score(self, rows: slice, read: Float[Tensor, "n V"]) -> None:
        """Cross-entropy of the tokens that stand there. Overwrites what was read."""
        targets, weights = self.rows.targets[rows, None], self.weights[rows, None]
        scaled, logits = weights * self.rows.coefficient, self.compiled is not None
        value, gradient = _made(_entropy, self.compiled)(read, targets, weights, scaled, logits, self.learns)
        self.value += value
        if gradient is not None:
            self.learn(rows, gradient)

    def distil(
        self, drafts: slice, source: Int[Tensor, " m"] | None, read: Float[Tensor, "m V"], how: Distillation
    ) -> Float[Tensor, ""]:
        """Of the rows `drafts`; the sum of their divergence from p, which is `read` at `source`, or at their own."""
        gap, size, divergences = self.value.new_zeros(()), self.size, _made(_distilled, self.compiled)
        for rows in (slice(i, min(i + size, drafts.stop)) for i in range(drafts.start, drafts.stop, size)):
            own = self.read(rows)
            if source is None or self.rows.where is None:
                given = read[rows.start - drafts.start : rows.stop - drafts.start]
            else:
                at = torch.searchsorted(source, self.rows.where[rows])
                given = read if len(at) == len(read) else read[at]
            targets, weights = self.rows.targets[rows, None], self.weights[rows, None]
            scaled, small = weights * self.rows.coefficient, self.rows.small
            value, gaps, gradient = divergences(
                given, own, targets, weights, scaled, small, how, self.compiled is not None, self.learns
            )
            self.value += value
            gap += gaps
            if gradient is not None:
                self.learn(rows, gradient)
        return gap


def _firsts(drafts: Int[Tensor, " n"] | None, source: Int[Tensor, " m"] | None, chunks: list[slice]) -> list[int]:
    """The first of `drafts`, whose positions are all in `source`, in each of its chunks, and their number."""
    if drafts is None or source is None:
        return [0, *(chunk.stop for chunk in chunks)]
    starts = torch.tensor([chunk.start for chunk in chunks], dtype=torch.long, device=source.device)
    return [*torch.searchsorted(drafts, source[starts]).tolist(), len(drafts)]


Function = TypeVar("Function", bound=Callable[..., Any])


def _made(function: Function, compiled: str | None) -> Function:
    """`function`, or what that backend of torch's compiler makes of it."""
    return function if compiled is None else cast(Function, _compiled(function, backend=compiled))


_compiled = functools.cache(torch.compile)


def _log_p(read: Float[Tensor, "n V"], logits: bool) -> Float[Tensor, "n V"]:
    """Log-probabilities of what was read."""
    if not logits:
        return read
    return torch.log_softmax(read.to(torch.promote_types(read.dtype, torch.float32)), -1)


def _less(p: Float[Tensor, "n V"], targets: Int[Tensor, "n 1"], weights: Float[Tensor, "n 1"]) -> Float[Tensor, "n V"]:
    """`p` less `weights` at the targets; may overwrite it."""
    if not torch.compiler.is_compiling():
        return p.scatter_add_(1, targets, -weights)
    return p - torch.where(torch.arange(p.shape[1], device=p.device) == targets, weights, 0)


def _entropy(
    read: Float[Tensor, "n V"],
    targets: Int[Tensor, "n 1"],
    weights: Float[Tensor, "n 1"],
    scaled: Float[Tensor, "n 1"],
    logits: bool,
    learns: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n V"] | None]:
    """A cross-entropy, and `scaled` times its gradient: p less the indicator of the targets.

    `read` is log-probabilities, which may be overwritten, or `logits`.
    """
    log_p = _log_p(read, logits)
    value = -(weights * log_p.gather(1, targets)).sum()
    return value, _less(log_p.exp_().mul_(scaled), targets, scaled).to(read.dtype) if learns else None


def _distilled(
    source: Float[Tensor, "n V"],
    read: Float[Tensor, "n v"],
    targets: Int[Tensor, "n 1"],
    weights: Float[Tensor, "n 1"],
    scaled: Float[Tensor, "n 1"],
    small: Int[Tensor, " v"] | None,
    how: Distillation,
    logits: bool,
    learns: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "n v"] | None]:
    """Cross-entropy and divergence from `source` of drafts, and `scaled` times the gradient of their mixture.

    `read` and `source` are log-probabilities, of which `read` may be overwritten, or `logits`.
    """
    log_q, log_t = _log_p(read, logits), _log_p(source, logits)
    if small is not None:
        log_t = log_t[:, small]
    value = -(weights * log_q.gather(1, targets)).sum()
    gaps, gradient = _divergence(log_t, log_q, how)
    gap = (weights[:, 0] * gaps).sum()
    if not learns:
        return value, gap, None
    if how.share < 1:
        rest = _less(log_q.exp_(), targets, torch.ones_like(weights))
        gradient.mul_(how.share).add_(rest, alpha=1 - how.share)
    return value, gap, gradient.mul_(scaled).to(read.dtype)


def _divergence(
    log_p: Float[Tensor, "n V"], log_q: Float[Tensor, "n V"], how: Distillation
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """`divergence` over the tokens that drafts have, and its gradient at their logits."""
    p, q = log_p.exp(), log_q.exp()
    if how.form == "tv":
        below = q * (q < p)
        return 1 - torch.minimum(p, q).sum(-1), (below.sum(-1, keepdim=True) * q).sub_(below)
    share = p.sum(-1, keepdim=True)
    gaps = (p * (log_p - log_q)).sum(-1) - torch.xlogy(share, share)[:, 0]
    return gaps, q.mul_(share).sub_(p)


class _Score(torch.autograd.Function):
    """Total and values of `score`, the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: dict[str, _Rows],
        distillation: Distillation | None,
        learning: bool,
        compiled: str | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`tensors` are states at each head's positions, its table and its bias, head by head."""
        work: dict[str, _Work] = {}
        for i, (name, rows) in enumerate(heads.items()):
            states, tokens, bias = tensors[3 * i : 3 * i + 3]
            assert states is not None and tokens is not None
            learns = learning and rows.coefficient != 0 and any(ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i])
            work[name] = _Work(rows, states, tokens, bias, learns, compiled)
        drafts = None if distillation is None else work["draft"]
        kinds = [each.value.dtype for each in work.values()]
        gap = torch.zeros((), dtype=kinds[0], device=tensors[0].device)  # type: ignore[union-attr]
        with torch.autocast(gap.device.type, enabled=False):
            for name, head in work.items():
                if head is drafts:
                    continue
                chunks = list(head.chunks())
                verifies = distillation is not None and name == distillation.source
                firsts = _firsts(work["draft"].rows.where, head.rows.where, chunks) if verifies else []
                for i, chunk in enumerate(chunks):
                    read = head.read(chunk)
                    if drafts is not None and distillation is not None and verifies:
                        of, places = slice(firsts[i], firsts[i + 1]), head.rows.where
                        places = None if places is None else places[chunk]
                        gap = gap + drafts.distil(of, places, read, distillation)
                    head.score(chunk, read)
        total, share = torch.zeros_like(gap), 0.0 if distillation is None else distillation.share
        for head in work.values():
            own = share if head is drafts else 0.0
            total = total + head.rows.coefficient * ((1 - own) * head.value + own * gap)
        ctx.gradients = [head.gradients or (None, None, None) for head in work.values()]
        values = torch.stack([*(head.value for head in work.values()), gap])
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Float[Tensor, ""], _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the total."""
        each = (gradient for head in ctx.gradients for gradient in head)
        return (
            None,
            None,
            None,
            None,
            *(None if gradient is None else gradient * total.to(gradient.dtype) for gradient in each),
        )
