"""`caddf report`: what a folder of results holds, on one page that needs no other file; no model is run.

Every file below the folder that a command of caddf wrote is shown by its kind, with its name, and how it was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from caddf.benchmarks import BENCHMARKS
from caddf.benchmarks.roster import needs
from caddf.checkpoint import write_text_atomic
from caddf.machine import machine
from caddf.report.files import Results, Source
from caddf.report.likelihoods import evaluations, losses
from caddf.report.page import COMMANDS, Page
from caddf.report.tables import TITLES, benchmark, table

__all__ = ["COMMANDS", "report"]


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
        "Tables": page.by_name(TITLES, results.tables, "table", table),
        "Benchmarks": page.by_name(
            {name: each.title for name, each in BENCHMARKS.items()}, results.benchmarks, "benchmark", benchmark
        ),
        "Likelihoods": evaluations(page, results.evaluations),
        "Training": [losses(page, results.losses)],
    }
    html = templates.get_template("report.html").render(
        results=results, sections=sections, commands=COMMANDS, machine=machine(),
        samples=page.each(partial(_samples, page), results.samples),
        recordings=page.each(partial(_recording, page), results.recordings),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, html)
    return results


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
