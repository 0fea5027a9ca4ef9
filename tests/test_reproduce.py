"""The tables: from nothing, in pieces, and never twice."""

import json
import os
import shutil
import signal
import threading
import time
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from caddf.checkpoint import read_json, write_json_atomic
from caddf.cli import main
from caddf.errors import Failure, InputError
from caddf.experiment import METHODS, network_of
from caddf.interrupted import INTERRUPTED
from caddf.model_settings import ModelSettings
from caddf.models.config import PRESETS
from caddf.models.matching import TOLERANCE, count
from caddf.report import report
from caddf.reproduce import SETS, TABLES, ReproduceSettings, plus_minus, reproduce
from caddf.reproduce.plan import Job, Variant, Workshop
from caddf.reproduce.tables import Ablations
from caddf.reproduce.workers import end_with, side_by_side
from caddf.text_model import fingerprint, load

QUIET = Console(quiet=True)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A table over two small texts, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "one.txt", "two.txt"):
        lines = (f"{name} holds line {i} of some {i % 7} lines.\n\n" for i in range(120))
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    for name in list(SETS):
        monkeypatch.delitem(SETS, name)
    monkeypatch.setitem(SETS, "one.txt", "One")
    monkeypatch.setitem(SETS, "two.txt", "Two")
    return ReproduceSettings(
        "debug",
        training_set="train.txt",
        methods="gpt2,radd-ao",
        steps=2,
        batch_size=2,
        windows=2,
        samples=1,
        prompts="one.txt",
        batch="1",
        repeats=2,
        workers=1,
        device="cpu",
    )


def with_methods(settings, methods, **others):
    return ReproduceSettings(**{**vars(settings), "methods": methods, **others})


@pytest.fixture
def jobs(monkeypatch):
    """The products of the jobs that are done; set to stop at a number of them."""

    class Done(list):
        stop = None

    done = Done()
    init = Job.__init__

    def recorded(self, about, product, kind, do, **others):
        def instead(console):
            done.append(product)
            return len(done) != done.stop and do(console)

        init(self, about, product, kind, instead, **others)

    monkeypatch.setattr(Job, "__init__", recorded)
    return done


@pytest.fixture
def made(settings):
    """A table that was made, with its settings."""
    small = with_methods(settings, "gpt2")
    return small, reproduce("table1", small, QUIET)


def test_a_table_comes_from_nothing_and_is_not_made_twice(settings, tmp_path, jobs):
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
    assert str(tmp_path) not in (out / "table.json").read_text() and "only" not in table["settings"]
    assert "| gpt2 | causal |" in (out / "table.md").read_text()
    commit = table["machine"]["commit"]
    assert table["commits"] == ({"trained": [commit], "evaluated": [commit]} if commit else {})
    if commit:
        for kind in ("md", "html"):
            assert f"; trained by {commit[:10]}; evaluated by {commit[:10]}" in (out / f"table.{kind}").read_text()
    for kind in ("md", "html"):  # what was read, not only what it is called
        assert "One: 1 documents of" in (out / f"table.{kind}").read_text()
    assert "<td>radd-ao<td>diffusion" in (out / "table.html").read_text()
    work = tmp_path / "runs" / "reproduce" / "debug"
    assert (work / "runs" / "gpt2-0" / "done.json").is_file()
    assert (work / "evaluations" / "radd-ao-0" / "two.txt.json").is_file()

    assert table["paired"] == []  # there is no dual branch

    jobs.clear()
    reproduce("table1", settings, QUIET)
    assert not jobs


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"steps": 3}, "steps is 3, but .*gpt2-0 was made with 2"),
        ({"batch_size": 4}, "batch_size is 4, but .*gpt2-0 was made with 2"),
        ({"windows": 3}, "windows is 3, but .*one.txt.json was made with 2"),
        ({"samples": 2}, "samples is 2, but .*one.txt.json was made with 1"),
        ({"training_set": "one.txt"}, "training_set is one.txt, but .*train was made with train.txt"),
    ],
)
def test_pieces_made_otherwise_are_refused_before_any_work(made, others, said, jobs):
    settings, out = made
    before = (out / "table.json").read_text()
    for only in ("all", "table"):
        with pytest.raises(InputError, match=said):
            reproduce("table1", with_methods(settings, "gpt2", **others, only=only), QUIET)
    assert not jobs and (out / "table.json").read_text() == before


