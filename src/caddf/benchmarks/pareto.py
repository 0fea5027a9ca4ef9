"""`caddf benchmark pareto`: speed against quality, every decoder at several values of its one knob."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from caddf.benchmarks.contest import Conditions, contest
from caddf.benchmarks.decode import COLUMNS, about, cells
from caddf.benchmarks.results import Benchmark, Drawing, Results
from caddf.benchmarks.roster import Entrant, Roster, entrants, needs
from caddf.errors import InputError
from caddf.plots import plain_ticks

KNOBS: dict[str, tuple[str, tuple[float | int | None, ...]]] = {
    "confidence": ("threshold", (0.3, 0.5, 0.7, 0.9)),
    "margin": ("threshold", (0.2, 0.4, 0.6, 0.8)),
    "entropy_bound": ("bound", (0.1, 0.5, 1.0, 2.0)),
    "hybrid": ("anchor", (0.25, 0.5, 0.75, 1.0)),
    "block": ("steps", (1, 2, 4, None)),
}
"""The setting by which a decoder trades quality for speed; chains of steps have theirs in `SHARES`."""
SHARES = (1 / 32, 1 / 8, 1 / 2, 1.0)
"""Steps of a chain, over the new tokens."""
FEW = 1 / 16
"""Those in which `hybrid` sets its anchors."""


@dataclass(frozen=True)
class ParetoSettings(Conditions):
    """Which trained models, and what they continue.

    repeats: rounds in which every row decodes once; quality is a mean over all their texts.
    out: folder of the results; not set, results/pareto.
    """

    batch: str = "8"
    repeats: int = 4
    memory: bool = False
    out: str | None = None


def pareto(settings: ParetoSettings, console: Console) -> Results:
    """Measures every point in turns and writes pareto.json, .md, .png and .svg; goes on where it was interrupted."""
    needs("matplotlib")
    if settings.models is None or settings.judge is None:
        raise InputError(
            "models or judge is not given; speed against quality needs --models NAME=RUN,... or a folder of runs, and "
            "--judge RUN, which reads left to right"
        )
    roster = settings.roster()
    given = settings.resolved(roster)
    assert given.new_tokens is not None
    folder, entered = Path(settings.out or "results/pareto"), list(points(roster, given.new_tokens))
    results = contest("pareto", folder, entered, given, roster, console)
    for row in results.values["rows"]:
        row["on_front"] = not any(dominates(other, row) for other in results.values["rows"])
    header = {**COLUMNS, "front": "no other row is faster with a PPL as low and an entropy as high"}
    results.write(
        about(results.values),
        header,
        lambda row: [*cells(row), "yes" if row["on_front"] else ""],
        partial(draw, rows=results.values["rows"]),
    )
    return results


def points(roster: Roster, new_tokens: int) -> Iterator[Entrant]:
    """Every decoder of every model, once for each value of its knob."""
    steps = sorted({max(1, round(share * new_tokens)) for share in SHARES})
    for entrant in entrants(roster, None, steps, transformers=False):
        if entrant.decoder not in KNOBS:
            yield entrant
            continue
        knob, values = KNOBS[entrant.decoder]
        for value in values:
            chosen = {} if value is None else {knob: value}  # None is the decoder's own default
            point = dataclasses.replace(entrant, settings={**entrant.settings, **chosen})
            yield point
            if entrant.settings.get("speculate") and value != 1:  # its anchors in few steps, not one by one
                few = max(1, round(FEW * new_tokens))
                yield dataclasses.replace(point, settings={**point.settings, "steps": few})


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `one` is as fast, as likely and as varied as `other`, and better in one of them."""
    if one["generative_ppl"] is None or other["generative_ppl"] is None:
        return False
    merits = [(row["tokens_per_second"], -row["generative_ppl"], row["entropy"]) for row in (one, other)]
    return all(a >= b for a, b in zip(*merits, strict=True)) and merits[0] != merits[1]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Speed against the PPL of what was generated, a line along each knob; on the front stands the entropy."""
    axes.figure.set_size_inches(10, 6)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        knob, _ = KNOBS.get(row["decoder"], ("steps", ()))
        others = [f"{setting} {value}" for setting, value in row["settings"].items() if setting != knob]
        name = " ".join(str(part) for part in (row["model"], row["decoder"], row["target"], *others) if part)
        lines.setdefault(f"{name}, batch {row['batch']}", []).append(row)
    from matplotlib import colormaps

    markers, colours = "os^vD<>pP*Xdh8", colormaps["tab20"]
    for i, (name, line) in enumerate(lines.items()):
        known = sorted((row for row in line if row["generative_ppl"]), key=lambda row: row["tokens_per_second"])
        speeds, ppls = ([row[key] for row in known] for key in ("tokens_per_second", "generative_ppl"))
        colour = colours(i % 20)
        axes.plot(speeds, ppls, color=colour, marker=markers[i % len(markers)], lw=1, ms=5, label=name)
        for row in filter(lambda row: row["on_front"], known):
            at = (row["tokens_per_second"], row["generative_ppl"])
            axes.annotate(f"{row['entropy']:.2f}", at, xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="new tokens per second", ylabel="PPL of generated text (judge)")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set_title("on the front: entropy of the text, nats", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


PARETO = Benchmark(
    "pareto",
    "Speed against quality",
    ParetoSettings,
    pareto,
    {"pareto": Drawing("Tokens per second against quality", draw)},
    "caddf benchmark pareto --models RUNS --prompts SET --judge RUN",
)
