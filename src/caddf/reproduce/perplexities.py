"""Tables 1 and 2: every likelihood of every method on every data set, and the ratios by which designs are judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from caddf.benchmarks.results import within
from caddf.checkpoint import read_json
from caddf.evaluation.pairing import named, paired
from caddf.reproduce.plan import SETS, Job, Variant, Workshop

Values = dict[str, Any]


@dataclass(frozen=True)
class Perplexities:
    """Tables 1 and 2: every likelihood of every method, zero-shot on all data sets."""

    name: str
    variants: dict[str, Variant]

    @property
    def standard(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.variants)

    def check(self, shop: Workshop) -> None:
        """Nothing more than training and evaluation need."""

    def plan(self, shop: Workshop, chosen: dict[str, Variant]) -> Iterator[Job]:
        """Data, runs, evaluations."""
        yield from shop.prepare(*SETS)
        yield from (shop.train(variant) for variant in chosen.values())
        yield from (shop.evaluate(variant, name) for variant in chosen.values() for name in SETS)

    def values(self, shop: Workshop, chosen: dict[str, Variant]) -> Values:
        """A row for each method and likelihood."""
        return {
            "sets": SETS, "sources": shop.sources(), "rows": perplexities(shop, chosen), "paired": pairs(shop, chosen),
        }  # fmt: skip

    def grid(self, values: Values) -> tuple[str, list[str], list[list[str]]]:
        """What the dual branch costs and buys, paired; nothing where no methods compare."""
        rows = []
        for row in values.get("paired") or []:  # of an earlier version there are none
            ours, theirs = f"{row['method']} {row['likelihood']}", f"{row['other']} {row['against']}"
            rows.append([ours, theirs, *(times(row["sets"].get(name)) for name in values["sets"])])
        if not rows:
            return "", [], []
        about = (
            "Ratios of perplexities over the same windows, paired: ± is the standard error over windows of what the "
            "two do not have in common."
        )
        return about, ["perplexity", "over that of", *values["sets"].values()], rows


def pairs(shop: Workshop, chosen: dict[str, Variant]) -> list[Values]:
    """Ratios by which designs are judged, on each data set, of the evaluations that are there.

    Of every method that reads left to right and denoises: its exact perplexities to GPT-2's, its diffusion bound to
    every RADD's, and its hybrid bound nearest to left to right to its own diffusion bound.
    """
    rows: dict[tuple[str, str, str, str], Values] = {}
    for name in SETS:
        found = {label: shop.evaluation(variant, name) for label, variant in chosen.items()}
        there = {label: read_json(path) for label, path in found.items() if path.exists()}
        there = {label: each for label, each in there.items() if "per_window" in each}
        for label, ours in there.items():
            nats = ours["per_window"]["nats"]
            if "block" not in nats:
                continue
            wanted = [(likelihood, "gpt2", "causal") for likelihood in ("causal", "block")]
            wanted += [("diffusion", other, "diffusion") for other in there if other.startswith("radd")]
            wanted += [(hybrid, label, "diffusion") for hybrid in [n for n in nats if n.startswith("hybrid")][-1:]]
            for likelihood, other, against in wanted:
                if other in there:
                    ratio = paired(ours, there[other], likelihood, against)
                    row = rows.setdefault((label, likelihood, other, against), {
                        "method": label, "likelihood": likelihood, "other": other, "against": against, "sets": {},
                    })  # fmt: skip
                    row["sets"][name] = {"ratio": ratio.ratio, "standard_error": ratio.standard_error}
    return list(rows.values())


def perplexities(shop: Workshop, chosen: dict[str, Variant], only: tuple[str, ...] = ()) -> list[Values]:
    """A row for each variant and likelihood (of `only`, if given), from the evaluations that are there."""
    rows: dict[tuple[str, str], Values] = {}
    for label, variant in chosen.items():
        for name in SETS:
            path = shop.evaluation(variant, name)
            if not path.exists():
                continue
            evaluated = read_json(path)
            counts = evaluated["accounts"]["parameters"]
            for likelihood, cell in named(evaluated["likelihoods"]):
                if only and likelihood not in only:
                    continue
                row = rows.setdefault((label, likelihood), {
                    "method": label, "likelihood": likelihood, "parameters": counts["total"],
                    "non_embedding": counts["total"] - counts["embeddings"],
                    "flops_per_token": evaluated["accounts"]["flops_per_token"], "training": shop.trained(variant),
                    "sets": {},
                })  # fmt: skip
                measured_on = "ar" if likelihood == "causal" and "ar" not in evaluated["likelihoods"] else likelihood
                accuracy = evaluated["accuracy"].get(measured_on)
                row["sets"][name] = {**cell, "accuracy": accuracy, "windows": evaluated["windows"]}
    return list(rows.values())


# Cells.


def perplexity(likelihood: Values) -> Values:
    """A perplexity with its standard error, by the delta method; of one window there is none."""
    error = likelihood.get("standard_error")
    return {"ppl": likelihood["ppl"], "standard_error": None if error is None else likelihood["ppl"] * error}


def plus_minus(cell: Values | None) -> str:
    """A perplexity with its standard error, where there is one."""
    if cell is None:
        return ""
    error = cell["standard_error"]
    return f"{cell['ppl']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def times(cell: Values | None) -> str:
    """A ratio with its standard error, where there is one."""
    return "" if cell is None else within(cell["ratio"], cell["standard_error"])
