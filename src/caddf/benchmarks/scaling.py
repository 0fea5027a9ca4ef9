"""`caddf benchmark scaling`: what a token costs after ever longer prompts, one at a time and by speculation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console

from caddf.benchmarks.given import whole_numbers, written
from caddf.benchmarks.measure import Spread, now
from caddf.benchmarks.results import Benchmark, Drawing, Results, Told, in_rounds, number, put, put_median, spread
from caddf.benchmarks.roster import TARGETED, Contestant, Entrant, Roster, entrants, needs
from caddf.benchmarks.trial import Prompts, task_of, weights_read
from caddf.decoding import Speculative, Task
from caddf.errors import Checked, InputError, at_least, check_seed
from caddf.experiment import Network
from caddf.interface import LanguageModel
from caddf.model_settings import Size
from caddf.models.backbone import DualBranch
from caddf.text_model import DType

SHORT, LONG = 256, 4096
"""The contexts that `context_scaling` compares."""
COLUMNS = {
    "method": "",
    "decoder": "with the causal head as target",
    "context": "tokens of the prompt, whose keys and values are in the cache",
    "ms/token": "median (quartiles), after the first round, which reads the prompt",
    "ms/round": "",
    "per round": "new tokens; with random weights drafts are accepted by chance",
    "MiB/round": "read: weights of the passes, keys and values",
    "cost, over that at the first context": "of a round",
    "bytes, over those at the first context": "of a round",
}


@dataclass(frozen=True)
class ScalingSettings(Checked):
    """Which prompts, and how many tokens after them.

    size: of the models, whose weights are random.
    methods: a comma-separated choice of methods that read left to right.
    contexts: tokens of the prompts, as in 256,4096.
    new_tokens: timed after each prompt.
    repeats: rounds in which each row decodes once.
    dtype: of weights and arithmetic.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of weights, prompts and draws.
    out: folder of the results; not set, results/scaling-SIZE.
    """

    size: Size = "demo"
    methods: str = "gpt2,caddf-lambda-dce"
    contexts: str = "256,512,1024,2048,4096,8192"
    new_tokens: int = 32
    repeats: int = 5
    dtype: DType = "float32"
    device: str = "auto"
    seed: int = 0
    out: str | None = None


def scaling(settings: ScalingSettings, console: Console) -> Results:
    """Measures each decoder at each context, in turns; writes scaling.json, .md, .png and .svg.

    Raises `InputError` before anything is measured.
    """
    needs("matplotlib")
    check_seed(settings.seed)
    contexts = whole_numbers("contexts", settings.contexts)
    at_least(1, settings, "repeats")
    at_least(16, settings, "new_tokens")
    roster = Roster.of(
        methods=settings.methods, size=settings.size, context=max(contexts) + settings.new_tokens,
        device=settings.device, dtype=settings.dtype, seed=settings.seed,
    )  # fmt: skip
    readers = [e for e in entrants(roster, ",".join(TARGETED), [1], transformers=False) if e.decoder in TARGETED]
    readers = [entrant for entrant in readers if entrant.settings.get("target", "causal") == "causal"]
    if not readers:
        raise InputError(f"methods is {settings.methods}; none of them reads left to right")
    folder = settings.out or f"results/scaling-{settings.size}"
    results = Results.open("scaling", folder, written(settings), free=("repeats",))
    kept = {(row["label"], row["context"]): row for row in results.values.get("rows", [])}
    table = [(entrant, context) for entrant in readers for context in contexts]
    results.values["rows"] = [
        kept.get((entrant.label, context)) or _row(entrant, context, roster[entrant.model].network)
        for entrant, context in table
    ]

    def measure(place: tuple[Entrant, int], turn: int) -> dict[str, float]:
        entrant, context = place
        return _measured(settings, entrant, roster[entrant.model], context, turn)

    def say(place: tuple[Entrant, int], figures: dict[str, float]) -> str:
        return f"{place[0].label} at {place[1]}: {1e3 * figures['seconds_per_token']:.2f} ms/token"

    rows = list(zip(table, results.values["rows"], strict=True))
    in_rounds(results, rows, settings.repeats, measure, say, console)
    summarise(results.values["rows"])
    put(results.values, ratios(results.values["rows"]))
    about = f"{settings.new_tokens} new tokens after each prompt, batch 1, random weights."
    results.write(about, COLUMNS, cells, partial(draw, rows=results.values["rows"]))
    return results


def _row(entrant: Entrant, context: int, network: Network) -> dict[str, Any]:
    return {
        "method": entrant.method,
        "decoder": entrant.decoder,
        "target": "causal",
        "label": entrant.label,
        "batch": 1,
        "context": context,
        "bytes_per_round": bytes_read(network, entrant.decoder, context),
        "rounds": [],
    }


def bytes_read(network: Network, decoder: str, context: int) -> int:
    """Weights of a round's passes, and the keys and values that they read; drafting reads the other branch's too."""
    weights, each = weights_read(network, fused=False, drafts=True), next(network.parameters()).element_size()
    if isinstance(network, DualBranch) and decoder == "autoregressive":
        assert network.config.causal is not None
        cached = 2 * network.config.causal.layers * network.config.causal.width
        return weights["causal"] + each * cached * context
    if "draft" in weights:
        weights["draft"] *= Speculative().drafting(cast(LanguageModel, network)).most
    return sum(weights.values()) + each * network.cached_per_position() * context


def _measured(
    settings: ScalingSettings, entrant: Entrant, contestant: Contestant, context: int, turn: int
) -> dict[str, float]:
    network = contestant.network
    device = next(network.parameters()).device
    prompts = Prompts(None, "", context + settings.new_tokens, settings.new_tokens)
    prompt = prompts.take(turn, 1, network.vocab_size, settings.seed)
    task = task_of(network, prompt, settings.new_tokens, 1.0, settings.seed + turn, device)
    return after_the_first(entrant, network, task)


@torch.inference_mode()
def after_the_first(entrant: Entrant, network: Network, task: Task) -> dict[str, float]:
    """Seconds per token and per round, from the first frame, by which the prompt has been read, to the last."""
    frames = entrant.build(network)(cast(LanguageModel, network), task)
    frame = next(frames)
    begun, left = now(task.tokens.device), int((task.wanted & (frame.tokens == task.mask_id)).sum())
    rounds = 0
    for _ in frames:
        rounds += 1
    seconds = now(task.tokens.device) - begun
    return {
        "seconds_per_token": seconds / left,
        "seconds_per_round": seconds / rounds,
        "tokens_per_round": left / rounds,
    }


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Medians and quartiles, and each row's cost over that of its decoder at the first context."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in ("seconds_per_token", "seconds_per_round", "tokens_per_round"):
            put_median(row, name)
        base = first.setdefault(row["label"], row)
        row["cost_ratio"] = _cost(row, base).median
        row["bytes_ratio"] = row["bytes_per_round"] / base["bytes_per_round"]


def _cost(row: dict[str, Any], base: dict[str, Any]) -> Spread:
    """Of a round: what a token costs besides depends on what is accepted by chance."""
    return Spread.ratio(*([each["seconds_per_round"] for each in which["rounds"]] for which in (row, base)))


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Told]:
    """Cost at 4096 over that at 256, over the ratio of the bytes read: of the first model, and of each decoder."""
    told: dict[str, Told] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        at = {row["context"]: row for row in rows if row["label"] == label}
        key = "context_scaling" if not told else f"context_scaling {label}"
        if SHORT not in at or LONG not in at:
            told[key] = Told(f"not told: needs the contexts {SHORT} and {LONG}")
            continue
        grown = at[LONG]["bytes_per_round"] / at[SHORT]["bytes_per_round"]
        cost = _cost(at[LONG], at[SHORT])
        told[key] = Told(label, cost.median / grown, (cost.low / grown, cost.high / grown))
    return told


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    return [
        row["method"],
        row["decoder"],
        str(row["context"]),
        spread(1e3 * row["seconds_per_token"], [1e3 * each for each in row["seconds_per_token_quartiles"]]),
        number(1e3 * row["seconds_per_round"]),
        number(row["tokens_per_round"]),
        number(row["bytes_per_round"] / 2**20),
        number(row["cost_ratio"]),
        number(row["bytes_ratio"]),
    ]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Cost of a round against the context, dashed what the bytes read would make of it."""
    axes.figure.set_size_inches(7, 5)
    for i, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        line = [row for row in rows if row["label"] == label]
        contexts, cost = [row["context"] for row in line], [1e3 * row["seconds_per_round"] for row in line]
        axes.plot(contexts, cost, color=f"C{i}", marker="o", label=label)
        axes.plot(contexts, [cost[0] * row["bytes_ratio"] for row in line], color=f"C{i}", ls="--", lw=1)
    axes.set(xscale="log", xlabel="context (tokens)", ylabel="ms per round; dashed: in proportion to bytes read")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


SCALING = Benchmark(
    "scaling",
    "Cost against context",
    ScalingSettings,
    scaling,
    {"scaling": Drawing("Cost of a round against the context", draw)},
    "caddf benchmark scaling",
)
