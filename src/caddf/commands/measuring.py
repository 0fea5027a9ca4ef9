"""`caddf benchmark` and `caddf reproduce`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from caddf import benchmarks
from caddf.benchmarks.results import Results
from caddf.commands.options import json_option
from caddf.reproduce import TABLES, ReproduceSettings
from caddf.reproduce import reproduce as make_table
from caddf.settings import add_options, options, parse
from caddf.text_model import check_seed


def _benchmark(
    settings: type, measure: Callable[[Any, Console], Results]
) -> Callable[[ArgumentParser, list[str]], int]:
    """A verb that measures, leaves a folder of results and prints its table."""

    def run(parser: ArgumentParser, arguments: list[str]) -> int:
        json_option(parser)
        add_options(parser, settings)
        values = parse(parser, arguments)
        results = measure(settings(**options(settings, values)), Console(stderr=True))
        text = json.dumps(results.values) + "\n" if values.json else results.markdown.read_text(encoding="utf-8")
        print(text, end="")
        return 0

    return run


benchmark_decode = _benchmark(benchmarks.DecodeSettings, benchmarks.decode)
benchmark_train = _benchmark(benchmarks.TrainSettings, benchmarks.train)
benchmark_scaling = _benchmark(benchmarks.ScalingSettings, benchmarks.scaling)
benchmark_pareto = _benchmark(benchmarks.ParetoSettings, benchmarks.pareto)
benchmark_steps = _benchmark(benchmarks.StepsSettings, benchmarks.steps)
benchmark_acceptance = _benchmark(benchmarks.AcceptanceSettings, benchmarks.measure_acceptance)
benchmark_infill = _benchmark(benchmarks.InfillSettings, benchmarks.infill)


def reproduce(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf reproduce` and returns its exit code."""
    parser.add_argument("table", type=str, help=f"one of {', '.join(TABLES)}")
    add_options(parser, ReproduceSettings)
    values = parse(parser, arguments)
    settings = ReproduceSettings(**options(ReproduceSettings, values))
    check_seed(settings.seed)
    out = make_table(values.table, settings, Console(stderr=True))
    if (out / "table.md").exists():
        print((out / "table.md").read_text(encoding="utf-8"), end="")
    return 0
