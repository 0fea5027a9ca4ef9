"""The tables: from nothing, in pieces, and never twice."""

import json

import pytest
from rich.console import Console

import caddf.reproduce as tables
from caddf.errors import InputError
from caddf.reproduce import ReproduceSettings, reproduce

QUIET = Console(quiet=True)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A table over two small texts, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "one.txt", "two.txt"):
        lines = (f"{name} holds line {i} of some {i % 7} lines.\n\n" for i in range(120))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(tables, "SETS", {"one.txt": "One", "two.txt": "Two"})
    return ReproduceSettings(
        "debug",
        training_set="train.txt",
        methods="gpt2,radd-ao",
        steps=2,
        batch_size=2,
        windows=2,
        samples=1,
        device="cpu",
    )


def test_a_table_comes_from_nothing_and_is_not_made_twice(settings, tmp_path, monkeypatch):
    out = reproduce("table1", settings, QUIET)
    table = json.loads((out / "table.json").read_text())
    assert [(row["method"], row["likelihood"]) for row in table["rows"]] == [
        ("gpt2", "causal"),
        ("radd-ao", "diffusion"),
    ]
    assert all(set(row["sets"]) == {"one.txt", "two.txt"} for row in table["rows"])
    one, other = (row["parameters"] for row in table["rows"])
    assert abs(one - other) <= 0.02 * other
    assert table["rows"][0]["training"]["steps"] == 2 and table["machine"]["torch"]
    assert str(tmp_path) not in (out / "table.json").read_text()
    assert "| gpt2 | causal |" in (out / "table.md").read_text()
    assert "<td>radd-ao<td>diffusion" in (out / "table.html").read_text()

    monkeypatch.setattr(tables, "run", lambda *_: pytest.fail("what is done was done again"))
    reproduce("table1", settings, QUIET)


def test_it_goes_on_where_it_was_interrupted(settings, monkeypatch):
    done, run = [], tables.run

    def stops_at_the_fifth(job, *more):
        done.append(job.product)
        return len(done) < 5 and run(job, *more)

    monkeypatch.setattr(tables, "run", stops_at_the_fifth)
    out = reproduce("table1", settings, QUIET)
    assert not (out / "table.md").exists()
    again = []
    monkeypatch.setattr(tables, "run", lambda job, *more: again.append(job.product) or run(job, *more))
    reproduce("table1", settings, QUIET)
    assert (out / "table.md").exists()
    assert not set(done[:4]) & set(again)


@pytest.mark.parametrize(
    ("table", "methods", "said"),
    [("table9", None, "table is table9; it must be one of table1"), ("table1", "gpt2,gpt9", "methods holds 'gpt9'")],
)
def test_what_is_not_there_is_named(settings, table, methods, said):
    with pytest.raises(InputError, match=said):
        reproduce(table, ReproduceSettings("debug", methods=methods), QUIET)
