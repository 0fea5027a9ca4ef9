"""`caddf report`: what a folder of results holds, on one page that needs no other file; no model is run.

Every file below the folder that a command of caddf wrote is shown by its kind, with its name, and how it was made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from caddf import plots
from caddf.benchmarks.acceptance import draw_by_offset, draw_by_step, draw_by_temperature
from caddf.benchmarks.decode import draw as draw_decode
from caddf.benchmarks.infill import draw as draw_infill
from caddf.benchmarks.pareto import draw as draw_pareto
from caddf.benchmarks.roster import needs
from caddf.benchmarks.scaling import draw as draw_scaling
from caddf.benchmarks.steps import draw as draw_steps
from caddf.benchmarks.train import draw as draw_train
from caddf.checkpoint import write_text_atomic
from caddf.evaluation.pairing import named
from caddf.machine import machine
from caddf.reproduce import paired_grid, perplexity, plus_minus
from caddf.result_files import BENCHMARKS, Results, Source, Values, link_to

T = TypeVar("T")
TABLES = {
    "table1": "Table 1. Every method, zero-shot",
    "table2": "Table 2. The strongest methods, zero-shot",
    "table3": "Table 3. Efficiency",
    "table4": "Table 4. Ablations",
}
VARIES = {"acceptance-temperature": "temperature", "acceptance-step": "step"}
"""Drawings that say nothing unless the rows differ in this."""
DRAWINGS: dict[str, dict[str, tuple[str, Callable[..., None]]]] = {
    "decode": {"decode": ("Tokens per second", draw_decode)},
    "pareto": {"pareto": ("Tokens per second against quality", draw_pareto)},
    "scaling": {"scaling": ("Cost of a round against the context", draw_scaling)},
    "steps": {"steps": ("Perplexity against denoising steps", draw_steps)},
    "acceptance": {
        "acceptance": ("Share of drafts accepted against their place", draw_by_offset),
        "acceptance-temperature": ("Tokens per round against temperature", draw_by_temperature),
        "acceptance-step": ("Tokens per round against the training step", draw_by_step),
    },
    "infill": {"infill": ("Perplexity of a span against its length", draw_infill)},
    "train": {"train": ("Tokens per second of a training step", draw_train)},
}
COMMANDS = {
    **{f"{table}": f"caddf reproduce {table} --scale demo" for table in TABLES},
    "decode": "caddf benchmark decode --models RUNS --prompts SET",
    "pareto": "caddf benchmark pareto --models RUNS --prompts SET --judge RUN",
    "scaling": "caddf benchmark scaling",
    "steps": "caddf benchmark steps --models RUNS --data SET",
    "acceptance": "caddf benchmark acceptance --models RUNS --data SET --checkpoints all",
    "infill": "caddf benchmark infill --models RUNS --data SET",
    "train": "caddf benchmark train",
    "evaluations": "caddf evaluate RUN --data SET --json > results/NAME/evaluation.json",
    "losses": "cp RUN/metrics.jsonl results/NAME/RUN.jsonl",
    "samples": "caddf samples --models NAME=RUN,... --prompt TEXT --out results/samples",
    "recordings": "caddf generate RUN --prompt TEXT --record results/NAME/recording.json",
}
"""What makes what may be missing."""
MANY = 3
"""Entries of one kind and folder, beyond which they are folded."""
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
    """A part of the page: tables and figures of some sources, or what is missing and the command that makes it.

    `folded` is shown when it is asked for.
    """

    name: str
    title: str
    about: str = ""
    sources: list[Source] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """Where the page lies, and the folder of results that it is of."""

    path: Path
    results: Path

    def id(self, path: Path) -> str:
        """What the page calls what is made of `path`: where that lies within the results, which nothing else does."""
        return quote(path.relative_to(self.results).as_posix()).replace("%", ".")

    def figure(self, title: str, draw: plots.Draw, folder: Path, name: str, save: bool = True) -> Figure:
        """A drawing as FOLDER/NAME.png and .svg, unless the command that measured left one there, and on the page."""
        svg = plots.saved(draw, folder if save else None, name, self.id(folder / name))
        drawn = folder / f"{name}.svg"
        return Figure(title, Markup(svg), link_to(drawn, self.path) if drawn.exists() else "")


def report(folder: Path, page: Path, progress: Callable[[int, int], None] | None = None) -> Results:
    """Writes the page from the files in `folder`, and the figures beside the files they are drawn from.

    `progress` hears how many of the files are drawn. Raises `InputError` where there is no such folder, or matplotlib
    is missing.
    """
    needs("matplotlib")
    results = Results.read(folder, page)
    templates = Environment(
        loader=PackageLoader("caddf"), autoescape=select_autoescape(), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn, files = count(1), len(results.sources) - len(results.losses)

    def tell() -> None:
        if progress is not None:
            progress(next(drawn), files)

    fitting, shown = partial(_fitting, unread=results.unread, tell=tell), Page(page, folder)
    sections = {
        "Tables": _by_name(TABLES, results.tables, "table", partial(_table, page=shown), fitting),
        "Benchmarks": _by_name(_titles(), results.benchmarks, "benchmark", partial(_benchmark, page=shown), fitting),
        "Likelihoods": _evaluations(fitting(_likelihoods, results.evaluations), shown),
        "Training": [_losses(results.losses, shown)],
    }
    html = templates.get_template("report.html").render(
        results=results, sections=sections, commands=COMMANDS, samples=fitting(_samples, results.samples),
        recordings=fitting(_recording, results.recordings), machine=machine(),
    )  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(page, html)
    return results


def _titles() -> dict[str, str]:
    return {name: title for name, (title, _) in BENCHMARKS.items()}


def _fitting(
    build: Callable[[Source], T], sources: Iterable[Source], unread: dict[str, str], tell: Callable[[], None]
) -> list[T]:
    """What is built of each source; one of another version, or edited, is unread, and the rest stands."""
    built = []
    for source in sources:
        try:
            built.append(build(source))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            unread[source.link] = f"does not fit this version ({type(error).__name__}: {error})"
        tell()
    return built


def _by_name(
    titles: dict[str, str],
    sources: Sequence[Source],
    key: str,
    entry: Callable[..., Entry],
    fitting: Callable[[Callable[[Source], Entry], Iterable[Source]], list[Entry]],
) -> list[Entry]:
    """The sources of each title, others after them, and what is missing."""
    entries = []
    for name in dict.fromkeys([*titles, *(source.values[key] for source in sources)]):
        title = titles.get(name, name)
        found = fitting(partial(entry, title=title), [source for source in sources if source.values[key] == name])
        groups = Counter(each.sources[0].group for each in found)
        found = [replace(each, folded=groups[each.sources[0].group] > MANY) for each in found]
        entries += found or [Entry(name, title, missing=COMMANDS.get(name, ""))]
    return entries


# Tables.


def _table(source: Source, title: str, page: Page) -> Entry:
    values, settings = source.values, source.about
    title = f"{title}, scale {settings['scale']}" if "scale" in settings else title
    title, name = f"{title} ({source.place})", page.id(source.path)
    if "sets" not in values:
        return Entry(name, title, str(values.get("about", "")), [source], [_plain_grid(values["rows"])])
    about = (
        f"Perplexity ± standard error, below it the accuracy; zero-shot, trained on {settings['training_set']}. "
        "causal, ar and block are exact, hybrid and diffusion are upper bounds: compare like with like. "
        f"{settings['windows']} windows a set (fewer where a set has fewer), {settings['samples']} samples per bound."
    )
    columns = ["method", "likelihood", "parameters", "tokens seen", *values["sets"].values()]
    rows = [
        [Cell(row["method"]), Cell(row["likelihood"]), Cell(f"{row['parameters']:,}"),
         Cell(f"{row['training']['tokens']:,}"), *(_perplexity(row["sets"].get(each)) for each in values["sets"])]
        for row in values["rows"]
    ]  # fmt: skip
    curves = _hybrid_curves(values)
    figures = []
    if curves:
        draw = partial(plots.draw_hybrid, evaluations=curves)
        figures.append(page.figure("Perplexity against l*", draw, source.path.parent, "table-hybrid"))
    grids = [Grid(dict.fromkeys(columns, ""), rows)]
    said, columns, ratios = paired_grid(values)
    if ratios:
        about += f" Below: {said[0].lower()}{said[1:]}"
        grids.append(Grid(dict.fromkeys(columns, ""), [[Cell(cell) for cell in row] for row in ratios]))
    return Entry(name, title, about, [source], grids, figures)


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


def _hybrid_curves(values: Values) -> dict[str, Values]:
    """Against l*, for each method and set that has hybrid bounds."""
    curves: dict[str, Values] = {}
    for row in values["rows"]:
        for name, cell in row["sets"].items():
            curve = curves.setdefault(f"{row['method']}, {values['sets'][name]}", {"hybrid": []})
            kind, _, anchor = row["likelihood"].partition(" ")
            if kind == "hybrid":
                curve["hybrid"].append({"lambda": float(anchor), **cell})
            elif kind in ("diffusion", "block"):
                curve[kind] = cell
    return {name: curve for name, curve in curves.items() if curve["hybrid"]}


def _plain_grid(rows: Sequence[Values]) -> Grid:
    """All that rows of any kind say, a column for each name."""
    flat = [dict(_flat(row)) for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row)
    return Grid(dict.fromkeys(columns, ""), [[Cell(_said(row.get(name))) for name in columns] for row in flat])


def _flat(values: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield (prefix + name).replace("_", " "), value


def _said(value: Any) -> str:
    """A number as people write it, whatever it is."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


