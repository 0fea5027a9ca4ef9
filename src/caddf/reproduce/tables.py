"""The paper's tables, each an object: the variants that it may be asked for, the jobs that it needs, what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any, Protocol

from caddf.benchmarks.measure import Spread
from caddf.benchmarks.results import number, spread, within
from caddf.benchmarks.roster import name_of, needs
from caddf.checkpoint import read_json
from caddf.errors import InputError
from caddf.evaluation.pairing import paired
from caddf.experiment import DEFAULT_METHOD, METHODS
from caddf.reproduce.perplexities import Perplexities, Values, perplexities, perplexity, plus_minus, times
from caddf.reproduce.plan import SETS, Job, Variant, Workshop, same

DRAFTS = {"decoders": "speculative", "lookups": "0"}
"""Of Table 4: the model's own, none copied from the text."""


class Table(Protocol):
    """One of the paper's tables. What it is asked for is a choice of `variants`, by name."""

    @property
    def name(self) -> str:
        """`table1` and so on."""

    @property
    def variants(self) -> dict[str, Variant]:
        """All that it may be asked for."""

    @property
    def standard(self) -> tuple[str, ...]:
        """The choice where none is made."""

    def check(self, shop: Workshop) -> None:
        """Raises `InputError`, before any work, where settings do not fit or a package is missing."""

    def plan(self, shop: Workshop, chosen: dict[str, Variant]) -> Iterator[Job]:
        """Everything that it needs, in order."""

    def values(self, shop: Workshop, chosen: dict[str, Variant]) -> Values:
        """What `table.json` says, from what is there: `rows`, and more."""

    def grid(self, values: Values) -> tuple[str, list[str], list[list[str]]]:
        """What is shown of `values` besides perplexities: a text, columns, and rows of cells."""


def methods(names: Iterable[str]) -> dict[str, Variant]:
    """Methods as they are."""
    return {name: Variant(name, name) for name in names}


@dataclass(frozen=True)
class Efficiency:
    """Table 3: speed, passes, caches and memory of trained models and their decoders, and what the text is worth."""

    name: str = "table3"
    variants: dict[str, Variant] = field(default_factory=lambda: methods(METHODS))
    standard: tuple[str, ...] = ("gpt2", "sedd-scaled", "radd-lambda-dce", "mdlm", "bd3lm", DEFAULT_METHOD)

    def check(self, shop: Workshop) -> None:
        """The packages of the extra `bench`."""
        check_prompts(shop)
        for package in ("matplotlib", "psutil", "transformers"):
            needs(package)

    def plan(self, shop: Workshop, chosen: dict[str, Variant]) -> Iterator[Job]:
        """Data, runs, and one contest of them all."""
        yield from shop.prepare(shop.settings.prompts)
        yield from (shop.train(variant) for variant in chosen.values())
        yield shop.decode(contest(self, chosen), chosen, judge=self._judge(shop, chosen))

    @staticmethod
    def _judge(shop: Workshop, chosen: dict[str, Variant]) -> str | None:
        own = str(shop.run(chosen["gpt2"])) if "gpt2" in chosen else None
        return shop.settings.judge or own

    def values(self, shop: Workshop, chosen: dict[str, Variant]) -> Values:
        """A row for each method, decoder and batch."""
        judge = self._judge(shop, chosen)
        decoded = decodings(shop, contest(self, chosen), judge=None if judge is None else name_of(judge))
        kept = (
            "model", "method", "decoder", "settings", "target", "batch", "context", "new_tokens", "parameters",
            "tokens_per_second", "tokens_per_second_quartiles", "causal_evaluations", "diffusion_evaluations",
            "tokens_per_evaluation", "tokens_per_round", "cache_hit_rate", "peak_memory", "bandwidth_share",
            "generative_ppl", "entropy", "target_ppl",
        )  # fmt: skip
        rows = [{name: row[name] for name in kept} for row in decoded["rows"]]
        conditions = {name: decoded.get(name) for name in ("judge", "ratios", "ratio_quartiles", "ratio_of")}
        return {"about": self._about(decoded), **conditions, "rows": rows}

    def _about(self, decoded: Values) -> str:
        if not decoded["rows"]:
            return ""
        given, judge = decoded["settings"], decoded.get("judge")
        text = (
            f"{_conditions(given)}; median (quartiles) of {given['repeats']} rounds in which every row decodes once. "
            "Target PPL is exact, of what the decoder draws from; chains have no such target."
        )
        if judge is not None:
            text += f" PPL of text is under {judge['run']}, whose own of held-out text is {judge['ppl']:.1f}."
        return text

    def grid(self, values: Values) -> tuple[str, list[str], list[list[str]]]:
        """Speed, passes, memory, quality."""
        columns = ["method", "decoder", "batch", "parameters", "tokens/s", "passes: causal, diffusion",
                   "tokens per pass", "tokens per round", "cache hits", "memory, MiB", "PPL of text", "entropy",
                   "target PPL"]  # fmt: skip
        rows = []
        for row in values["rows"]:
            passes = ", ".join(number(row[f"{branch}_evaluations"]) for branch in ("causal", "diffusion"))
            memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"
            rows.append([
                row["model"], decoder(row), str(row["batch"]), f"{row['parameters']:,}", speed(row), passes,
                number(row["tokens_per_evaluation"]), number(row["tokens_per_round"]), f"{row['cache_hit_rate']:.1%}",
                memory, number(row["generative_ppl"]), number(row["entropy"]), number(row["target_ppl"]),
            ])  # fmt: skip
        return values["about"], columns, rows


