"""Curves: they show the numbers they are given, as files and as part of a page."""

import errno
import math
import re
from xml.etree import ElementTree

import pytest

from caddf import plots
from caddf.benchmarks.acceptance import draw_by_offset, draw_by_step, draw_by_temperature
from caddf.errors import InputError

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def bound(ppl, error=0.01, **where):
    return {"nll": math.log(ppl), "standard_error": error, "ppl": ppl, **where}


EVALUATIONS = {
    "ours": {
        "diffusion": bound(60.0),
        "ar": bound(40.0),
        "block": bound(41.0),
        "hybrid": [bound(50.0, **{"lambda": 0.75}), bound(55.0, **{"lambda": 0.25})],
        "nfe": [bound(90.0, steps=4), bound(65.0, None, steps=32)],
    },
    "theirs": {"hybrid": [bound(58.0, **{"lambda": 0.5})], "nfe": [bound(70.0, steps=8)]},
}
HYBRID = {name: plots.Curve.hybrid(each) for name, each in EVALUATIONS.items()}
ACCEPTANCE = [
    {"model": "m", "target": target, "temperature": temperature, "step": step, "by_offset": [0.8, 0.5],
     "by_offset_errors": [0.1, 0.1], "tokens_per_round": step / 10 + temperature, "standard_error": 0.1}
    for target in ("causal", "fused") for temperature in (1.0, 0.5) for step in (20, 10)
]  # fmt: skip
RUNS = {"run": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "validation": 2.75}]}


def points(axes):
    """The (x, y) of every line that has points."""
    return [sorted(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() == "o"]


def test_hybrid_bounds_start_at_the_diffusion_bound_and_run_to_the_exact_one(axes):
    plots.draw_hybrid(axes, HYBRID)
    assert points(axes) == [[(0.0, 60.0), (0.25, 55.0), (0.75, 50.0)], [(0.5, 58.0)]]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [40.0]
    # An error of 0.01 nats is one of 0.01 PPL; the bars end there.
    low, high = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert low == pytest.approx(60 * 0.99) and high == pytest.approx(60 * 1.01)


def test_bounds_at_steps_are_in_order_whatever_the_errors(axes):
    plots.draw_nfe(axes, {name: plots.Curve.nfe(each) for name, each in EVALUATIONS.items()})
    assert points(axes) == [[(4, 90.0), (32, 65.0)], [(8, 70.0)]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "32"]


def test_acceptance_is_of_the_last_step_but_against_steps(axes):
    draw_by_offset(axes, ACCEPTANCE)
    assert points(axes) == [[(1, 0.8), (2, 0.5)]] * 4
    axes.cla()
    draw_by_temperature(axes, ACCEPTANCE)
    assert points(axes) == [[(0.5, 2.5), (1.0, 3.0)]] * 2
    axes.cla()
    draw_by_step(axes, ACCEPTANCE)
    assert points(axes) == [[(10, 2.0), (20, 3.0)], [(10, 1.5), (20, 2.5)]] * 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "m, causal, temperature 1" and len(set(labels)) == 4


def test_ratios_stand_in_rows_with_their_errors(axes):
    ratios = {
        "a / b": {"one": plots.Ratio(0.5, 0.4, 0.8)},
        "c / d": {"one": plots.Ratio(2, 1, 4), "two": plots.Ratio(3, 3, 3)},
    }
    plots.draw_ratios(axes, ratios, "less is better")
    one, two = points(axes)
    assert [x for x, _ in one] == [0.5, 2] and [x for x, _ in two] == [3]
    assert [round(y) for _, y in one + two] == [0, 1, 1] and one[1][1] != two[0][1]
    assert axes.containers[0].lines[2][0].get_segments()[0][:, 0].tolist() == [0.4, 0.8]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a / b", "c / d"] and axes.yaxis_inverted()
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [1]


def test_losses_and_validation_are_told_apart(axes):
    plots.draw_losses(axes, RUNS)
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, 2.5], [2.75]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run, loss", "run, validation"]


def draw(axes):
    plots.draw_losses(axes, RUNS)


def test_a_drawing_is_kept_as_png_and_svg_and_is_the_same_each_time(tmp_path):
    first = plots.saved(draw, tmp_path, "losses", "one")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
    ElementTree.fromstring((tmp_path / "losses.svg").read_text())
    assert plots.saved(draw, None, "losses", "one") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "losses.svg"]


def test_a_drawing_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def full(figure, file, format, **how):
        written(figure, file, format=format, **how)
        if format == "png":
            raise OSError(errno.ENOSPC, "full")

    plots.saved(draw, tmp_path, "losses", "one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = pyplot.Figure.savefig
    monkeypatch.setattr(pyplot.Figure, "savefig", full)
    with pytest.raises(InputError, match=r"losses\.png"):
        plots.saved(draw, tmp_path, "losses", "one")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_on_a_page_ink_is_the_pages_and_names_are_its_own():
    def draw(axes):
        plots.draw_hybrid(axes, HYBRID)

    one, other = plots.saved(draw, None, "hybrid", "one"), plots.saved(draw, None, "hybrid", "other")
    assert "currentColor" in one and plots.INK not in one and "http" not in one and "<style" not in one
    names, others = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other))
    assert names and not names & others
    # xlink:href lost its namespace, which HTML knows; every reference is to a name that is there.
    used = set(re.findall(r"url\(#([^)]+)\)", one)) | set(re.findall(r'href="#([^"]+)"', one))
    assert used and used <= names
    tree = ElementTree.fromstring(one.replace("xlink:href", "href"))
    assert {"PPL (upper bound ± standard error)", "ours", "theirs"} <= {element.text for element in tree.iter("text")}