# Benchmarks.


def _benchmark(source: Source, title: str, page: Page) -> Entry:
    values, shown = source.values, source.values["shown"]
    rows = [[Cell(text.replace("<br>", "\n")) for text in row] for row in shown["rows"]]
    grids = [Grid(shown["columns"], rows)]
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    drawings = DRAWINGS.get(values["benchmark"], {})
    figures = [
        page.figure(said, partial(draw, rows=values["rows"]), source.path.parent, file, save=file != source.path.stem)
        for file, (said, draw) in drawings.items()
        if file not in VARIES or len({row[VARIES[file]] for row in values["rows"]}) > 1
    ]
    return Entry(page.id(source.path), f"{title} ({source.place})", shown["about"], [source], grids, figures)


def _ratios(values: Values) -> Grid:
    """Ratios with quartiles, and what they are of or why there is none."""
    rows = []
    for key, of in values["ratio_of"].items():
        value, quartiles = values["ratios"].get(key), values["ratio_quartiles"].get(key)
        spread = "" if quartiles is None else f"{quartiles[0]:.3g} to {quartiles[1]:.3g}"
        rows.append([Cell(key), Cell("" if value is None else f"{value:.3g}"), Cell(spread), Cell(of)])
    return Grid(dict.fromkeys(("ratio", "value", "quartiles", "of"), ""), rows)


