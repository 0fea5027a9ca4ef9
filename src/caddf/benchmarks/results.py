"""What a benchmark leaves: a folder with the figures as JSON, as a Markdown table, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader
from rich.console import Console

from caddf.benchmarks.measure import Spread, in_turns
from caddf.checkpoint import check_writable, read_json, write_json_atomic, write_text_atomic
from caddf.errors import InputError
from caddf.machine import machine
from caddf.plots import plain_ticks, saved

T = TypeVar("T")
SAME = ("processor", "cores", "threads", "gpu", "torch")
"""What must not change between the parts of one measurement."""


@dataclass
class Results:
    """The values of one benchmark, kept in `folder/NAME.json` while they are measured."""

    name: str
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        name: str,
        folder: str | Path,
        settings: dict[str, Any],
        free: Sequence[str] = (),
        read: Mapping[str, str] | None = None,
    ) -> Results:
        """New ones, or those of an earlier call with the same settings (but for those in `free`), to go on with.

        `read` are fingerprints of what else is measured on, by the settings that name it. Raises `InputError` where the
        folder holds the figures of other settings, of other text, of another machine, or of more rounds than
        `repeats`, or cannot be written.
        """
        results, here = cls(name, Path(folder)), machine()
        check_writable("out", results.json)
        if not results.json.exists():
            results.values = {"benchmark": name, "settings": settings, "machine": here}
            results.values |= {"read": dict(read)} if read else {}
            return results
        results.values = read_json(results.json)
        before = results.values.get("settings", {})
        other = [key for key in settings if key not in free and before.get(key) != settings[key]]
        if other:
            raise InputError(
                f"out is {folder}, which was measured with {other[0]} {before.get(other[0])}, not "
                f"{settings[other[0]]}; give another folder"
            )
        for key, fingerprint in (read or {}).items():
            if results.values.setdefault("read", {}).setdefault(key, fingerprint) != fingerprint:
                raise InputError(
                    f"out is {folder}, which was measured with another {key} of the same name; give another folder"
                )
        other = [key for key in SAME if results.values["machine"].get(key) != here[key]]
        if other:
            raise InputError(
                f"out is {folder}, which was measured on another machine ({other[0]} "
                f"{results.values['machine'].get(other[0])}, here {here[other[0]]}); give another folder"
            )
        rounds = max((len(row.get("rounds", ())) for row in results.values.get("rows", ())), default=0)
        if rounds > settings.get("repeats", rounds):
            raise InputError(
                f"repeats is {settings['repeats']}, but {folder} holds {rounds} rounds; give as many, or another folder"
            )
        results.values["settings"] = settings
        calls = [results.values["machine"], *results.values.get("continued", [])]
        if here["commit"] != calls[-1].get("commit"):
            results.values["continued"] = [*calls[1:], {"commit": here["commit"], "date": here["date"]}]
        results.values.pop("shown", None)  # of fewer rounds than there will be
        return results

    @property
    def json(self) -> Path:
        """The file of all figures."""
        return self.folder / f"{self.name}.json"

    @property
    def markdown(self) -> Path:
        """The table."""
        return self.folder / f"{self.name}.md"

    def save(self) -> None:
        """What is known so far, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"settings": self.values["settings"]}  # as given, to be compared with those of the next call
        write_json_atomic(self.json, {**rounded(self.values), **settings})

    def write(
        self,
        about: str,
        header: dict[str, str],
        show: Callable[[dict[str, Any]], list[str]],
        draw: Callable[[Any], None],
    ) -> None:
        """JSON, a Markdown table of the rows (`header`: columns and what they are), and a drawing as PNG and SVG."""
        table = [show(row) for row in self.values["rows"]]
        self.values["shown"] = {"about": about, "columns": header, "rows": table}
        self.save()
        templates = Environment(loader=PackageLoader("caddf"), trim_blocks=True, keep_trailing_newline=True)
        text = templates.get_template("benchmark.md").render(self.values, about=about, header=header, table=table)
        write_text_atomic(self.markdown, text)
        saved(draw, self.folder, self.name, self.name)


