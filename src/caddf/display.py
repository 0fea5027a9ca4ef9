"""What people see in a terminal: tables, progress, and a canvas that fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from caddf.data import TokenSet
from caddf.generation import Snapshot

STYLES = {
    "given": "dim",
    "open": "dim",
    "kept": "",
    "fresh": "bold green",
    "corrected": "bold yellow",
    "rejected": "red strike",
}


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


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield report


def token_set(console: Console, data: TokenSet) -> None:
    """What a token set holds."""
    table = Table(
        "split", "documents", "tokens", "bytes", "bytes/token", title=f"{data.folder} ({data.tokenizer.name})"
    )
    for name, split in data.manifest["splits"].items():
        counts = [f"{split[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *counts, f"{split['bytes'] / split['tokens']:.2f}")
    console.print(table)


def evaluation(console: Console, result: dict[str, Any]) -> None:
    """Likelihoods with standard errors, accuracies, and what they were measured on."""
    table = Table("likelihood", "nats/token", "±", "PPL", "bits/byte", "what it is")
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
    rows += [(f"NFE {x['steps']}", x, f"upper bound of {x['steps']} denoising steps") for x in likelihoods["nfe"]]
    rows += [
        (
            f"IW {x['paths']}x{x['steps']}",
            x,
            f"upper bound: {x['paths']} importance-weighted paths of {x['steps']} steps",
        )
        for x in likelihoods.get("importance_weighted", [])
    ]
    for name, x, about in rows:
        per_byte = "" if x["bits_per_byte"] is None else f"{x['bits_per_byte']:.4f}"
        table.add_row(name, f"{x['nll']:.4f}", f"{x['standard_error']:.4f}", f"{x['ppl']:.2f}", per_byte, about)
    console.print(table)
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in result["accuracy"].items())
    console.print(f"accuracy: {accuracy}")
    mtp = result["mtp"]
    if "accuracy" in mtp:
        agreement = f", agreement with the fused head {mtp['agreement']:.3f}" if "agreement" in mtp else ""
        console.print(
            f"multi-token prediction, blocks of {mtp['block_size']}: accuracy {mtp['accuracy']:.3f}{agreement}"
        )
    console.print(
        f"{result['tokens']:,} tokens in {result['windows']} windows of {result['split']}, "
        f"{result['samples']} Monte-Carlo samples a window"
    )


def canvas(snapshot: Snapshot) -> Text:
    """Every row's canvas: new tokens green, corrections yellow, rejected drafts struck out, open positions as _."""
    text = Text()
    for row in range(len(snapshot.rows)):
        for piece, kind in snapshot.pieces(row):
            text.append(piece, STYLES[kind])
        text.append("\n")
    return text


def watch(frames: Iterator[Snapshot], live: bool) -> Snapshot:
    """The last frame; on the way there, with `live`, the canvas is shown on standard error."""
    last = None
    if not live:
        for last in frames:  # noqa: B007
            pass
    else:
        with Live(console=Console(stderr=True), refresh_per_second=12) as shown:
            for last in frames:
                shown.update(canvas(last))
    assert last is not None
    return last


def generation(console: Console, results: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Prompt, text and statistics of each row."""
    for each in results if isinstance(results, list) else [results]:
        whole = each["text"] if "[MASK" in each["prompt"] else each["prompt"] + each["text"]
        console.print(whole, markup=False, highlight=False)
        passes = each["evaluations"]
        console.print(
            f"{each['tokens']} tokens, {each['tokens_per_second']:.1f}/s, {each['rounds']} rounds, evaluations: "
            f"{passes['causal']} causal and {passes['diffusion']} diffusion, {each['tokens_per_evaluation']:.2f} "
            f"tokens per evaluation, cache hit rate {each['cache_hit_rate']:.1%}, seed {each['seed']}",
            style="dim",
            highlight=False,
        )


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
    console.print(
        f"context {accounts['context']}, vocabulary {accounts['vocab_size']:,}, block size {accounts['block_size']}"
    )