@dataclass(frozen=True)
class Ablations:
    """Table 4: the dual branch without a part of it, at as many parameters in all (the paper removes the part alone).

    So that what is compared is the design and not the size. Each variant is trained as Table 1's methods are; the full
    model is Table 1's.
    """

    name: str = "table4"
    variants: dict[str, Variant] = field(
        default_factory=lambda: {
            "full": Variant(DEFAULT_METHOD, DEFAULT_METHOD),
            "no-causal-branch": Variant(f"{DEFAULT_METHOD}-no-causal-branch", DEFAULT_METHOD, {"causal": "off"}),
            "no-cross-attention": Variant(f"{DEFAULT_METHOD}-no-cross-attention", DEFAULT_METHOD, {"fusion": "none"}),
        }
    )

    @property
    def standard(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.variants)

    def check(self, shop: Workshop) -> None:
        """The package that the contest draws with."""
        check_prompts(shop)
        needs("matplotlib")

    def plan(self, shop: Workshop, chosen: dict[str, Variant]) -> Iterator[Job]:
        """Data, runs, evaluations, and one contest of speculation (of the chain, without a causal branch)."""
        yield from Perplexities(self.name, chosen).plan(shop, chosen)
        yield shop.decode(contest(self, chosen), chosen, memory=False, **DRAFTS)

    def values(self, shop: Workshop, chosen: dict[str, Variant]) -> Values:
        """A row for each variant, target and batch; `perplexities` has all data sets."""
        decoded = decodings(shop, contest(self, chosen), **DRAFTS)
        path = shop.evaluation(self.variants["full"], shop.settings.prompts)
        full = read_json(path) if path.exists() else {}
        there = {name for name, each in chosen.items() if shop.evaluation(each, shop.settings.prompts).exists()}
        drafted = [row for row in decoded["rows"] if row["model"] in there]
        rows = [self._row(shop, chosen[row["model"]], row, decoded["rows"], full) for row in drafted]
        shown = perplexities(shop, chosen, only=("causal", "block", "diffusion"))
        quality = {"sets": SETS, "sources": shop.sources(), "rows": shown}
        return {"about": self._about(decoded), "rows": rows, "perplexities": quality}

    def _about(self, decoded: Values) -> str:
        if not decoded["rows"]:
            return ""
        given = decoded["settings"]
        return (
            f"All variants have as many parameters, data, tokens and seed. Text of {given['prompts']}: exact PPL of "
            "the target that the decoder draws from, diffusion bound, their ratios to the full model's (paired over "
            "windows), and multi-token prediction (share of a block's drafts that are the text, and that are the fused "
            f"model's own choice). {_conditions(given)}; ± of tokens per round is over "
            f"{given['repeats']} rounds in which every row decodes once, brackets are quartiles of them. A chain's "
            "rounds are its steps that change a token. A ratio is to the full model's row of the same target, or its "
            "first, within the round."
        )

    def _row(self, shop: Workshop, variant: Variant, row: Values, rows: list[Values], full_model: Values) -> Values:
        """A decoder's row, with what was evaluated of its model, and that over what was of the full one."""
        evaluated = read_json(shop.evaluation(variant, shop.settings.prompts))
        likelihoods, drafts = evaluated["likelihoods"], evaluated["mtp"]
        name = {"causal": "causal", "fused": "block"}.get(row["target"], "")
        exact = likelihoods.get(name)
        full = [each for each in rows if each["model"] == "full" and each["batch"] == row["batch"]]
        same = next((each for each in full if each["target"] == row["target"]), full[0] if full else None)
        ratio = None if same is None else Spread.ratio(*([r["tokens_per_second"] for r in each["rounds"]]
                                                         for each in (row, same)))  # fmt: skip
        rounds = [each["tokens_per_round"] for each in row["rounds"]]
        return {
            **{name: row[name] for name in ("model", "decoder", "target", "batch", "parameters")},
            "settings": {name: value for name, value in row["settings"].items() if name != "lookup"},
            "tokens_seen": shop.trained(variant)["tokens"],
            "target_ppl": None if exact is None else perplexity(exact),
            "target_ratio": None if exact is None else self._to_full(evaluated, full_model, name),
            "diffusion_ppl": perplexity(likelihoods["diffusion"]),
            "diffusion_ratio": self._to_full(evaluated, full_model, "diffusion"),
            "mtp_accuracy": drafts["accuracy"],
            "mtp_agreement": drafts.get("agreement"),
            "tokens_per_round": row["tokens_per_round"],
            "tokens_per_round_error": stdev(rounds) / len(rounds) ** 0.5 if len(rounds) > 1 else None,
            "tokens_per_second": row["tokens_per_second"],
            "tokens_per_second_quartiles": row["tokens_per_second_quartiles"],
            "ratio": None if ratio is None else ratio.median,
            "ratio_quartiles": None if ratio is None else [ratio.low, ratio.high],
        }

    @staticmethod
    def _to_full(evaluated: Values, full: Values, likelihood: str) -> Values | None:
        """A perplexity over the full model's, paired; None where that is not there."""
        if not {"per_window"} <= full.keys() & evaluated.keys():
            return None
        found = paired(evaluated, full, likelihood)
        return {"ratio": found.ratio, "standard_error": found.standard_error}

    def grid(self, values: Values) -> tuple[str, list[str], list[list[str]]]:
        """Quality, drafts, speed."""
        columns = ["variant", "decoder", "batch", "parameters", "tokens seen", "target PPL", "target PPL / full",
                   "diffusion bound", "bound / full", "MTP accuracy", "MTP agreement", "tokens per round",
                   "tokens/s", "ratio to full"]  # fmt: skip
        rows = []
        for row in values["rows"]:
            low_high = row["ratio_quartiles"]
            rows.append([
                row["model"], decoder(row), str(row["batch"]), f"{row['parameters']:,}", f"{row['tokens_seen']:,}",
                plus_minus(row["target_ppl"]), times(row["target_ratio"]), plus_minus(row["diffusion_ppl"]),
                times(row["diffusion_ratio"]), f"{row['mtp_accuracy']:.1%}",
                "" if row["mtp_agreement"] is None else f"{row['mtp_agreement']:.1%}",
                within(row["tokens_per_round"], row["tokens_per_round_error"]), speed(row),
                "" if low_high is None else spread(row["ratio"], low_high),
            ])  # fmt: skip
        return values["about"], columns, rows


