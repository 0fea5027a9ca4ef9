"""Decodings kept for people to read: frame by frame, and of every method at equal cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from caddf.benchmarks.roster import Contestant, Entrant, Roster, entrants
from caddf.checkpoint import write_text_atomic
from caddf.errors import Checked, InputError
from caddf.generation import generate
from caddf.machine import machine
from caddf.snapshots import Snapshot
from caddf.text_model import DType, TextModel


@dataclass(frozen=True)
class SamplesSettings(Checked):
    """Who writes, and for how much.

    models: trained ones, NAME=RUN,... or a folder of runs; a pass of the first of them is the unit of cost.
    decoders: a comma-separated choice of the dual branch's decoders; not set, all. Other methods have their own.
    budget: what a sample may cost, in passes of the first model; another pass costs its floating-point operations per
        position over that one's. A decoding stops there, and a chain of steps has as many as it can pay.
    max_new_tokens: wanted after each prompt.
    temperature: of all draws; 0 is greedy.
    dtype: of weights and arithmetic.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of all draws.
    """

    models: str
    decoders: str | None = None
    budget: float = 32.0
    max_new_tokens: int = 64
    temperature: float = 1.0
    dtype: DType = "float32"
    device: str = "auto"
    seed: int = 0


def collect_samples(prompts: Sequence[str], settings: SamplesSettings, console: Console) -> dict[str, Any]:
    """What every decoder of every model makes of each prompt within the budget, as plain values for JSON.

    Raises `InputError` where there is no prompt, and where settings do not fit the models.
    """
    if not prompts:
        raise InputError("no prompt is given; samples need at least one --prompt")
    if not settings.budget >= 1:
        raise InputError(f"budget is {settings.budget}; it must be 1 pass of the first model or more")
    roster = Roster.of(
        models=settings.models, device=settings.device, dtype=settings.dtype, seed=settings.seed
    )  # fmt: skip
    unit = _pass(roster[roster.names[0]])
    told = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "seed")}
    tasks = [(entrant, prompt) for entrant in _affordable(roster, settings, unit) for prompt in prompts]
    # All are asked before the first is run: settings that do not fit a model are told at once.
    asked = [
        generate(_text_model(roster[entrant.model]), prompt, decoder=entrant.decoder, **told, **entrant.settings)
        for entrant, prompt in tasks
    ]
    samples: list[dict[str, Any]] = []
    for (entrant, prompt), frames in zip(tasks, asked, strict=True):
        flops = roster[entrant.model].network.flops_per_position()
        sample = {**_named(entrant), "prompt": prompt, **_within(settings.budget, frames, flops, unit)}
        console.print(f"{entrant.label}: {sample['tokens']} tokens for {sample['cost']:.1f}", markup=False)
        samples.append(sample)
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name != "models"}
    return {"samples": samples, "prompts": list(prompts), "unit": roster.names[0], "settings": values,
            "models": roster.names, "machine": machine()}  # fmt: skip


def _affordable(roster: Roster, settings: SamplesSettings, unit: float) -> Iterator[Entrant]:
    """Every model with its decoders, chains with as many steps as the budget pays."""
    for name in roster.names:
        steps = max(1, int(settings.budget * unit / _pass(roster[name])))
        every = entrants(roster, settings.decoders, [steps], transformers=False)
        yield from (entrant for entrant in every if entrant.model == name)


def _pass(contestant: Contestant) -> float:
    """Floating-point operations per position of a pass of all branches."""
    flops = contestant.network.flops_per_position()
    return flops.get("causal", 0.0) + flops.get("diffusion", 0.0)


def _text_model(contestant: Contestant) -> TextModel:
    assert contestant.tokenizer is not None
    return TextModel(contestant.network, contestant.tokenizer)


def _named(entrant: Entrant) -> dict[str, Any]:
    return {name: getattr(entrant, name) for name in ("model", "method", "decoder", "settings")}


def _within(budget: float, frames: Iterator[Snapshot], flops: dict[str, float], unit: float) -> dict[str, Any]:
    """The last frame that the budget pays: its text, with `_` where nothing stands yet, and what it took."""
    last: dict[str, Any] = {"text": "", "tokens": 0, "finished": False, "cost": 0.0}
    for frame in frames:
        passes = frame.results()[0]["evaluations"]
        cost = sum(passes[branch] * flops.get(branch, 0.0) for branch in passes) / unit
        if cost > budget * (1 + 1e-9):
            break
        tokens = frame.frame.tokens
        last = {
            "text": _written(frame),
            "tokens": int((frame.task.wanted & (tokens != frame.task.mask_id)).sum()),
            "finished": not bool(frame.task.unfinished(tokens).any()),
            "cost": cost,
            "evaluations": passes,
            "seconds": frame.seconds,
        }
    return last


def _written(last: Snapshot) -> str:
    """What stands behind the prompt, `_` for each open position up to the last token that stands."""
    new = last.frame.tokens[0][last.task.wanted[0]].tolist()
    runs = [(is_open, list(run)) for is_open, run in groupby(new, key=lambda token: token == last.task.mask_id)]
    if runs and runs[-1][0]:
        runs.pop()
    return "".join("_" * len(run) if is_open else last.tokenizer.decode(run) for is_open, run in runs)


@dataclass
class Recording:
    """Every frame of a decoding, row by row, as it passes."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def of(self, frames: Iterator[Snapshot]) -> Iterator[Snapshot]:
        """The frames themselves, written down one by one."""
        for frame in frames:
            results = frame.results()
            self.rows = self.rows or [
                {"prompt": row["prompt"], "seed": row["seed"], "template": frame.task.template, "frames": []}
                for row in results
            ]
            for r, (row, result) in enumerate(zip(self.rows, results, strict=True)):
                row["result"] = result
                row["frames"].append({
                    "pieces": _pieces(frame, r), "evaluations": result["evaluations"], "rounds": result["rounds"],
                    "copied_rounds": result["copied_rounds"], "seconds": frame.seconds,
                })  # fmt: skip
            yield frame

    def save(self, file: Path, **about: Any) -> None:
        """Writes the recording, and what it is `about`, as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps({"recording": about, "machine": machine(), "rows": self.rows}) + "\n")


def _pieces(frame: Snapshot, row: int) -> list[tuple[str, str]]:
    """`Snapshot.pieces`, where a fresh token that was drafted before it was drawn is `accepted`."""
    drafts, length = frame.frame.drafts, int(frame.task.lengths[row])
    drafted = iter([False] * length if drafts is None else (drafts[row, :length] != frame.task.mask_id).tolist())
    pieces: list[tuple[str, str]] = []
    for text, kind in frame.pieces(row):
        was = kind != "rejected" and next(drafted)  # a rejected draft shares its position with what follows it
        pieces.append((text, "accepted" if kind == "fresh" and was else kind))
    return pieces
