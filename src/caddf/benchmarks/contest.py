"""Decoders measured in turns: every round each row decodes once, and what it took is on disk before the next starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from rich.console import Console

from caddf.benchmarks.given import whole_numbers, written
from caddf.benchmarks.measure import Spread, allocated, bandwidth, fresh, resident
from caddf.benchmarks.results import Results, in_rounds, put_median
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
from caddf.decoding import Decoder, Speculative, Task
from caddf.errors import Checked, InputError, at_least, check_seed
from caddf.interface import LanguageModel
from caddf.quantise import Quantisation
from caddf.text_model import DType, fingerprint, load, resolve_device

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

Place = tuple[Entrant, int]
"""Of a row in the table: who decodes, and how many rows together."""


@dataclass(frozen=True)
class Conditions(Checked):
    """What all rows have in common.

    models: trained ones, NAME=RUN,... or a folder of runs.
    context: tokens of a finished row; not set, the models' context.
    new_tokens: how many of them are drawn, the rest being the prompt; not set, half.
    batch: rows decoded together, as in 1,8; each size is measured.
    repeats: rounds in which every row decodes once.
    temperature: of all draws; 0 is greedy.
    prompts: a token set whose held-out text trained models continue.
    split: of the prompts.
    judge: a run or model folder that reads left to right, by which generated text is scored.
    windows: of the exact perplexities of targets.
    memory: measure peak memory too (on a CPU, each row decodes once more in a process of its own).
    dtype: of weights and arithmetic.
    quantize: int8 or bf16 weights instead, on a CPU: of all models.
    compile: kernels on a CPU, rounds as CUDA graphs on a GPU, made off the clock: auto is of the models that can.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of weights, prompts and draws.
    """

    models: str | None = None
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

    def roster(self, **untrained: Any) -> Roster:
        """The models; `untrained` says what those of random weights are."""
        return Roster.of(
            models=self.models, context=self.context, device=self.device, dtype=self.dtype, seed=self.seed,
            quantize=self.quantize, compile=self.compile, **untrained,
        )  # fmt: skip

    def resolved(self, roster: Roster) -> Conditions:
        """With nothing left open: the context of the models, half of it new. Raises `InputError`."""
        check_seed(self.seed)
        at_least(1, self, "repeats", "windows")
        whole_numbers("batch", self.batch)
        if roster.trained and self.prompts is None:
            raise InputError("prompts is not given; trained models continue held-out text: give a token set")
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


@dataclass(frozen=True)
class Contest:
    """What takes part, and what it is measured on. A place in the table is an entrant and a size of batch."""

    given: Conditions
    roster: Roster
    prompts: Prompts
    judge: Judge | None
    decoders: dict[str, Decoder] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Conditions, roster: Roster) -> Contest:
        """Raises `InputError` where prompts are in other tokens than a model's, or the judge cannot read the texts."""
        prompts = given.beginnings
        for name in roster.names:
            if prompts.data is not None:
                check_tokenizer(name, roster[name].tokenizer, prompts.data, "prompts")
        return cls(given, roster, prompts, _judge(given))

    @property
    def read(self) -> dict[str, str]:
        """Fingerprints of what the settings name, but for the models."""
        read = {} if self.prompts.data is None else {"prompts": self.prompts.data.fingerprint(self.given.split)}
        return read if self.judge is None else {**read, "judge": fingerprint(self.judge.model.model)}

    def task(self, place: Place, turn: int) -> Task:
        """What is decoded in a round."""
        (entrant, size), given = place, self.given
        network = self.roster[entrant.model].network
        beginnings = self.prompts.take(turn, size, network.vocab_size, given.seed)
        device, seed = next(network.parameters()).device, given.seed + turn * size
        return task_of(network, beginnings, self.prompts.new_tokens, given.temperature, seed, device)

    def decoder(self, entrant: Entrant) -> Decoder:
        """That of an entrant, made once."""
        if entrant.label not in self.decoders:
            self.decoders[entrant.label] = entrant.build(self.roster[entrant.model].network)
        return self.decoders[entrant.label]

    def warm_up(self, place: Place, turn: int) -> None:
        """The first frames of a round, off the clock."""
        entrant, _ = place
        warm_up(self.decoder(entrant), self.roster[entrant.model].network, self.task(place, turn))

    def measured(self, place: Place, turn: int) -> dict[str, Any]:
        """The figures of a round."""
        entrant, _ = place
        contestant, decoder, task = self.roster[entrant.model], self.decoder(entrant), self.task(place, turn)
        network, figures = contestant.network, dict[str, Any]()
        if task.tokens.device.type == "cuda":
            with allocated(task.tokens.device) as peak:
                ran = run(decoder, network, task)
            figures["peak"] = peak.most - peak.first + weights_held(network)
        else:
            ran = run(decoder, network, task)
        drafts = decoder.drafting(cast(LanguageModel, network)).most if isinstance(decoder, Speculative) else 0
        accounts = account(network, ran, self.prompts.new_tokens, drafts)
        return {**accounts, **figures, **self._quality(contestant, ran)}

    def _quality(self, contestant: Contestant, ran: Run) -> dict[str, float]:
        """Of trained models alone."""
        if contestant.tokenizer is None:
            return {}
        begun = self.prompts.context - self.prompts.new_tokens
        quality = {"entropy": unigram_entropy(ran.tokens[:, begun:])}
        if self.judge is not None:
            quality["judged"] = self.judge.nll(contestant.tokenizer, ran.tokens, begun)
        return quality


