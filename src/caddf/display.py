"""What people see in a terminal: tables, progress, and a canvas that fills."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from caddf.data import TokenSet
from caddf.evaluation import Ratio
from caddf.evaluation.pairing import EXACT
from caddf.snapshots import Snapshot

STYLES = {
    "given": "dim",
    "open": "dim",
    "kept": "",
    "fresh": "bold green",
    "corrected": "bold yellow",
    "rejected": "red strike",
}


def output() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


@contextmanager
def stages() -> Iterator[Callable[[str, int], None]]:
    """Progress of work whose length is not known, on standard error: a stage and a count."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} documents"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, count: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None)
            progress.update(tasks[stage], completed=count)

        yield report


SILENCE = 20.0
"""Seconds between lines that say how far something is, where there is no bar."""


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; where that is no terminal, a line now and then."""
    console = Console(stderr=True)
    begun = said = time.monotonic()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)

        def report(done: int, total: int) -> None:
            nonlocal said
            progress.update(task, completed=done, total=total)
            now = time.monotonic()
            if not console.is_terminal and done < total and now - said > SILENCE:
                said, left = now, (now - begun) * (total - done) / max(done, 1)
                console.print(f"{what}: {done} of {total} {unit}, about {max(1, round(left / 60))} min left")

        yield report


def token_set(console: Console, data: TokenSet) -> None:
    """What a token set holds."""
    table = Table(
        "split", "documents", "tokens", "bytes", "bytes/token", title=escape(f"{data.folder} ({data.tokenizer.name})")
    )
    for name, split in data.manifest["splits"].items():
        counts = [f"{split[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *counts, f"{split['bytes'] / split['tokens']:.2f}")
    console.print(table)


def evaluation(console: Console, result: dict[str, Any]) -> None:
    """Likelihoods with standard errors, accuracies, and what they were measured on."""
    table = Table("likelihood", "nats/token", "±", "± documents", "PPL", "bits/byte", "what it is")
    likelihoods = result["likelihoods"]
    kinds = {
        "causal": "exact: the causal branch alone",
        "ar": "exact: fused with an all-masked canvas",
        "block": "exact: fused in blocks",
        "diffusion": "upper bound (eq. 9)",
        "truncated": "published form, no bound: for comparison only",
    }
    rows = [(name, likelihoods[name], about) for name, about in kinds.items() if name in likelihoods]
    rows += [
        (f"hybrid {x['lambda']:g}", x, f"upper bound: infills from lambda {x['lambda']:g}")
        for x in likelihoods.get("hybrid", [])
    ]
    rows += [
        (f"NFE {x['steps']}", x, f"upper bound of {x['steps']} denoising steps") for x in likelihoods.get("nfe", [])
    ]
    rows += [
        (
            f"IW {x['paths']}x{x['steps']}",
            x,
            f"upper bound: {x['paths']} importance-weighted paths of {x['steps']} steps",
        )
        for x in likelihoods.get("importance_weighted", [])
    ]
    for name, x, about in rows:  # a single window, or document, has no error, and a foreign vocabulary no bytes
        error, document_error, per_byte = (_figure(x[k]) for k in ("standard_error", "document_error", "bits_per_byte"))
        table.add_row(name, f"{x['nll']:.4f}", error, document_error, f"{x['ppl']:.2f}", per_byte, about)
    console.print(table)
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in result["accuracy"].items())
    if accuracy:
        _line(console, f"accuracy: {accuracy}")
    mtp = result["mtp"]
    if "accuracy" in mtp:
        agreement = f", agreement with the fused head {mtp['agreement']:.3f}" if "agreement" in mtp else ""
        _line(
            console,
            f"multi-token prediction, blocks of {mtp['block_size']}: accuracy {mtp['accuracy']:.3f}{agreement}",
        )
    drawn = ""
    if {name for name, found in likelihoods.items() if found} - {*EXACT}:
        drawn = f", {result['samples']} Monte-Carlo samples a window"
        drawn += " (a quarter as many of finite steps and of infilling)"
    read = f"{_count(result['tokens'], 'token')} in {_count(result['windows'], 'window')} of {result['split']}"
    _line(console, read + drawn)
    choices = ("length", "stride", "documents", "eos", "bos", "closed", "tail")
    protocol = result["protocol"]
    _line(console, f"protocol {protocol['name']}: {', '.join(f'{name} {protocol[name]}' for name in choices)}")


def ratios(console: Console, found: Sequence[Ratio]) -> None:
    """Perplexities over another model's."""
    table = Table("perplexity", "over", "ratio", "±", "± documents")
    for each in found:
        errors = (_figure(each.standard_error), _figure(each.document_error))
        table.add_row(each.likelihood, each.against, f"{each.ratio:.4f}", *errors)
    console.print(table)
    _line(
        console,
        "Of the same windows, paired: ± is the standard error of what is not common to both, over windows, and over "
        "documents where they are known, the windows of one taken together.",
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def canvas(snapshot: Snapshot) -> Text:
    """Every row's canvas: new tokens green, corrections yellow, rejected drafts struck out, open positions as _."""
    text = Text()
    for row in range(len(snapshot.rows)):
        for piece, kind in snapshot.pieces(row):
            text.append(piece, STYLES[kind])
        text.append("\n")
    return text


def plain(snapshot: Snapshot) -> Iterator[str]:
    """Every row's canvas as it stands, on a line of its own: for logs."""
    for row in range(len(snapshot.rows)):
        yield "".join(piece for piece, kind in snapshot.pieces(row) if kind != "rejected").replace("\n", "\\n")


def watch(frames: Iterator[Snapshot], show: bool) -> Snapshot:
    """The last frame; on the way there, with `show`, the canvas fills on standard error: in place, or line by line."""
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=12) if show and console.is_terminal else nullcontext() as live:
        for last in frames:
            if live is not None:
                live.update(canvas(last))
            elif show:
                for row in plain(last):
                    _line(console, row)
    return last


