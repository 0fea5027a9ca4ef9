"""Decoders measured in turns: every round each row decodes once, and what it took is on disk before the next starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console

from caddf.benchmarks.measure import Spread, allocated, bandwidth, fresh, in_turns, resident
from caddf.benchmarks.results import Results
from caddf.benchmarks.roster import TARGETED, TRANSFORMERS, Contestant, Entrant, Roster, needs, same_weights
from caddf.benchmarks.trial import (
    Judge,
    Prompts,
    Run,
    account,
    bandwidth_share,
    check_tokenizer,
    exact_ppl,
    run,
    task_of,
    unigram_entropy,
    warm_up,
    weights_held,
    weights_read,
)
from caddf.compile import Compile
from caddf.data import TokenSet
from caddf.decoding import Decoder, Task
from caddf.errors import Checked, InputError
from caddf.experiment import Size
from caddf.quantise import Quantisation
from caddf.text_model import DType, check_seed, load, resolve_device

MEANS = (
    "causal_evaluations",
    "diffusion_evaluations",
    "tokens_per_evaluation",
    "tokens_per_round",
    "copied_share",
    "cache_hit_rate",
    "entropy",
)
"""Columns that are means over the rounds; of time there are medians."""


@dataclass(frozen=True)
class Conditions(Checked):
    """What all rows have in common. `DecodeSettings` says what each setting is."""

    size: Size = "demo"
    models: str | None = None
    methods: str | None = None
    shape: Literal["preset", "equal"] = "preset"
    context: int | None = None
    new_tokens: int | None = None
    batch: str = "1,8"
    repeats: int = 5
    temperature: float = 1.0
    prompts: str | None = None
    split: str = "test"
    judge: str | None = None
    windows: int = 8
    memory: bool = True
    dtype: DType = "float32"
    quantize: Quantisation | None = None
    compile: Compile = "auto"
    device: str = "auto"
    seed: int = 0

    def roster(self) -> Roster:
        """The models."""
        return Roster.of(
            models=self.models, methods=self.methods, size=self.size, context=self.context, shape=self.shape,
            device=self.device, dtype=self.dtype, seed=self.seed, quantize=self.quantize, compile=self.compile,
        )  # fmt: skip

    def resolved(self, roster: Roster) -> Conditions:
        """With nothing left open: the context of the models, half of it new. Raises `InputError`."""
        check_seed(self.seed)
        for name in ("repeats", "windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        whole_numbers("batch", self.batch)
        if not roster.trained and self.prompts is not None:
            raise InputError(
                f"prompts is {self.prompts}, but models is not given; random weights continue random tokens: "
                "leave prompts out"
            )
        if roster.trained and self.prompts is None:
            raise InputError("prompts is not given; trained models continue held-out text: give a token set")
        if self.judge is not None and not roster.trained:
            raise InputError("judge is given, but the models have random weights; give trained ones with --models")
        contexts = {name: roster.context_of(name) for name in roster.names}
        shortest = min(contexts, key=contexts.__getitem__)
        context = contexts[shortest] if self.context is None else self.context
        if not 2 <= context <= contexts[shortest]:
            raise InputError(
                f"context is {context}; it must lie between 2 and {contexts[shortest]}, the context of {shortest}"
            )
        new_tokens = context // 2 if self.new_tokens is None else self.new_tokens
        if not 1 <= new_tokens <= context:
            raise InputError(f"new_tokens is {new_tokens}; it must lie between 1 and the context, {context}")
        return dataclasses.replace(self, context=context, new_tokens=new_tokens)

    @property
    def beginnings(self) -> Prompts:
        """The prompts."""
        assert self.context is not None and self.new_tokens is not None
        data = None if self.models is None or self.prompts is None else TokenSet.open(self.prompts)
        return Prompts(data, self.split, self.context, self.new_tokens)


def whole_numbers(name: str, given: str, least: int = 1) -> list[int]:
    """The numbers of `1,8`; raises `InputError` where they are none, below `least`, or one twice."""
    words = given.strip("[]").split(",")
    if not all(word.strip().isdecimal() and int(word) >= least for word in words):
        raise InputError(f"{name} is {given}; it must be whole numbers of {least} or more, as in {least},8")
    numbers = [int(word) for word in words]
    if len({*numbers}) < len(numbers):
        raise InputError(f"{name} is {given}; each number is to be given once")
    return numbers


def contest(results: Results, rows: Sequence[Entrant], roster: Roster, given: Conditions, console: Console) -> None:
    """Measures what is missing of `rows`, for each size of batch, and leaves it in `results.values["rows"]`."""
    if given.memory and resolve_device(given.device).type == "cpu":
        needs("psutil")
    prompts, judge = given.beginnings, _judge(given)
    for name in roster.names:
        if prompts.data is not None:
            check_tokenizer(name, roster[name].tokenizer, prompts.data, "prompts")
    same_weights(results.folder, results.values.get("rows", []), roster)
    kept = {(row["label"], row["batch"]): row for row in results.values.get("rows", [])}
    if judge is not None and prompts.data is not None:
        results.values["judge"] = _about(judge, prompts.data, given)
    table = [(entrant, size) for size in whole_numbers("batch", given.batch) for entrant in rows]
    results.values["rows"] = [
        kept.get((entrant.label, size)) or _row(entrant, size, roster[entrant.model], given) for entrant, size in table
    ]
    places = [(entrant.label, size) for entrant, size in table]
    by_place = dict(zip(places, results.values["rows"], strict=True))
    speeds: list[float] = results.values.setdefault("bandwidths", [])
    decoders: dict[str, Decoder] = {}
    for turn, (entrant, size) in in_turns(table, given.repeats):
        row, contestant = by_place[entrant.label, size], roster[entrant.model]
        if len(row["rounds"]) > turn:
            continue
        if len(speeds) <= turn:
            speeds.append(bandwidth(roster.device))
        decoder = decoders.setdefault(entrant.label, entrant.build(contestant.network))
        if not row["rounds"]:
            warm_up(decoder, contestant.network, _task(given, prompts, contestant, size, turn))
        row["rounds"].append(_measured(given, prompts, contestant, decoder, judge, size, turn))
        results.save()
        said = f"{row['rounds'][-1]['tokens_per_second']:.1f} tokens/s"
        _tell(console, f"[{turn + 1}/{given.repeats}] {entrant.label}, batch {size}: {said}")
    for (entrant, size), row in zip(table, results.values["rows"], strict=True):
        if row["peak_memory"] is None and given.memory:
            row["peak_memory"] = peak = _peak(given, entrant, size, row["rounds"], roster)
            results.save()
            said = "not known on this device" if peak is None else f"{peak / 2**20:,.0f} MiB"
            _tell(console, f"{entrant.label}, batch {size}: peak memory {said}")
    if prompts.data is not None:
        _perplexities(results, roster, given, prompts.data, console)
    results.values["bandwidth"] = Spread.of(speeds).median
    for (entrant, _), row in zip(table, results.values["rows"], strict=True):
        network = roster[entrant.model].network
        drafts = row["decoder"] in ("speculative", "block") or "causal" not in network.heads
        summarise(row, weights_read(network, row["target"] != "causal", drafts), speeds)
    compare(results.values["rows"])


def _tell(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _row(entrant: Entrant, size: int, contestant: Contestant, given: Conditions) -> dict[str, Any]:
    targeted = entrant.decoder in (*TARGETED, TRANSFORMERS)
    return {
        "method": entrant.method,
        "model": entrant.model,
        "checkpoint": contestant.checkpoint,
        "weights": contestant.weights,
        "decoder": entrant.decoder,
        "target": entrant.settings.get("target", "causal") if targeted else None,
        "settings": {name: value for name, value in entrant.settings.items() if name != "target"},
        "label": entrant.label,
        "batch": size,
        "context": given.context,
        "new_tokens": given.new_tokens,
        "parameters": contestant.network.parameter_counts()["total"],
        "peak_memory": None,
        "target_ppl": None,
        "rounds": [],
    }


def _task(given: Conditions, prompts: Prompts, contestant: Contestant, size: int, turn: int) -> Task:
    network = contestant.network
    beginnings = prompts.take(turn, size, network.vocab_size, given.seed)
    device = next(network.parameters()).device
    return task_of(network, beginnings, prompts.new_tokens, given.temperature, given.seed + turn * size, device)


def _measured(
    given: Conditions,
    prompts: Prompts,
    contestant: Contestant,
    decoder: Decoder,
    judge: Judge | None,
    size: int,
    turn: int,
) -> dict[str, Any]:
    """One row's figures in one round."""
    network, task = contestant.network, _task(given, prompts, contestant, size, turn)
    if task.tokens.device.type == "cuda":
        with allocated(task.tokens.device) as peak:
            ran = run(decoder, network, task)
        weights = weights_held(network)
        figures: dict[str, Any] = {
            **account(network, ran, prompts.new_tokens),
            "peak": peak.most - peak.first + weights,
        }
    else:
        ran = run(decoder, network, task)
        figures = account(network, ran, prompts.new_tokens)
    return {**figures, **_quality(prompts, contestant, judge, ran)}


