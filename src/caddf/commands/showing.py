"""`caddf export`, `caddf samples` and `caddf report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from caddf import display
from caddf.checkpoint import check_writable, write_json_atomic
from caddf.errors import check_seed
from caddf.export import ExportSettings
from caddf.export import export as write_folder
from caddf.report import report as write_page
from caddf.samples import SamplesSettings, collect_samples
from caddf.settings import add_options, options, parse


def export(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf export` and returns its exit code."""
    add = parser.add_argument
    add("model", type=str, help="a run (its latest checkpoint), one of its checkpoints, or a model folder")
    add("--out", type=str, required=True, metavar="FOLDER", help="the new model folder")
    add("--evaluations", type=str, nargs="+", metavar="FILE",
        help="results of caddf evaluate --json, whose perplexities the card shows")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the folder, if it is there")
    add_options(parser, ExportSettings, skip=("out", "evaluations", "overwrite"))
    values = parse(parser, arguments)
    values.evaluations = tuple(values.evaluations or ())
    out = write_folder(values.model, ExportSettings(**options(ExportSettings, values)))
    print(f"{out}: {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights", flush=True)
    return 0


def samples(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf samples` and returns its exit code."""
    add = parser.add_argument
    add("--models", type=str, required=True, metavar="RUNS",
        help="NAME=RUN,... or a folder of runs; the first sets the unit of cost")  # fmt: skip
    add("--prompt", type=str, action="append", required=True, metavar="TEXT", help="text to continue; again for more")
    add("--out", type=str, default="results/samples", metavar="FOLDER", help="where samples.json is written")
    add_options(parser, SamplesSettings, skip=("models",))
    values = parse(parser, arguments)
    settings = SamplesSettings(**options(SamplesSettings, values))
    check_seed(settings.seed)
    out = Path(values.out)
    check_writable("out", out / "samples.json")
    samples = collect_samples(values.prompt, settings, Console(stderr=True))
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "samples.json", {**samples, "command": shlex.join(["caddf", "samples", *arguments])})
    print(out / "samples.json")
    return 0


def report(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf report` and returns its exit code."""
    parser.add_argument("results", type=str, help="a folder of result files, at any depth")
    parser.add_argument("-o", "--out", type=str, default="report.html", metavar="FILE", help="the page")
    values = parse(parser, arguments)
    check_writable("out", values.out)
    with display.bar("drawing", "files") as progress:
        shown = write_page(Path(values.results), Path(values.out), progress)
    for link, why in shown.unread.items():
        print(f"not shown: {link}: {why}", file=sys.stderr)
    print(values.out)
    return 0
