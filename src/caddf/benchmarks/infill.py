"""`caddf benchmark infill`: spans given both sides, against a left-to-right model that knows the left side alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from caddf.benchmarks.given import OnText, written
from caddf.benchmarks.results import Benchmark, Drawing, Results, Told, put, rounded, within
from caddf.benchmarks.roster import Contestant, needs, same_weights
from caddf.benchmarks.steps import denoises
from caddf.errors import InputError, at_least, once
from caddf.evaluation.estimates import estimate
from caddf.evaluation.infilling import Filled, SpanReading, fill_spans, readings
from caddf.evaluation.masks import uniform
from caddf.evaluation.pairing import ratio_of
from caddf.evaluation.suite import window_generator
from caddf.interface import LanguageModel
from caddf.plots import plain_ticks

BATCH = 16
"""Rows read together; no result depends on it."""
COLUMNS = {
    "model": "",
    "reading": "infill: left to right with both sides in sight; diffusion: any order (an upper bound); causal: left to "
    "right, the left side alone in sight",
    "span": "tokens of the span",
    "PPL": "of the span's tokens, with its standard error over windows",
    "against left to right": "ratio of that PPL to the first causal row's of the same span, paired over windows, with "
    "its standard error",
    "exact": "share of spans that greedy filling gives word for word, with its standard error",
    "more exact": "than that causal row, paired over windows",
}


@dataclass(frozen=True)
class InfillSettings(OnText):
    """Which models, a left-to-right one first, and what they fill; those told the time are left out.

    spans: lengths in tokens, as in 1,4,16.
    windows: of the models' context, each with one span of each length.
    samples: masked sets per span, for the bound of the any-order reading.
    seed: of places and masks.
    out: folder of the results; not set, results/infill.
    """

    spans: tuple[int, ...] = (1, 4, 16)
    windows: int = 200
    samples: int = 8
    out: str | None = None


def infill(settings: InfillSettings, console: Console) -> Results:
    """Writes infill.json, .md, .png and .svg; interrupted, it goes on with the model and span that are missing.

    Raises `InputError` before anything is measured.
    """
    needs("matplotlib")
    at_least(1, settings, "windows", "samples")
    once("spans", settings.spans)
    roster, data = settings.opened()
    readers = {name: roster[name] for name in roster.names if reads(roster[name])}
    if not readers:
        raise InputError(f"models is {settings.models}; none of them fills spans without being told the time")
    context = min(contestant.network.config.context for contestant in readers.values())
    for size in settings.spans:
        if not 1 <= size <= context // 2:
            raise InputError(f"spans holds {size}; each must lie between 1 and half of the context, {context // 2}")
    windows = data.split(settings.split).spread(context, settings.windows)

    read = {"data": data.fingerprint(settings.split)}
    results = Results.open("infill", settings.out or "results/infill", written(settings), read=read)
    rows: list[dict[str, Any]] = results.values.setdefault("rows", [])
    same_weights(results.folder, rows, readers)
    rows[:] = [row for row in rows if "matches" in row]  # those of an earlier version are measured again
    kept = {(row["model"], row["span"]) for row in rows}
    for size in settings.spans:
        start = places(windows, size, settings.seed)
        for name, contestant in readers.items():
            if (name, size) in kept:
                continue
            network = cast(LanguageModel, contestant.network)
            for each in readings(network):
                filled = fill(network, windows, start, size, each, settings, roster.device)
                rows.append(rounded(_row(name, contestant, each, size, filled)))
            results.save()
            console.print(f"{name}, spans of {size}", markup=False)
    place = {(name, size): i for i, (size, name) in enumerate(itertools.product(settings.spans, readers))}
    rows.sort(key=lambda row: place[row["model"], row["span"]])
    for size in settings.spans:
        here = [row for row in rows if row["span"] == size]
        left = next((row for row in here if row["reading"] == "causal"), None)
        if left is not None:
            for row in here:
                row["against_left"], row["against_left_error"] = ratio_of(row["windows"], left["windows"])
                more = estimate(torch.tensor(row["matches"]).double() - torch.tensor(left["matches"]).double(), 1)
                row["exact_more"], row["exact_more_error"] = more.nll, more.standard_error
    results.values["context"] = context
    put(results.values, dict(ratios(rows)))
    about = (
        f"One span in each of {len(windows)} windows of {context} tokens, at a place that is drawn, the same for all. "
        "The models differ in what they may see: both sides, or the left alone."
    )
    results.write(about, COLUMNS, cells, partial(draw, rows=rows))
    return results


def reads(contestant: Contestant) -> bool:
    """Whether the model has a reading of spans: left to right, or a denoiser that needs no time."""
    return denoises(contestant) or "causal" in contestant.network.heads


def places(windows: Int[Tensor, "N L"], size: int, seed: int) -> Int[Tensor, " N"]:
    """Where the span of each window starts: anywhere but at its first token, with at least one token behind it."""
    noise = [window_generator(seed, i, 1) for i in range(len(windows))]  # masks are drawn from other streams
    return 1 + (uniform((len(windows),), noise) * (windows.shape[1] - size - 1)).long()


def fill(
    network: LanguageModel,
    windows: Int[Tensor, "N L"],
    start: Int[Tensor, " N"],
    size: int,
    reading: SpanReading,
    settings: InfillSettings,
    device: torch.device,
) -> Filled:
    """All windows, some at a time."""
    parts = []
    for index in torch.arange(len(windows)).split(BATCH):
        noise = [window_generator(settings.seed, int(i)) for i in index]
        x0, at = windows[index].to(device), start[index].to(device)
        parts.append(fill_spans(network, x0, at, size, reading, settings.samples, noise))
    return Filled(torch.cat([part.nats for part in parts]), torch.cat([part.exact for part in parts]))


def _row(name: str, contestant: Contestant, reading: SpanReading, size: int, filled: Filled) -> dict[str, Any]:
    several, root = len(filled.nats) > 1, len(filled.nats) ** 0.5
    exact = filled.exact.double()
    return {
        "model": name,
        "method": contestant.method,
        "checkpoint": contestant.checkpoint,
        "weights": contestant.weights,
        "reading": reading,
        "bound": reading == "diffusion" and size > 1,
        "span": size,
        "nats": filled.nats.mean().item(),
        "standard_error": filled.nats.std().item() / root if several else None,
        "ppl": filled.nats.mean().exp().item(),
        "exact": exact.mean().item(),
        "exact_error": exact.std().item() / root if several else None,
        "windows": filled.nats.tolist(),
        "matches": filled.exact.int().tolist(),
    }


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Told]]:
    """Of each span: perplexity left to right over the best of those that see both sides (larger is better).

    An upper bound stands in for what is read exactly only where nothing is, and is said to be one.
    """
    for size in dict.fromkeys(row["span"] for row in rows):
        both = [row for row in rows if row["span"] == size and row["reading"] != "causal" and "against_left" in row]
        if both:
            exact = [row for row in both if not row["bound"]]
            best = min(exact or both, key=lambda row: row["against_left"])
            of = f"left to right / {best['model']}, {best['reading']}{', an upper bound' if best['bound'] else ''}"
            yield f"infill_vs_left_to_right at {size}", Told(of, 1 / best["against_left"])


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    error = row["standard_error"]
    return [
        row["model"],
        row["reading"],
        str(row["span"]),
        ("≤ " if row["bound"] else "") + within(row["ppl"], None if error is None else row["ppl"] * error),
        within(row["against_left"], row["against_left_error"]) if "against_left" in row else "",
        within(row["exact"], row["exact_error"]),
        within(row["exact_more"], row["exact_more_error"]) if "exact_more" in row else "",
    ]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Perplexity against the length of the span."""
    axes.figure.set_size_inches(8, 5)
    for model, reading in dict.fromkeys((row["model"], row["reading"]) for row in rows):
        own = [row for row in rows if (row["model"], row["reading"]) == (model, reading)]
        errors = [row["ppl"] * (row["standard_error"] or 0) for row in own]
        style = "--" if reading == "causal" else "-"
        spans, ppls = [row["span"] for row in own], [row["ppl"] for row in own]
        axes.errorbar(spans, ppls, yerr=errors, ls=style, marker="o", ms=4, capsize=3, label=f"{model}, {reading}")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the span", ylabel="PPL of its tokens")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


INFILL = Benchmark(
    "infill",
    "Spans filled in",
    InfillSettings,
    infill,
    {"infill": Drawing("Perplexity of a span against its length", draw)},
    "caddf benchmark infill --models RUNS --data SET",
)