def test_an_evaluation_of_another_run_is_refused(made):
    """A run that was removed and made anew leaves evaluations of the one before."""
    settings, _ = made
    shop, variant = Workshop(settings), Variant("gpt2", "gpt2")
    assert shop.trained(variant)["weights"] == fingerprint(load(shop.run(variant)).model)
    write_json_atomic(shop.run(variant) / "done.json", {**shop.trained(variant), "weights": "0" * 16})
    with pytest.raises(InputError, match=r"evaluations/gpt2-0 was made of another run than .*gpt2-0 is now; remove it"):
        reproduce("table1", settings, QUIET)


def test_a_model_that_was_trained_otherwise_is_refused(made):
    settings, _ = made
    run = Workshop(settings).run(Variant("gpt2", "gpt2"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("block_size: 8", "block_size: 4"))
    assert "block_size: 8" in config
    with pytest.raises(InputError, match=r"model.block_size is 8, but .*gpt2-0 was made with 4"):
        reproduce("table1", settings, QUIET)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"windows": 0}, "windows is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"context": 0}, "context is 0"),
        ({"context": 7}, "must lie between 1 and the context, 7"),
    ],
)
def test_settings_are_checked_before_any_work(settings, others, said):
    with pytest.raises(InputError, match=said):
        with_methods(settings, "gpt2", **others)


def test_another_context_has_places_of_its_own_and_the_same_text(made, jobs):
    settings, out = made
    before = (out / "table.json").read_bytes()
    other = with_methods(settings, "gpt2", context=24)
    found = reproduce("table1", other, QUIET)
    assert found.name == f"{out.name}-24" and "scale debug, context 24" in (found / "table.md").read_text()
    assert [product.parts[-3] for product in jobs] == ["runs", "evaluations", "evaluations"]
    assert load(Workshop(other).run(Variant("gpt2", "gpt2"))).context == 24
    assert (out / "table.json").read_bytes() == before and reproduce("table1", settings, QUIET) == out


def test_it_goes_on_where_it_was_interrupted(settings, jobs):
    jobs.stop = 5
    assert reproduce("table1", settings, QUIET) is None and len(jobs) == 5
    done, jobs.stop = jobs[:4], None
    jobs.clear()
    out = reproduce("table1", settings, QUIET)
    assert out is not None and (out / "table.md").exists()
    assert jobs and not set(done) & set(jobs)


def test_an_interrupted_table_is_not_the_one_before(made, jobs, capsys):
    settings, out = made
    before, jobs.stop = (out / "table.md").read_text(), 1
    given = vars(with_methods(settings, "gpt2,radd-ao"))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    assert main(["reproduce", "table1", *options]) == INTERRUPTED
    assert capsys.readouterr().out == "" and (out / "table.md").read_text() == before


def test_one_window_has_no_standard_error(made):
    settings, _ = made
    shutil.rmtree(Workshop(settings).folder / "evaluations")
    out = reproduce("table1", with_methods(settings, "gpt2", windows=1), QUIET)
    for kind, row in (("md", "| gpt2 | causal |"), ("html", "<td>gpt2<td>causal")):
        text = (out / f"table.{kind}").read_text()
        assert row in text and "±" not in text[text.index(row) :]
    assert plus_minus({"ppl": 41.37, "standard_error": None}) == "41.4"


def test_the_dual_branch_is_compared_window_by_window(settings):
    out = reproduce("table1", with_methods(settings, "gpt2,radd-ao,caddf-lambda-dce"), QUIET)
    table = json.loads((out / "table.json").read_text())
    rows = {(row["likelihood"], row["other"], row["against"]): row["sets"] for row in table["paired"]}
    assert list(rows) == [
        ("causal", "gpt2", "causal"),
        ("block", "gpt2", "causal"),
        ("diffusion", "radd-ao", "diffusion"),
        ("hybrid 0.75", "caddf-lambda-dce", "diffusion"),
    ]
    shown = {(row["method"], row["likelihood"]): row["sets"]["two.txt"]["ppl"] for row in table["rows"]}
    ratio = rows["block", "gpt2", "causal"]["two.txt"]
    assert ratio["ratio"] == pytest.approx(shown["caddf-lambda-dce", "block"] / shown["gpt2", "causal"], rel=1e-4)
    assert 0 < ratio["standard_error"] < 0.1
    assert "| caddf-lambda-dce block | gpt2 causal |" in (out / "table.md").read_text()
    pytest.importorskip("matplotlib")
    report(out.parent, out.parent / "report.html")
    assert "gpt2 causal" in (page := (out.parent / "report.html").read_text()) and "paired" in page


