"""`caddf report`: what a folder of results holds, on one page that needs no other file; no model is run.

Every file below the folder that a command of caddf wrote is shown by its kind, with its name, and how it was made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from caddf import benchmarks, plots
from caddf.benchmarks.decode import draw as draw_decode
from caddf.benchmarks.infill import draw as draw_infill
from caddf.benchmarks.pareto import draw as draw_pareto
from caddf.benchmarks.roster import needs
from caddf.benchmarks.scaling import draw as draw_scaling
from caddf.benchmarks.steps import draw as draw_steps
from caddf.benchmarks.train import draw as draw_train
from caddf.checkpoint import read_json, write_text_atomic
from caddf.errors import InputError
from caddf.machine import machine
from caddf.reproduce import ReproduceSettings, named, paired_grid

T = TypeVar("T")
Values = dict[str, Any]

TABLES = {
    "table1": "Table 1. Every method, zero-shot",
    "table2": "Table 2. The strongest methods, zero-shot",
    "table3": "Table 3. Efficiency",
    "table4": "Table 4. Ablations",
}
BENCHMARKS: dict[str, tuple[str, type]] = {
    "decode": ("Decoders: speed, passes, memory", benchmarks.DecodeSettings),
    "pareto": ("Speed against quality", benchmarks.ParetoSettings),
    "scaling": ("Cost against context", benchmarks.ScalingSettings),
    "steps": ("Steps that a perplexity takes", benchmarks.StepsSettings),
    "acceptance": ("Drafts that stand", benchmarks.AcceptanceSettings),
    "infill": ("Spans filled in", benchmarks.InfillSettings),
    "train": ("A training step", benchmarks.TrainSettings),
}
VARIES = {"acceptance-temperature": "temperature", "acceptance-step": "step"}
"""Drawings that say nothing unless the rows differ in this."""
DRAWINGS: dict[str, dict[str, tuple[str, Callable[..., None]]]] = {
    "decode": {"decode": ("Tokens per second", draw_decode)},
    "pareto": {"pareto": ("Tokens per second against quality", draw_pareto)},
    "scaling": {"scaling": ("Cost of a round against the context", draw_scaling)},
    "steps": {"steps": ("Perplexity against denoising steps", draw_steps)},
    "acceptance": {
        "acceptance": ("Share of drafts accepted against their place", plots.draw_by_offset),
        "acceptance-temperature": ("Tokens per round against temperature", plots.draw_by_temperature),
        "acceptance-step": ("Tokens per round against the training step", plots.draw_by_step),
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


@dataclass(frozen=True)
class Source:
    """A result file: where it lies, seen from the page, and what it says."""

    path: Path
    link: str
    values: Values

    @property
    def label(self) -> str:
        """What tells it from others of its kind: `FOLDER/NAME`, or the folder of a file that is named for its kind."""
        return self.path.parent.name if self.path.stem in ("evaluation", "metrics") else self.path.stem

    @cached_property
    def about(self) -> Values:
        """The settings of whatever kind it is."""
        told = self.values.get("settings", self.values.get("recording", self.values))
        return told if isinstance(told, dict) else {}

    @property
    def seed(self) -> str:
        """The seed, where it says one."""
        return str(self.about.get("seed", ""))

    @property
    def machine(self) -> Values:
        """What it was measured on, where it says so."""
        return dict(self.values.get("machine", {}))

    @property
    def commit(self) -> str:
        """The commit of the code that measured it, in short."""
        return str(self.machine.get("commit") or "")[:10]

    @cached_property
    def command(self) -> str:
        """What makes such a file anew."""
        values, out = self.values, self.path.parent
        if "command" in self.about or "command" in values:
            return str(self.about.get("command", values.get("command")))
        if "table" in values:
            words = ["reproduce", values["table"], *_changed(self.about, ReproduceSettings), "--out", out]
        elif "benchmark" in values:
            settings = BENCHMARKS[values["benchmark"]][1] if values["benchmark"] in BENCHMARKS else None
            words = ["benchmark", values["benchmark"], *_changed(self.about, settings), "--out", out]
        else:
            return ""
        return shlex.join(["caddf", *map(str, words)])


def _changed(given: Values, settings: type | None) -> Iterator[str]:
    """The options by which `given` differs from the defaults."""
    defaults = {} if settings is None else {each.name: each.default for each in dataclasses.fields(settings)}
    for name, value in given.items():
        default = defaults.get(name)
        if value is not None and value != (list(default) if isinstance(default, tuple) else default):
            shown = str(value).lower() if isinstance(value, bool) else json.dumps(value).strip('"')
            yield from (f"--{name.replace('_', '-')}", shown)


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
    """A part of the page: tables and figures of some sources, or what is missing and the command that makes it."""

    name: str
    title: str
    about: str = ""
    sources: list[Source] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: str = ""


@dataclass(frozen=True)
class Results:
    """The files of a folder by kind; `unread` are those that are broken, or of no kind that is shown."""

    folder: Path
    tables: list[Source]
    benchmarks: list[Source]
    evaluations: list[Source]
    losses: list[Source]
    samples: list[Source]
    recordings: list[Source]
    unread: dict[str, str]

    @classmethod
    def read(cls, folder: Path, page: Path) -> Results:
        """All JSON below `folder`, and the metrics of runs; raises `InputError` where there is no folder."""
        if not folder.is_dir():
            raise InputError(f"results is {folder}, which is no folder; give one that holds result files")
        kinds: dict[str, list[Source]] = {name: [] for name in (*KINDS.values(), "losses")}
        unread: dict[str, str] = {}
        for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
            link = _link(path, page)
            try:
                values = {"rows": _lines(path)} if path.suffix == ".jsonl" else read_json(path)
            except InputError as error:
                unread[link] = str(error)
                continue
            kind = "losses" if path.suffix == ".jsonl" else next((KINDS[key] for key in KINDS if key in values), None)
            if kind is None:
                unread[link] = "of no kind that this page shows"
            elif kind == "benchmarks" and "shown" not in values:
                unread[link] = "a benchmark that is not finished: the same command goes on with it"
            else:
                kinds[kind].append(Source(path, link, values))
        return cls(folder, **kinds, unread=unread)

    @property
    def sources(self) -> list[Source]:
        """All that the page shows."""
        parts = (self.tables, self.benchmarks, self.evaluations, self.losses, self.samples, self.recordings)
        return [source for part in parts for source in part]


KINDS = {
    "table": "tables",
    "benchmark": "benchmarks",
    "likelihoods": "evaluations",
    "samples": "samples",
    "recording": "recordings",
}
"""The key by which a file is known, and its kind; an evaluation has a number of samples too."""


def _lines(path: Path) -> list[Values]:
    """The steps of a run's metrics; raises `InputError` where they are none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: row[key] for key in ("step", "loss", "validation") if key in row} for row in rows if row["step"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no metrics.jsonl of a run; every line must be a JSON object with a step") from None


