"""`caddf report`: what a folder of results holds, on one page that needs no other file; no model is run.

Every file below the folder that a command of caddf wrote is shown by its kind, with its name, and how it was made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from caddf import plots, reproduce
from caddf.benchmarks import BENCHMARKS
from caddf.benchmarks.roster import needs
from caddf.checkpoint import write_text_atomic
from caddf.errors import InputError
from caddf.evaluation.pairing import named
from caddf.machine import machine
from caddf.reproduce import perplexity, plus_minus
from caddf.result_files import Results, Source, Values, link_to

T = TypeVar("T")
TABLES = {
    "table1": "Table 1. Every method, zero-shot",
    "table2": "Table 2. The strongest methods, zero-shot",
    "table3": "Table 3. Efficiency",
    "table4": "Table 4. Ablations",
}
COMMANDS = {
    **{f"{table}": f"caddf reproduce {table} --scale demo" for table in TABLES},
    **{name: each.example for name, each in BENCHMARKS.items()},
    "evaluations": "caddf evaluate RUN --data SET --json > results/NAME/evaluation.json",
    "losses": "cp RUN/metrics.jsonl results/NAME/RUN.jsonl",
    "samples": "caddf samples --models NAME=RUN,... --prompt TEXT --out results/samples",
    "recordings": "caddf generate RUN --prompt TEXT --record results/NAME/recording.json",
}
"""What makes what may be missing."""
MANY = 3
"""Entries of one kind and folder, beyond which they are folded."""
PERPLEXITIES = "ratio of perplexities ± standard error: less is better"
CURVES = 8
"""The most in one figure of likelihoods: beyond, the table says more."""


@dataclass(frozen=True)
class Cell:
    """What stands in a table; `note` below it, `exact` where the pointer rests."""

    text: str
    note: str = ""
    exact: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: columns, with what they mean where that is not plain, and rows."""

    columns: dict[str, str]
    rows: list[list[Cell]]

    @cached_property
    def numeric(self) -> list[bool]:
        """Which columns hold nothing but figures, and are aligned as such."""
        texts = [[row[i].text for row in self.rows] for i in range(len(self.columns))]
        return [all(re.fullmatch(r"[-+±\d.,%()\sto]*|none.*", text) for text in column) for column in texts]


@dataclass(frozen=True)
class Figure:
    """A drawing, and where it lies besides."""

    title: str
    svg: Markup
    file: str = ""