def _quality(prompts: Prompts, contestant: Contestant, judge: Judge | None, ran: Run) -> dict[str, float]:
    """Of trained models alone."""
    if contestant.tokenizer is None:
        return {}
    begun = prompts.context - prompts.new_tokens
    quality = {"entropy": unigram_entropy(ran.tokens[:, begun:])}
    return quality if judge is None else {**quality, "judged": judge.nll(contestant.tokenizer, ran.tokens, begun)}


def _judge(given: Conditions) -> Judge | None:
    if given.judge is None:
        return None
    model = load(given.judge, device=given.device, dtype="float32")
    if "causal" not in model.model.heads:
        raise InputError(f"judge is {given.judge}, which has no causal head; give a model that reads left to right")
    assert given.context is not None
    if not model.slides and model.context < given.context:
        raise InputError(
            f"judge is {given.judge}, which reads {model.context} tokens at most; texts have {given.context} with "
            "their prompts: give a judge of a longer context, or a smaller --context"
        )
    return Judge(Path(given.judge).name, model)


def _about(judge: Judge, data: TokenSet, given: Conditions) -> dict[str, Any]:
    """Who judges, and how well it knows such text itself."""
    model = judge.model
    windows = data.split(given.split).spread(model.context, given.windows)
    ppl = math.exp(judge.nll(data.tokenizer, windows, 0))
    return {"run": judge.name, "parameters": model.model.parameter_counts()["total"], "ppl": ppl}


