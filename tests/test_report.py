"""The report: every number on one page, from files alone; what is missing, broken or hostile does no harm."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from rich.console import Console

import caddf
from caddf.benchmarks import acceptance as measured
from caddf.cli import main
from caddf.errors import InputError
from caddf.generation import generate
from caddf.report import COMMANDS, report
from caddf.samples import SamplesSettings, collect_samples

pytest.importorskip("matplotlib")
HOSTILE = '</script><img src="https://example.org/x" onerror=alert(1)>&amp;{{ 7 * 7 }}'
MACHINE = {"processor": "a processor", "cores": 2, "commit": "0123456789abcdef", "date": "2026-01-01", "gpu": None}
VOID = {"meta", "br", "img", "input", "link", "hr"}


def cell(ppl, accuracy=0.25):
    return {"nll": math.log(ppl), "standard_error": 0.01, "ppl": ppl, "bits_per_byte": 1.25, "accuracy": accuracy,
            "windows": 8}  # fmt: skip


def row(method, likelihood, ppls, parameters, **where):
    sets = {name: {**where, **cell(ppl, ppl / 1000)} for name, ppl in zip(("one", "two"), ppls, strict=True)}
    return {
        "method": method,
        "likelihood": likelihood,
        "parameters": parameters,
        "training": {"tokens": 98765},
        "sets": sets,
    }


TABLE = {
    "table": "table1",
    "settings": {"scale": "debug", "training_set": "books", "windows": 8, "samples": 2, "seed": 3},
    "machine": MACHINE,
    "sets": {"one": "First", "two": "Second"},
    "rows": [
        row("gpt2", "causal", (41.37, 52.48), 1_234_567),
        row("caddf", "diffusion", (63.59, 74.61), 1_234_999),
        row("caddf", "hybrid 0.5", (58.72, 69.83), 1_234_999, **{"lambda": 0.5}),
        {**row("radd", "diffusion", (85.94, 96.05), 1_230_001),
         "sets": {"one": {**cell(85.94, None), "standard_error": None}}},
    ],
}  # fmt: skip
BENCHMARK = {
    "benchmark": "scaling",
    "settings": {"size": "debug", "seed": 5, "repeats": 5, "contexts": "64,128"},
    "machine": MACHINE,
    "rows": [
        {"label": "ar", "context": context, "seconds_per_round": context / 1e4, "bytes_ratio": 1.5}
        for context in (64, 128)
    ],
    "ratios": {"a": 1.2345},
    "ratio_quartiles": {"a": [1.1, 1.4]},
    "ratio_of": {"a": "this / that", "b": "not told: no such row"},
    "shown": {
        "about": "What it is of.",
        "columns": {"model": "", "ms/token": "median"},
        "rows": [["ar<br>too", "6.54"]],
    },
}
EVALUATION = {"model": "run", "seed": 7, "machine": MACHINE, "command": "caddf evaluate run --data set --json",
              "samples": 2,
              "likelihoods": {"block": cell(33.21), "hybrid": [{"lambda": 0.5, **cell(44.32)}]}}  # fmt: skip
SAMPLES = {
    "samples": [{"model": "m", "method": "gpt2", "decoder": "autoregressive", "settings": {}, "prompt": HOSTILE,
                 "text": HOSTILE, "tokens": 17, "finished": False, "cost": 16.96, "evaluations": {"causal": 17},
                 "seconds": 1.0}],
    "prompts": [HOSTILE], "unit": "m", "machine": MACHINE,
    "settings": {"budget": 17.0, "max_new_tokens": 64, "temperature": 1.0, "seed": 0},
}  # fmt: skip
FRAMES = [
    {"pieces": [["Once", "given"], [HOSTILE, "accepted"], ["x", "rejected"], ["y", "corrected"], ["z", "rejected"],
                ["_", "open"]], "evaluations": {"causal": 1, "diffusion": 1}, "rounds": 1, "seconds": 0.1},
    {"pieces": [["Once", "given"], [HOSTILE, "kept"], ["y", "kept"], ["\n", "fresh"]],
     "evaluations": {"causal": 2, "diffusion": 2}, "rounds": 2, "seconds": 0.2},
]  # fmt: skip
RECORDING = {
    "recording": {"model": "m", "decoder": "speculative", "seed": 1, "command": f"caddf generate m --prompt {HOSTILE}"},
    "machine": MACHINE,
    "rows": [{"prompt": "Once", "seed": 1, "template": False, "frames": FRAMES,
              "result": {"tokens": 3, "evaluations": {"causal": 2, "diffusion": 2}}}],
}  # fmt: skip
FILES = {
    "table1-debug/table.json": TABLE,
    "scaling/scaling.json": BENCHMARK,
    "eval/ours.json": EVALUATION,
    "samples/samples.json": SAMPLES,
    "demo/recording.json": RECORDING,
}


class Page(HTMLParser):
    """What a page says: its text, its tags, and the data of its JSON scripts."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.data, self.ids = [], [], "", [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1].get("type") == "application/json":
                self.data.append(json.loads(data))
        elif "style" not in self.open:
            self.text += data