@dataclass(frozen=True)
class Entry:
    """A part of the page. group: the folder of results that it is of. folded: it is shown when it is asked for."""

    name: str
    title: str
    shown: Markup
    group: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What is being written: where it lies, the results that it is of, and how its parts are written.

    tell: called after each file.
    """

    path: Path
    results: Results
    parts: Any
    tell: Callable[[], None]

    def each(self, build: Callable[[Source], T], sources: Iterable[Source]) -> list[T]:
        """What is built of each source; one of another version, or edited, is unread, and the rest stands."""
        built = []
        for source in sources:
            try:
                built.append(build(source))
            except InputError as error:
                self.results.unread[source.link] = str(error)
            self.tell()
        return built

    def id(self, path: Path) -> str:
        """What the page calls what is made of `path`: where that lies within the results, which nothing else does."""
        return quote(path.relative_to(self.results.folder).as_posix()).replace("%", ".")

    def entry(
        self,
        path: Path,
        title: str,
        about: str,
        sources: Sequence[Source],
        grids: Sequence[Grid] = (),
        figures: Sequence[Figure] = (),
    ) -> Entry:
        """A part made of `path`: tables and figures of some sources."""
        shown = self.parts.shown(about, sources, grids, figures)
        return Entry(self.id(path), title, shown, sources[0].group)

    def missing(self, name: str, title: str) -> Entry:
        """A part for which there is no file."""
        return Entry(name, title, self.parts.missing(COMMANDS[name]))

    def figure(self, title: str, draw: plots.Draw, folder: Path, name: str, save: bool = True) -> Figure:
        """A drawing as FOLDER/NAME.png and .svg, unless the command that measured left one there, and on the page."""
        svg = plots.saved(draw, folder if save else None, name, self.id(folder / name))
        drawn = folder / f"{name}.svg"
        return Figure(title, Markup(svg), link_to(drawn, self.path) if drawn.exists() else "")


def report(folder: Path, path: Path, progress: Callable[[int, int], None] | None = None) -> Results:
    """Writes the page from the files in `folder`, and the figures beside the files they are drawn from.

    `progress` hears how many of the files are drawn. Raises `InputError` where there is no such folder, or matplotlib
    is missing.
    """
    needs("matplotlib")
    results = Results.read(folder, path)
    templates = Environment(
        loader=PackageLoader("caddf"), autoescape=select_autoescape(), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn, files = count(1), len(results.sources) - len(results.losses)

    def tell() -> None:
        if progress is not None:
            progress(next(drawn), files)

    page = Page(path, results, templates.get_template("report_parts.html").module, tell)
    sections = {
        "Tables": _by_name(page, TABLES, results.tables, "table", _table),
        "Benchmarks": _by_name(
            page, {name: each.title for name, each in BENCHMARKS.items()}, results.benchmarks, "benchmark", _benchmark
        ),
        "Likelihoods": _evaluations(page, results.evaluations),
        "Training": [_losses(page, results.losses)],
    }
    html = templates.get_template("report.html").render(
        results=results, sections=sections, commands=COMMANDS, machine=machine(),
        samples=page.each(partial(_samples, page), results.samples),
        recordings=page.each(partial(_recording, page), results.recordings),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, html)
    return results


def _by_name(
    page: Page, titles: dict[str, str], sources: Sequence[Source], key: str, entry: Callable[[Page, str, Source], Entry]
) -> list[Entry]:
    """The sources of each title, others after them, and what is missing."""
    entries = []
    for name in dict.fromkeys([*titles, *(source.values[key] for source in sources)]):
        title = titles.get(name, name)
        found = page.each(partial(entry, page, title), [source for source in sources if source.values[key] == name])
        groups = Counter(each.group for each in found)
        entries += [replace(each, folded=groups[each.group] > MANY) for each in found]
        if name in titles and not found:
            entries.append(page.missing(name, title))
    return entries


# Tables.


def _table(page: Page, title: str, source: Source) -> Entry:
    """What the table says in its own words, perplexities in theirs, and drawings of both."""
    values, settings = source.values, source.about
    table = reproduce.TABLES.get(values["table"])
    if table is None:
        raise InputError(f"table is {values['table']}; it must be one of {', '.join(reproduce.TABLES)}")
    title = f"{title}, scale {settings['scale']}" if "scale" in settings else title
    quality = values if "sets" in values else values.get("perplexities")
    about, columns, rows = table.grid(values)
    said, grids = [about], []
    if rows:
        grids.append(Grid(dict.fromkeys(columns, ""), [[Cell(cell) for cell in row] for row in rows]))
    if quality is not None:
        place = 0 if quality is values else 1  # where perplexities are all of the table, they come first
        grids.insert(place, _perplexities(quality))
        said.insert(
            place,
            f"Perplexity ± standard error, below it the accuracy; zero-shot, trained on {settings['training_set']}. "
            "causal, ar and block are exact, hybrid and diffusion are upper bounds: compare like with like. "
            f"{settings['windows']} windows a set (fewer where a set has fewer), {settings['samples']} samples per "
            "bound.",
        )
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    figures = [*_paired(page, source), *_compared(page, source)]
    if quality is not None and (curves := _hybrid_curves(quality)):
        draw = partial(plots.draw_hybrid, curves=curves)
        figures.append(page.figure("Perplexity against l*", draw, source.path.parent, "table-hybrid"))
    about = " ".join(filter(None, said))
    return page.entry(source.path, f"{title} ({source.place})", about, [source], grids, figures)


def _perplexities(values: Values) -> Grid:
    """Every likelihood of every method, a column for each set."""
    columns = ["method", "likelihood", "parameters", "tokens seen", *values["sets"].values()]
    rows = [
        [Cell(row["method"]), Cell(row["likelihood"]), Cell(f"{row['parameters']:,}"),
         Cell(f"{row['training']['tokens']:,}"), *(_perplexity(row["sets"].get(each)) for each in values["sets"])]
        for row in values["rows"]
    ]  # fmt: skip
    return Grid(dict.fromkeys(columns, ""), rows)


def _paired(page: Page, source: Source) -> list[Figure]:
    """Perplexities over those of rivals, on each set."""
    values = source.values
    ratios = {
        f"{row['method']} {row['likelihood']} / {row['other']} {row['against']}": {
            values["sets"][key]: _within(ratio) for key, ratio in row["sets"].items()
        }
        for row in values.get("paired") or []
    }
    return _ratio_figure(page, source, "Perplexity over that of others", PERPLEXITIES, ratios)


def _compared(page: Page, source: Source) -> list[Figure]:
    """Speeds over those of others, and perplexities over the full model's, where a table has them."""
    values = source.values
    speeds = {
        key: {"median, quartiles": plots.Ratio(values["ratios"][key], *quartiles)}
        for key, quartiles in (values.get("ratio_quartiles") or {}).items()
        if quartiles and "_vs_" in key
    }
    full: dict[str, dict[str, plots.Ratio]] = {}
    for row in values["rows"]:
        for key, name in (("target_ratio", f"exact, {row.get('target')}"), ("diffusion_ratio", "diffusion bound")):
            if (ratio := row.get(key)) and row["model"] != "full":
                full.setdefault(row["model"], {})[name] = _within(ratio)
    return [
        *_ratio_figure(page, source, "Speed over that of others", "ratio of tokens/s: more is better", speeds),
        *_ratio_figure(page, source, "Perplexity over the full model's", PERPLEXITIES, full),
    ]


