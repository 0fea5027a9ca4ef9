"""The paper's tables from nothing: what is missing is trained and evaluated, what is there is taken as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, select_autoescape
from rich.console import Console

from caddf.checkpoint import read_json, write_json_atomic, write_text_atomic
from caddf.data import TokenSet, prepare
from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig
from caddf.experiment import METHODS, ModelSettings, Size
from caddf.machine import machine
from caddf.models.accounts import accounts
from caddf.running import RunSettings, ValidationSettings, resume, start
from caddf.scoring import evaluate
from caddf.text_model import load
from caddf.training import TrainConfig

SETS = {
    "prolong": "ProLong",
    "wikitext2": "WikiText2",
    "json-mode-eval": "CFG",
    "wikitext103": "WikiText103",
    "c4": "C4",
    "fineweb": "FineWeb",
}
TABLES: dict[str, list[str]] = {
    "table1": list(METHODS),
    "table2": [name for name in METHODS if name.startswith(("gpt2", "sedd-scaled", "sedd-unscaled", "radd", "caddf"))],
}


@dataclass(frozen=True)
class ReproduceSettings:
    """A table, and what it costs.

    scale: the size of the models.
    data_root: folder of local copies of the data sets; not set, they come from the hub.
    work: folder of token sets, runs and evaluations, which later calls go on from.
    out: folder of the table; not set, results/TABLE-SCALE.
    training_set: what the methods are trained on.
    methods: a comma-separated choice of the table's methods; not set, all of them.
    steps: updates of each method; not set, the preset's.
    batch_size: rows of an update; not set, the preset's.
    windows: scored per data set, the same for every method.
    samples: Monte-Carlo samples per window and bound.
    only: do the data, training or evaluation part alone; the table is written from what is there.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of the weights, the order of the data, and all draws.
    """

    scale: Size = "demo"
    data_root: str | None = None
    work: str = "runs/reproduce"
    out: str | None = None
    training_set: str = "books"
    methods: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    windows: int = 200
    samples: int = 8
    only: Literal["all", "data", "train", "evaluate", "table"] = "all"
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One piece of work: done if `product` exists."""

    about: str
    product: Path
    kind: str
    method: str = ""
    data: str = ""


def reproduce(table: str, settings: ReproduceSettings, console: Console) -> Path:
    """Does what is missing of `table`, in order, and writes table.json, table.md and table.html; returns their folder.

    Interrupted, it goes on where it stopped; nothing that is done is done again. Raises `InputError` for a table or
    method that is not there.
    """
    if table not in TABLES:
        raise InputError(f"table is {table}; it must be one of {', '.join(TABLES)}")
    methods = TABLES[table] if settings.methods is None else settings.methods.split(",")
    for method in methods:
        if method not in TABLES[table]:
            raise InputError(f"methods holds {method!r}; {table} has {', '.join(TABLES[table])}")
    out = Path(settings.out or f"results/{table}-{settings.scale}")
    jobs = list(plan(methods, settings))
    left = [job for job in jobs if not job.product.exists() and settings.only in ("all", job.kind)]
    begun = time.monotonic()
    for number, job in enumerate(left, 1):
        spent = time.monotonic() - begun
        more = f", about {spent / (number - 1) * (len(left) - number + 1) / 60:.0f} min left" if number > 1 else ""
        console.print(f"[{number}/{len(left)}] {job.about}{more}", markup=False, highlight=False)
        if not run(job, settings, console):
            return out
    write(table, methods, settings, out)
    return out


def plan(methods: list[str], settings: ReproduceSettings) -> Iterator[Job]:
    """Everything that the table needs: token sets, runs, evaluations."""
    work = Path(settings.work) / settings.scale
    yield Job(f"prepare {settings.training_set}", work / "data" / "train", "data", data=settings.training_set)
    for name in SETS:
        yield Job(f"prepare {name}", work / "data" / name, "data", data=name)
    for method in methods:
        done = work / "runs" / f"{method}-{settings.seed}" / "done.json"
        yield Job(f"train {method}", done, "train", method)
    for method in methods:
        for name in SETS:
            product = work / "evaluations" / f"{method}-{settings.seed}" / f"{name}.json"
            yield Job(f"evaluate {method} on {name}", product, "evaluate", method, name)


