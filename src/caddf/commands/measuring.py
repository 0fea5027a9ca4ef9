"""`caddf benchmark` and `caddf reproduce`."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser
from rich.console import Console

from caddf.benchmarks import BENCHMARKS
from caddf.commands.options import json_option
from caddf.interrupted import INTERRUPTED
from caddf.reproduce import TABLES, ReproduceSettings
from caddf.reproduce import reproduce as make_table
from caddf.settings import add_options, options, parse


def benchmark(parser: ArgumentParser, arguments: list[str]) -> int:
    """Measures, leaves a folder of results, prints its table, and returns the exit code."""
    chosen = BENCHMARKS[parser.prog.split()[-1]]
    json_option(parser)
    add_options(parser, chosen.settings)
    values = parse(parser, arguments)
    results = chosen.measure(chosen.settings(**options(chosen.settings, values)), Console(stderr=True))
    text = json.dumps(results.values) + "\n" if values.json else results.markdown.read_text(encoding="utf-8")
    print(text, end="")
    return 0


def reproduce(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf reproduce` and returns its exit code."""
    parser.add_argument("table", type=str, help=f"one of {', '.join(TABLES)}")
    add_options(parser, ReproduceSettings)
    values = parse(parser, arguments)
    settings = ReproduceSettings(**options(ReproduceSettings, values))
    out = make_table(values.table, settings, Console(stderr=True))
    if out is None:
        return INTERRUPTED
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    return 0