def contest(
    name: str, folder: Path, entrants: Sequence[Entrant], given: Conditions, roster: Roster, console: Console
) -> Results:
    """Measures what is missing of every entrant, for each size of batch, and leaves it in `rows` of the results.

    Raises `InputError` before anything is measured.
    """
    if given.memory and resolve_device(given.device).type == "cpu":
        needs("psutil")
    held = Contest.of(given, roster)
    results = Results.open(name, folder, written(given), free=("repeats", "domain", "memory"), read=held.read)
    same_weights(results.folder, results.values.get("rows", []), roster)
    kept = {(row["label"], row["batch"]): row for row in results.values.get("rows", [])}
    if held.judge is not None and held.prompts.data is not None:
        results.values["judge"] = _about(held.judge, held.prompts.data, given)
    table = [(entrant, size) for size in whole_numbers("batch", given.batch) for entrant in entrants]
    rows = [kept.get((each.label, size)) or _row(each, size, roster[each.model], given) for each, size in table]
    results.values["rows"] = rows
    speeds: list[float] = results.values.setdefault("bandwidths", [])

    def measure(place: Place, turn: int) -> dict[str, Any]:
        if len(speeds) <= turn:
            speeds.append(bandwidth(roster.device))
        return held.measured(place, turn)

    def say(place: Place, figures: dict[str, Any]) -> str:
        return f"{place[0].label}, batch {place[1]}: {figures['tokens_per_second']:.1f} tokens/s"

    in_rounds(results, list(zip(table, rows, strict=True)), given.repeats, measure, say, console, held.warm_up)
    for place, row in zip(table, rows, strict=True):
        if row["peak_memory"] is None and given.memory:
            row["peak_memory"] = peak = _peak(given, place, row["rounds"], roster)
            results.save()
            said = "not known on this device" if peak is None else f"{peak / 2**20:,.0f} MiB"
            _tell(console, f"{place[0].label}, batch {place[1]}: peak memory {said}")
    if held.prompts.data is not None:
        _perplexities(results, roster, given, held.prompts.data, console)
    results.values["bandwidth"] = Spread.of(speeds).median
    for (entrant, _), row in zip(table, rows, strict=True):
        network = roster[entrant.model].network
        drafts = row["decoder"] == "speculative" or (row["decoder"] == "block" and not network.chained)
        drafts = drafts or "causal" not in network.heads
        summarise(row, weights_read(network, row["target"] != "causal", drafts), speeds)
    compare(rows)
    return results


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
    length = model.context
    if not model.slides and model.tokenizer.fingerprint != data.tokenizer.fingerprint:
        assert given.context is not None
        length = min(length, given.context)  # in its own tokens they may be more, and have to fit as the texts have
    windows = data.split(given.split).spread(length, given.windows)
    ppl = math.exp(judge.nll(data.tokenizer, windows, 0))
    return {"run": judge.name, "parameters": model.model.parameter_counts()["total"], "ppl": ppl}


def _peak(given: Conditions, place: Place, rounds: list[dict[str, Any]], roster: Roster) -> int | None:
    """Bytes of weights, caches and activations: of the allocator on a GPU, of a fresh process on a CPU."""
    if roster.device.type == "cuda":
        return max(each["peak"] for each in rounds)
    return fresh(resident_peak, given, place) if roster.device.type == "cpu" else None


def resident_peak(given: Conditions, place: Place) -> int:
    """Weights, and what one decoding adds to the resident memory of this process; run it in a `fresh` one."""
    held = Contest(given, given.roster(), given.beginnings, judge=None)  # which loads no other model
    network = held.roster[place[0].model].network
    weights = weights_held(network)
    decoder, task = held.decoder(place[0]), held.task(place, 0)
    with resident() as peak:
        run(decoder, network, task)
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
    put_median(row, "tokens_per_second")
    for name in MEANS:
        values = [each[name] for each in rounds if each.get(name) is not None]
        row[name] = fmean(values) if values else None
    share = Spread.of([bandwidth_share(read, each, bandwidths[turn]) for turn, each in enumerate(rounds)])
    row["bandwidth_share"], row["bandwidth_share_quartiles"] = share.median, (share.low, share.high)
    judged = [each["judged"] for each in rounds if "judged" in each]
    row["generative_ppl"] = math.exp(fmean(judged)) if judged else None