def test_ablations_share_the_full_model_and_compare_within_rounds(settings, jobs):
    pytest.importorskip("matplotlib")
    full = with_methods(settings, "caddf-lambda-dce")
    reproduce("table1", full, QUIET)
    jobs.clear()
    out = reproduce("table4", with_methods(settings, None), QUIET)
    assert not any("caddf-lambda-dce-0" in str(product) for product in jobs)
    table = json.loads((out / "table.json").read_text())
    rows = {(row["model"], row["target"]): row for row in table["rows"]}
    assert list(rows) == [
        ("full", "causal"),
        ("full", "fused"),
        ("no-causal-branch", None),
        ("no-cross-attention", "causal"),
        ("no-cross-attention", "fused"),
    ]
    assert len({row["tokens_seen"] for row in table["rows"]}) == 1
    most = rows["full", "causal"]["parameters"]
    assert all(abs(row["parameters"] - most) <= TOLERANCE * most for row in table["rows"])
    assert rows["full", "fused"]["ratio"] == 1.0
    decoded = read_json(Workshop(settings).decoding("table4") / "decode.json")
    speeds = {
        (row["model"], row["target"]): [each["tokens_per_second"] for each in row["rounds"]] for row in decoded["rows"]
    }
    for mine, theirs in ((("no-causal-branch", None), "causal"), (("no-cross-attention", "fused"), "fused")):
        ratios = [a / b for a, b in zip(speeds[mine], speeds["full", theirs], strict=True)]
        assert rows[mine]["ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-4)  # the median of two
    evaluated = read_json(Workshop(settings).evaluation(Variant("caddf-lambda-dce", ""), "one.txt"))
    exact = evaluated["likelihoods"]["block"]
    assert rows["full", "fused"]["target_ppl"]["ppl"] == exact["ppl"]
    assert rows["full", "fused"]["target_ppl"]["standard_error"] == exact["ppl"] * exact["standard_error"]
    assert rows["full", "fused"]["mtp_agreement"] == evaluated["mtp"]["agreement"]
    assert (
        rows["no-causal-branch", None]["target_ppl"] is None and rows["no-causal-branch", None]["target_ratio"] is None
    )
    assert rows["full", "causal"]["diffusion_ratio"] == {"ratio": 1, "standard_error": 0}
    ablated = read_json(Workshop(settings).evaluation(Variant("caddf-lambda-dce-no-cross-attention", ""), "one.txt"))
    ratio = ablated["likelihoods"]["block"]["ppl"] / exact["ppl"]
    assert rows["no-cross-attention", "fused"]["target_ratio"]["ratio"] == pytest.approx(ratio, rel=1e-4)
    shown = {(row["method"], row["likelihood"]) for row in table["perplexities"]["rows"]}
    assert ("no-causal-branch", "diffusion") in shown and ("no-causal-branch", "causal") not in shown
    text = (out / "table.md").read_text()
    assert "| no-cross-attention | speculative (causal) | 1 |" in text and "| full | block |" in text
    assert "<td>no-causal-branch<td>ancestral (steps 16)" in (out / "table.html").read_text()

    gone = Workshop(settings).evaluation(Variant("caddf-lambda-dce-no-cross-attention", ""), "one.txt")
    gone.unlink()  # decoded, but not evaluated: its rows wait for that
    jobs.clear()
    reproduce("table4", with_methods(settings, None, only="table"), QUIET)
    left = json.loads((out / "table.json").read_text())["rows"]
    assert [row["model"] for row in left] == ["full", "full", "no-causal-branch"]
    reproduce("table4", with_methods(settings, None), QUIET)
    assert jobs == [gone] and len(json.loads((out / "table.json").read_text())["rows"]) == 5


def test_efficiency_is_measured_of_the_trained_methods(settings, tmp_path, monkeypatch, jobs):
    for package in ("matplotlib", "psutil", "transformers"):
        pytest.importorskip(package)
    monkeypatch.setattr("caddf.benchmarks.contest.fresh", lambda *_: 2**20)  # a process for each row takes seconds
    only = with_methods(settings, "gpt2,radd-ao", repeats=1)
    early = reproduce("table3", with_methods(only, only.methods, only="data"), QUIET)
    assert json.loads((early / "table.json").read_text())["rows"] == []
    out = reproduce("table3", only, QUIET)
    table = json.loads((out / "table.json").read_text())
    assert [(row["model"], row["decoder"], row["peak_memory"]) for row in table["rows"]] == [
        ("gpt2", "autoregressive", 2**20),
        ("gpt2", "speculative", 2**20),
        ("radd-ao", "ancestral", 2**20),
    ]
    assert "16 new tokens after 16" in table["about"] and table["judge"]["run"] == "gpt2-0"
    assert table["rows"][0]["target_ppl"] == pytest.approx(table["judge"]["ppl"], rel=1e-4)
    assert "| radd-ao | ancestral (steps 16) | 1 |" in (out / "table.md").read_text()
    decoded = read_json(out / "decode/decode.json")
    assert len(decoded["rows"]) == len(table["rows"]) and all(row["rounds"] for row in decoded["rows"])
    assert {file.name for file in (out / "decode").iterdir()} == {
        f"decode.{kind}" for kind in ("json", "md", "png", "svg")
    }
    jobs.clear()
    reproduce("table3", only, QUIET)
    assert not jobs
    file = next(Workshop(only).folder.glob("decode/*/decode.json"))
    more = with_methods(only, only.methods, repeats=2)
    with pytest.raises(InputError, match=r"repeats is 2, but .* was made with 1"):
        reproduce("table3", with_methods(more, more.methods, only="table"), QUIET)
    with pytest.raises(InputError, match=r"batch is 2, but .* was made with 1"):
        reproduce("table3", with_methods(more, more.methods, batch="2"), QUIET)
    measured = read_json(file)["rows"]
    reproduce("table3", more, QUIET)
    decoded = read_json(file)
    assert jobs == [file.with_suffix(".md")]  # one round more
    assert [row["rounds"][:1] for row in decoded["rows"]] == [row["rounds"] for row in measured]
    assert all(len(row["rounds"]) == 2 for row in decoded["rows"])
    assert "of 2 rounds" in json.loads((out / "table.json").read_text())["about"]
    with pytest.raises(InputError, match=r"repeats is 1, but .* was made with 2"):
        reproduce("table3", only, QUIET)
    jobs.clear()
    name, shown = file.parent.name.removesuffix("-0"), decoded.pop("shown")
    write_json_atomic(file, decoded)
    assert not Workshop(more).decoded(name)  # interrupted among its rounds
    decoded["shown"] = shown
    decoded["rows"][2]["weights"] = "0" * 16
    write_json_atomic(file, decoded)
    with pytest.raises(InputError, match=r"decode/.* was made of another radd-ao than any run is now; remove it"):
        reproduce("table3", more, QUIET)
    assert not jobs


@pytest.mark.parametrize("name", ["no-causal-branch", "no-cross-attention"])
@pytest.mark.parametrize("scale", ["debug", "demo", "tiny"])
def test_an_ablation_has_as_many_parameters_at_every_scale(scale, name):
    variant, preset = Ablations().variants[name], PRESETS[scale]
    full = ModelSettings(scale).parameters(preset.vocab_size)
    method = METHODS[variant.method]
    config = method.configure(ModelSettings(scale, match=full, **variant.model), preset.vocab_size, 0)
    parameters = count(lambda: network_of({"architecture": method.architecture, "model": config.to_dict()}))
    assert abs(parameters - full) <= TOLERANCE * full


@pytest.mark.parametrize(
    ("table", "methods", "said"),
    [
        ("table9", None, "table is table9; it must be one of table1"),
        ("table1", "gpt2,gpt9", "methods holds 'gpt9'"),
        ("table4", "gpt2", "methods holds 'gpt2'; table4 has full, no-causal-branch, no-cross-attention"),
    ],
)
def test_what_is_not_there_is_named(settings, table, methods, said):
    with pytest.raises(InputError, match=said):
        reproduce(table, ReproduceSettings("debug", methods=methods), QUIET)


def test_prompts_are_of_a_set_that_is_prepared(settings, tmp_path):
    with pytest.raises(InputError, match=r"prompts is nine.txt; it must be one of one.txt, two.txt"):
        reproduce("table4", with_methods(settings, None, prompts="nine.txt"), QUIET)
    assert not (tmp_path / "runs").exists()


def test_earlier_tables_need_what_they_did(settings):
    kinds = [job.kind for job in TABLES["table2"].plan(Workshop(settings), TABLES["table2"].variants)]
    methods, sets = len(TABLES["table2"].variants), len(SETS)
    assert kinds == ["data"] * (1 + sets) + ["train"] * methods + ["evaluate"] * methods * sets


def test_the_time_left_is_told_kind_by_kind(monkeypatch, tmp_path):
    clock, said = [0.0], StringIO()
    monkeypatch.setattr("caddf.reproduce.making.time.monotonic", lambda: clock[0])

    def job(kind, minutes):
        return Job(
            f"{kind} it", tmp_path / "nothing", kind, lambda console: clock.append(clock.pop() + 60 * minutes) or True
        )

    kinds = [("train", 30), ("train", 50), ("train", 40), ("evaluate", 2), ("evaluate", 2)]
    table = SimpleNamespace(
        standard=[],
        variants={},
        check=lambda shop: None,
        values=lambda shop, chosen: {},
        plan=lambda shop, chosen: [job(*each) for each in kinds],
    )
    monkeypatch.setitem(TABLES, "table1", table)
    monkeypatch.setattr("caddf.reproduce.making.write", lambda *given: None)
    reproduce(
        "table1", ReproduceSettings(work=str(tmp_path), out=str(tmp_path), workers=1), Console(file=said, width=200)
    )
    assert said.getvalue().splitlines() == [
        "[1/5] train it",
        "[2/5] train it, about 60 min with the 1 behind it",
        "[3/5] train it, about 40 min",
        "[4/5] evaluate it",
        "[5/5] evaluate it, about 2 min",
    ]


def test_workers_train_the_same_weights(settings, tmp_path):
    reproduce("table1", with_methods(settings, settings.methods, only="data"), QUIET)
    several = with_methods(settings, settings.methods, only="train", workers=2, work=str(tmp_path / "more"))
    shutil.copytree(tmp_path / "runs" / "reproduce", tmp_path / "more")
    for given in (with_methods(settings, settings.methods, only="train"), several):
        reproduce("table1", given, QUIET)
    trained = [
        {run.parent.name: read_json(run)["weights"] for run in (tmp_path / work).glob("debug/runs/*/done.json")}
        for work in ("runs/reproduce", "more")
    ]
    assert len(trained[0]) == 2 and trained[0] == trained[1]


@pytest.fixture
def found(monkeypatch):
    """Workers find the jobs of these tests."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)


def waits(console):
    time.sleep(60)
    return True


def fails(console):
    raise InputError(f"threads is {torch.get_num_threads()}")


def dies(console):
    os._exit(5)


def test_what_a_worker_says_is_raised_and_the_others_stop(tmp_path, found):
    jobs = [Job("trains", tmp_path / "a", "train", fails), Job("waits", tmp_path / "b", "train", waits)]
    begun = time.monotonic()
    with pytest.raises(InputError, match="threads is 1"):
        side_by_side(jobs, 2, lambda job: None, lambda job: None)
    assert time.monotonic() - begun < 50


def test_a_worker_that_dies_is_told_of(tmp_path, found):
    with pytest.raises(Failure, match="trains: its process ended with 5: see above"):
        side_by_side([Job("trains", tmp_path / "a", "train", dies)], 1, lambda job: None, lambda job: None)


def test_an_interruption_reaches_the_workers(tmp_path, found):
    jobs = [Job(name, tmp_path / name, "train", waits) for name in ("a", "b")]
    begun = []

    def begins(job):
        begun.append(job)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with pytest.raises(KeyboardInterrupt):
        side_by_side(jobs, 1, begins, lambda job: None)
    assert begun == jobs[:1]


def test_a_worker_ends_with_its_parent(monkeypatch):
    told = []
    monkeypatch.setattr(os, "kill", lambda *given: told.append(given))
    end_with(os.getpid())  # which is not its parent
    assert told == [(os.getpid(), signal.SIGTERM)]


def test_a_gpu_has_one_worker(settings, monkeypatch):
    monkeypatch.setattr("caddf.reproduce.making.resolve_device", lambda device: torch.device("cuda"))
    with pytest.raises(InputError, match="workers is 2; on cuda it must be 1"):
        reproduce("table1", with_methods(settings, "gpt2", workers=2), QUIET)
