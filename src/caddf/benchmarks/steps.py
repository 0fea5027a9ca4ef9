"""`caddf benchmark steps`: denoising steps that a perplexity takes (eq. 14, measured), and passes that steps cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from caddf.benchmarks.given import OnText, written
from caddf.benchmarks.results import Benchmark, Drawing, Results, Told, number, put, rounded
from caddf.benchmarks.roster import Contestant, needs, same_weights
from caddf.categorical import RowGenerators
from caddf.decoding import Ancestral, Task
from caddf.denoiser import as_model
from caddf.errors import InputError, at_least, once
from caddf.evaluation.steps import StepCurve, Steps, step_curve
from caddf.experiment import METHODS
from caddf.interface import LanguageModel
from caddf.plots import plain_ticks

ROWS = 64
"""Rows over which passes are counted."""
SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Steps, over the context, whose perplexity without a causal branch is the target where none is given."""
COLUMNS = {
    "model": "",
    "causal branch": "part of every denoising step, and of the infilling below an anchor",
    "anchor": "lambda at which diffusion ends and left-to-right infilling begins; 0 is diffusion alone",
    "target PPL": "of held-out text, reached by the bound of the n-step sampler",
    "steps": "the fewest n (by the bound less and plus two standard errors); none: not in as many as there are tokens",
    "fewer": "than without a causal branch, as a ratio",
}


@dataclass(frozen=True)
class StepsSettings(OnText):
    """Which models, with a causal branch and without, and what they are to reach.

    targets: perplexities, as in 60,80; not set, what the first model without a causal branch reaches in an eighth, a
        quarter and half as many steps as the context has tokens (where there is none, the first model's diffusion).
    anchors: of hybrid decoding.
    windows: that are scored.
    samples: masked sets per window.
    seed: of all noise.
    out: folder of the results; not set, results/steps.
    """

    targets: str | None = None
    anchors: tuple[float, ...] = (0.25, 0.5, 0.75)
    windows: int = 32
    samples: int = 16
    out: str | None = None


def steps(settings: StepsSettings, console: Console) -> Results:
    """Finds the steps that each model takes to each target; writes steps.json, .md, .png and .svg.

    Raises `InputError` before anything is measured.
    """
    needs("matplotlib")
    at_least(1, settings, "windows", "samples")
    if settings.anchors:
        once("anchors", settings.anchors)
    for anchor in settings.anchors:
        if not 0 <= anchor < 1:
            raise InputError(
                f"anchors holds {anchor:g}; each must be at least 0 and below 1, where nothing is denoised"
            )
    wanted = None if settings.targets is None else perplexities(settings.targets)
    roster, data = settings.opened()
    readers = {name: roster[name] for name in roster.names if denoises(roster[name])}
    if not readers:
        raise InputError(f"models is {settings.models}; none of them denoises without being told the time")
    context = min(contestant.network.config.context for contestant in readers.values())
    windows = data.split(settings.split).spread(context, settings.windows)

    read = {"data": data.fingerprint(settings.split)}
    results = Results.open("steps", settings.out or "results/steps", written(settings), read=read)
    values = results.values
    same_weights(results.folder, values.get("rows", []), readers)
    kept = {(row["model"], row["anchor"]): row for row in values.get("rows", []) if "level" in row}
    if not kept:  # or all of an earlier version, whose draws were weighed otherwise
        values.pop("targets", None)
    without = [name for name, contestant in readers.items() if "causal" not in contestant.network.heads]
    base = without[0] if without else next(iter(readers))
    table = [(base, 0.0)]
    for name, contestant in readers.items():
        anchors = settings.anchors if "fused" in contestant.network.heads else ()
        table += [(name, anchor) for anchor in (0.0, *anchors) if (name, anchor) != (base, 0.0)]
    rows: list[dict[str, Any]] = []
    for name, anchor in table:
        if (name, anchor) not in kept:
            contestant = readers[name]
            curve = step_curve(
                cast(LanguageModel, contestant.network),
                windows.to(roster.device),
                settings.samples,
                torch.Generator().manual_seed(settings.seed),
                anchor,
            )
            if "targets" not in values:
                reached = [curve.bound(max(1, round(share * context))).ppl for share in SHARES]
                values["targets"] = wanted or rounded(reached)
            kept[name, anchor] = rounded(_row(name, contestant, curve, values["targets"]))
        rows.append(kept[name, anchor])
        values["rows"] = rows
        results.save()
        console.print(
            f"{name}, anchor {anchor:g}: {', '.join(map(_said, rows[-1]['reached']))}", markup=False, soft_wrap=True
        )
    values["context"], values["base"] = context, base
    values["counted"] = [count(n, context, settings.seed) for n in grid(context)]
    put(values, ratios(rows, base))
    results.write(_about(values), COLUMNS, partial(cells, base=rows[0]), partial(draw, rows=rows))
    return results


def denoises(contestant: Contestant) -> bool:
    """Whether the model has a time-free denoiser, of which the finite-step bound is."""
    return METHODS[contestant.method].bound is None and contestant.network.denoiser != "causal"


def perplexities(given: str) -> list[float]:
    """The numbers of `60,80.5`; raises `InputError` where they are none, or no perplexities."""
    try:
        targets = [float(word) for word in given.strip("[]").split(",")]
    except ValueError:
        targets = []
    if not targets or not all(1 < target < math.inf for target in targets):
        raise InputError(f"targets is {given}; it must be perplexities above 1, as in 60,80")
    return targets


