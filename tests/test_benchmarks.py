"""Benchmarks: what is measured in which order, what is said of it, and what is left on disk. No test looks at time."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import caddf.benchmarks.contest as contest
import caddf.benchmarks.results as results_module
from caddf.benchmarks import (
    BENCHMARKS,
    AcceptanceSettings,
    DecodeSettings,
    InfillSettings,
    ParetoSettings,
    ScalingSettings,
    StepsSettings,
    TrainSettings,
    decode,
    infill,
    measure_acceptance,
    pareto,
    scaling,
    steps,
    train,
)
from caddf.benchmarks.contest import Conditions, _about
from caddf.benchmarks.decode import ratios
from caddf.benchmarks.given import whole_numbers
from caddf.benchmarks.hub_gpt2 import TransformersGenerate, to_transformers
from caddf.benchmarks.infill import ratios as infill_ratios
from caddf.benchmarks.measure import Spread, bandwidth, fresh, in_turns, resident
from caddf.benchmarks.pareto import KNOBS, dominates
from caddf.benchmarks.results import number
from caddf.benchmarks.roster import Contestant, Entrant, Roster, entrants, runs_of, untrained_config
from caddf.benchmarks.scaling import bytes_read
from caddf.benchmarks.scaling import ratios as scaling_ratios
from caddf.benchmarks.steps import count, denoises
from caddf.benchmarks.train import FullLogits
from caddf.benchmarks.train import ratios as train_ratios
from caddf.benchmarks.trial import (
    Judge,
    Prompts,
    account,
    bandwidth_share,
    exact_ppl,
    run,
    task_of,
    unigram_entropy,
    weights_read,
)
from caddf.cli import VERBS, main
from caddf.data import TokenSet, prepare
from caddf.decoding import DECODERS, Autoregressive
from caddf.errors import InputError
from caddf.evaluation import causal_nll
from caddf.experiment import ARCHITECTURES, METHODS
from caddf.interface import AnyOrder, Infill
from caddf.model_settings import ModelSettings
from caddf.models.causal_model import CausalModel
from caddf.text_model import TextModel
from caddf.tokenizer import Tokenizer

SHORT = 24
"""The context of all models of random weights: matching their sizes takes a while, and is done once for each."""
CPU, QUIET = torch.device("cpu"), Console(quiet=True)
TINY = DecodeSettings(
    size="debug", methods="gpt2,radd-lambda-dce,caddf-lambda-dce", decoders="speculative,autoregressive,ancestral",
    context=24, new_tokens=4, batch="1,2", repeats=2, memory=False, device="cpu",
)  # fmt: skip
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def gpt2(**changes) -> CausalModel:
    """A tiny GPT-2 of ours, in float64."""
    torch.manual_seed(0)
    config = untrained_config("gpt2", "debug", SHORT, "preset")
    return CausalModel(dataclasses.replace(config, **changes)).double().eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A token set, and model folders of three methods that pass for trained."""
    folder = tmp_path_factory.mktemp("benchmarks")
    text = "".join(f"line {i} of {i % 7} in {i % 11}, and {i % 5} more.\n\n" for i in range(400))
    (folder / "text.txt").write_text(text)
    data = prepare(folder / "set", input=str(folder / "text.txt"), tokenizer="bpe:300")
    for seed, method in enumerate(("gpt2", "radd-lambda-dce", "caddf-lambda-dce")):
        about = METHODS[method]
        torch.manual_seed(seed)
        config = untrained_config(method, "debug", SHORT, "preset")
        config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size, rows=0, context=16)
        model = TextModel(ARCHITECTURES[about.architecture].network(config), data.tokenizer, {
            "method": method, "architecture": about.architecture,
            "objective": dataclasses.asdict(about.settings(**about.defaults)),
        })  # fmt: skip
        model.save_pretrained(folder / method.partition("-")[0])
    return folder


def models(folder, *names):
    return ",".join(f"{name}={folder / name}" for name in names)


# Order, spread, memory.


