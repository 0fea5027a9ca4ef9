"""What a perplexity is measured on: how tokens are cut into windows, and which of them count.

`docs/evaluation.md` explains each choice, and where the published evaluations differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from caddf.errors import InputError
from caddf.evaluation.likelihood import at_least_one
from caddf.evaluation.suite import EvaluationConfig

ACCURACY = {
    "autoregressive": "over all scored positions: is the arg max, given the true tokens before, the token",
    "diffusion": "over masked positions, averaged over lambda in [0, 1]: is the arg max, given the others, the token",
    "gaussian": "over all positions, averaged over time: is the arg max, given the noised embeddings, the token",
}
"""What "accuracy" means for each family of methods; figures of two families are not comparable."""


@dataclass(frozen=True)
class Protocol:
    """How text is scored.

    length: tokens of a window, special ones included; None is the model's context. stride: from the start of a window's
        text to the next; None is no overlap. What a window repeats is context there, and is not scored again.
    documents: `concatenate` runs them together, `separate` begins a window with each. eos: `<|endoftext|>` after each.
    bos: what a window begins with: `none`, its text; `given`, `<|endoftext|>` that is not scored, and never masked;
        `scored`, the same as a token like any other. closed: a window ends with a scored `<|endoftext|>` of its own.
    tail: `drop` or `score` what is left over and does not fill a window.
    split: of the data set. max_windows: so many windows, chosen with `seed`; None is all. samples: Monte-Carlo samples
        of a bound, per window.
    """

    length: int | None = None
    stride: int | None = None
    documents: Literal["concatenate", "separate"] = "concatenate"
    eos: bool = True
    bos: Literal["none", "given", "scored"] = "none"
    closed: bool = False
    tail: Literal["drop", "score"] = "drop"
    split: str = "test"
    max_windows: int | None = 200
    samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(samples=self.samples)
        for name in ("length", "stride", "max_windows"):
            if (value := getattr(self, name)) is not None:
                at_least_one(**{name: value})

    def settings(self, **others: Any) -> EvaluationConfig:
        """What `evaluate` is told, given these windows: the samples and the seed, and `others`."""
        return EvaluationConfig(**{"samples": self.samples, "seed": self.seed, "max_windows": None, **others})


PRESETS = {
    "caddf": Protocol(),
    # louaaron/Score-Entropy-Discrete-Diffusion, data.py and run_train.py: 1,024 tokens of the rows run together.
    "sedd": Protocol(length=1024, split="validation", max_windows=None, samples=1),
    # ML-GSAI/RADD, evaluation_modeling.py: the same windows, 1,024 draws of the noise.
    "radd": Protocol(length=1024, max_windows=None, samples=1024),
    # kuleshov-group/mdlm, dataloader.py: BOS, 1,022 tokens, EOS; its autoregressive baseline is given BOS.
    "mdlm": Protocol(length=1024, bos="scored", closed=True, split="validation", max_windows=None, samples=1),
    "mdlm-ar": Protocol(length=1024, bos="given", closed=True, split="validation", max_windows=None, samples=1),
    # kuleshov-group/bd3lms, scripts/zs_ppl: the same, nothing between rows, and BOS is never noised (`ignore_bos`).
    "bd3lm": Protocol(
        length=1024, eos=False, bos="given", closed=True, split="validation", max_windows=None, samples=1
    ),
}
"""Ours, and those of the published evaluations as their code has them."""


@dataclass(frozen=True)
class Window:
    """Tokens to score together, and which of them count."""

    tokens: Int[Tensor, " L"]
    scored: Bool[Tensor, " L"]


def windows(
    tokens: Integer[np.ndarray, " T"], protocol: Protocol, eos_id: int, context: int | None = None
) -> list[Window]:
    """The windows of a split, in the order of the text; each of its documents ends with `eos_id`, as in token sets.

    `context` is the model's, for a protocol that leaves the length to it. Windows are of one length, except the last of
    a stretch under `tail="score"`. Raises `InputError` where there is no room for text, or no window.
    """
    length = protocol.length or context
    if length is None:
        raise InputError("length is not set; give the protocol's length, or the model's context")
    room = length - (protocol.bos != "none") - protocol.closed
    if room < 1:
        raise InputError(f"length is {length}; beside BOS and EOS it must have room for a token")
    stride = protocol.stride or room
    if stride > room:
        raise InputError(f"stride is {stride}; it must be at most the {room} tokens of text in a window")
    if not protocol.eos and protocol.documents == "concatenate":
        tokens = tokens[tokens != eos_id]
    spans = [
        (start + first, min(start + first + room, stop), 0 if first == 0 else room - stride)
        for start, stop in _stretches(tokens, protocol, eos_id)
        for first in _starts(stop - start, room, stride, protocol.tail)
    ]
    if not spans:
        raise InputError(f"the {protocol.split} split has {len(tokens)} tokens; one window needs {room}")
    if protocol.max_windows is not None and protocol.max_windows < len(spans):
        # The choice that `evaluate` makes of as many windows.
        order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(protocol.seed))
        spans = [spans[index] for index in order[: protocol.max_windows].sort().values.tolist()]
    return [_window(tokens[start:stop], seen, protocol, eos_id) for start, stop, seen in spans]


def stacked(rows: list[Window]) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Windows of one length as a batch; raises `InputError` where their lengths differ."""
    lengths = sorted({len(row.tokens) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            f"the windows have {lengths[0]} to {lengths[-1]} tokens; with tail=drop they are of one length"
        )
    return torch.stack([row.tokens for row in rows]), torch.stack([row.scored for row in rows])


def _stretches(tokens: Integer[np.ndarray, " T"], protocol: Protocol, eos_id: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is cut into windows on its own: everything, or each document."""
    if protocol.documents == "concatenate":
        yield 0, len(tokens)
        return
    start = 0
    for end in (np.flatnonzero(tokens == eos_id) + 1).tolist():
        yield start, end if protocol.eos else end - 1
        start = end


def _starts(count: int, room: int, stride: int, tail: str) -> range:
    """Where windows begin in a stretch of `count` tokens, each with some token that those before did not score."""
    if tail == "drop":
        return range(0, count - room + 1, stride)
    # The window at s > 0 scores from s + room - stride on.
    return range(0, max(count - (room - stride), min(count, 1)), stride)


def _window(text: Integer[np.ndarray, " l"], seen: int, protocol: Protocol, eos_id: int) -> Window:
    opened, closed = protocol.bos != "none", protocol.closed
    ids = [eos_id] * opened + text.tolist() + [eos_id] * closed
    scored = [protocol.bos == "scored"] * opened + [place >= seen for place in range(len(text))] + [True] * closed
    return Window(torch.tensor(ids), torch.tensor(scored))
