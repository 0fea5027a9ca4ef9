"""Curves from result files: perplexity against l* and steps, and losses; those of benchmarks lie in their modules.

Every `draw_*` puts the numbers of result files on axes, and knows nothing of where they are shown; `saved` writes a
drawing as PNG and SVG, and returns it as SVG for a page, whose ink is the page's own (`currentColor`).
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caddf.checkpoint import TEMPORARY, saving

Draw = Callable[[Any], None]
Rows = Sequence[dict[str, Any]]

INK = "#1a1d21"
"""Of text and axes; on a page it becomes the colour of the text there."""
COLOURS = ("#3d85c6", "#d9722e", "#2e9e72", "#b6559b", "#a58a1e", "#7f74d6", "#cf4f4f", "#4a9aa8", "#8a8f98", "#8f6a4a")
"""Of series: each can be told from white, from near-black, and from its neighbours."""


def style(salt: str) -> Any:
    """matplotlib's settings for all drawings; with `salt` the same numbers make the same SVG."""
    from cycler import cycler

    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    return {
        **inks,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.figsize": (7, 4.2),
        "grid.color": INK,
        "grid.linewidth": 0.6,
        "grid.alpha": 0.18,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "font.size": 10,
        "text.parse_math": False,  # names of runs are names
        "svg.fonttype": "none",  # text stays text: selectable, and in the reader's font
        "svg.hashsalt": salt,
    }