def _row(name: str, contestant: Contestant, curve: StepCurve, targets: Sequence[float]) -> dict[str, Any]:
    found = [curve.reach(math.log(target)) for target in targets]
    shown = [(n, curve.bound(n)) for n in grid(curve.length)]
    return {
        "model": name,
        "method": contestant.method,
        "checkpoint": contestant.checkpoint,
        "weights": contestant.weights,
        "causal_branch": "causal" in contestant.network.heads,
        "anchor": curve.anchor,
        "level": curve.level,
        "reached": [_reached(target, each) for target, each in zip(targets, found, strict=True)],
        "curve": [{"steps": n, "ppl": each.ppl, "standard_error": each.standard_error} for n, each in shown],
    }


def _reached(target: float, found: Steps) -> dict[str, Any]:
    return {"target_ppl": target, "steps": found.steps, "between": list(found.between)}


def _said(reached: dict[str, Any]) -> str:
    steps = "no number of" if reached["steps"] is None else reached["steps"]
    return f"PPL {reached['target_ppl']:.4g} in {steps} steps"


def _or_none(steps: int | None) -> str:
    return "none" if steps is None else str(steps)


def grid(length: int) -> list[int]:
    """1, 2, 4, ... and `length` itself."""
    return sorted({*(2**j for j in range(length.bit_length()) if 2**j < length), length})


def count(steps: int, length: int, seed: int) -> dict[str, Any]:
    """Passes of the ancestral decoder over rows of `length` masked tokens, counted, and n (1 - (1 - 1/n)^L) (A.3).

    How many there are does not depend on what the denoiser says: a coin stands for it.
    """

    def coin(x_t: Tensor) -> Tensor:
        return torch.full((*x_t.shape, 2), math.log(0.5), dtype=torch.float64)

    tokens = torch.full((ROWS, length), 2)
    task = Task(tokens, torch.full((ROWS,), length), 2, RowGenerators(seed, ROWS))
    *_, last = Ancestral(steps)(as_model(coin, 2), task)
    counted = last.counts.diffusion.double()
    return {
        "steps": steps,
        "expected": steps * (1 - (1 - 1 / steps) ** length),
        "counted": counted.mean().item(),
        "standard_error": counted.std().item() / math.sqrt(ROWS),
    }


def ratios(rows: Sequence[dict[str, Any]], base: str) -> dict[str, Told]:
    """Steps without a causal branch over the fewest with one, at each target that both reach."""
    told: dict[str, Told] = {}
    first, ours = rows[0], [row for row in rows if row["causal_branch"]]
    if first["causal_branch"] or not ours:
        return {"steps_without_vs_with": Told("not told: needs models with a causal branch and without")}
    for i, reached in enumerate(first["reached"]):
        key = f"steps_without_vs_with at PPL {reached['target_ppl']:.4g}"
        found = [(row["reached"][i]["steps"], row) for row in ours if row["reached"][i]["steps"] is not None]
        if reached["steps"] is None or not found:
            told[key] = Told("not told: not both reach it")
            continue
        fewest, row = min(found, key=lambda each: each[0])
        told[key] = Told(f"{base} / {row['model']} at anchor {row['anchor']:g}", reached["steps"] / fewest)
    return told


def cells(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """A row of the Markdown table: all targets, one under the other."""

    def steps_of(each: dict[str, Any]) -> str:
        low, high = map(_or_none, each["between"])
        return f"{_or_none(each['steps'])} ({low} to {high})"

    def fewer(each: dict[str, Any], of: dict[str, Any]) -> str:
        return "" if None in (each["steps"], of["steps"]) else number(of["steps"] / each["steps"])

    pairs = list(zip(row["reached"], base["reached"], strict=True))
    return [
        row["model"],
        "yes" if row["causal_branch"] else "no",
        f"{row['anchor']:g}",
        "<br>".join(number(each["target_ppl"], 4) for each, _ in pairs),
        "<br>".join(steps_of(each) for each, _ in pairs),
        "<br>".join(fewer(each, of) for each, of in pairs),
    ]


def _about(values: dict[str, Any]) -> str:
    return (
        f"Rows of {values['context']} tokens. An upper bound on the perplexity of the sampler in n steps, from "
        f"{values['settings']['windows']} windows and {values['settings']['samples']} masked sets of each. A step "
        "with a causal branch costs a pass of it too, and an anchor a pass per infilled token (fewer by speculation)."
    )


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The bound against the number of steps."""
    axes.figure.set_size_inches(8, 5)
    for row in rows:
        ns, ppls = zip(*((each["steps"], each["ppl"]) for each in row["curve"]), strict=True)
        errors = [each["ppl"] * (each["standard_error"] or 0.0) for each in row["curve"]]
        style = "-" if row["causal_branch"] else "--"
        axes.errorbar(
            ns, ppls, errors, ls=style, marker="o", ms=4, capsize=2, label=f"{row['model']}, anchor {row['anchor']:g}"
        )
    for reached in rows[0]["reached"]:
        axes.axhline(reached["target_ppl"], color="0.5", lw=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="denoising steps", ylabel="PPL, upper bound ± standard error (grey: targets)"
    )
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


STEPS = Benchmark(
    "steps",
    "Steps that a perplexity takes",
    StepsSettings,
    steps,
    {"steps": Drawing("Perplexity against denoising steps", draw)},
    "caddf benchmark steps --models RUNS --data SET",
)
