"""The paper's tables and the benchmarks on the page: what their commands say, and drawings of what they compare."""

from __future__ import annotations

from functools import partial

from caddf import plots, reproduce
from caddf.benchmarks import BENCHMARKS
from caddf.errors import InputError
from caddf.report.files import Source, Values
from caddf.report.page import Cell, Entry, Figure, Grid, Page
from caddf.reproduce import perplexity, plus_minus

TITLES = {
    "table1": "Table 1. Every method, zero-shot",
    "table2": "Table 2. The strongest methods, zero-shot",
    "table3": "Table 3. Efficiency",
    "table4": "Table 4. Ablations",
}
PERPLEXITIES = "ratio of perplexities ± standard error: less is better"


def table(page: Page, title: str, source: Source) -> Entry:
    """What the table says in its own words, perplexities in theirs, and drawings of both."""
    values, settings = source.values, source.about
    found = reproduce.TABLES.get(values["table"])
    if found is None:
        raise InputError(f"table is {values['table']}; it must be one of {', '.join(reproduce.TABLES)}")
    title = f"{title}, scale {settings['scale']}" if "scale" in settings else title
    title = f"{title}, context {settings['context']}" if settings.get("context") else title
    quality = values if "sets" in values else values.get("perplexities")
    about, columns, rows = found.grid(values)
    said, grids = [about], []
    if rows:
        grids.append(Grid(dict.fromkeys(columns, ""), [[Cell(cell) for cell in row] for row in rows]))
    if quality is not None:
        place = 0 if quality is values else 1  # where perplexities are all of the table, they come first
        grids.insert(place, _perplexities(quality))
        said.insert(
            place,
            f"Perplexity ± standard error, below it the accuracy; zero-shot, trained on {settings['training_set']}. "
            "causal, ar and block are exact, hybrid and diffusion are upper bounds: compare like with like. "
            f"{settings['windows']} windows a set (fewer where a set has fewer), {settings['samples']} samples per "
            "bound.",
        )
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    figures = [*_paired(page, source), *_compared(page, source)]
    if quality is not None and (curves := _hybrid_curves(quality)):
        draw = partial(plots.draw_hybrid, curves=curves)
        figures.append(page.figure("Perplexity against l*", draw, source.path.parent, "table-hybrid"))
    about = " ".join(filter(None, said))
    return page.entry(source.path, f"{title} ({source.place})", about, [source], grids, figures)


def _perplexities(values: Values) -> Grid:
    """Every likelihood of every method, a column for each set."""
    columns = ["method", "likelihood", "parameters", "tokens seen", *values["sets"].values()]
    rows = [
        [Cell(row["method"]), Cell(row["likelihood"]), Cell(f"{row['parameters']:,}"),
         Cell(f"{row['training']['tokens']:,}"), *(_perplexity(row["sets"].get(each)) for each in values["sets"])]
        for row in values["rows"]
    ]  # fmt: skip
    return Grid(dict.fromkeys(columns, ""), rows)


def _paired(page: Page, source: Source) -> list[Figure]:
    """Perplexities over those of rivals, on each set."""
    values = source.values
    ratios = {
        f"{row['method']} {row['likelihood']} / {row['other']} {row['against']}": {
            values["sets"][key]: _within(ratio) for key, ratio in row["sets"].items()
        }
        for row in values.get("paired") or []
    }
    return _ratio_figure(page, source, "Perplexity over that of others", PERPLEXITIES, ratios)


def _compared(page: Page, source: Source) -> list[Figure]:
    """Speeds over those of others, and perplexities over the full model's, where a table has them."""
    values = source.values
    speeds = {
        key: {"median, quartiles": plots.Ratio(values["ratios"][key], *quartiles)}
        for key, quartiles in (values.get("ratio_quartiles") or {}).items()
        if quartiles and "_vs_" in key
    }
    full: dict[str, dict[str, plots.Ratio]] = {}
    for row in values["rows"]:
        for key, name in (("target_ratio", f"exact, {row.get('target')}"), ("diffusion_ratio", "diffusion bound")):
            if (ratio := row.get(key)) and row["model"] != "full":
                full.setdefault(row["model"], {})[name] = _within(ratio)
    return [
        *_ratio_figure(page, source, "Speed over that of others", "ratio of tokens/s: more is better", speeds),
        *_ratio_figure(page, source, "Perplexity over the full model's", PERPLEXITIES, full),
    ]