def report(folder: Path, page: Path) -> Results:
    """Writes the page from the files in `folder`, and the figures beside the files they are drawn from.

    Raises `InputError` where there is no such folder, or matplotlib is missing.
    """
    needs("matplotlib")
    results = Results.read(folder, page)
    templates = Environment(
        loader=PackageLoader("caddf"), autoescape=select_autoescape(), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    fitting = partial(_fitting, unread=results.unread)
    sections = {
        "Tables": _by_name(TABLES, results.tables, "table", partial(_table, page=page), fitting),
        "Benchmarks": _by_name(_titles(), results.benchmarks, "benchmark", partial(_benchmark, page=page), fitting),
        "Likelihoods": [_evaluations(fitting(lambda each: (each, _likelihoods(each)), results.evaluations), page)],
        "Training": [_losses(results.losses, page)],
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


def _fitting(build: Callable[[Source], T], sources: Iterable[Source], unread: dict[str, str]) -> list[T]:
    """What is built of each source; one of another version, or edited, is unread, and the rest stands."""
    built = []
    for source in sources:
        try:
            built.append(build(source))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            unread[source.link] = f"does not fit this version ({type(error).__name__}: {error})"
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
        entries += found or [Entry(name, title, missing=COMMANDS.get(name, ""))]
    return entries


def _figure(title: str, draw: plots.Draw, folder: Path, name: str, page: Path, save: bool = True) -> Figure:
    """A drawing as FOLDER/NAME.png and .svg, unless the command that measured has left one there, and on the page."""
    svg = plots.saved(draw, folder if save else None, name, re.sub(r"\W+", "-", f"{folder.name}-{name}"))
    drawn = folder / f"{name}.svg"
    return Figure(title, Markup(svg), _link(drawn, page) if drawn.exists() else "")


def _link(path: Path, page: Path) -> str:
    """A file seen from the page."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


# Tables.


def _table(source: Source, title: str, page: Path) -> Entry:
    values, settings = source.values, source.about
    title = f"{title}, scale {settings['scale']}" if "scale" in settings else title
    name = source.path.parent.name
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
        figures.append(_figure("Perplexity against l*", draw, source.path.parent, "table-hybrid", page))
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
    return Cell(_ppl(cell), "" if accuracy is None else f"{100 * accuracy:.1f}%", exact)


def _ppl(cell: Values) -> str:
    """A perplexity with its standard error, by the delta method."""
    error = cell.get("standard_error")
    return f"{cell['ppl']:.1f}" + ("" if error is None else f" ± {cell['ppl'] * error:.1f}")


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


def _benchmark(source: Source, title: str, page: Path) -> Entry:
    values, shown = source.values, source.values["shown"]
    rows = [[Cell(text.replace("<br>", "\n")) for text in row] for row in shown["rows"]]
    grids = [Grid(shown["columns"], rows)]
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    drawings = DRAWINGS.get(values["benchmark"], {})
    figures = [
        _figure(said, partial(draw, rows=values["rows"]), source.path.parent, file, page, save=file != source.path.stem)
        for file, (said, draw) in drawings.items()
        if file not in VARIES or len({row[VARIES[file]] for row in values["rows"]}) > 1
    ]
    name = f"{source.path.parent.name}-{source.path.stem}"
    return Entry(name, f"{title} ({source.path.parent.name})", shown["about"], [source], grids, figures)


def _ratios(values: Values) -> Grid:
    """Ratios with quartiles, and what they are of or why there is none."""
    rows = []
    for key, of in values["ratio_of"].items():
        value, quartiles = values["ratios"].get(key), values["ratio_quartiles"].get(key)
        spread = "" if quartiles is None else f"{quartiles[0]:.3g} to {quartiles[1]:.3g}"
        rows.append([Cell(key), Cell("" if value is None else f"{value:.3g}"), Cell(spread), Cell(of)])
    return Grid(dict.fromkeys(("ratio", "value", "quartiles", "of"), ""), rows)


# Likelihoods and losses.


def _likelihoods(source: Source) -> list[list[Cell]]:
    """The rows of an evaluation."""
    cells = named(source.values["likelihoods"])
    return [[Cell(source.label), Cell(name), Cell(_ppl(cell)), Cell(_nats(cell))] for name, cell in cells]


def _evaluations(found: list[tuple[Source, list[list[Cell]]]], page: Path) -> Entry:
    """Every evaluation: a table of likelihoods, and a figure of those in one folder."""
    if not found:
        return Entry("evaluations", "Evaluations", missing=COMMANDS["evaluations"])
    figures, sources = [], [source for source, _ in found]
    for some in _by_folder(sources):
        for key, said, draw in (
            ("hybrid", "Perplexity against l*", plots.draw_hybrid),
            ("nfe", "Perplexity against steps", plots.draw_nfe),
        ):
            curves = {each.label: each.values["likelihoods"] for each in some if each.values["likelihoods"].get(key)}
            if curves:
                drawn = partial(draw, evaluations=curves)
                figures.append(_figure(f"{said} ({some[0].path.parent.name})", drawn, some[0].path.parent, key, page))
    columns = dict.fromkeys(("evaluation", "likelihood", "perplexity", "nats and bits"), "")
    about = "causal, ar and block are exact; hybrid and diffusion are upper bounds."
    grid = Grid(columns, [row for _, rows in found for row in rows])
    return Entry("evaluations", "Evaluations", about, sources, [grid], figures)


def _losses(sources: list[Source], page: Path) -> Entry:
    """Loss curves, a figure for the runs in one folder."""
    if not sources:
        return Entry("losses", "Loss curves", missing=COMMANDS["losses"])
    about = "Each method's own objective: curves of different methods compare only where their validation is alike."
    figures = []
    for some in _by_folder(sources):
        draw = partial(plots.draw_losses, runs={each.label: each.values["rows"] for each in some})
        figures.append(_figure(f"Losses ({some[0].path.parent.name})", draw, some[0].path.parent, "losses", page))
    return Entry("losses", "Loss curves", about, sources, [], figures)


def _by_folder(sources: list[Source]) -> list[list[Source]]:
    folders = dict.fromkeys(source.path.parent for source in sources)
    return [[source for source in sources if source.path.parent == folder] for folder in folders]


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
