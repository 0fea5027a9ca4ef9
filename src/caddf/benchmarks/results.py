"""What a benchmark leaves: a folder with the figures as JSON, as a Markdown table, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from caddf.checkpoint import check_writable, read_json, write_json_atomic, write_text_atomic
from caddf.errors import InputError
from caddf.machine import machine
from caddf.plots import plain_ticks, saved

SAME = ("processor", "cores", "threads", "gpu", "torch")
"""What must not change between the parts of one measurement."""


@dataclass
class Results:
    """The values of one benchmark, kept in `folder/NAME.json` while they are measured."""

    name: str
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, folder: str | Path, settings: dict[str, Any], free: Sequence[str] = ()) -> Results:
        """New ones, or those of an earlier call with the same settings (but for those in `free`), to go on with.

        Raises `InputError` where the folder holds the figures of other settings, of another machine, or of more rounds
        than `repeats`, or cannot be written.
        """
        results, here = cls(name, Path(folder)), machine()
        check_writable("out", results.json)
        if not results.json.exists():
            results.values = {"benchmark": name, "settings": settings, "machine": here}
            return results
        results.values = read_json(results.json)
        before = results.values.get("settings", {})
        other = [key for key in settings if key not in free and before.get(key) != settings[key]]
        if other:
            raise InputError(
                f"out is {folder}, which was measured with {other[0]} {before.get(other[0])}, not "
                f"{settings[other[0]]}; give another folder"
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
