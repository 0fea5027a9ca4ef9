"""The files of a folder of results by kind, and the commands that make each anew."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from caddf.benchmarks import BENCHMARKS
from caddf.checkpoint import read_json
from caddf.command_line import changed
from caddf.errors import InputError, check_types
from caddf.reproduce import ReproduceSettings

Values = dict[str, Any]


class Said(dict[str, Any]):
    """A JSON object of a file; asked for what it does not say, it raises `InputError`, as no mistake of ours does."""

    def __missing__(self, name: str) -> NoReturn:
        raise InputError(f"{name} is missing; the file is of another version, or was edited")


KINDS = {
    "table": "tables",
    "benchmark": "benchmarks",
    "likelihoods": "evaluations",
    "samples": "samples",
    "recording": "recordings",
}
"""The key by which a file is known, and its kind; an evaluation has a number of samples too."""
TYPES: dict[str, Any] = {
    **dict.fromkeys(("table", "benchmark"), str),
    **dict.fromkeys(("likelihoods", "recording", "settings", "machine", "sets", "shown"), dict),
    **dict.fromkeys(("ratio_of", "ratios", "ratio_quartiles"), dict | None),
    "rows": Sequence[dict],
    "prompts": Sequence[str],
}
"""Of what a file says, whatever its kind."""
SHOWN: dict[str, Any] = {"about": str, "columns": dict, "rows": Sequence[Sequence[str]]}
"""Of a benchmark's table."""
STEP: dict[str, Any] = {"step": int, "loss": float, "validation": float}
"""Of a line of a run's metrics."""


@dataclass(frozen=True)
class Source:
    """A result file and what it says.

    link: where it lies, seen from the page. place: its folder, seen from that of all results.
    """

    path: Path
    link: str
    place: str
    values: Values

    @property
    def group(self) -> str:
        """The folder of results that it is part of."""
        return self.place.split("/")[0]

    @property
    def label(self) -> str:
        """What tells it from others of its kind and group: `FOLDER/NAME`, without a name that is that of its kind."""
        within = self.place.partition("/")[2]
        if self.path.stem in ("evaluation", "metrics"):
            return within or self.group
        return f"{within}/{self.path.stem}" if within else self.path.stem

    @cached_property
    def about(self) -> Values:
        """The settings of whatever kind it is."""
        told: Any = self.values.get("settings", self.values.get("recording", self.values))
        return told

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
            words = ["reproduce", values["table"], *_settings(self.about, ReproduceSettings), "--out", out]
        elif "benchmark" in values:
            benchmark = BENCHMARKS.get(values["benchmark"])
            settings = None if benchmark is None else benchmark.settings
            words = ["benchmark", values["benchmark"], *_settings(self.about, settings), "--out", out]
        else:
            return ""
        return shlex.join(["caddf", *map(str, words)])


def _settings(given: Values, kind: type | None) -> Iterator[str]:
    """The options of a command with settings of that kind."""
    defaults = {} if kind is None else {each.name: each.default for each in dataclasses.fields(kind)}
    said = {name: value for name, value in given.items() if value is not None}
    return changed(said, defaults, lambda name: f"--{name.replace('_', '-')}")


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
            link = link_to(path, page)
            try:
                kind, values = _read(path)
            except InputError as error:
                unread[link] = str(error)
                continue
            if kind is None:
                unread[link] = "of no kind that this page shows"
            elif kind == "benchmarks" and "shown" not in values:
                unread[link] = "a benchmark that is not finished: the same command goes on with it"
            else:
                place = path.parent.relative_to(folder).as_posix()
                place = folder.resolve().name if place == "." else place
                kinds[kind].append(Source(path, link, place, values))
        return cls(folder, **kinds, unread=unread)

    @property
    def sources(self) -> list[Source]:
        """All that the page shows."""
        parts = (self.tables, self.benchmarks, self.evaluations, self.losses, self.samples, self.recordings)
        return [source for part in parts for source in part]


def _read(path: Path) -> tuple[str | None, Values]:
    """A file's kind, if it is of one that is shown, and what it says; raises `InputError` where that is not right."""
    if path.suffix == ".jsonl":
        return "losses", {"rows": _lines(path)}
    values = read_json(path, Said)
    kind = next((KINDS[key] for key in KINDS if key in values), None)
    if kind is not None:
        check_types(TYPES | ({"samples": Sequence[dict]} if kind == "samples" else {}), values)
        check_types(SHOWN, values.get("shown", {}))
    return kind, values


def _lines(path: Path) -> list[Values]:
    """The steps of a run's metrics; raises `InputError` where they are none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [{key: row[key] for key in STEP if key in row} for row in rows if row["step"]]
        for step in steps:
            check_types(STEP, step)
        return steps
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no metrics.jsonl of a run; every line must be a JSON object with a step") from None


def link_to(path: Path, page: Path) -> str:
    """A file seen from the page."""
    return Path(os.path.relpath(path, page.parent)).as_posix()