def generation(console: Console, last: Snapshot) -> None:
    """Prompt and text of each row; its statistics go to standard error, so that what is piped on is text alone."""
    told = Console(stderr=True)
    for each in last.results():
        _line(console, each["text"] if last.task.template else each["prompt"] + each["text"])
        passes, copied = each["evaluations"], f" ({n} copied)" if (n := each["copied_rounds"]) else ""
        _line(
            told,
            f"{_count(each['tokens'], 'token')}, {each['tokens_per_second']:.1f}/s, "
            f"{_count(each['rounds'], 'round')}{copied}, "
            f"evaluations: {passes['causal']} causal and {passes['diffusion']} diffusion, "
            f"{each['tokens_per_evaluation']:.2f} tokens per evaluation, cache hit rate {each['cache_hit_rate']:.1%}, "
            f"seed {each['seed']}",
            style="dim",
        )


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def info(console: Console, accounts: dict[str, Any]) -> None:
    """Parameters, floating-point operations and memory."""
    title = " ".join(str(accounts[key]) for key in ("method", "size") if key in accounts)
    table = Table("part", "parameters", "FLOPs per token", title=title or None)
    for part, count in accounts["parameters"].items():
        flops = accounts["flops_per_token"].get(part)
        table.add_row(part, f"{count:,}", "" if flops is None else f"{flops:.3g}")
    console.print(table)
    memory = Table("memory", "MiB")
    for name, size in accounts["memory"].items():
        memory.add_row(name.replace("_", " "), f"{size / 2**20:,.1f}")
    console.print(memory)
    _line(
        console,
        f"context {accounts['context']}, vocabulary {accounts['vocab_size']:,}, block size {accounts['block_size']}",
    )


def _line(console: Console, text: str, style: str | None = None) -> None:
    """Text as it is, tabs too: no markup, no line broken to the terminal's width, nothing that controls a terminal."""
    spared = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    if style is None:
        print(spared, file=console.file)  # a console makes blanks of tabs
    else:
        console.print(spared, style=style, markup=False, highlight=False, soft_wrap=True)


def methods(console: Console, rows: dict[str, dict[str, str]]) -> None:
    """Every method, with its objective, likelihood, sampler and source."""
    table = Table("method", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *map(escape, row.values()))
    console.print(table)