def _within(ratio: Values) -> plots.Ratio:
    """With its standard error to both sides, where it has one (of a single window there is none)."""
    value, error = ratio["ratio"], ratio["standard_error"] or 0.0
    return plots.Ratio(value, value - error, value + error)


def _ratio_figure(
    page: Page, source: Source, title: str, what: str, ratios: dict[str, dict[str, plots.Ratio]]
) -> list[Figure]:
    """A drawing of them, where there are any."""
    draw = partial(plots.draw_ratios, ratios=ratios, what=what)
    return [page.figure(title, draw, source.path.parent, "table-ratios")] if ratios else []


def _perplexity(cell: Values | None) -> Cell:
    """A likelihood on one set."""
    if cell is None:
        return Cell("")
    accuracy = cell.get("accuracy")
    exact = f"{nats(cell)}, {cell['windows']} windows" if "windows" in cell else nats(cell)
    return Cell(plus_minus(perplexity(cell)), "" if accuracy is None else f"{100 * accuracy:.1f}%", exact)


def nats(cell: Values) -> str:
    """Nats per token with their error, and bits per byte where they are known."""
    error, bits = cell.get("standard_error"), cell.get("bits_per_byte")
    said = f"{cell['nll']:.4f}" + ("" if error is None else f" ± {error:.4f}") + " nats per token"
    return said if bits is None else f"{said}, {bits:.4f} bits per byte"


def _hybrid_curves(values: Values) -> dict[str, plots.Curve]:
    """Against l*, for each method and set that has hybrid bounds."""
    found: dict[str, Values] = {}
    for row in values["rows"]:
        for name, cell in row["sets"].items():
            likelihoods = found.setdefault(f"{row['method']}, {values['sets'][name]}", {"hybrid": []})
            if row["likelihood"].startswith("hybrid "):
                likelihoods["hybrid"].append(cell)
            else:
                likelihoods[row["likelihood"]] = cell
    return {name: plots.Curve.hybrid(each) for name, each in found.items() if each["hybrid"]}


def benchmark(page: Page, title: str, source: Source) -> Entry:
    """What its command says, its ratios, and its drawings."""
    values, shown = source.values, source.values["shown"]
    rows = [[Cell(text.replace("<br>", "\n")) for text in row] for row in shown["rows"]]
    grids = [Grid(shown["columns"], rows)]
    if values.get("ratio_of"):
        grids.append(_ratios(values))
    found, rows_of = BENCHMARKS.get(values["benchmark"]), values["rows"]
    figures = [
        page.figure(each.title, partial(each.draw, rows=rows_of), source.path.parent, file, file != source.path.stem)
        for file, each in (found.drawings.items() if found is not None else ())
        if not each.varies or len({row[each.varies] for row in rows_of}) > 1
    ]
    return page.entry(source.path, f"{title} ({source.place})", shown["about"], [source], grids, figures)


def _ratios(values: Values) -> Grid:
    """Ratios with quartiles, and what they are of or why there is none."""
    rows = []
    for key, of in values["ratio_of"].items():
        value, quartiles = (values["ratios"] or {}).get(key), (values["ratio_quartiles"] or {}).get(key)
        spread = "" if quartiles is None else f"{quartiles[0]:.3g} to {quartiles[1]:.3g}"
        rows.append([Cell(key), Cell("" if value is None else f"{value:.3g}"), Cell(spread), Cell(of)])
    return Grid(dict.fromkeys(("ratio", "value", "quartiles", "of"), ""), rows)
