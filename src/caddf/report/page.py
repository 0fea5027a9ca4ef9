"""What the page is made of: tables, figures, and entries of both, each built of result files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from markupsafe import Markup

from caddf import plots
from caddf.benchmarks import BENCHMARKS
from caddf.errors import InputError
from caddf.report.files import Results, Source, link_to
from caddf.reproduce import TABLES

T = TypeVar("T")
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

    def by_name(
        self, titles: dict[str, str], sources: Sequence[Source], key: str, entry: Callable[[Page, str, Source], Entry]
    ) -> list[Entry]:
        """The sources of each title, others after them, and what is missing."""
        entries = []
        for name in dict.fromkeys([*titles, *(source.values[key] for source in sources)]):
            title = titles.get(name, name)
            found = self.each(partial(entry, self, title), [source for source in sources if source.values[key] == name])
            groups = Counter(each.group for each in found)
            entries += [replace(each, folded=groups[each.group] > MANY) for each in found]
            if name in titles and not found:
                entries.append(self.missing(name, title))
        return entries
