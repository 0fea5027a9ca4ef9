"""`caddf benchmark acceptance`: how many drafts stand, by place, temperature, target and training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from rich.console import Console

from caddf.benchmarks.given import OnText, written
from caddf.benchmarks.results import Benchmark, Drawing, Results, rounded, within
from caddf.benchmarks.roster import needs
from caddf.categorical import Warp
from caddf.data import TokenSet
from caddf.errors import InputError, at_least, once
from caddf.evaluation.acceptance import Verifier, acceptance, given_in_block
from caddf.experiment import Network
from caddf.interface import LanguageModel
from caddf.plots import Rows, finish, labelled
from caddf.text_model import TextModel, fingerprint, load, model_folder

COLUMNS = {
    "model": "",
    "step": "of training",
    "target": "the distribution that is drawn from exactly: the causal head, or the fused one in blocks",
    "k": "positions of a window, or of a block",
    "temperature": "of drafts and target alike; 0 is greedy",
    "tokens per round": "expected, with their standard error over windows: drafts that stand, and the token after them",
    "accepted by place": "share of the first, second, ... drafts accepted, of those reached: a ratio of two estimates, "
    "which may exceed 1 where few windows are read",
}


@dataclass(frozen=True)
class AcceptanceSettings(OnText):
    """Which models, and where they draft; those without a draft head and a target are left out.

    temperatures: of targets and drafts, as in 0,0.5,1.
    block_sizes: k of windows and blocks, as in 8,16; empty is each model's own.
    checkpoints: the latest of each run, or all that it kept.
    windows: of text, spread evenly over the split.
    rounds: of each window, each at a block that is drawn.
    seed: of places and drafts.
    out: folder of the results; not set, results/acceptance.
    """

    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)
    block_sizes: tuple[int, ...] = ()
    checkpoints: Literal["latest", "all"] = "latest"
    windows: int = 64
    rounds: int = 8
    out: str | None = None


def measure_acceptance(settings: AcceptanceSettings, console: Console) -> Results:
    """Writes acceptance.json, .md, .png and .svg; raises `InputError` before anything is measured."""
    needs("matplotlib")
    at_least(1, settings, "windows", "rounds")
    once("temperatures", settings.temperatures)
    for temperature in settings.temperatures:
        Warp(temperature)  # raises
    roster, data = settings.opened()
    if settings.block_sizes:
        once("block_sizes", settings.block_sizes)
    drafting = [name for name in roster.names if _drafts(load(roster.trained[name]).model, settings)]
    if not drafting:
        raise InputError(f"models is {settings.models}; none of them drafts for a target of its own")
    read = {"data": data.fingerprint(settings.split)}
    results = Results.open("acceptance", settings.out or "results/acceptance", written(settings), read=read)
    kept, rows = results.values.setdefault("rows", []), []
    for name in drafting:
        for folder in checkpoints(roster.trained[name], settings.checkpoints):
            model = load(folder, device=settings.device, dtype=settings.dtype)
            weights = fingerprint(model.model)
            for place in map(rounded, _places(name, folder, model, settings)):
                row = next((row for row in kept if place.items() <= row.items()), None)
                if row is None:
                    row = rounded({**place, "weights": weights, **_measured(model, data, place, settings)})
                    kept.append(row)
                    results.save()
                elif row.get("weights") != weights:
                    raise InputError(
                        f"out is {results.folder}, whose rows of {name} are of other weights; give another folder"
                    )
                rows.append(row)
            console.print(f"{name}, {folder.name}", markup=False)
    results.values["rows"] = rows
    about = f"{settings.rounds} rounds at each of {settings.windows} windows of {settings.split}."
    results.write(about, COLUMNS, cells, partial(draw_by_offset, rows=rows))
    return results


def _drafts(network: Network, settings: AcceptanceSettings) -> bool:
    """Whether a model drafts for a target of its own; raises `InputError` where a block size is none for it."""
    targets = {target for target in get_args(Verifier) if {target, "draft"} <= network.heads}
    for target, size in product(sorted(targets), settings.block_sizes):
        given_in_block(cast(LanguageModel, network), target, size, network.config.context)  # raises
    return bool(targets)


def checkpoints(run: str, which: str) -> list[Path]:
    """The model folders of a run, the latest last."""
    latest = model_folder(run)
    every = sorted(latest.parent.glob("step-*")) if which == "all" else []
    return [folder for folder in every if folder < latest] + [latest]


def _places(name: str, folder: Path, model: TextModel, settings: AcceptanceSettings) -> Iterator[dict[str, Any]]:
    """What is measured of a checkpoint: by target, k and temperature."""
    step = folder.name.removeprefix("step-")
    for target in get_args(Verifier):
        if {target, "draft"} - model.model.heads:
            continue
        for size, temperature in product(settings.block_sizes or (model.model.block_size,), settings.temperatures):
            yield {
                "model": name,
                "step": int(step) if step.isdecimal() else None,
                "target": target,
                "temperature": temperature,
                "block_size": size,
            }


def _measured(model: TextModel, data: TokenSet, place: dict[str, Any], settings: AcceptanceSettings) -> dict[str, Any]:
    windows = data.split(settings.split).spread(model.context, settings.windows).to(model.device)
    found = acceptance(
        model.model, windows, place["target"], torch.Generator().manual_seed(settings.seed), rounds=settings.rounds,
        block_size=place["block_size"], warp=Warp(place["temperature"]),
    )  # fmt: skip
    shares, errors = found.by_offset()
    reached = int(shares.isfinite().sum())  # no round comes to the places behind
    return {
        "tokens_per_round": found.tokens.mean().item(),
        "standard_error": found.tokens.std().item() / len(windows) ** 0.5 if len(windows) > 1 else None,
        "by_offset": shares[:reached].tolist(),
        "by_offset_errors": errors[:reached].tolist() if len(windows) > 1 else None,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    return [
        row["model"],
        "" if row["step"] is None else f"{row['step']:,}",
        row["target"],
        str(row["block_size"]),
        f"{row['temperature']:g}",
        within(row["tokens_per_round"], row["standard_error"]),
        " ".join(f"{share:.2f}" for share in row["by_offset"]),
    ]


# Drawings.


def draw_by_offset(axes: Any, rows: Rows) -> None:
    """Share of drafts accepted against their place in the round, of those reached, at each model's last step."""
    for row in _last_of(rows):
        shares, errors = row["by_offset"], row["by_offset_errors"]
        axes.errorbar(range(1, len(shares) + 1), shares, yerr=errors, marker="o", capsize=3, label=_told(row))
    axes.set(xlabel="place of the draft in its round", ylabel="share accepted, of those reached", ylim=(0, 1.02))
    axes.set_xticks(*labelled(range(1, max(len(row["by_offset"]) for row in rows) + 1)))
    finish(axes)