# Likelihoods and losses.


def _likelihoods(source: Source) -> tuple[Source, dict[str, Cell]]:
    """The cells of an evaluation: its likelihoods by name, and behind them bits per byte."""
    likelihoods = dict(named(source.values["likelihoods"]))
    cells = {name: Cell(plus_minus(perplexity(each)), exact=_nats(each)) for name, each in likelihoods.items()}
    first = likelihoods.get("block", next(iter(likelihoods.values()), {}))
    return source, cells | {BITS: Cell("" if first.get("bits_per_byte") is None else f"{first['bits_per_byte']:.3f}")}


BITS = "bits per byte"


def _evaluations(found: list[tuple[Source, dict[str, Cell]]], page: Page) -> list[Entry]:
    """Of each folder of results a table of its evaluations, and figures of those that lie side by side."""
    if not found:
        return [Entry("evaluations", "Evaluations", missing=COMMANDS["evaluations"])]
    entries, about = [], "Perplexity ± standard error. causal, ar and block are exact; hybrid and diffusion are bounds."
    for group in dict.fromkeys(source.group for source, _ in found):
        some = [(source, cells) for source, cells in found if source.group == group]
        names = {name: None for _, cells in some for name in cells if name != BITS}
        columns = {"evaluation": "", **dict.fromkeys(names, ""), BITS: "of block, or of the first there is"}
        rows = [[Cell(source.label), *(cells.get(name, Cell("")) for name in [*names, BITS])] for source, cells in some]
        sources, figures = [source for source, _ in some], []
        for folder, beside in _by_folder(sources, above=1).items():
            for key, said, draw in (
                ("hybrid", "Perplexity against l*", plots.draw_hybrid),
                ("nfe", "Perplexity against steps", plots.draw_nfe),
            ):
                curves = {each.label: each.values["likelihoods"] for each in beside}
                curves = {label: each for label, each in curves.items() if each.get(key)}
                if 0 < len(curves) <= CURVES:
                    figures.append(page.figure(said, partial(draw, evaluations=curves), folder, key))
        title, name = f"Evaluations ({group})", page.id(page.results / group / "evaluations")
        entries.append(Entry(name, title, about, sources, [Grid(columns, rows)], figures))
    return entries


def _losses(sources: list[Source], page: Page) -> Entry:
    """Loss curves, a figure for the runs in one folder."""
    if not sources:
        return Entry("losses", "Loss curves", missing=COMMANDS["losses"])
    about = "Each method's own objective: curves of different methods compare only where their validation is alike."
    figures = []
    for folder, some in _by_folder(sources).items():
        draw = partial(plots.draw_losses, runs={each.label: each.values["rows"] for each in some})
        figures.append(page.figure(f"Losses ({some[0].place})", draw, folder, "losses"))
    return Entry("losses", "Loss curves", about, sources, [], figures)


def _by_folder(sources: list[Source], above: int = 0) -> dict[Path, list[Source]]:
    """Sources by the folder that they lie in, or where `above` is 1 the one that holds it, within those of results."""
    folders: dict[Path, list[Source]] = {}
    for each in sources:
        within = above if "/" in each.place else 0
        folders.setdefault(each.path.parents[within], []).append(each)
    return folders


# Text.


def _samples(source: Source) -> Values:
    """The samples of each prompt, in their order."""
    values = source.values
    return {
        "source": source,
        "about": values["settings"],
        "unit": values["unit"],
        "prompts": {
            prompt: [each for each in values["samples"] if each["prompt"] == prompt] for prompt in values["prompts"]
        },
    }


def _recording(source: Source) -> Values:
    """The rows of a recording, each with the number of its pieces by what became of them, over all frames."""
    rows = []
    for row in source.values["rows"]:
        kinds = Counter(kind for frame in row["frames"] for _, kind in frame["pieces"])
        rows.append({**row, "kinds": kinds, "drafted": kinds["accepted"] + kinds["rejected"]})
    return {"source": source, "about": source.values["recording"], "rows": rows}
