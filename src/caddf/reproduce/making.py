"""`caddf reproduce`: does what is missing of a table, and writes the table from what is there."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.console import Console

from caddf.checkpoint import write_json_atomic, write_text_atomic
from caddf.errors import InputError
from caddf.machine import machine
from caddf.reproduce.plan import ReproduceSettings, Variant, Workshop
from caddf.reproduce.tables import TABLES, Table


def reproduce(table: str, settings: ReproduceSettings, console: Console) -> Path:
    """Does what is missing of `table`, in order, and writes table.json, table.md and table.html; returns their folder.

    Interrupted, it goes on where it stopped; nothing that is done is done again. Raises `InputError`, before any work,
    for a table or method that is not there, and for pieces that were made with other settings.
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
    out = Path(settings.out or f"results/{table}-{settings.scale}")
    wanted = (job for job in made.plan(shop, chosen) if settings.only in ("all", job.kind))
    left = [job for job in wanted if not job.product.exists()]
    seconds: dict[str, list[float]] = {}
    for done, job in enumerate(left):
        alike = sum(other.kind == job.kind for other in left[done:])
        said = f"[{done + 1}/{len(left)}] {job.about}"
        if job.kind in seconds:
            more = f"about {max(1, round(alike * fmean(seconds[job.kind]) / 60))} min"
            said += f", {more} with the {alike - 1} behind it" if alike > 1 else f", {more}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
        begun = time.monotonic()
        if not job.do(console):
            return out
        seconds.setdefault(job.kind, []).append(time.monotonic() - begun)
    write(made, chosen, shop, out)
    return out


def write(table: Table, chosen: dict[str, Variant], shop: Workshop, out: Path) -> None:
    """The table from what is there, in three forms."""
    settings = asdict(shop.settings)
    for place in ("data_root", "work", "out"):
        del settings[place]
    if settings["judge"] is not None:
        settings["judge"] = Path(settings["judge"]).name
    values = {"table": table.name, "settings": settings, "machine": machine(), **table.values(shop, chosen)}
    about, columns, rows = table.grid(values)
    shown = {"perplexities": values if "sets" in values else values.get("perplexities")}
    shown |= {"about": about, "columns": columns, "grid": rows}
    out.mkdir(parents=True, exist_ok=True)
    templates = Environment(loader=PackageLoader("caddf"), trim_blocks=True, autoescape=select_autoescape())
    write_json_atomic(out / "table.json", values)
    for kind in ("md", "html"):
        write_text_atomic(out / f"table.{kind}", templates.get_template(f"table.{kind}").render({**values, **shown}))