TABLES: dict[str, Table] = {
    "table1": Perplexities("table1", methods(METHODS)),
    "table2": Perplexities(
        "table2",
        methods(n for n in METHODS if n.startswith(("gpt2", "sedd-scaled", "sedd-unscaled", "radd", "caddf"))),
    ),
    "table3": Efficiency(),
    "table4": Ablations(),
}


def check_prompts(shop: Workshop) -> None:
    """Raises `InputError` where the prompts are of no data set that tables have."""
    if shop.settings.prompts not in SETS:
        raise InputError(f"prompts is {shop.settings.prompts}; it must be one of {', '.join(SETS)}")


def contest(table: Table, chosen: dict[str, Variant]) -> str:
    """The name of a table's decodings: speeds compare within one contest, so another choice is another contest."""
    return table.name if tuple(chosen) == table.standard else f"{table.name}-{'+'.join(chosen)}"


def decodings(shop: Workshop, contest: str, **settings: Any) -> Values:
    """What `benchmark decode` left, once all of it was measured; raises `InputError` if with other settings.

    Of fewer repeats it goes on, unless the decoding part is left out.
    """
    folder, given = shop.decoding(contest), shop.settings
    if not (folder / "decode.md").exists():
        return {"rows": []}
    decoded, whole = read_json(folder / "decode.json"), shop.decoded(contest)
    names = ["prompts", "batch", "windows"]
    if whole or given.only not in ("all", "decode"):
        names.append("repeats")
    same(folder, {name: getattr(given, name) for name in names} | settings, decoded["settings"])
    return decoded if whole else {"rows": []}


def _conditions(given: Values) -> str:
    """What is decoded."""
    prompt = given["context"] - given["new_tokens"]
    return (
        f"{given['new_tokens']} new tokens after {prompt} of held-out text of {given['prompts']}, temperature "
        f"{given['temperature']:g}"
    )


# Cells.


def decoder(row: Values) -> str:
    """Its name, its target and its settings."""
    said = ([] if row["target"] is None else [row["target"]]) + [f"{k} {v}" for k, v in row["settings"].items()]
    return f"{row['decoder']} ({', '.join(said)})" if said else str(row["decoder"])


def speed(row: Values) -> str:
    """Tokens a second of the whole batch."""
    return spread(row["tokens_per_second"], row["tokens_per_second_quartiles"])