def _peak(given: Conditions, entrant: Entrant, size: int, rounds: list[dict[str, Any]], roster: Roster) -> int | None:
    """Bytes of weights, caches and activations: of the allocator on a GPU, of a fresh process on a CPU."""
    if roster.device.type == "cuda":
        return max(each["peak"] for each in rounds)
    return fresh(resident_peak, given, entrant, size) if roster.device.type == "cpu" else None


def resident_peak(given: Conditions, entrant: Entrant, size: int) -> int:
    """Weights, and what one decoding adds to the resident memory of this process; run it in a `fresh` one."""
    contestant, prompts = given.roster()[entrant.model], given.beginnings
    weights = weights_held(contestant.network)
    decoder, task = entrant.build(contestant.network), _task(given, prompts, contestant, size, 0)
    with resident() as peak:
        run(decoder, contestant.network, task)
    return weights + peak.most - peak.first


def _perplexities(results: Results, roster: Roster, given: Conditions, data: TokenSet, console: Console) -> None:
    """The exact perplexity of every target, once for each model."""
    known = {(row["model"], row["target"]): row["target_ppl"] for row in results.values["rows"] if row["target_ppl"]}
    for row in results.values["rows"]:
        place = (row["model"], row["target"])
        if row["target"] is None:
            continue
        if place not in known:
            network = roster[row["model"]].network
            windows = data.split(given.split).spread(network.config.context, given.windows)
            known[place] = exact_ppl(network, windows, row["target"], roster.device)
            _tell(console, f"{row['model']}: perplexity {known[place]:.2f} of the {row['target']} target")
        row["target_ppl"] = known[place]
        results.save()


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """The columns of rows against others of their batch: the first, and the same model and target one at a time."""
    for row in rows:
        beside = [each for each in rows if each["batch"] == row["batch"]]
        alone = [
            each
            for each in beside
            if each["decoder"] == "autoregressive" and all(each[name] == row[name] for name in ("model", "target"))
        ]
        for name, other in (("over_first", beside[0]), ("over_one_at_a_time", alone[0] if alone else None)):
            spread = None if other is None or other is row else faster(row, other)
            row[name] = spread and spread.median
            row[f"{name}_quartiles"] = spread and [spread.low, spread.high]


def faster(fast: dict[str, Any], slow: dict[str, Any]) -> Spread:
    """How many times as fast one row is as another, within each round."""
    return Spread.ratio(*([each["tokens_per_second"] for each in row["rounds"]] for row in (fast, slow)))


def summarise(row: dict[str, Any], read: dict[str, int], bandwidths: Sequence[float]) -> None:
    """The columns of a row from its rounds: medians and quartiles of time, means of counts and of quality."""
    rounds = row["rounds"]
    speed = Spread.of([each["tokens_per_second"] for each in rounds])
    row["tokens_per_second"], row["tokens_per_second_quartiles"] = speed.median, [speed.low, speed.high]
    for name in MEANS:
        values = [each[name] for each in rounds if each.get(name) is not None]
        row[name] = fmean(values) if values else None
    shares = [bandwidth_share(read, each, bandwidths[turn]) for turn, each in enumerate(rounds)]
    row["bandwidth_share"] = Spread.of(shares).median
    judged = [each["judged"] for each in rounds if "judged" in each]
    row["generative_ppl"] = math.exp(fmean(judged)) if judged else None