def test_rows_take_turns():
    assert list(in_turns("abc", 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")]


def test_spread_is_quartiles_and_ratios_are_taken_within_rounds():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    # The machine is ten times slower in the second round: it cancels.
    assert Spread.ratio([20.0, 2.0, 40.0], [10.0, 1.0, 10.0]) == Spread(2.0, 2.0, 3.0)


def test_memory_is_that_of_a_fresh_process():
    assert fresh(sum, [1, 2]) == 3
    with pytest.raises(RuntimeError, match="int ended with 1: ValueError"):
        fresh(int, "three")
    with resident() as peak:
        torch.ones(1 << 26)  # 256 MiB, gone at once
    assert peak.most - peak.first > 200 * 2**20


def test_bandwidth_is_a_number_of_bytes_per_second(monkeypatch):
    monkeypatch.setattr("caddf.benchmarks.measure.READ", 1 << 20)
    times = iter(range(100))
    monkeypatch.setattr("caddf.benchmarks.measure.now", lambda device: next(times))
    assert bandwidth(CPU) == 1 << 20  # each read takes one second on this clock


# Models and rows.


def test_the_gpt2_of_transformers_is_ours():
    ours, x = gpt2(), torch.randint(512, (2, SHORT), generator=torch.Generator().manual_seed(0))
    theirs = to_transformers(ours)
    inputs = torch.nn.functional.pad(x[:, :-1], (1, 0), value=ours.config.bos_id)
    with torch.no_grad():
        states, _ = ours(x, x, Infill())
        expected = ours.log_probs(states, torch.ones_like(x, dtype=torch.bool)).view(2, SHORT, -1)
        assert torch.allclose(theirs(inputs).logits.log_softmax(-1), expected, atol=1e-10)
    task = task_of(ours, x[:, :6], 18, 0.0, 0, CPU)
    mine, other = (run(decoder, ours, task) for decoder in (Autoregressive(), TransformersGenerate(ours)))
    assert torch.equal(mine.tokens, other.tokens)
    for name in ("causal", "diffusion", "computed", "needed", "rounds"):
        assert torch.equal(getattr(mine.counts, name), getattr(other.counts, name))


def test_what_transformers_cannot_hold_is_refused():
    config = untrained_config("caddf-lambda-dce", "debug", SHORT, "preset")
    with pytest.raises(InputError, match="built otherwise"):
        to_transformers(ARCHITECTURES["dual"].network(config))


def test_preset_gives_others_the_causal_branchs_shape_and_equal_its_parameters():
    dual = ARCHITECTURES["dual"].network(untrained_config("caddf-lambda-dce", "debug", SHORT, "preset"))
    total = dual.parameter_counts()["total"]
    for method, place in (("gpt2", "branch"), ("radd-lambda-dce", "diffusion"), ("sedd-scaled", "branch")):
        branch = getattr(untrained_config(method, "debug", SHORT, "preset"), place)
        own = dual.config.causal
        assert (branch.layers, branch.width, branch.heads) == (own.layers, own.width, own.heads)
    equal = ARCHITECTURES["dual"].network(untrained_config("radd-lambda-dce", "debug", SHORT, "equal"))
    assert abs(equal.parameter_counts()["total"] - total) <= 0.02 * total


def test_every_decoder_of_the_dual_branch_is_entered_and_runs():
    roster = Roster.of(methods="caddf-lambda-dce,gpt2,sedd-scaled,bd3lm", size="debug", context=SHORT, device="cpu")
    rows = entrants(roster, None, [2, 4], transformers=True)
    labels = [row.label for row in rows]
    assert len(set(labels)) == len(labels)
    for label in (
        "caddf-lambda-dce speculative causal", "caddf-lambda-dce speculative fused", "gpt2 autoregressive",
        "caddf-lambda-dce hybrid speculate True", "caddf-lambda-dce ancestral steps 4", "gpt2 transformers",
        "bd3lm block", "sedd-scaled tau_leaping schedule loglinear steps 2",
    ):  # fmt: skip
        assert label in labels
    others = {"euler", "tau_leaping", "d3pm_absorbing", "d3pm_uniform", "gaussian"}
    assert {row.decoder for row in rows if row.model == "caddf-lambda-dce"} == set(DECODERS) - others
    for row in rows:
        network = roster[row.model].network
        ran = run(row.build(network), network, task_of(network, torch.zeros(1, 8, dtype=torch.long), 4, 1.0, 0, CPU))
        assert (ran.tokens < network.vocab_size).all()
        assert account(network, ran, 4)["tokens_per_evaluation"] > 0


def test_copies_are_entered_for_trained_models_alone():
    roster = Roster.of(methods="caddf-lambda-dce,gpt2", size="debug", context=SHORT, device="cpu")
    for name, lookups, expected in (
        ("caddf-lambda-dce", (0, 4), {("causal", 0), ("causal", 4), ("fused", 0), ("fused", 4)}),
        ("caddf-lambda-dce", (0,), {("causal", 0), ("fused", 0)}),
        ("gpt2", (0, 4, 5), {(None, 4), (None, 5)}),
        ("gpt2", (0,), set()),
    ):
        for trained in (False, True):
            roster[name].tokenizer = Tokenizer.plain_bytes() if trained else None
            rows = entrants(roster, "speculative", [1], False, lookups)
            entered = [row for row in rows if row.model == name and row.decoder == "speculative"]
            found = {(row.settings.get("target"), row.settings.get("lookup")) for row in entered}
            untrained = {(target, None) for target, _ in expected if target}
            assert found == (expected if trained else untrained)
    dual = "caddf-lambda-dce"
    roster[dual].tokenizer = Tokenizer.plain_bytes()
    rows = entrants(roster, "speculative", [1], False, (0, 3), (5, 7))
    found = [
        (row.settings["target"], row.settings["lookup"], row.settings["drafts"]) for row in rows if row.model == dual
    ]
    assert found == [*itertools.product(("causal", "fused"), (0, 3), (5, 7))]
    with pytest.raises(
        InputError, match="drafts holds 9; it must be at most the block size, which is 8 in caddf-lambda-dce"
    ):
        entrants(roster, "speculative", [1], False, (0, 3), (5, 9))
    with pytest.raises(InputError, match=r"lookups is -1; it must be whole numbers of 0 or more"):
        whole_numbers("lookups", "-1", least=0)
    with pytest.raises(InputError, match=r"lookups is 3,0,3; it must hold at least one, and each once"):
        whole_numbers("lookups", "3,0,3", least=0)


def test_runs_are_named_by_pairs_or_by_folder(tmp_path):
    assert runs_of("a=x/y,b=z") == {"a": "x/y", "b": "z"}
    for name in ("radd-ao-0", "gpt2-0", "gpt2-1"):
        (tmp_path / name / "checkpoints" / "latest").mkdir(parents=True)
    assert list(runs_of(str(tmp_path))) == ["gpt2-0", "gpt2-1", "radd-ao"]
    with pytest.raises(InputError, match="NAME=RUN"):
        runs_of(str(tmp_path / "none"))
    for given in ("a=", "=z", "a=x,b", "a=x,a=z"):
        with pytest.raises(InputError, match="a run for each name, and no name twice"):
            runs_of(given)
    with pytest.raises(InputError, match=r"which is one model; name it: radd-ao-0=.*radd-ao-0$"):
        runs_of(str(tmp_path / "radd-ao-0"))


def test_weights_read_and_their_share_of_the_bandwidth():
    model = gpt2()
    layers = sum(p.numel() for p in [*model.causal.layers.parameters(), *model.causal.norm.parameters()])
    head = model.vocab_size * model.config.branch.width
    assert weights_read(model, fused=False, drafts=False) == {"causal": 8 * (layers + head)}
    dual = ARCHITECTURES["dual"].network(untrained_config("caddf-lambda-dce", "debug", SHORT, "preset"))
    plain, full = weights_read(dual, False, False), weights_read(dual, True, True)
    assert full["causal"] - plain["causal"] == 4 * sum(p.numel() for p in dual.fusion.parameters())
    each_draft = 4 * (dual.vocab_size * dual.config.diffusion.width + sum(p.numel() for p in dual.chain.parameters()))
    assert dual.chained and full["draft"] == each_draft and plain["draft"] == 0
    assert full["diffusion"] == plain["diffusion"]
    figures = {"passes_causal": 10.0, "passes_diffusion": 5.0, "passes_draft": 20.0, "seconds": 2.0}
    assert bandwidth_share({"causal": 100, "diffusion": 40}, figures, 1000.0) == pytest.approx(1200 / 2000)
    read = {"causal": 100, "diffusion": 40, "draft": 7}
    assert bandwidth_share(read, figures, 1000.0) == pytest.approx(1340 / 2000)


# Quality.


def test_entropy_is_of_each_rows_bag_in_nats():
    rows = torch.tensor([[1, 2, 1, 2], [3, 3, 3, 3]])
    assert unigram_entropy(rows) == pytest.approx(math.log(2) / 2)


def test_the_judge_scores_what_comes_after_the_prompt(trained):
    data = TokenSet.open(trained / "set")
    judge = Judge("gpt2", TextModel.from_pretrained(trained / "gpt2", dtype="float64"))
    rows = data.split("test").spread(16, 2)
    whole, prompt = (causal_nll(judge.model.model, x) for x in (rows, rows[:, :10]))
    assert judge.nll(data.tokenizer, rows, 10) == pytest.approx((whole - prompt).sum().item() / 12)
    ppl = exact_ppl(judge.model.model, rows, "causal", CPU)
    assert ppl == pytest.approx(math.exp(whole.mean().item() / 16))


def test_a_judge_reads_text_of_another_tokenizer_in_its_own_tokens(trained, tmp_path):
    data = TokenSet.open(trained / "set")
    judge = Judge("gpt2", TextModel.from_pretrained(trained / "gpt2", dtype="float64"))
    text = tmp_path / "text.txt"
    text.write_text("The old man opened the door, and she said nothing. " * 20, encoding="utf-8")
    other = prepare(tmp_path / "bytes", train=text, tokenizer="bytes")
    windows = other.split("train").spread(judge.model.context, 2)
    anew = [torch.tensor([data.tokenizer.encode(other.tokenizer.decode(row))]) for row in windows.tolist()]
    expected = sum(causal_nll(judge.model.model, x).sum().item() for x in anew) / sum(x.numel() for x in anew)
    given = Conditions(split="train", windows=2, context=judge.model.context)
    assert _about(judge, other, given)["ppl"] == pytest.approx(math.exp(expected))


def test_a_judge_that_ends_reads_as_far_as_texts_go(trained, tmp_path, monkeypatch):
    """In its own tokens another's may be longer than the judge, whose name is said then."""
    data = TokenSet.open(trained / "set")
    text = tmp_path / "text.txt"
    text.write_text("The old man opened the door, and she said nothing. " * 20, encoding="utf-8")
    other = prepare(tmp_path / "bytes", train=text, tokenizer="bytes")
    judge = Judge("gpt2", TextModel.from_pretrained(trained / "gpt2", dtype="float64"))
    monkeypatch.setattr(TextModel, "slides", False)
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "nll", lambda self, tokenizer, tokens, prompt: read.append(tokens.shape[1]) or 1.0)
        _about(judge, other, Conditions(split="train", windows=2, context=5))
        _about(judge, data, Conditions(split="train", windows=2, context=5))
    assert read == [5, judge.model.context]
    monkeypatch.setattr(TextModel, "context", 3)
    with pytest.raises(InputError, match="judge is gpt2, which reads 3 tokens at most; a text has 4 of its tokens"):
        judge.nll(data.tokenizer, data.split("test").spread(4, 1), 0)


def test_prompts_are_held_out_text_and_others_each_round(trained):
    data = TokenSet.open(trained / "set")
    prompts = Prompts(data, "test", 16, 6)
    one, two = (prompts.take(turn, 3, data.tokenizer.vocab_size, 0) for turn in (0, 1))
    windows = {tuple(row[:10].tolist()) for row in data.split("test").windows(16)}
    assert one.shape == (3, 10) and not torch.equal(one, two)
    assert {tuple(row.tolist()) for row in torch.cat([one, two])} <= windows


# Ratios, from figures that are made up.


def row(method, decoder, speed, **columns):
    row = {
        "method": method, "model": method, "decoder": decoder, "target": None, "settings": {}, "batch": 1,
        "label": f"{method} {decoder}",
        "tokens_per_second": speed, "generative_ppl": None, "entropy": None, "target_ppl": None, "bandwidth_share": 0.1,
        "bandwidth_share_quartiles": (0.05, 0.15), "cache_hit_rate": 0.5, "tokens_per_round": 1.0,
    }  # fmt: skip
    row |= columns
    row["rounds"] = [
        {
            "tokens_per_second": speed * slow,
            "cache_hit_rate": row["cache_hit_rate"],
            "tokens_per_round": row["tokens_per_round"] + more,
        }
        for slow, more in ((1, 0.4), (1, 0), (0.1, -0.4))
    ]
    return row


def figures():
    known = {"generative_ppl": 50.0, "entropy": 4.0}
    return [
        row("gpt2", "autoregressive", 30.0, target="causal", target_ppl=40.0, bandwidth_share=0.6, **known),
        row("gpt2", "transformers", 10.0, target="causal", target_ppl=40.0, **known),
        row("radd-ao", "ancestral", 2.0, settings={"steps": 512}, generative_ppl=60.0, entropy=4.0),
        row("radd-ao", "ancestral", 8.0, settings={"steps": 64}, generative_ppl=90.0, entropy=4.0),
        row("caddf-lambda-dce", "autoregressive", 20.0, target="causal", target_ppl=41.0, **known),
        row("caddf-lambda-dce", "speculative", 60.0, target="causal", target_ppl=41.0, tokens_per_round=3.5, **known),
        row("caddf-lambda-dce", "speculative", 50.0, target="fused", target_ppl=42.0, tokens_per_round=4.5, **known),
        row("caddf-lambda-dce", "ancestral", 300.0, cache_hit_rate=0.83, generative_ppl=70.0, entropy=4.0),
    ]


def test_ratios_are_told_under_the_keys_of_the_goals():
    told = ratios(figures(), "prose")
    assert {key: each.value for key, each in told.items()} == {
        "ar_vs_transformers": pytest.approx(3.0),
        "bandwidth_share": 0.6,
        "speculative_vs_ar": pytest.approx(3.0),
        "tokens_per_round": 3.5,  # the fused target's PPL is above 1.03 of the baseline's
        "cache_hits_any_order": 0.83,
        "caddf_vs_radd": pytest.approx(30.0),  # over 512 steps; the 300 tokens/s have a worse PPL
    }
    assert told["ar_vs_transformers"].quartiles == (pytest.approx(3.0), pytest.approx(3.0))
    assert told["tokens_per_round"].quartiles == (pytest.approx(3.3), pytest.approx(3.7))
    assert told["bandwidth_share"].quartiles == (0.05, 0.15)
    assert "speculative_vs_ar_code" in ratios(figures(), "code")


def test_ratios_that_quality_forbids_are_not_told_but_explained():
    rows = figures()
    for each in rows:
        if each["method"].startswith("caddf"):
            each |= {"target_ppl": 50.0, "entropy": 3.0}
    told = ratios(rows, "prose")
    assert told["tokens_per_round"].value is None and "above 1.03" in told["tokens_per_round"].of
    assert told["caddf_vs_radd"].value is None and "as good as" in told["caddf_vs_radd"].of
    for each in rows:
        each |= {"entropy": None, "generative_ppl": None, "target_ppl": None}
    told = ratios(rows, "prose")
    assert "random weights" in told["tokens_per_round"].of and "speculative_vs_ar" not in told
    assert "without a judge" in told["caddf_vs_radd"].of


def test_training_and_scaling_ratios():
    def step(variant, speed, memory):
        rounds = [{"tokens_per_second": speed}] * 3
        return {"method": "gpt2", "batch": 8, "variant": variant, "rounds": rounds, "peak_memory": memory}

    told = train_ratios([step("ours", 13.0, 60), step("plain", 10.0, 100)] * 2)
    assert set(told) == {"train_speed", "train_memory", "train_speed gpt2 8", "train_memory gpt2 8"}
    assert told["train_speed"].value == pytest.approx(1.3) and told["train_memory"].value == pytest.approx(0.6)

    def at(context, seconds, size):
        rounds = [{"seconds_per_round": seconds}] * 3
        return {"label": "ours", "context": context, "bytes_per_round": size, "rounds": rounds}

    assert scaling_ratios([at(256, 1.0, 100), at(4096, 1.8, 150)])["context_scaling"].value == pytest.approx(1.2)
    assert scaling_ratios([at(256, 1.0, 100), at(512, 1.8, 150)])["context_scaling"].value is None


def test_the_front_is_what_nothing_dominates():
    good, slow, varied = (
        {"tokens_per_second": speed, "generative_ppl": 10.0, "entropy": entropy}
        for speed, entropy in ((9.0, 4.0), (8.0, 4.0), (8.0, 5.0))
    )
    assert dominates(good, slow) and not dominates(slow, good)
    assert not dominates(good, varied) and not dominates(good, dict(good))


def test_numbers_in_tables():
    assert [number(n) for n in (None, 0.012345, 1.5, 123.45, 12345.6)] == ["", "0.0123", "1.5", "123", "12,346"]


# From settings to files.


def measured(results):
    values = json.loads(results.json.read_text())
    for kind in ("md", "png", "svg"):
        assert (results.folder / f"{results.name}.{kind}").stat().st_size > 200
    return values


def test_decode_leaves_json_markdown_and_a_plot(tmp_path):
    values = measured(decode(dataclasses.replace(TINY, out=str(tmp_path)), QUIET))
    assert len(values["rows"]) == 2 * 8 and values["machine"]["torch"] and values["bandwidth"] > 0
    for each in values["rows"]:
        assert (each["context"], each["new_tokens"], len(each["rounds"])) == (SHORT, 4, 2)
        assert each["tokens_per_second"] > 0 and each["parameters"] > 0 and 0 < each["bandwidth_share"]
        assert each["tokens_per_evaluation"] > 0 and 0 <= each["cache_hit_rate"] < 1
        for name in ("generative_ppl", "entropy", "target_ppl", "peak_memory"):
            assert each[name] is None
    assert set(values["ratios"]) == {"ar_vs_transformers", "bandwidth_share", "cache_hits_any_order"}
    assert {"tokens_per_round", "caddf_vs_radd"} <= set(values["ratio_of"])
    first, *rest = (each for each in values["rows"] if each["batch"] == 1)
    assert first["over_first"] is None and first["over_one_at_a_time"] is None
    for each in rest:
        paired = [
            a["tokens_per_second"] / b["tokens_per_second"]
            for a, b in zip(each["rounds"], first["rounds"], strict=True)
        ]
        assert each["over_first"] == pytest.approx(statistics.median(paired), rel=1e-4)  # six digits are kept
        drafted = each["decoder"] == "speculative" and each["target"] is not None
        assert (each["over_one_at_a_time"] is not None) >= drafted
    assert "| gpt2 | transformers | causal | 1 |" in (tmp_path / "decode.md").read_text()


def test_decode_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    settings = dataclasses.replace(TINY, methods="gpt2,caddf-lambda-dce", out=str(tmp_path))
    decoded, plain = [], contest.run

    def stops(*given):
        if len(decoded) == 8:
            raise KeyboardInterrupt
        decoded.append(given)
        return plain(*given)

    monkeypatch.setattr(contest, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        decode(settings, QUIET)
    kept = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert sum(len(each["rounds"]) for each in kept) == 8 and max(len(each["rounds"]) for each in kept) == 1

    again, warm, warm_up = [], [], contest.warm_up
    monkeypatch.setattr(contest, "run", lambda *given: again.append(given) or plain(*given))
    monkeypatch.setattr(contest, "warm_up", lambda *given: warm.append(given) or warm_up(*given))
    rows = measured(decode(settings, QUIET))["rows"]
    assert len(again) == 2 * len(rows) - 8
    assert len(warm) == len(rows)  # of this process, those that the first one measured too
    assert [each["rounds"][:1] for each in rows][:8] == [each["rounds"] for each in kept][:8]

    with pytest.raises(InputError, match=r"measured with temperature 1\.0, not 0\.5; give another"):
        decode(dataclasses.replace(settings, temperature=0.5), QUIET)


def test_trained_models_have_quality_and_targets(trained, tmp_path):
    settings = DecodeSettings(
        models=models(trained, "gpt2", "caddf"), decoders="speculative,ancestral", new_tokens=6, batch="2", repeats=2,
        prompts=str(trained / "set"), judge=str(trained / "gpt2"), windows=2, memory=False, device="cpu",
        out=str(tmp_path),
    )  # fmt: skip
    values = measured(decode(settings, QUIET))
    text = (tmp_path / "decode.json").read_text()
    assert str(trained) not in text and str(tmp_path) not in text
    assert values["judge"]["run"] == "gpt2" and values["judge"]["ppl"] > 1
    for each in values["rows"]:
        assert each["generative_ppl"] > 1 and 0 <= each["entropy"] <= math.log(6) + 1e-5
        assert (each["target_ppl"] is not None) == (each["decoder"] != "ancestral")
    baseline = next(each for each in values["rows"] if each["model"] == "gpt2")
    assert baseline["target_ppl"] == pytest.approx(values["judge"]["ppl"], rel=1e-4)  # they are one model
    with pytest.raises(InputError, match="prompts is not given"):
        decode(dataclasses.replace(settings, prompts=None), QUIET)
    with pytest.raises(InputError, match="context is 40; it must lie between 2 and 16, the context of"):
        decode(dataclasses.replace(settings, context=40), QUIET)


def test_a_judge_that_cannot_read_the_texts_is_refused_before_any_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(TextModel, "context", 8)
    monkeypatch.setattr(contest, "run", None)
    settings = DecodeSettings(
        models=models(trained, "caddf"), new_tokens=6, prompts=str(trained / "set"), judge=str(trained / "gpt2"),
        device="cpu", out=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(InputError, match="gpt2, which reads 8 tokens at most; texts have 16 with their prompts"):
        decode(settings, QUIET)


def test_peak_memory_holds_the_weights():
    given = dataclasses.replace(TINY, methods="caddf-lambda-dce", size="demo", memory=True)
    peak = fresh(contest.resident_peak, given, (Entrant("caddf-lambda-dce", "caddf-lambda-dce", "autoregressive"), 1))
    weights = sum(p.nbytes for p in given.roster()["caddf-lambda-dce"].network.parameters())
    assert weights <= peak < weights + 300 * 2**20


def test_pareto_turns_every_knob(trained, tmp_path):
    settings = ParetoSettings(
        models=models(trained, "caddf"), new_tokens=3, batch="1", repeats=1, prompts=str(trained / "set"),
        judge=str(trained / "gpt2"), windows=2, device="cpu", out=str(tmp_path),
    )  # fmt: skip
    rows = measured(pareto(settings, QUIET))["rows"]
    for decoder in ("confidence", "margin", "entropy_bound"):
        knob, values = KNOBS[decoder]
        assert [each["settings"][knob] for each in rows if each["decoder"] == decoder] == list(values)
    hybrid = [each["settings"] for each in rows if each["decoder"] == "hybrid"]
    assert [each["anchor"] for each in hybrid if "steps" in each] == [0.25, 0.5, 0.75]
    assert all(each["speculate"] and each["steps"] == 1 for each in hybrid if "steps" in each) and len(hybrid) == 11
    assert any(each["on_front"] for each in rows)
    with pytest.raises(InputError, match="models or judge is not given"):
        pareto(dataclasses.replace(settings, judge=None), QUIET)


def test_full_logits_give_the_same_loss():
    for method, pattern in (("gpt2", Infill()), ("radd-lambda-dce", AnyOrder())):
        config = untrained_config(method, "debug", SHORT, "preset")
        torch.manual_seed(0)
        model = ARCHITECTURES[METHODS[method].architecture].network(config).double()
        x = torch.randint(512, (2, SHORT), generator=torch.Generator().manual_seed(1))
        where = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        head, canvas = model.denoiser, torch.where(where, model.mask_id, x)
        prefix = x if isinstance(pattern, Infill) else canvas
        states, _ = model(prefix, canvas, pattern)
        assert torch.allclose(FullLogits(model).nll(states, where, x, head), model.nll(states, where, x, head))


def test_train_compares_with_plain_pytorch(tmp_path):
    settings = TrainSettings(
        "debug", "caddf-lambda-dce", "2", length=16, repeats=2, memory=False, device="cpu", out=str(tmp_path)
    )
    values = measured(train(settings, QUIET))
    assert [each["variant"] for each in values["rows"]] == ["ours", "plain"]
    assert set(values["ratios"]) == {"train_speed"}
    with pytest.raises(InputError, match="methods holds gpt9"):
        train(dataclasses.replace(settings, methods="gpt9"), QUIET)


def test_scaling_goes_from_prompt_to_longer_prompt(tmp_path):
    settings = ScalingSettings("debug", contexts="4,8", new_tokens=16, repeats=2, device="cpu", out=str(tmp_path))
    rows = measured(scaling(settings, QUIET))["rows"]
    assert [(each["method"], each["decoder"], each["context"]) for each in rows] == [
        (method, decoder, context)
        for method, decoder in (
            ("gpt2", "autoregressive"), ("caddf-lambda-dce", "autoregressive"), ("caddf-lambda-dce", "speculative"),
        )
        for context in (4, 8)
    ]  # fmt: skip
    assert all(each["tokens_per_round"] == 1 for each in rows if each["decoder"] == "autoregressive")
    assert rows[0]["cost_ratio"] == 1 and rows[1]["bytes_ratio"] > 1
    with pytest.raises(InputError, match=r"repeats is 1, but .* holds 2 rounds"):
        scaling(dataclasses.replace(settings, repeats=1), QUIET)


def test_bytes_read_are_weights_and_cached_positions():
    model = gpt2()
    branch = model.config.branch
    grown = bytes_read(model, "autoregressive", 10) - bytes_read(model, "autoregressive", 0)
    assert grown == 10 * 8 * 2 * branch.layers * branch.width


def test_steps_are_counted_and_found(trained, tmp_path):
    settings = StepsSettings(
        models=models(trained, "gpt2", "radd", "caddf"), data=str(trained / "set"), anchors=(0.5,), windows=3,
        samples=2, device="cpu", out=str(tmp_path),
    )  # fmt: skip
    values = measured(steps(settings, QUIET))
    assert values["base"] == "radd"  # the model without a causal branch; GPT-2 denoises nothing
    assert [(each["model"], each["anchor"]) for each in values["rows"]] == [("radd", 0), ("caddf", 0), ("caddf", 0.5)]
    assert [each["target_ppl"] for each in values["rows"][0]["reached"]] == values["targets"]
    assert [each["steps"] for each in values["rows"][1]["curve"]] == [1, 2, 4, 8, 16]
    easy = steps(dataclasses.replace(settings, targets="100000", out=str(tmp_path / "easy")), QUIET).values
    assert [each["reached"][0]["steps"] for each in easy["rows"]] == [1, 1, 1]  # below any model of 300 tokens
    assert easy["ratios"] == {"steps_without_vs_with at PPL 1e+05": 1.0}
    with pytest.raises(InputError, match="targets is 1,x"):
        steps(dataclasses.replace(settings, targets="1,x"), QUIET)
    assert not denoises(Contestant("gpt2", gpt2()))


def test_spans_are_compared_with_what_the_left_side_alone_tells(trained, tmp_path):
    settings = InfillSettings(
        models=models(trained, "gpt2", "radd", "caddf"), data=str(trained / "set"), spans=(1, 3), windows=5, samples=2,
        device="cpu", out=str(tmp_path),
    )  # fmt: skip
    values = measured(infill(settings, QUIET))
    readings = [
        ("gpt2", "causal"),
        ("radd", "diffusion"),
        *(("caddf", each) for each in ("infill", "diffusion", "causal")),
    ]
    assert [(each["span"], each["model"], each["reading"]) for each in values["rows"]] == [
        (span, *reading) for span in (1, 3) for reading in readings
    ]
    for row in values["rows"]:
        assert 2 < row["nats"] < 12 and row["bound"] == (row["reading"] == "diffusion" and row["span"] > 1)
    assert [row["against_left"] for row in values["rows"] if row["model"] == "gpt2"] == [1, 1]
    (exact,) = (row["against_left"] for row in values["rows"] if row["span"] == 3 and row["reading"] == "infill")
    assert values["ratios"]["infill_vs_left_to_right at 3"] == pytest.approx(1 / exact, rel=1e-5)
    bounds = [row for row in values["rows"] if row["reading"] != "infill"]
    ((_, told),) = [each for each in infill_ratios(bounds) if each[0].endswith("at 3")]
    assert told.of.endswith("diffusion, an upper bound")
    for row in values["rows"]:
        left = next(each for each in values["rows"] if each["reading"] == "causal" and each["span"] == row["span"])
        assert row["exact"] == pytest.approx(sum(row["matches"]) / len(row["windows"]), rel=1e-5)
        assert row["exact_more"] == pytest.approx(row["exact"] - left["exact"], abs=1e-6)
    file = tmp_path / "infill.json"
    other = {**values["rows"][0], "weights": "another's"}
    file.write_text(json.dumps({**values, "rows": [other, values["rows"][1]]}))
    with pytest.raises(InputError, match=f"out is {tmp_path}, whose rows of gpt2 are of other weights"):
        infill(settings, QUIET)
    file.write_text(json.dumps({**values, "rows": values["rows"][:2]}))  # interrupted
    again = infill(settings, QUIET).values["rows"]
    assert [(row["model"], row["reading"]) for row in again] == 2 * readings
    assert [row["nats"] for row in again] == pytest.approx([row["nats"] for row in values["rows"]], rel=1e-5)
    with pytest.raises(InputError, match="spans holds 9; each must lie between 1 and half of the context, 8"):
        infill(dataclasses.replace(settings, spans=(9,)), QUIET)


def test_what_was_measured_of_other_weights_is_not_gone_on_with(trained, tmp_path):
    """Runs of one name, in turns: rounds of two models would stand in one row."""
    other = tmp_path / "caddf"
    shutil.copytree(trained / "caddf", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.5 * value for name, value in weights.items()}, other / "model.safetensors")
    given = DecodeSettings(
        models=f"caddf={trained}/caddf", decoders="autoregressive", batch="1", repeats=2, memory=False,
        prompts=str(trained / "set"), windows=2, device="cpu", out=str(tmp_path / "out"),
    )  # fmt: skip
    decode(given, QUIET)
    with pytest.raises(InputError, match="whose rows of caddf are of other weights; give another folder"):
        decode(dataclasses.replace(given, models=f"caddf={other}"), QUIET)
    with pytest.raises(InputError, match=r"repeats is 1, but .* holds 2 rounds"):
        decode(dataclasses.replace(given, repeats=1), QUIET)


def test_what_was_measured_on_other_text_is_not_gone_on_with(trained, tmp_path):
    """A token set and a judge of the same name are told apart by what they hold."""
    (tmp_path / "text.txt").write_text("".join(f"another {i} of {i % 9}.\n\n" for i in range(400)))
    prepare(tmp_path / "set", input=str(tmp_path / "text.txt"), tokenizer=str(trained / "set"))
    (tmp_path / "gpt2").mkdir()
    shutil.copytree(trained / "caddf", tmp_path / "gpt2", dirs_exist_ok=True)
    given = AcceptanceSettings(
        models=models(trained, "caddf"), data=str(trained / "set"), temperatures=(1.0,), windows=2, rounds=1,
        device="cpu", out=str(tmp_path / "out"),
    )  # fmt: skip
    measure_acceptance(given, QUIET)
    with pytest.raises(InputError, match="measured with another data of the same name; give another folder"):
        measure_acceptance(dataclasses.replace(given, data=str(tmp_path / "set")), QUIET)
    with pytest.raises(InputError, match="block_size is 99; with target causal it must lie between 2 and"):
        measure_acceptance(dataclasses.replace(given, block_sizes=(4, 99), out=str(tmp_path / "other")), QUIET)
    assert not (tmp_path / "other").exists()
    decoding = DecodeSettings(
        models=models(trained, "caddf"), decoders="autoregressive", batch="1", repeats=1, memory=False, windows=2,
        prompts=str(trained / "set"), judge=str(trained / "gpt2"), device="cpu", out=str(tmp_path / "decoded"),
    )  # fmt: skip
    decode(decoding, QUIET)
    for name, place in (("prompts", "set"), ("judge", "gpt2")):
        with pytest.raises(InputError, match=f"measured with another {name} of the same name"):
            decode(dataclasses.replace(decoding, **{name: str(tmp_path / place)}), QUIET)


def test_a_file_names_every_commit_that_measured_it(tmp_path, monkeypatch):
    settings = dataclasses.replace(TINY, methods="gpt2", repeats=1, out=str(tmp_path))
    here = results_module.machine()
    for repeats, commit in ((1, "a"), (2, "b"), (3, "b")):
        monkeypatch.setattr(results_module, "machine", lambda commit=commit: {**here, "commit": commit})
        values = decode(dataclasses.replace(settings, repeats=repeats), QUIET).values
    assert values["machine"]["commit"] == "a"
    assert values["continued"] == [{"commit": "b", "date": here["date"]}]
    assert f"commit a, {here['date']}, continued by b, {here['date']};" in (tmp_path / "decode.md").read_text()


@pytest.mark.parametrize("n", [1, 5, 24])
def test_counted_passes_are_the_expected_ones(n):
    """A row's count has a standard deviation; the mean of 64 is within 5 of its own: by chance, once in 1e6."""
    counted = count(n, 12, seed=0)
    assert counted["expected"] == pytest.approx(n * (1 - (1 - 1 / n) ** 12))
    # The log-linear grid's first step is 0.001 longer than the others.
    assert abs(counted["counted"] - counted["expected"]) <= 5 * counted["standard_error"] + 0.02


# The command line and the document.


def test_the_verb_prints_the_table_or_json(tmp_path, capsys):
    options = ["--size", "debug", "--context", "24", "--methods", "gpt2", "--batch", "1"]
    options += ["--repeats", "1", "--memory", "false", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["benchmark", "decode", *options]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "decode.md").read_text()
    assert main(["benchmark", "decode", *options, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [each["method"] for each in values["rows"]] == ["gpt2", "gpt2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["decode", "--methods", "gpt9"], "methods holds gpt9; it must be of"),
        (["decode", "--size", "debug", "--decoders", "psychic"], "decoders holds psychic; it must be of"),
        (["decode", "--size", "debug", "--batch", "0"], "batch is 0; it must be whole numbers of 1 or more"),
        (
            ["decode", "--size", "debug", "--new-tokens", "99"],
            "new_tokens is 99; it must lie between 1 and the context",
        ),
        (["decode", "--size", "debug", "--judge", "x"], "judge is x, but models is not given; it is for trained"),
        (["decode", "--size", "debug", "--drafts", "5"], "drafts is 5, but models is not given; it is for trained"),
        (["decode", "--models", "x", "--size", "debug"], "size is debug, but models is given; it is for random"),
        (["decode", "--methods", "gpt2,gpt2"], "methods is gpt2,gpt2; it must hold at least one, and each once"),
        (["decode", "--decoders", "block,block"], "decoders is block,block; it must hold at least one, and each once"),
        (["pareto"], "models or judge is not given"),
        (["scaling", "--methods", "gpt2,gpt2"], "methods is gpt2,gpt2; it must hold"),
        (["train", "--methods", "gpt2,gpt2"], "methods is gpt2,gpt2; it must hold"),
        (["infill", "--spans", "1,1"], "spans is 1,1; it must hold"),
        (["acceptance", "--temperatures", "[]"], "temperatures is empty; it must hold"),
        (["steps", "--anchors", "0.5,0.5"], "anchors is 0.5,0.5; it must hold"),
        (["steps", "--anchors", "0.5,1"], "anchors holds 1; each must be at least 0 and below 1"),
        (["scaling", "--contexts", "a"], "contexts is a; it must be whole numbers"),
        (["train", "--length", "0"], "length is 0; it must be 1 or more"),
        (["steps", "--data", "x"], "models or data is not given"),
        (["race"], "there is no command 'benchmark race'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_measured(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib", "transformers"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"{package} is not installed; .*caddf\[bench\]"):
        decode(dataclasses.replace(TINY, out=str(tmp_path / "out")), QUIET)


def test_the_documents_commands_have_only_options_that_exist():
    settings = {
        "decode": DecodeSettings, "train": TrainSettings, "scaling": ScalingSettings, "pareto": ParetoSettings,
        "steps": StepsSettings, "acceptance": AcceptanceSettings, "infill": InfillSettings,
    }  # fmt: skip
    commands = re.findall(r"^    caddf benchmark (\w+)((?: .*| \\\n.*)*)$", DOCUMENT.read_text(), re.MULTILINE)
    assert {verb for verb, _ in commands} == set(settings)
    for verb, options in commands:
        known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings[verb])}
        assert set(re.findall(r"--[\w-]+", options)) <= known | {"--json"}


def test_the_documents_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    assert names["results"].values["ratios"]["bandwidth_share"] > 0


def test_full_logits_learn_what_ours_learns_with_a_small_draft_vocabulary():
    settings = ModelSettings("debug", draft_vocab=100)
    method = METHODS["caddf-lambda-dce"]
    config = method.configure(settings, settings.preset.vocab_size, 0)
    torch.manual_seed(0)
    model = ARCHITECTURES[method.architecture].network(config).double()
    objective = method.build(method.settings(**method.defaults), config)
    x0 = torch.randint(512, (4, SHORT), generator=torch.Generator().manual_seed(1))
    learnt = []
    for asked in (model, FullLogits(model)):
        model.zero_grad()
        loss = objective(asked, x0, torch.Generator().manual_seed(3))
        loss.total.backward()
        learnt.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ours, gradients), (plain, expected) = learnt
    torch.testing.assert_close(ours.total, plain.total)
    assert ours.parts.keys() == plain.parts.keys() and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_every_benchmark_is_a_verb():
    assert {f"benchmark {name}" for name in BENCHMARKS} == {name for name in VERBS if name.startswith("benchmark ")}