def saved(draw: Draw, folder: Path | None, name: str, label: str) -> str:
    """The drawing as SVG for a page, where `label` is its own; with a folder, NAME.png and .svg there, on white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(style(label)):
        figure, axes = pyplot.subplots(layout="constrained")
        try:
            draw(axes)
            page = io.StringIO()
            figure.savefig(page, format="svg", facecolor="none", metadata={"Date": None})
            if folder is not None:
                _write(figure, folder / f"{name}.svg", metadata={"Date": None})
                _write(figure, folder / f"{name}.png", dpi=150)
        finally:
            pyplot.close(figure)
    return for_page(page.getvalue(), label)


def _write(figure: Any, path: Path, **how: Any) -> None:
    """The figure in the place of `path`'s content, or that left as it was; `InputError` when the disk is full."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}{TEMPORARY}")
    with saving(path):
        try:
            with temporary.open("wb") as file:
                figure.savefig(file, format=path.suffix[1:], facecolor="white", **how)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def for_page(svg: str, label: str) -> str:
    """An SVG file as part of an HTML page: its ink the page's, its width the column's, no identifier taken twice."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    names = set(re.findall(r'\bid="([^"]+)"', svg))
    for name in names:
        svg = re.sub(rf'(["#]){re.escape(name)}\b', rf"\g<1>{label}-{name}", svg)
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    assert width is not None
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    shown = f'<svg role="img" aria-label="{label}" style="max-width:{float(width[1]) * 4 / 3:.0f}px"'
    return svg.replace("<svg", shown, 1).replace(INK, "currentColor")


# Likelihoods.


@dataclass(frozen=True)
class Curve:
    """Bounds of an evaluation from left to right (place, PPL, standard error), and the PPL that they approach."""

    points: list[tuple[float, float, float]]
    limit: float | None

    @classmethod
    def hybrid(cls, likelihoods: Mapping[str, Any]) -> Curve:
        """Against l*, to the exact likelihood `ar`, which is the bound at 1; at 0 stands the diffusion bound."""
        bounds = [(each["lambda"], each) for each in likelihoods["hybrid"]]
        if "diffusion" in likelihoods:
            bounds.append((0.0, likelihoods["diffusion"]))
        return cls._of(bounds, likelihoods.get("ar"))

    @classmethod
    def nfe(cls, likelihoods: Mapping[str, Any]) -> Curve:
        """Of a sampler with n steps against n, to the bound at infinitely many."""
        return cls._of([(each["steps"], each) for each in likelihoods["nfe"]], likelihoods.get("diffusion"))

    @classmethod
    def _of(cls, bounds: Iterable[tuple[float, Mapping[str, Any]]], limit: Mapping[str, Any] | None) -> Curve:
        """Errors of perplexities are from those of nats per token (the delta method)."""
        points = [(x, each["ppl"], each["ppl"] * (each.get("standard_error") or 0.0)) for x, each in bounds]
        return cls(sorted(points), None if limit is None else limit["ppl"])


def draw_hybrid(axes: Any, curves: Mapping[str, Curve]) -> None:
    """PPL against l*, the share masked where the causal branch takes over; dotted, the exact likelihood at 1."""
    _draw_curves(axes, curves, ":")
    axes.set(xlabel="l*: 0 is diffusion alone", ylabel="PPL (upper bound ± standard error)", yscale="log")
    finish(axes, axes.yaxis)


def draw_nfe(axes: Any, curves: Mapping[str, Curve]) -> None:
    """PPL of a sampler with n steps against n; dashed, the bound at infinitely many."""
    _draw_curves(axes, curves, "--")
    axes.set(xlabel="steps (NFE)", ylabel="PPL (upper bound ± standard error)", xscale="log", yscale="log")
    axes.set_xticks(*labelled({int(x) for curve in curves.values() for x, _, _ in curve.points}))
    axes.minorticks_off()
    finish(axes, axes.yaxis)


def _draw_curves(axes: Any, curves: Mapping[str, Curve], limits: str) -> None:
    """A line for each, and one of the style `limits` where it has a limit."""
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        xs, ppls, errors = zip(*curve.points, strict=True)
        axes.errorbar(xs, ppls, yerr=errors, marker="o", capsize=3, color=colour, label=name)
        if curve.limit is not None:
            axes.axhline(curve.limit, color=colour, ls=limits, lw=1.2)


# Ratios.


@dataclass(frozen=True)
class Ratio:
    """A ratio within what is likely of it: standard errors, or quartiles."""

    value: float
    low: float
    high: float


def draw_ratios(axes: Any, ratios: Mapping[str, Mapping[str, Ratio]], what: str) -> None:
    """Ratios in rows, by name, those of a row told apart by what they are of; dashed, where nothing is gained."""
    rows = list(ratios)
    series = list(dict.fromkeys(name for each in ratios.values() for name in each))
    for i, name in enumerate(series):
        there = [(row, ratios[key][name]) for row, key in enumerate(rows) if name in ratios[key]]
        below = 0.6 * ((i + 0.5) / len(series) - 0.5)
        places = [row + below for row, _ in there]
        values = [each.value for _, each in there]
        errors = [[each.value - each.low for _, each in there], [each.high - each.value for _, each in there]]
        look = {"fmt": "o", "ms": 4, "capsize": 2, "color": COLOURS[i % len(COLOURS)]}
        axes.errorbar(values, places, xerr=errors, label=name, **look)
    axes.axvline(1, color=INK, ls="--", lw=1)
    axes.set(xlabel=what, xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), rows)
    finish(axes, axes.xaxis)
    axes.figure.set_size_inches(9, max(2.4, 1 + 0.45 * len(rows)))


# Training.


def draw_losses(axes: Any, runs: Mapping[str, Rows]) -> None:
    """The training loss of each run (faint) and its validation (marked), in nats per token, against the step."""
    for i, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        for key, look in (("loss", {"lw": 0.9, "alpha": 0.45}), ("validation", {"marker": "o", "ms": 3.5})):
            steps = [row["step"] for row in rows if key in row]
            values = [row[key] for row in rows if key in row]
            if values:
                axes.plot(steps, values, color=colour, label=f"{name}, {key}", **look)
    axes.set(xlabel="step", ylabel="nats per token", yscale="log")
    finish(axes, axes.yaxis)


# Parts of all drawings.


def finish(axes: Any, logarithmic: Any = None) -> None:
    """Grid, legend, and plain numbers on a logarithmic axis."""
    if logarithmic is not None:
        _plain(logarithmic)
    axes.grid(True)
    if len(axes.get_legend_handles_labels()[1]) > 4:
        axes.figure.set_size_inches(9, 4.6)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(fontsize=9)


def _plain(axis: Any) -> None:
    """Numbers without powers; within less than a factor of four, evenly spaced ones."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if low > 0 and math.log(high / low) > math.log(4):
        plain_ticks(axis)
        return
    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())


def labelled(values: Iterable[int]) -> tuple[list[int], list[str]]:
    """Ticks at these numbers, and their labels."""
    ticks = sorted(values)
    return ticks, [str(tick) for tick in ticks]


def plain_ticks(axis: Any) -> None:
    """A logarithmic axis labelled 1, 2, 5, 10, ... without powers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
