"""What stands after a step of a decoder: texts, what became of each token, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from caddf.decoding import Frame, Task
from caddf.decoding.task import hit_rate
from caddf.tokenizer import Tokenizer

LONGEST = 4
"""Bytes of a character, each of which may be a token."""
Kind = Literal["given", "open", "kept", "fresh", "corrected", "rejected"]


@dataclass(frozen=True)
class Row:
    """One prompt or template as tokens, `[M]` where a token is wanted; `prompt` is what the user gave."""

    prompt: str
    tokens: list[int]


@dataclass(frozen=True)
class Snapshot:
    """The state of all rows after a step of the decoder.

    `seconds` is the time spent decoding so far, not that of whoever looks at the frames; `final` says whether what
    stands stays.
    """

    frame: Frame
    rows: list[Row]
    task: Task
    tokenizer: Tokenizer
    stop: tuple[str, ...]
    seeds: list[int]
    seconds: float
    cost: float
    final: bool

    @property
    def text(self) -> str:
        """The first row's text so far: a prompt's continuation, or a template with its holes filled."""
        return self.texts[0]

    @cached_property
    def texts(self) -> list[str]:
        """Every row's text so far; `[M]` shows as an underscore.

        Of a continuation that goes on, what the next token may still change is held back: part of a character, and what
        a stop string may begin with. So left to right each text begins with the one before it.
        """
        return [self._text(r) for r in range(len(self.rows))]

    @cached_property
    def ended(self) -> list[bool]:
        """Whether nothing more is to come in a row; rows of a batch end at different steps."""
        return [self.final and not unfinished for unfinished in self.task.unfinished(self.frame.tokens).tolist()]

    def pieces(self, row: int = 0) -> list[tuple[str, Kind]]:
        """The canvas token by token, with what became of each; a rejected draft comes before its correction.

        A character of several tokens stands with the last of them.
        """
        frame = self.frame
        tokens: list[tuple[str, Kind]] = []
        wanted, part = self.task.wanted[row].tolist(), list[int]()
        shown = frame.tokens[row, : int(self.task.lengths[row])].tolist()
        for i, token in enumerate(shown):
            if token == self.task.mask_id and part:  # a character that does not go on
                tokens[-1], part = (self.tokenizer.decode(part), tokens[-1][1]), []
            draft = self.task.mask_id if frame.drafts is None else int(frame.drafts[row, i])
            if draft not in (self.task.mask_id, token):
                tokens.append((self.tokenizer.decode([draft]), "rejected"))
            kind: Kind = "kept"
            if not wanted[i]:
                kind = "given"
            elif token == self.task.mask_id:
                kind = "open"
            elif frame.corrected is not None and frame.corrected[row, i]:
                kind = "corrected"
            elif frame.fresh[row, i]:
                kind = "fresh"
            text = "_"
            if token != self.task.mask_id:
                part.append(token)
                text = self.tokenizer.decode(part)
                if text.endswith("\ufffd") and len(part) < LONGEST and i + 1 < len(shown):
                    text = ""
                else:
                    part = []
            tokens.append((text, kind))
        return tokens

    def results(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Text and statistics of every row, or of those `rows`, as plain values for JSON.

        `tokens` counts the new ones; `tokens_per_second` is of this row, over the time of the whole batch;
        `tokens_per_evaluation` counts a diffusion pass at its floating-point operations per position over the causal
        branch's; `copied_rounds` are those whose drafts came from the text itself; `cache_hit_rate` is the share of the
        token-positions of a decoder without caches that came from one; `ended_by` is `stop` where `<|endoftext|>` or a
        stop string came before all was written, else `length`, and nothing where more is to come.
        """
        return [self._result(r) for r in (range(len(self.rows)) if rows is None else rows)]

    def _result(self, r: int) -> dict[str, Any]:
        counts = self.frame.counts
        causal, diffusion, computed, needed = (
            int(getattr(counts, name)[r]) for name in ("causal", "diffusion", "computed", "needed")
        )
        new = self._new(r)
        tokens = len(new)
        passes = causal + diffusion * (self.cost if causal else 1.0)
        return {
            "text": self.texts[r],
            "prompt": self.rows[r].prompt,
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds if self.seconds > 0 else 0.0,
            "evaluations": {"causal": causal, "diffusion": diffusion},
            "tokens_per_evaluation": tokens / passes if passes else 0.0,
            "rounds": int(counts.rounds[r]),
            "copied_rounds": int(counts.copied[r]),
            "cache_hit_rate": hit_rate(computed, needed),
            "seed": self.seeds[r],
            "ended_by": self._ended_by(r, new),
        }

    def _new(self, r: int) -> list[int]:
        """The new tokens that stand: in a continuation those before the first `[M]` or `<|endoftext|>`.

        What a step drew behind a stop string does not count; the token that completes the stop string does.
        """
        tokens = self.frame.tokens[r, : int(self.task.lengths[r])]
        new = tokens[self.task.wanted[r, : len(tokens)]].tolist()
        if self.task.template:
            return [token for token in new if token != self.task.mask_id]
        ends = (i for i, token in enumerate(new) if token in (self.task.mask_id, self.tokenizer.eos_id))
        new = new[: next(ends, len(new))]
        if self.stop and self._stopped(new):
            ends = (i for i in range(1, len(new)) if self._stopped(new[:i]))
            new = new[: next(ends, len(new))]
        return new

    def _ended_by(self, r: int, new: list[int]) -> Literal["stop", "length"] | None:
        if not self.ended[r]:
            return None
        stopped = len(new) < int(self.task.wanted[r].sum()) or bool(self.stop and self._stopped(new))
        return "stop" if stopped else "length"

    def _goes_on(self, r: int, new: int) -> bool:
        """Whether more is to come behind so many new tokens of a continuation."""
        tokens = self.frame.tokens[r, : int(self.task.lengths[r])]
        wanted = tokens[self.task.wanted[r, : len(tokens)]]
        return new < len(wanted) and int(wanted[new]) == self.task.mask_id

    def _stopped(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return first_stop(text, self.stop) < len(text)

    def _text(self, r: int) -> str:
        if not self.task.template:
            new = self._new(r)
            text = self.tokenizer.decode(new)
            if (end := first_stop(text, self.stop)) < len(text) or not self._goes_on(r, len(new)):
                return text[:end]
            return settled(text, self.stop)
        parts: list[str] = []
        run: list[int] = []
        for token in [*self.frame.tokens[r, : int(self.task.lengths[r])].tolist(), self.task.mask_id]:
            if token == self.task.mask_id:
                parts += [self.tokenizer.decode(run), "_"]
                run = []
            else:
                run.append(token)
        return "".join(parts[:-1])


def settled(text: str, stop: tuple[str, ...]) -> str:
    """`text` without what the next token may change: the beginning of a character, or of a stop string."""
    text = text.rstrip("\ufffd")
    begun = (n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n]))
    return text[: len(text) - max(begun, default=0)]


def first_stop(text: str, stop: tuple[str, ...]) -> int:
    """Where the first stop string of `text` starts, or the length of `text`."""
    return min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))


class StopWords:
    """Whether a row's text holds one. What was looked at, and stands, is not decoded again, but for its last tokens."""

    def __init__(self, stop: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self.stop, self.tokenizer = stop, tokenizer
        self.reach = max((len(word.encode()) for word in stop), default=0)  # a token has a byte at least
        self.clean: list[int] = []

    def met(self, tokens: list[int]) -> bool:
        """Whether the text of `tokens` holds one of them."""
        stands = tokens[: len(self.clean)] == self.clean
        text = self.tokenizer.decode(tokens[max(len(self.clean) - self.reach, 0) if stands else 0 :])
        if first_stop(text, self.stop) < len(text):
            return True
        self.clean = tokens
        return False
