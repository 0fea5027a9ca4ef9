"""`caddf reproduce`: does what is missing of a table, and writes the table from what is there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import fmean

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from rich.console import Console

from caddf.checkpoint import TEMPORARY, saving, write_json_atomic, write_text_atomic
from caddf.errors import InputError
from caddf.machine import machine
from caddf.reproduce.perplexities import perplexity, plus_minus
from caddf.reproduce.plan import Job, ReproduceSettings, Variant, Workshop
from caddf.reproduce.tables import TABLES, Table, contest
from caddf.reproduce.workers import one_thread, side_by_side
from caddf.text_model import resolve_device


def reproduce(table: str, settings: ReproduceSettings, console: Console) -> Path | None:
    """Does what is missing of `table`, in order, and writes table.json, table.md and table.html; returns their folder.

    Interrupted, it returns None and writes no table; called again, it goes on where it stopped. Raises `InputError`,
    before any work, for a table or method that is not there, and for pieces that were made with other settings.
    """
    if table not in TABLES:
        raise InputError(f"table is {table}; it must be one of {', '.join(TABLES)}")
    made, shop = TABLES[table], Workshop(settings)
    names = made.standard if settings.methods is None else settings.methods.split(",")
    for name in names:
        if name not in made.variants:
            raise InputError(f"methods holds {name!r}; {table} has {', '.join(made.variants)}")
    chosen = {name: made.variants[name] for name in names}
    made.check(shop)
    shop.check(chosen.values())
    made.values(shop, chosen)  # raises for decodings under other settings
    out = Path(settings.out or f"results/{table}-{settings.place}")
    wanted = (job for job in made.plan(shop, chosen) if settings.only in ("all", job.kind))
    left = [job for job in wanted if job.left]
    if not _all_done(left, _workers(settings), console):
        return None
    write(made, chosen, shop, out)
    return out


ALONE = ("train", "evaluate")
"""Kinds of jobs that are of one thread on a CPU, and may go side by side."""


def _workers(settings: ReproduceSettings) -> int | None:
    """How many jobs go side by side; None on a GPU, which one at a time has to itself. Raises `InputError`."""
    device = resolve_device(settings.device)
    if device.type == "cpu":
        return settings.workers or torch.get_num_threads()
    if settings.workers not in (None, 1):
        raise InputError(f"workers is {settings.workers}; on {device} it must be 1: one training has the GPU to itself")
    return None


def _all_done(jobs: Sequence[Job], workers: int | None, console: Console) -> bool:
    """Does `jobs`, kind by kind; False where one was interrupted."""
    seconds: dict[str, list[float]] = {}
    begun: dict[Job, float] = {}

    def begins(job: Job) -> None:
        alike = [other for other in jobs[len(begun) :] if other.kind == job.kind]
        said = f"[{len(begun) + 1}/{len(jobs)}] {job.about}"
        if job.kind in seconds:
            together = min(len(alike), (workers or 1) if job.kind in ALONE else 1)
            more = f"about {max(1, round(len(alike) * fmean(seconds[job.kind]) / together / 60))} min"
            said += f", {more} with the {len(alike) - 1} behind it" if len(alike) > 1 else f", {more}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
        begun[job] = time.monotonic()

    def ends(job: Job) -> None:
        seconds.setdefault(job.kind, []).append(time.monotonic() - begun[job])

    def here(job: Job) -> bool:
        begins(job)
        with one_thread() if workers and job.kind in ALONE else nullcontext():
            done = job.do(console)
        ends(job)
        return done

    for kind, group in groupby(jobs, key=lambda job: job.kind):
        alike = list(group)
        if workers and min(workers, len(alike)) > 1 and kind in ALONE:
            done = side_by_side(alike, workers, begins, ends)
        else:
            done = all(here(job) for job in alike)
        if not done:
            return False
    return True


def write(table: Table, chosen: dict[str, Variant], shop: Workshop, out: Path) -> None:
    """The table from what is there, in three forms, and the decodings that it is of."""
    settings = asdict(shop.settings)
    for name in ("data_root", "work", "out", "workers", "only"):  # of this machine and call, and no figure's
        del settings[name]
    if settings["judge"] is not None:
        settings["judge"] = Path(settings["judge"]).name
    measured = contest(table, chosen)
    values = {
        "table": table.name,
        "settings": settings,
        "machine": machine(),
        "commits": shop.commits(chosen.values(), measured),
        **table.values(shop, chosen),
    }
    about, columns, rows = table.grid(values)
    shown = {"perplexities": values if "sets" in values else values.get("perplexities")}
    shown |= {"about": about, "columns": columns, "grid": rows}
    out.mkdir(parents=True, exist_ok=True)
    rounds = out / "decode"  # every round of every row, of which the table has medians
    for file in rounds.glob("decode.*"):  # of a table before
        file.unlink()
    templates = Environment(loader=PackageLoader("caddf"), trim_blocks=True, autoescape=select_autoescape())
    templates.filters |= {"perplexity": perplexity, "plus_minus": plus_minus, "pieces": _pieces}
    write_json_atomic(out / "table.json", values)
    for kind in ("md", "html"):
        write_text_atomic(out / f"table.{kind}", templates.get_template(f"table.{kind}").render({**values, **shown}))
    if shop.decoded(measured):
        rounds.mkdir(exist_ok=True)
        with saving(rounds):
            for file in shop.decoding(measured).glob("decode.*"):
                temporary = rounds / f"{file.name}{TEMPORARY}"
                shutil.copy(file, temporary)
                temporary.replace(rounds / file.name)


def _pieces(commits: dict[str, list[str]]) -> str:
    """By which commits the pieces of a table were made: the table's own says who wrote it down."""
    return "".join(f"; {kind} by {', '.join(each[:10] for each in made)}" for kind, made in commits.items())
