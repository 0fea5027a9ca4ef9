"""`caddf benchmark decode`: methods by decoders by batches (Table 3), in turns; medians, and ratios with quartiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from caddf.benchmarks.contest import Conditions, contest, faster
from caddf.benchmarks.given import whole_numbers
from caddf.benchmarks.measure import Spread
from caddf.benchmarks.results import Benchmark, Drawing, Results, Told, dots, number, put, spread
from caddf.benchmarks.roster import TRANSFORMERS, Roster, decoders_of, entrants, needs
from caddf.decoding import Speculative
from caddf.errors import InputError
from caddf.model_settings import Size

PARITY = 1.03
"""How far a target's perplexity may be above that of the autoregressive baseline, for its speed to count."""
OF_RANDOM, OF_TRAINED = (
    ("size", "methods", "shape"),
    ("prompts", "split", "judge", "windows", "lookups", "drafts", "domain"),
)
"""Settings that are of random weights alone, and of trained models alone."""
SAME_ENTROPY = 0.98
"""How far, as a share, the entropy of text may be below another's and still pass for equal."""
COLUMNS = {
    "model": "",
    "decoder": "and its settings",
    "target": "the distribution that it draws from exactly: the causal head, or the fused one in blocks",
    "batch": "",
    "tokens/s": "new tokens of the whole batch a second, prompts read included: median (quartiles)",
    "x first": "speed over that of the batch's first row, within each round: median (quartiles)",
    "x one at a time": "the same over the model's own `autoregressive`, with the same target",
    "per evaluation": "new tokens of a row per causal pass; a diffusion pass counts at its floating-point operations",
    "per round": "new tokens of a row per round",
    "copied": "share of the rounds whose drafts were copied from the text itself (lookup)",
    "causal, diffusion": "passes of each branch",
    "cache hits": "share of the token-positions that a decoder without caches computes",
    "memory": "MiB at the peak: weights, caches, activations",
    "parameters": "in all",
    "bandwidth": "share of the measured memory bandwidth that reading the weights of all passes takes",
    "PPL of text": "generated, under the judge",
    "entropy": "of the new tokens of a row, as a bag, in nats",
    "target PPL": "exact, of held-out text",
}


@dataclass(frozen=True)
class DecodeSettings(Conditions):
    """Who decodes what, and how often.

    size: of models with random weights, of which speed and memory can be told and quality cannot.
    methods: a comma-separated choice of methods for random weights; not set, those of the comparison.
    shape: of a method with one branch, for random weights: preset, the shape of the size's causal branch (small:
        GPT-2's), or equal, as many parameters as the dual branch.
    decoders: a comma-separated choice of the dual branch's decoders; not set, all. Other methods have their own.
    steps: of the chains (ancestral, tau-leaping), as in 512,1024, a row each; not set, as many as new tokens.
    lookups: how many last tokens must have stood before for speculation of trained models to copy its drafts, a row
        each; 0 is without copies.
    drafts: how many drafts a round of theirs has at most, as in 5,7, a row each; not set, the decoder's default.
    domain: what the prompts are, which decides the names of some ratios.
    out: folder of the results; not set, results/decode-SIZE or results/decode-trained.
    """

    size: Size = "demo"
    methods: str | None = None
    shape: Literal["preset", "equal"] = "preset"
    decoders: str | None = None
    steps: str | None = None
    lookups: str = f"0,{Speculative.lookup}"
    drafts: str | None = None
    domain: Literal["prose", "code"] = "prose"
    out: str | None = None

    def roster(self, **untrained: Any) -> Roster:
        """The models: trained, or of random weights."""
        return super().roster(size=self.size, methods=self.methods, shape=self.shape, **untrained)

    def check_fits(self) -> None:
        """Raises `InputError` for a setting that is of trained models alone, or of random weights alone."""
        trained = self.models is not None
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value != each.default and each.name in (OF_RANDOM if trained else OF_TRAINED):
                raise InputError(
                    f"{each.name} is {value}, but models is {'given' if trained else 'not given'}; it is for "
                    f"{'random weights' if trained else 'trained models'}: leave it out"
                )