def run(job: Job, settings: ReproduceSettings, console: Console) -> bool:
    """Does one job; False if it was interrupted."""
    work = Path(settings.work) / settings.scale
    if job.kind == "data":
        root = settings.data_root
        if job.data == settings.training_set:
            spec = ModelSettings(settings.scale).preset.tokenizer
            prepare(job.product, input=job.data, tokenizer=spec, data_root=root, seed=settings.seed)
        else:
            prepare(job.product, test=job.data, tokenizer=str(work / "data" / "train"), data_root=root)
        return True
    folder = work / "runs" / f"{job.method}-{settings.seed}"
    if job.kind == "train":
        method = METHODS[job.method]
        if folder.exists():
            result = resume(folder, console)
        else:
            train = TrainConfig(steps=settings.steps, batch_size=settings.batch_size, sample_every=0, tensorboard=False)
            whole = RunSettings(
                data=str(work / "data" / "train"),
                method=job.method,
                device=settings.device,  # type: ignore[arg-type]
                seed=settings.seed,
                model=ModelSettings(settings.scale),
                objective=method.settings(**method.defaults),
                train=train,
                validation=ValidationSettings(windows=64),
            )
            result = start(whole, folder, console)
        if not result.interrupted:
            resolved = RunSettings.load(folder).train.resolved(ModelSettings(settings.scale).preset)
            about = {"steps": result.step, "tokens": result.tokens, "batch_size": resolved.batch_size}
            write_json_atomic(
                job.product, {**about, "learning_rate": resolved.learning_rate, "seconds": result.elapsed}
            )
        return not result.interrupted
    model = load(folder, device=settings.device)
    data = TokenSet.open(work / "data" / job.data)
    measured = EvaluationConfig(
        samples=settings.samples, max_windows=settings.windows, nfe=(), paths=0, seed=settings.seed
    )
    evaluated = evaluate(model, data, split="test", settings=measured)
    job.product.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(job.product, {**evaluated, "accounts": accounts(model.model)})
    return True


def named(likelihoods: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every likelihood of an evaluation that a table may show, by name: exact ones and bounds, never `truncated`."""
    for name in ("causal", "ar", "block", "hybrid", "diffusion"):
        if name == "hybrid":
            yield from ((f"hybrid {each['lambda']:g}", each) for each in likelihoods.get(name, []))
        elif name in likelihoods:
            yield name, likelihoods[name]


def write(table: str, methods: list[str], settings: ReproduceSettings, out: Path) -> None:
    """The table from the evaluations that are there: a row for each method and likelihood."""
    work = Path(settings.work) / settings.scale
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for method in methods:
        for name in SETS:
            path = work / "evaluations" / f"{method}-{settings.seed}" / f"{name}.json"
            if not path.exists():
                continue
            evaluated, trained = read_json(path), read_json(work / "runs" / f"{method}-{settings.seed}" / "done.json")
            counts = evaluated["accounts"]["parameters"]
            for likelihood, cell in named(evaluated["likelihoods"]):
                row = rows.setdefault((method, likelihood), {
                    "method": method, "likelihood": likelihood, "parameters": counts["total"],
                    "non_embedding": counts["total"] - counts["embeddings"],
                    "flops_per_token": evaluated["accounts"]["flops_per_token"], "training": trained, "sets": {},
                })  # fmt: skip
                measured_on = "ar" if likelihood == "causal" and "ar" not in evaluated["likelihoods"] else likelihood
                accuracy = evaluated["accuracy"].get(measured_on)
                row["sets"][name] = {**cell, "accuracy": accuracy, "windows": evaluated["windows"]}
    values: dict[str, Any] = {"table": table, "settings": asdict(settings), "machine": machine(), "sets": SETS}
    for place in ("data_root", "work", "out"):
        del values["settings"][place]
    values["rows"] = list(rows.values())
    out.mkdir(parents=True, exist_ok=True)
    templates = Environment(loader=PackageLoader("caddf"), trim_blocks=True, autoescape=select_autoescape())
    write_json_atomic(out / "table.json", values)
    for kind in ("md", "html"):
        write_text_atomic(out / f"table.{kind}", templates.get_template(f"table.{kind}").render(values))