def in_rounds(
    results: Results,
    rows: Sequence[tuple[T, dict[str, Any]]],
    repeats: int,
    measure: Callable[[T, int], dict[str, Any]],
    say: Callable[[T, dict[str, Any]], str],
    console: Console,
    warm_up: Callable[[T, int], None] = lambda of, turn: None,
) -> None:
    """Measures what is missing of the `rounds` of rows, in turns; each is on disk before the next starts.

    What a process measures first of a row is warmed up before, whether or not others have measured the row.
    """
    warm = set[int]()
    for turn, (of, row) in in_turns(rows, repeats):
        if len(row["rounds"]) > turn:
            continue
        if id(row) not in warm:
            warm_up(of, turn)
            warm.add(id(row))
        row["rounds"].append(rounded(measure(of, turn)))
        results.save()
        console.print(f"[{turn + 1}/{repeats}] {say(of, row['rounds'][-1])}", markup=False, soft_wrap=True)


def put_median(row: dict[str, Any], name: str) -> None:
    """A column from a row's rounds: the median, and the quartiles beside it."""
    found = Spread.of([each[name] for each in row["rounds"]])
    row[name], row[f"{name}_quartiles"] = found.median, [found.low, found.high]


@dataclass(frozen=True)
class Drawing:
    """A drawing of a benchmark's rows; it says nothing unless they differ in `varies`."""

    title: str
    draw: Callable[..., None]
    varies: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A command `caddf benchmark NAME`: what it is told, what it does, and how what it leaves is shown.

    drawings: by the names of their files. example: the command, where a page has nothing to show of it.
    """

    name: str
    title: str
    settings: type
    measure: Callable[[Any, Console], Results]
    drawings: dict[str, Drawing]
    example: str


@dataclass(frozen=True)
class Told:
    """A figure under the key of a goal: its value, its quartiles, and what it is of; or why there is none."""

    of: str
    value: float | None = None
    quartiles: tuple[float, float] | None = None


def put(values: dict[str, Any], told: dict[str, Told]) -> None:
    """`ratios` (numbers alone), `ratio_quartiles`, and `ratio_of`, which names the rows and says what is missing."""
    values["ratios"] = {key: each.value for key, each in told.items() if each.value is not None}
    values["ratio_quartiles"] = {key: list(each.quartiles) for key, each in told.items() if each.quartiles is not None}
    values["ratio_of"] = {key: each.of for key, each in told.items()}


def rounded(values: Any, digits: int = 6) -> Any:
    """Floats to so many significant digits, for files that people read."""
    if isinstance(values, float):
        return float(f"{values:.{digits}g}")
    if isinstance(values, dict):
        return {key: rounded(value, digits) for key, value in values.items()}
    return [rounded(value, digits) for value in values] if isinstance(values, list | tuple) else values


def number(value: float | None, digits: int = 3) -> str:
    """For a table: so many significant digits, without an exponent; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{float(f'{value:.{digits}g}'):g}"


def spread(median: float | None, quartiles: Sequence[float] | None) -> str:
    """For a table: a median with its quartiles, where there are any."""
    if median is None or quartiles is None:
        return number(median)
    low, high = quartiles
    return f"{number(median)} ({number(low)} to {number(high)})"


def within(value: float, error: float | None) -> str:
    """For a table: a figure with its standard error, where there is one."""
    return number(value) + ("" if error is None else f" ± {number(error, 2)}")


def dots(axes: Any, names: Sequence[str], rows: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    """Tokens a second of each row on a logarithmic axis, the first on top, with quartiles."""
    for name, row, colour in zip(names, rows, colours, strict=True):
        speed, (low, high) = row["tokens_per_second"], row["tokens_per_second_quartiles"]
        axes.errorbar([speed], [name], xerr=[[speed - low], [high - speed]], fmt="o", color=colour, capsize=3)
    axes.figure.set_size_inches(9, 1.2 + 0.28 * len(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.grid(alpha=0.3)