def decode(settings: DecodeSettings, console: Console) -> Results:
    """Measures every row in turns and writes decode.json, .md, .png and .svg; goes on where it was interrupted.

    Raises `InputError` before anything is measured, for settings that do not fit the models and packages that miss.
    """
    needs("matplotlib")
    decoders_of(settings.decoders)
    settings.check_fits()
    roster = settings.roster()
    given = settings.resolved(roster)
    assert given.new_tokens is not None
    steps = whole_numbers("steps", settings.steps) if settings.steps is not None else [given.new_tokens]
    if any(roster[name].method == "gpt2" for name in roster.names):
        needs("transformers")
    lookups = whole_numbers("lookups", settings.lookups, least=0)
    drafts = [] if settings.drafts is None else whole_numbers("drafts", settings.drafts)
    rows = entrants(roster, settings.decoders, steps, True, lookups, drafts)
    folder = Path(settings.out or f"results/decode-{'trained' if settings.models else settings.size}")
    results = contest("decode", folder, rows, given, roster, console)
    put(results.values, ratios(results.values["rows"], settings.domain))
    results.write(about(results.values), COLUMNS, cells, partial(draw, rows=results.values["rows"]))
    return results


def about(values: dict[str, Any]) -> str:
    """What the table is of."""
    given = values["settings"]
    text = (
        f"{given['new_tokens']} new tokens after a prompt of {given['context'] - given['new_tokens']}; every row "
        f"decodes once in each of {given['repeats']} rounds. Measured bandwidth: {values['bandwidth'] / 1e9:.1f} GB/s."
    )
    if given["models"] is None:
        return text + " The weights are random: figures of speed and memory, not of acceptance or quality."
    if "judge" in values:
        judge = values["judge"]
        text += (
            f" The judge is {judge['run']} ({judge['parameters']:,} parameters), whose own PPL is {judge['ppl']:.2f}."
        )
    return text


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
    return [
        row["model"],
        f"{row['decoder']} ({settings})" if settings else row["decoder"],
        row["target"] or "",
        str(row["batch"]),
        spread(row["tokens_per_second"], row["tokens_per_second_quartiles"]),
        spread(row["over_first"], row["over_first_quartiles"]),
        spread(row["over_one_at_a_time"], row["over_one_at_a_time_quartiles"]),
        number(row["tokens_per_evaluation"]),
        number(row["tokens_per_round"]),
        "" if not row.get("copied_share") else f"{row['copied_share']:.0%}",
        f"{number(row['causal_evaluations'])}, {number(row['diffusion_evaluations'])}",
        f"{row['cache_hit_rate']:.1%}",
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}",
        f"{row['parameters']:,}",
        f"{row['bandwidth_share']:.0%}",
        number(row["generative_ppl"]),
        number(row["entropy"]),
        number(row["target_ppl"]),
    ]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens a second of every row, fastest first, a colour for each family."""
    ordered = sorted(rows, key=_speed, reverse=True)
    families = sorted({family(row) for row in ordered})
    colours = [f"C{families.index(family(row))}" for row in ordered]
    dots(axes, [f"{row['label']}, batch {row['batch']}" for row in ordered], ordered, colours)
    axes.set(xlabel="new tokens per second (median, quartiles)")


def family(row: dict[str, Any]) -> str:
    """gpt2, radd, sedd, caddf ..."""
    return str(row["method"].split("-")[0])


# Ratios.


def ratios(rows: Sequence[dict[str, Any]], domain: str) -> dict[str, Told]:
    """What these rows tell of the goals, by key, at the first of the batches.

    Speeds are compared within each round. Rows of different quality are compared only where the faster is no worse.
    """
    rows = [row for row in rows if row["batch"] == rows[0]["batch"]]
    ours = [row for row in rows if "caddf" == family(row)]
    baseline = next((row for row in rows if family(row) == "gpt2" and row["decoder"] == "autoregressive"), None)
    told: dict[str, Told] = {}

    theirs = next((row for row in rows if row["decoder"] == TRANSFORMERS), None)
    if theirs is not None:
        same = next(row for row in rows if row["model"] == theirs["model"] and row["decoder"] == "autoregressive")
        told["ar_vs_transformers"] = _faster(same, theirs)
    left_to_right = [row for row in rows if row["decoder"] == "autoregressive" and row["target"] == "causal"]
    if left_to_right:
        best = max(left_to_right, key=lambda row: row["bandwidth_share"])
        told["bandwidth_share"] = Told(best["label"], best["bandwidth_share"], best["bandwidth_share_quartiles"])
    if baseline is not None or ours:
        told |= _speculation(ours, baseline, "_code" if domain == "code" else "")
    chain = next((row for row in ours if row["decoder"] == "ancestral"), None)
    if chain is not None:
        told["cache_hits_any_order"] = _over_rounds(chain, "cache_hit_rate", chain["label"])
    for other in ("radd", "sedd"):
        slow = [row for row in rows if family(row) == other]
        if slow and ours:
            told[f"caddf_vs_{other}"] = _no_worse(ours, max(slow, key=lambda row: row["settings"].get("steps", 0)))
    return told


def _speculation(ours: Sequence[dict[str, Any]], baseline: dict[str, Any] | None, suffix: str) -> dict[str, Told]:
    """Speculation against the same model one token at a time (the faster target), and its tokens per round."""
    drafted = [row for row in ours if row["decoder"] == "speculative"]
    plain = [row for row in ours if row["decoder"] == "autoregressive"]
    if not drafted:
        return {}
    told = {}
    fastest = max(drafted, key=_speed)
    if fastest["entropy"] is None:
        return {"tokens_per_round": Told("not told: with random weights drafts are accepted by chance")}
    if plain:
        told[f"speculative_vs_ar{suffix}"] = _faster(fastest, max(plain, key=_speed))
    limit = None if baseline is None or baseline["target_ppl"] is None else PARITY * baseline["target_ppl"]
    fit = [row for row in drafted if limit is not None and row["target_ppl"] is not None and row["target_ppl"] <= limit]
    if fit:
        most = max(fit, key=lambda row: row["tokens_per_round"])
        of = f"{most['label']}, target PPL {most['target_ppl']:.4g}"
        told["tokens_per_round"] = _over_rounds(most, "tokens_per_round", of)
    elif limit is None:
        told["tokens_per_round"] = Told("not told: no autoregressive baseline whose exact PPL is known")
    else:
        targets = ", ".join(f"{row['target']} {row['target_ppl']:.4g}" for row in drafted)
        told["tokens_per_round"] = Told(
            f"not told: target PPL {targets}, above {PARITY} x the baseline's ({limit:.4g})"
        )
    return told


def _over_rounds(row: dict[str, Any], name: str, of: str) -> Told:
    """A row's mean, with the quartiles of its rounds."""
    found = Spread.of([each[name] for each in row["rounds"]])
    return Told(of, row[name], (found.low, found.high))


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens_per_second"])


def _faster(fast: dict[str, Any], slow: dict[str, Any]) -> Told:
    ratio = faster(fast, slow)
    return Told(f"{fast['label']} / {slow['label']}", ratio.median, (ratio.low, ratio.high))


def _no_worse(ours: Sequence[dict[str, Any]], slow: dict[str, Any]) -> Told:
    """The fastest of `ours` whose text is no worse than `slow`'s: no higher PPL, no lower entropy."""
    if slow["generative_ppl"] is None:
        return Told("not told: without a judge nothing is known of the quality")
    fit = [
        row
        for row in ours
        if row["generative_ppl"] <= slow["generative_ppl"] and row["entropy"] >= SAME_ENTROPY * slow["entropy"]
    ]
    if not fit:
        return Told(f"not told: no row has a PPL and an entropy as good as those of {slow['label']}")
    return _faster(max(fit, key=_speed), slow)


DECODE = Benchmark(
    "decode",
    "Decoders: speed, passes, memory",
    DecodeSettings,
    decode,
    {"decode": Drawing("Tokens per second", draw)},
    "caddf benchmark decode --models RUNS --prompts SET",
)