def draw_by_temperature(axes: Any, rows: Rows) -> None:
    """Tokens per round against temperature, at each model's last step."""
    _draw_tokens(axes, _last_of(rows), "temperature", "temperature")


def draw_by_step(axes: Any, rows: Rows) -> None:
    """Tokens per round against the training step."""
    _draw_tokens(axes, rows, "step", "training step")


def _last_of(rows: Rows) -> Rows:
    last = {row["model"]: max(each["step"] or 0 for each in rows if each["model"] == row["model"]) for row in rows}
    return [row for row in rows if (row["step"] or 0) == last[row["model"]]]


def _draw_tokens(axes: Any, rows: Rows, key: str, said: str) -> None:
    """A line for what else tells the rows apart."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(_told({**row, key: None}), []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row[key])
        xs, ys, errors = ([row[each] for row in line] for each in (key, "tokens_per_round", "standard_error"))
        axes.errorbar(xs, ys, yerr=None if None in errors else errors, marker="o", capsize=3, label=name)
    axes.set(xlabel=said, ylabel="tokens per round ± standard error")
    axes.locator_params(axis="x", integer=key == "step")
    finish(axes)


def _told(row: Mapping[str, Any]) -> str:
    """What tells a row of acceptances from others."""
    said = [str(row[name]) for name in ("model", "target") if row.get(name) is not None]
    numbers = {"block_size": "k", "temperature": "temperature", "step": "step"}
    return ", ".join(said + [f"{short} {row[name]:g}" for name, short in numbers.items() if row.get(name) is not None])


ACCEPTANCE = Benchmark(
    "acceptance",
    "Drafts that stand",
    AcceptanceSettings,
    measure_acceptance,
    {
        "acceptance": Drawing("Share of drafts accepted against their place", draw_by_offset),
        "acceptance-temperature": Drawing("Tokens per round against temperature", draw_by_temperature, "temperature"),
        "acceptance-step": Drawing("Tokens per round against the training step", draw_by_step, "step"),
    },
    "caddf benchmark acceptance --models RUNS --data SET --checkpoints all",
)
