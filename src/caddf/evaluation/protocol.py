"""What a perplexity is measured on: how tokens are cut into windows, and which of them count.

`docs/evaluation.md` explains each choice, and where the published evaluations differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from caddf.errors import Checked, InputError, at_least


@dataclass(frozen=True)
class Protocol(Checked):
    """How text is scored.

    name: of the preset that it comes from.
    length: tokens of a window, special ones included; null is the model's context. stride: from the start of a window's
        text to the next; null is no overlap. What a window repeats is context there, and is not scored again.
    documents: `concatenate` runs them together, `separate` begins a window with each. eos: `<|endoftext|>` after each.
    bos: what a window begins with: `none`, its text; `given`, `<|endoftext|>` that is not scored, and never masked;
        `scored`, the same as a token like any other. closed: a window ends with a scored `<|endoftext|>` of its own.
    tail: `drop` or `score` what is left over and does not fill a window.
    split: train, validation or test. max_windows: so many windows, chosen with `seed`; null is all. samples: of
        each bound, by Monte Carlo, per window (a quarter as many of finite steps and of infilling).
    seed: of that choice, and of all noise.
    """

    name: str = "custom"
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
        super().__post_init__()
        at_least(1, self, "length", "stride", "max_windows", "samples")


_PUBLISHED = Protocol(length=1024, max_windows=None, samples=1, split="validation")
PRESETS = {
    each.name: each
    for each in (
        Protocol("caddf"),
        # louaaron/Score-Entropy-Discrete-Diffusion, data.py and run_train.py: 1,024 tokens of the rows run together.
        replace(_PUBLISHED, name="sedd"),
        # ML-GSAI/RADD, evaluation_modeling.py: the same windows, 1,024 draws of the noise.
        replace(_PUBLISHED, name="radd", split="test", samples=1024),
        # kuleshov-group/mdlm, dataloader.py: BOS, 1,022 tokens, EOS; its autoregressive baseline is given BOS.
        replace(_PUBLISHED, name="mdlm", bos="scored", closed=True),
        replace(_PUBLISHED, name="mdlm-ar", bos="given", closed=True),
        # kuleshov-group/bd3lms, scripts/zs_ppl: the same, nothing between rows, and BOS is never noised (`ignore_bos`).
        replace(_PUBLISHED, name="bd3lm", eos=False, bos="given", closed=True),
    )
}
"""Ours, and those of the published evaluations as their code has them."""


def preset(name: str) -> Protocol:
    """A protocol by its name; raises `InputError` where there is none."""
    if name not in PRESETS:
        raise InputError(f"protocol is {name}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens to score together, and which of them count: all after those that are given.

    index: its place among all windows of the split, which names its noise; not set, its place in the list.
    document: the number of the one in which its scored tokens begin, where that is known.
    """

    tokens: Int[Tensor, " L"]
    scored: Bool[Tensor, " L"]
    index: int | None = None
    document: int | None = None

    def __post_init__(self) -> None:
        if self.scored.shape != self.tokens.shape or self.scored.dtype != torch.bool:
            raise InputError(f"scored has shape {tuple(self.scored.shape)}; a bool per token is needed")
        given = len(self.scored) - int(self.scored.sum())
        if given == len(self.scored) or not self.scored[given:].all():
            raise InputError("scored marks no tokens, or a given one after them; given tokens come first")


def chosen(count: int, most: int | None, seed: int) -> Int[Tensor, " n"]:
    """Which of `count` windows are evaluated: `most` of them, chosen with `seed`, in order."""
    if most is None or most >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


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
    if stride < room and protocol.bos == "scored":
        raise InputError(f"stride is {stride} and bos is scored; what overlaps is given, so bos must be given or none")
    ends = tokens == eos_id
    documents = np.cumsum(ends) - ends  # of each token
    if not protocol.eos and protocol.documents == "concatenate":
        tokens, documents = tokens[~ends], documents[~ends]
    spans = [
        (start + first, min(start + first + room, stop), 0 if first == 0 else room - stride)
        for start, stop in _stretches(tokens, protocol, eos_id)
        for first in _starts(stop - start, room, stride, protocol.tail)
    ]
    if not spans:
        raise InputError(f"the {protocol.split} split has {len(tokens)} tokens; one window needs {room}")
    indices = chosen(len(spans), protocol.max_windows, protocol.seed).tolist()
    return [
        _window(tokens, spans[index], index, int(documents[spans[index][0] + spans[index][2]]), protocol, eos_id)
        for index in indices
    ]


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


def _window(
    tokens: Integer[np.ndarray, " T"],
    span: tuple[int, int, int],
    index: int,
    document: int,
    protocol: Protocol,
    eos_id: int,
) -> Window:
    """The window of a span: start and end of its text, of which so many tokens are not scored."""
    start, stop, seen = span
    special = np.array([eos_id])
    parts = [special[: protocol.bos != "none"], tokens[start:stop], special[: protocol.closed]]
    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    given = 1 if protocol.bos == "given" else 0
    return Window(ids, torch.arange(len(ids)) >= given + seen, index, document)