def write(folder, files):
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = write(folder / "results", FILES)
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "sample": HOSTILE}, {"step": 2, "validation": 2.5, "tokens": 9}]
    write(results, {"loss/gpt2.jsonl": "".join(json.dumps(line) + "\n" for line in metrics)})
    report(results, folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def html(whole):
    return (whole / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_needs_nothing_else(html, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert not re.match(r"\w+:|//", attributes.get(name) or "")
    assert "@import" not in html and set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "fetch(" not in html and "XMLHttpRequest" not in html
    assert len(page.ids) == len(set(page.ids))


def test_every_number_of_a_table_is_there(html, page):
    for line in TABLE["rows"]:
        assert f"{line['parameters']:,}" in page.text and f"{line['training']['tokens']:,}" in page.text
        for name, each in line["sets"].items():
            error = each["standard_error"]
            assert (
                f"{each['ppl']:.1f}" if error is None else f"{each['ppl']:.1f} ± {each['ppl'] * error:.1f}"
            ) in page.text
            assert f"{each['nll']:.4f}" in html and name in TABLE["sets"]
            assert each["accuracy"] is None or f"{100 * each['accuracy']:.1f}%" in page.text
    for said in ("6.54", "ar\ntoo", "1.23", "1.1 to 1.4", "this / that", "not told: no such row", "33.2 ± 0.3"):
        assert said in page.text


def test_every_figure_names_its_file_and_how_it_was_made(whole, page):
    files = [*FILES, "loss/gpt2.jsonl"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    for name in files:
        assert links.count(f"results/{name}") >= 2 and f"results/{name}" in page.text
    assert all((whole / link).is_file() for link in links if not link.startswith("#"))
    for command in (
        "caddf reproduce table1 --scale debug --windows 8 --samples 2 --seed 3 --out ",
        "caddf benchmark scaling --size debug --seed 5 --contexts 64,128 --out ",
        EVALUATION["command"],
        RECORDING["recording"]["command"],
    ):
        assert command in page.text
    assert page.text.count("commit 0123456789") == 2 * len(FILES) and "processor a processor" in page.text


def test_figures_are_on_the_page_and_in_the_folder(whole, page):
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    for drawn in ("table1-debug/table-hybrid", "eval/hybrid", "loss/losses"):
        assert (whole / "results" / f"{drawn}.png").is_file() and (whole / "results" / f"{drawn}.svg").is_file()
    assert not (whole / "results/scaling/scaling.png").exists()  # the benchmark's own command leaves it


def test_hostile_text_is_text(html, page):
    assert page.text.count(HOSTILE) >= 4 and "alert(1)>" not in html
    assert not any(tag == "img" for tag, _ in page.tags)


def test_the_stepper_has_the_recorded_frames(page):
    assert page.data == [FRAMES]
    shown = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    assert shown[-4:] == [kind for _, kind in FRAMES[-1]["pieces"]]
    assert "In all 2 rounds: 3 drafted, 1 accepted" in " ".join(page.text.split())


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_stepper_shows_each_round_drafted_and_verified():
    script = (Path(caddf.__file__).parent / "templates" / "report.js").read_text(encoding="utf-8")
    ask = f"console.log(JSON.stringify(stagesOf({json.dumps(FRAMES)})))"
    ask = f"const document = {{querySelectorAll: () => []}};\n{script}\n{ask}"
    stages = json.loads(subprocess.run(["node", "-e", ask], capture_output=True, text=True, check=True).stdout)
    assert [stage["pieces"] for stage in stages] == [
        [["Once", "given"], ["_", "open"], ["_", "open"], ["_", "open"]],
        [["Once", "given"], [HOSTILE, "drafted"], ["x", "drafted"], ["z", "drafted"]],
        FRAMES[0]["pieces"],
        FRAMES[1]["pieces"],
    ]
    said = [stage["said"] for stage in stages]
    assert said[1] == "round 1 of 2: 3 drafted"
    assert said[2].startswith("round 1 of 2: 1 accepted, 2 rejected or dropped, 1 corrected, 0 drawn besides; 1 open.")
    assert said[3] == "round 2 of 2: 1 drawn; 0 open. Passes so far: 2 causal, 2 diffusion"


def test_what_is_missing_is_named_with_its_command(tmp_path):
    (tmp_path / "results").mkdir()
    report(tmp_path / "results", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("Missing.") == len(COMMANDS)
    assert all(command in page.text for command in COMMANDS.values())
    with pytest.raises(InputError, match="which is no folder"):
        report(tmp_path / "nothing", tmp_path / "report.html")


def test_what_does_not_fit_is_named_and_the_rest_stands(tmp_path):
    unfinished = {name: value for name, value in BENCHMARK.items() if name != "shown"}
    write(tmp_path / "results", {
        "a/broken.json": "{", "b/list.json": "[]", "c/other.json": {"else": 1}, "d/scaling.json": unfinished,
        "e/table.json": {"table": "table1", "settings": {}, "rows": [{}], "sets": {}}, "f/metrics.jsonl": "{}\n",
        "g/table.json": TABLE,
    })  # fmt: skip
    shown = report(tmp_path / "results", tmp_path / "report.html")
    assert [Path(link).parts[1] for link in shown.unread] == ["a", "b", "c", "d", "f", "e"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "41.4 ± 0.4" in page.text and all(link in page.text for link in shown.unread)


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


ODD = {
    "table": ({"table": {}, "rows": []}, "table is {}; it must be text"),
    "benchmark": ({**BENCHMARK, "benchmark": ["scaling"]}, "benchmark is ['scaling']; it must be text"),
    "drawn": ({**BENCHMARK, "rows": [without(BENCHMARK["rows"][0], "context")]}, "context is missing"),
    "unknown": ({"benchmark": "new", "shown": BENCHMARK["shown"], "ratio_of": {"a": "this"}}, "ratios is missing"),
    "shown": ({**BENCHMARK, "shown": {**BENCHMARK["shown"], "columns": ["model"]}}, "columns is ['model']; it must be"),
    "cell": ({**TABLE, "rows": [row("gpt2", "hybrid 0.5", (41.0, 52.0), 9)]}, "lambda is missing"),
    "machine": ({**EVALUATION, "machine": "text"}, "machine is 'text'; it must be a dict"),
    "steps": ({**EVALUATION, "likelihoods": {"nfe": [cell(33.2)]}}, "steps is missing"),
    "recording": ({**RECORDING, "recording": {"model": "m"}}, "decoder is missing"),
    "samples": ({**SAMPLES, "settings": without(SAMPLES["settings"], "budget")}, "budget is missing"),
    "list": ({"samples": "none"}, "samples is 'none'; it must be a list, each a dict"),
}


def test_odd_files_are_named_and_change_nothing_else(whole, html, tmp_path):
    shutil.copytree(whole / "results", tmp_path / "results")
    write(tmp_path / "results", {f"{name}/odd.json": values for name, (values, _) in ODD.items()})
    write(tmp_path / "results", {"loss/odd.jsonl": '{"step": 1, "loss": "low"}\n'})
    unread = report(tmp_path / "results", tmp_path / "report.html").unread
    assert unread.keys() == {*(f"results/{name}/odd.json" for name in ODD), "results/loss/odd.jsonl"}
    assert all(unread[f"results/{name}/odd.json"].startswith(why) for name, (_, why) in ODD.items())
    beside = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<li>{link}: " in beside for link in unread)
    ours, theirs = (text[text.index("<main>") : text.index('<h2 id="reproduce">')] for text in (html, beside))
    assert ours == theirs


def test_mistakes_of_ours_are_no_odd_files(tmp_path, monkeypatch):
    write(tmp_path / "results", {"scaling.json": BENCHMARK})
    monkeypatch.setattr("caddf.report.tables._ratios", lambda values: {}["rows"])
    with pytest.raises(KeyError):
        report(tmp_path / "results", tmp_path / "report.html")


def test_files_beside_no_folder_have_the_name_of_the_results(tmp_path):
    write(tmp_path / "mine", {"evaluation.json": EVALUATION, "scaling.json": BENCHMARK})
    report(tmp_path / "mine", tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Evaluations (mine)" in text and "Cost against context (mine)" in text and "(.)" not in text


def ablation(model, target_ratio, diffusion_ratio=None):
    exact, bound = ({"ppl": ppl, "standard_error": ppl / 100} for ppl in (54.32, 76.54))
    return {
        "model": model, "decoder": "speculative", "settings": {}, "target": "causal", "batch": 1, "parameters": 1234567,
        "tokens_seen": 98765, "target_ppl": exact, "target_ratio": target_ratio, "diffusion_ppl": bound,
        "diffusion_ratio": diffusion_ratio, "mtp_accuracy": 0.0432, "mtp_agreement": None, "tokens_per_round": 3.21,
        "tokens_per_round_error": 0.12, "tokens_per_second": 432.1, "tokens_per_second_quartiles": [400.0, 450.0],
        "ratio": None, "ratio_quartiles": None,
    }  # fmt: skip


def test_what_a_table_compares_is_drawn(tmp_path):
    ratio = {"ratio": 0.8765, "standard_error": 0.0123}
    paired = {"method": "caddf", "likelihood": "block", "other": "gpt2", "against": "causal", "sets": {"two": ratio}}
    efficiency = {
        "table": "table3", "about": "What it is of.", "rows": [], "ratios": {"a_vs_b": 23.45, "share": 0.5},
        "ratio_quartiles": {"a_vs_b": [20.0, 30.0]}, "ratio_of": {"a_vs_b": "a / b", "share": "a"},
    }  # fmt: skip
    ablations = {
        "table": "table4", "settings": TABLE["settings"], "about": "What else it is of.",
        "rows": [ablation("full", target_ratio={"ratio": 1.0, "standard_error": 0.0}),
                 ablation("less", target_ratio=ratio, diffusion_ratio={"ratio": 2.345, "standard_error": 0.1})],
        "perplexities": {name: TABLE[name] for name in ("sets", "rows")},
    }  # fmt: skip
    tables = {"1/table.json": {**TABLE, "paired": [paired]}, "3/table.json": efficiency, "4/table.json": ablations}
    write(tmp_path / "results", tables)
    assert not report(tmp_path / "results", tmp_path / "report.html").unread
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for said in (
        "0.876 ± 0.012", "23.4", "20 to 30", "a / b", "What it is of.", "What else it is of.", "54.3 ± 0.5",
        "2.35 ± 0.1", "3.21 ± 0.12", "432 (400 to 450)", "Perplexity over the full model's",
        "Speed over that of others",
    ):  # fmt: skip
        assert said in page.text
    assert page.text.count("63.6 ± 0.6") == page.text.count("41.4 ± 0.4") == 2
    drawn = {name: (tmp_path / f"results/{name}/table-ratios.svg").read_text() for name in "134"}
    names = {"1": ["caddf block / gpt2 causal", "Second"], "3": ["a_vs_b"], "4": ["less", "exact, causal", "diffusion"]}
    assert all(name in drawn[table] for table, some in names.items() for name in some)
    assert "First" not in drawn["1"] and "share" not in drawn["3"] and "full<" not in drawn["4"]


def test_tables_of_other_names_are_not_shown(tmp_path):
    write(tmp_path / "results", {"table.json": {"table": "table9", "rows": []}})
    (why,) = report(tmp_path / "results", tmp_path / "report.html").unread.values()
    assert why == "table is table9; it must be one of table1, table2, table3, table4"


def test_folders_of_any_name_have_links_and_identifiers_of_their_own(tmp_path):
    write(tmp_path, {f"{folder}/c#d/e/100%.json": EVALUATION for folder in ("a", "b?")})
    report(tmp_path, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    files = {unquote(link) for link in links if not link.startswith("#")}
    assert files == {f"{folder}/c#d/{file}" for folder in ("a", "b?") for file in ("e/100%.json", "hybrid.svg")}
    assert not any(set("#? ") & set(link) for link in links if not link.startswith("#"))
    assert len(page.ids) == len(set(page.ids)) > 4


# What is decoded for it.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dual branch, a causal model and a masked one, a few steps old, and the commands' folder."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("".join(f"a{i % 7} = open(b{i % 5})\n\n" for i in range(300)), encoding="utf-8")
    assert (
        main(
            [
                "data",
                "prepare",
                "--input",
                str(folder / "text.txt"),
                "--tokenizer",
                "bytes",
                "--out",
                str(folder / "set"),
            ]
        )
        == 0
    )
    for method in ("gpt2", "radd-lambda-dce", "caddf-lambda-dce"):
        settings = [
            "--config",
            method,
            "--data",
            str(folder / "set"),
            "--out",
            str(folder / f"{method}-0"),
            "--device",
            "cpu",
        ]
        small = [
            "--model.size",
            "debug",
            "--train.steps",
            "3",
            "--train.tensorboard",
            "false",
            "--train.sample_every",
            "0",
        ]
        assert main(["train", *settings, *small, "--dtype", "float32"]) == 0
    return folder


def test_a_recording_holds_every_frame(runs, tmp_path, capsys):
    file = tmp_path / "new" / "recording.json"
    given = [str(runs / "caddf-lambda-dce-0"), "--prompt", "a1 = ", "--max-new-tokens", "12", "--seed", "3"]
    assert main(["generate", *given, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["generate", *given, "--json", "--record", str(file)]) == 0
    said, recorded = json.loads(capsys.readouterr().out), json.loads(file.read_text())
    (row,) = recorded["rows"]
    assert said["text"] == plain["text"] == row["result"]["text"]
    frames = list(generate(caddf.load(given[0]), given[2], max_new_tokens=12, seed=3))
    as_pieces = [
        [[text, "fresh" if kind == "accepted" else kind] for text, kind in each["pieces"]] for each in row["frames"]
    ]
    assert as_pieces == [[list(piece) for piece in frame.pieces()] for frame in frames]
    # A draft is accepted or rejected; all of a round that were drafted are one of the two.
    for frame, each in zip(frames, row["frames"], strict=True):
        kinds = Counter(kind for _, kind in each["pieces"])
        assert kinds["accepted"] + kinds["rejected"] == int((frame.frame.drafts != frame.task.mask_id).sum())
        assert each["copied_rounds"] == int(frame.frame.counts.copied[0])
    assert row["frames"][-1]["copied_rounds"] == row["result"]["copied_rounds"]
    assert recorded["recording"]["command"].startswith("caddf generate ") and recorded["machine"]["torch"]
    assert main(["generate", *given, "--record", str(tmp_path)]) == 2
    assert "which is a folder" in capsys.readouterr().err


def test_samples_cost_no_more_than_the_budget(runs, tmp_path, capsys):
    models = ",".join(f"{name}={runs / name}-0" for name in ("gpt2", "radd-lambda-dce", "caddf-lambda-dce"))
    given = [
        "samples",
        "--models",
        models,
        "--prompt",
        "a1 = ",
        "--budget",
        "6",
        "--max-new-tokens",
        "10",
        "--out",
        str(tmp_path),
    ]
    assert main([*given, "--decoders", "speculative,autoregressive,ancestral,confidence"]) == 0
    samples = json.loads((tmp_path / "samples.json").read_text())
    rows = {(row["model"], row["decoder"], row["settings"].get("target")): row for row in samples["samples"]}
    assert len(rows) == len(samples["samples"]) == 8
    assert all(row["cost"] <= 6 + 1e-6 for row in rows.values())
    # Six passes of the unit are six tokens; the text of a decoding that is cut off is that of one that is shorter.
    alone = rows["gpt2", "autoregressive", None]
    assert alone["tokens"] == 6 and alone["cost"] == pytest.approx(6) and not alone["finished"]
    model = caddf.load(runs / "gpt2-0")
    last = list(generate(model, "a1 = ", decoder="autoregressive", max_new_tokens=6))[-1]
    assert alone["text"] == model.tokenizer.decode(last.frame.tokens[0][last.task.wanted[0]].tolist())
    chain = rows["radd-lambda-dce", "ancestral", None]
    assert (
        chain["finished"]
        and "_" not in chain["text"]
        and chain["evaluations"]["diffusion"] <= chain["settings"]["steps"]
    )
    report(tmp_path, tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.count("autoregressive") >= 3


@pytest.mark.parametrize(
    ("prompts", "budget", "said"),
    [([], 8.0, "no prompt is given"), (["a"], 0.5, "budget is 0.5"), (["a\udc80"], 8.0, "lone surrogate")],
)
def test_samples_refuse_before_they_run(runs, prompts, budget, said):
    settings = SamplesSettings(f"gpt2={runs / 'gpt2-0'}", budget=budget, max_new_tokens=4)
    with pytest.raises(InputError, match=said):
        collect_samples(prompts, settings, Console(quiet=True))


@pytest.fixture
def accepted(runs, capsys):
    """The rows of `benchmark acceptance` with the options given."""

    def measure(*options):
        given = ["--models", str(runs), "--data", str(runs / "set"), "--windows", "3", "--rounds", "2", *options]
        assert main(["benchmark", "acceptance", *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    return measure


def test_acceptance_is_measured_at_each_checkpoint(accepted, tmp_path):
    rows = accepted("--temperatures", "[0.5,1]", "--out", str(tmp_path / "a"))
    assert [(row["model"], row["target"], row["temperature"], row["step"]) for row in rows] == [
        ("caddf-lambda-dce", target, temperature, 3) for target in ("causal", "fused") for temperature in (0.5, 1.0)
    ]
    for row in rows:
        stand, reached = 0.0, 1.0
        for share in row["by_offset"]:
            reached *= share
            stand += reached
        assert row["tokens_per_round"] == pytest.approx(
            1 + stand, rel=2e-5
        )  # six digits are kept; windows slide: what is accepted whole adds a token
    report(tmp_path, tmp_path / "report.html")
    assert (tmp_path / "a" / "acceptance-temperature.svg").is_file() and not (
        tmp_path / "a" / "acceptance-step.svg"
    ).exists()


def test_acceptance_goes_on_where_it_was_interrupted(accepted, runs, tmp_path, monkeypatch, capsys):
    calls, plain = [], measured.acceptance

    def counted(*given, **settings):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given, **settings)

    monkeypatch.setattr(measured, "acceptance", counted)
    where = ("--temperatures", "0,1", "--out", str(tmp_path / "a"))
    with pytest.raises(AssertionError):  # interrupted
        accepted(*where)
    first = json.loads((tmp_path / "a" / "acceptance.json").read_text())["rows"]
    rows = accepted(*where)
    assert len(calls) == 5 and rows[:2] == first and len(rows) == 4
    accepted("--temperatures", "0,1", "--out", str(tmp_path / "b"))
    written = [json.loads((tmp_path / name / "acceptance.json").read_text())["rows"] for name in "ab"]
    assert written[0] == written[1]

    for row in first:
        row["weights"] = "others"
    values = json.loads((tmp_path / "a" / "acceptance.json").read_text())
    (tmp_path / "a" / "acceptance.json").write_text(json.dumps({**values, "rows": first}))
    given = ["--models", str(runs), "--data", str(runs / "set"), "--windows", "3", "--rounds", "2", *where]
    assert main(["benchmark", "acceptance", *given]) == 2
    assert "of other weights; give another folder" in capsys.readouterr().err


def test_acceptance_refuses_before_it_measures(runs, tmp_path, capsys):
    given = ["benchmark", "acceptance", "--models", str(runs), "--windows", "3", "--data"]
    text = tmp_path / "text.txt"
    text.write_text("other words\n\n" * 300)
    assert (
        main(["data", "prepare", "--input", str(text), "--tokenizer", "bpe:270", "--out", str(tmp_path / "set")]) == 0
    )
    capsys.readouterr()
    assert main([*given, str(tmp_path / "set"), "--out", str(tmp_path / "a")]) == 2
    assert "needs its own tokenizer" in capsys.readouterr().err
    assert main([*given, str(runs / "set"), "--out", str(text / "a")]) == 2
    assert "but nothing can be written to" in capsys.readouterr().err


def test_acceptance_is_measured_at_each_width_of_windows(accepted, tmp_path):
    rows = accepted("--temperatures", "1", "--block-sizes", "2,5", "--out", str(tmp_path))
    assert [(row["target"], row["block_size"]) for row in rows] == [
        (target, size) for target in ("causal", "fused") for size in (2, 5)
    ]
    assert all(len(row["by_offset"]) <= row["block_size"] - (row["target"] == "causal") for row in rows)
    assert rows[1]["tokens_per_round"] > rows[0]["tokens_per_round"]
    assert "| caddf-lambda-dce | 3 | causal | 5 | 1 |" in (tmp_path / "acceptance.md").read_text()
