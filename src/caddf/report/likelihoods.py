"""Evaluations and losses on the page: a table for each folder of results, and curves of what lies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from caddf import plots
from caddf.evaluation.pairing import named
from caddf.report.files import Source
from caddf.report.page import Cell, Entry, Grid, Page
from caddf.report.tables import nats
from caddf.reproduce import perplexity, plus_minus

CURVES = 8
"""The most in one figure of likelihoods: beyond, the table says more."""

BITS = "bits per byte"
FIGURES = {
    "hybrid": ("Perplexity against l*", plots.Curve.hybrid, plots.draw_hybrid),
    "nfe": ("Perplexity against steps", plots.Curve.nfe, plots.draw_nfe),
}
"""The figures of evaluations: the likelihoods that each shows, its title, how its curves are read and drawn."""


@dataclass(frozen=True)
class Evaluation:
    """What is shown of a source: cells by the name of the likelihood, and bits per byte; curves by their figure."""

    source: Source
    cells: dict[str, Cell]
    curves: dict[str, plots.Curve]

    @classmethod
    def of(cls, source: Source) -> Evaluation:
        """All of it, so that what is missing is known before evaluations are put together."""
        likelihoods = source.values["likelihoods"]
        by_name = dict(named(likelihoods))
        cells = {name: Cell(plus_minus(perplexity(each)), exact=nats(each)) for name, each in by_name.items()}
        first = by_name.get("block", next(iter(by_name.values()), {}))
        bits = Cell("" if first.get("bits_per_byte") is None else f"{first['bits_per_byte']:.3f}")
        curves = {key: curve(likelihoods) for key, (_, curve, _) in FIGURES.items() if likelihoods.get(key)}
        return cls(source, cells | {BITS: bits}, curves)


def evaluations(page: Page, sources: Sequence[Source]) -> list[Entry]:
    """Of each folder of results a table of its evaluations, and figures of those that lie side by side."""
    found = page.each(Evaluation.of, sources)
    if not found:
        return [page.missing("evaluations", "Evaluations")]
    entries, about = [], "Perplexity ± standard error. causal, ar and block are exact; hybrid and diffusion are bounds."
    for group in dict.fromkeys(each.source.group for each in found):
        some = [each for each in found if each.source.group == group]
        names = {name: None for each in some for name in each.cells if name != BITS}
        columns = {"evaluation": "", **dict.fromkeys(names, ""), BITS: "of block, or of the first there is"}
        rows = [
            [Cell(each.source.label), *(each.cells.get(name, Cell("")) for name in [*names, BITS])] for each in some
        ]
        sources, figures = [each.source for each in some], []
        of = {each.source.path: each.curves for each in some}
        for folder, beside in _by_folder(sources, above=1).items():
            for key, (title, _, draw) in FIGURES.items():
                curves = {each.label: of[each.path][key] for each in beside if key in of[each.path]}
                if 0 < len(curves) <= CURVES:
                    figures.append(page.figure(title, partial(draw, curves=curves), folder, key))
        path, title = page.results.folder / group / "evaluations", f"Evaluations ({group})"
        entries.append(page.entry(path, title, about, sources, [Grid(columns, rows)], figures))
    return entries


def losses(page: Page, sources: Sequence[Source]) -> Entry:
    """Loss curves, a figure for the runs in one folder."""
    if not sources:
        return page.missing("losses", "Loss curves")
    about = "Each method's own objective: curves of different methods compare only where their validation is alike."
    figures = []
    for folder, some in _by_folder(sources).items():
        draw = partial(plots.draw_losses, runs={each.label: each.values["rows"] for each in some})
        figures.append(page.figure(f"Losses ({some[0].place})", draw, folder, "losses"))
    return page.entry(page.results.folder / "losses", "Loss curves", about, sources, [], figures)


def _by_folder(sources: Sequence[Source], above: int = 0) -> dict[Path, list[Source]]:
    """Sources by the folder that they lie in, or where `above` is 1 the one that holds it, within those of results."""
    folders: dict[Path, list[Source]] = {}
    for each in sources:
        within = above if "/" in each.place else 0
        folders.setdefault(each.path.parents[within], []).append(each)
    return folders