def _within(ratio: Values) -> plots.Ratio:
    """With its standard error to both sides."""
    value, error = ratio["ratio"], ratio["standard_error"]
    return plots.Ratio(value, value - error, value + error)


def _ratio_figure(
    page: Page, source: Source, title: str, what: str, ratios: dict[str, dict[str, plots.Ratio]]
) -> list[Figure]:
    """A drawing of them, where there are any."""
    draw = partial(plots.draw_ratios, ratios=ratios, what=what)
    return [page.figure(title, draw, source.path.parent, "table-ratios")] if ratios else []


def _perplexity(cell: Values | None) -> Cell:
    """A likelihood on one set."""
    if cell is None:
        return Cell("")
    accuracy = cell.get("accuracy")
    exact = f"{_nats(cell)}, {cell['windows']} windows" if "windows" in cell else _nats(cell)
    return Cell(plus_minus(perplexity(cell)), "" if accuracy is None else f"{100 * accuracy:.1f}%", exact)


def _nats(cell: Values) -> str:
    error, bits = cell.get("standard_error"), cell.get("bits_per_byte")
    said = f"{cell['nll']:.4f}" + ("" if error is None else f" ± {error:.4f}") + " nats per token"
    return said if bits is None else f"{said}, {bits:.4f} bits per byte"


def _hybrid_curves(values: Values) -> dict[str, plots.Curve]:
    """Against l*, for each method and set that has hybrid bounds."""
    found: dict[str, Values] = {}
    for row in values["rows"]:
        for name, cell in row["sets"].items():
            likelihoods = found.setdefault(f"{row['method']}, {values['sets'][name]}", {"hybrid": []})
            if row["likelihood"].startswith("hybrid "):
                likelihoods["hybrid"].append(cell)
            else:
                likelihoods[row["likelihood"]] = cell
    return {name: plots.Curve.hybrid(each) for name, each in found.items() if each["hybrid"]}


# Benchmarks.


def _benchmark(page: Page, title: str, source: Source) -> Entry:
    values, shown = source.values, source.values["shown"]
    rows = [[Cell(text.replace("<br>", "\n")) for text in row] for row in shown["rows"]]
    grids = [Grid(shown["columns"], rows)]
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    benchmark, rows_of = BENCHMARKS.get(values["benchmark"]), values["rows"]
    figures = [
        page.figure(each.title, partial(each.draw, rows=rows_of), source.path.parent, file, file != source.path.stem)
        for file, each in (benchmark.drawings.items() if benchmark is not None else ())
        if not each.varies or len({row[each.varies] for row in rows_of}) > 1
    ]
    return page.entry(source.path, f"{title} ({source.place})", shown["about"], [source], grids, figures)


def _ratios(values: Values) -> Grid:
    """Ratios with quartiles, and what they are of or why there is none."""
    rows = []
    for key, of in values["ratio_of"].items():
        value, quartiles = values["ratios"].get(key), values["ratio_quartiles"].get(key)
        spread = "" if quartiles is None else f"{quartiles[0]:.3g} to {quartiles[1]:.3g}"
        rows.append([Cell(key), Cell("" if value is None else f"{value:.3g}"), Cell(spread), Cell(of)])
    return Grid(dict.fromkeys(("ratio", "value", "quartiles", "of"), ""), rows)


# Likelihoods and losses.


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
        cells = {name: Cell(plus_minus(perplexity(each)), exact=_nats(each)) for name, each in by_name.items()}
        first = by_name.get("block", next(iter(by_name.values()), {}))
        bits = Cell("" if first.get("bits_per_byte") is None else f"{first['bits_per_byte']:.3f}")
        curves = {key: curve(likelihoods) for key, (_, curve, _) in FIGURES.items() if likelihoods.get(key)}
        return cls(source, cells | {BITS: bits}, curves)


def _evaluations(page: Page, sources: Sequence[Source]) -> list[Entry]:
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


def _losses(page: Page, sources: Sequence[Source]) -> Entry:
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


# Text.


def _samples(page: Page, source: Source) -> Markup:
    """The samples of each prompt, in their order."""
    values = source.values
    prompts = {name: [each for each in values["samples"] if each["prompt"] == name] for name in values["prompts"]}
    shown: Markup = page.parts.samples(values, prompts, source)
    return shown


def _recording(page: Page, source: Source) -> Markup:
    """The rows of a recording, each with the number of its pieces by what became of them, over all frames."""
    values = source.values
    kinds = [Counter(kind for frame in row["frames"] for _, kind in frame["pieces"]) for row in values["rows"]]
    shown: Markup = page.parts.recording(values["recording"], list(zip(values["rows"], kinds, strict=True)), source)
    return shown
