"""The commands end to end on a tiny model: what they print, what they leave on disk, and what they refuse."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import caddf
from caddf import display
from caddf.checkpoint import named
from caddf.cli import VERBS, main
from caddf.commands import generating
from caddf.decoding import DECODERS
from caddf.training import TrainingError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(caddf.__file__).parents[1])}
TRAIN = ["--model.size", "debug", "--device", "cpu", "--dtype", "float32", "--train.tensorboard", "false"]
QUICK = ["--samples", "1", "--anchors", "0.5", "--nfe", "2", "--paths", "0", "--max-windows", "2"]
LIKELIHOOD = {"nll", "standard_error", "ppl", "bits_per_byte"}


def sentences(count, seed):
    """Lines of text with the structure of `name = verb(name)`."""
    draw = random.Random(seed)
    return "".join(f"{draw.choice('abc')}{i} = {draw.choice(['open', 'read', 'close'])}(x)\n" for i in range(count))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for name, count in (("train", 400), ("validation", 60), ("test", 60)):
        (folder / f"{name}.txt").write_text(sentences(count, name))
    splits = [word for name in ("train", "validation", "test") for word in (f"--{name}", f"{folder / name}.txt")]
    assert main(["data", "prepare", *splits, "--tokenizer", "bpe:280", "--out", str(folder / "set")]) == 0
    return str(folder / "set")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("cli") / "run")
    often = ["--train.steps", "20", "--train.checkpoint_every", "10", "--train.ema", "0.9"]
    assert main(["train", *TRAIN, "--data", data, "--out", run, *often]) == 0
    return run


class Said:
    """The outcome of a command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        """The one JSON value on standard output."""
        assert self.out.count("\n") == 1 and self.out.endswith("\n")
        return json.loads(self.out)


@pytest.fixture
def say(capsys):
    """Runs a command that must succeed."""

    def say(*arguments, code=0):
        capsys.readouterr()
        returned = main([str(argument) for argument in arguments])
        said = Said(returned, *capsys.readouterr())
        assert said.code == code, said.err
        return said

    return say


@pytest.fixture
def refused(say):
    """Runs a command that must be refused in one line of standard error; returns the sentence."""

    def refused(*arguments):
        said = say(*arguments, code=2)
        assert said.out == "" and said.err.startswith("caddf: error: ") and said.err.count("\n") == 1, said.err
        return said.err.removeprefix("caddf: error: ").rstrip("\n")

    return refused


# Measured, written, described.


def test_evaluate_prints_one_json_object(say, data, run):
    result = say("evaluate", run, "--data", data, "--split", "test", *QUICK, "--seed", "3", "--json").json
    assert (result["model"], result["data"], result["split"], result["seed"]) == (run, data, "test", 3)
    likelihoods = result["likelihoods"]
    for name in ("causal", "ar", "block", "diffusion", "truncated"):
        assert likelihoods[name].keys() >= LIKELIHOOD
        assert 0 < likelihoods[name]["nll"] < 6 and math.isclose(
            likelihoods[name]["ppl"], math.exp(likelihoods[name]["nll"])
        )
    assert [each["lambda"] for each in likelihoods["hybrid"]] == [0.5] and likelihoods["hybrid"][0].keys() >= LIKELIHOOD
    assert likelihoods["nfe"][0]["steps"] == 2
    assert result["accuracy"].keys() == {"ar", "diffusion"}
    assert result["mtp"].keys() == {"accuracy", "agreement", "block_size"} and result["mtp"]["block_size"] == 8
    assert result["tokens"] == 64 and result["samples"] == 1
    assert say("evaluate", run, "--data", data, "--split", "test", *QUICK, "--seed", "3", "--json").json == result
    python = caddf.evaluate(caddf.load(run), data, split="test")["likelihoods"]["causal"]
    whole = say("evaluate", run, "--data", data, "--split", "test", "--json", *QUICK[:-2]).json["likelihoods"]["causal"]
    assert whole == python


def test_evaluate_prints_a_table_even_of_one_window(say, data, run):
    said = say("evaluate", run, "--data", data, *QUICK[:-1], "1", "--block-size", "4", "--dtype", "float64")
    for word in ("causal", "ar", "block", "diffusion", "truncated", "hybrid 0.5", "NFE 2", "blocks of 4", "validation"):
        assert word in said.out
    assert said.err == ""


def test_two_evaluations_are_compared(say, refused, data, run, tmp_path):
    one, other = str(tmp_path / "one.json"), str(tmp_path / "other.json")
    for file, k in ((one, "8"), (other, "4")):
        said = say("evaluate", run, "--data", data, "--split", "test", *QUICK, "--block-size", k, "--json")
        Path(file).write_text(said.out)
    ratios = say("compare", one, other, "--json").json
    assert [each["likelihood"] for each in ratios][:3] == ["causal", "ar", "block"]
    assert ratios[0]["ratio"] == 1 and ratios[0]["standard_error"] == 0
    assert "diffusion" in say("compare", one, other).out
    assert "nothing.json" in refused("compare", one, str(tmp_path / "nothing.json"))
    (tmp_path / "older.json").write_text('{"likelihoods": {}}')
    assert "has no per_window" in refused("compare", str(tmp_path / "older.json"), one)


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"d3pm_absorbing", "d3pm_uniform", "gaussian"}))
def test_generate_prints_one_json_object(say, run, decoder):
    arguments = ["generate", run, "--prompt", "a1 =", "--decoder", decoder, "--max-new-tokens", "9", "--seed", "4"]
    result = say(*arguments, "--json").json
    assert result["prompt"] == "a1 =" and result["seed"] == 4 and isinstance(result["text"], str)
    assert 0 < result["tokens"] <= 9 and result["tokens_per_second"] > 0 and result["tokens_per_evaluation"] > 0
    assert result["evaluations"].keys() == {"causal", "diffusion"} and 0 <= result["cache_hit_rate"] < 1
    again = say(*arguments, "--json").json
    assert again["text"] == result["text"]

    filled = say("generate", run, "--template", "a1 =[MASK:6](x)\n", "--decoder", decoder, "--json").json
    assert filled["text"].startswith("a1 =") and filled["text"].endswith("(x)\n") and filled["tokens"] == 6


@pytest.mark.parametrize("target", ["causal", "fused"])
def test_greedy_speculation_prints_what_autoregression_prints(say, run, target):
    same = ["--prompt", "b2 = r", "--temperature", "0", "--dtype", "float64", "--target", target, "--json"]
    drafted, plain = (say("generate", run, *same, "--decoder", name).json for name in ("speculative", "autoregressive"))
    assert drafted["text"] == plain["text"] and len(plain["text"]) > 20
    assert drafted["rounds"] <= plain["rounds"]


def test_batches_are_lists_and_rows_are_what_they_are_alone(say, run):
    same = ["generate", run, "--max-new-tokens", "10", "--dtype", "float64", "--json"]
    rows = say(*same, "--prompt", "a", "--prompt", "a10 = close", "--seed", "5").json
    assert [row["seed"] for row in rows] == [5, 6]
    for prompt, row in zip(("a", "a10 = close"), rows, strict=True):
        alone = say(*same, "--prompt", prompt, "--seed", row["seed"]).json
        assert alone["text"] == row["text"] and alone["evaluations"] == row["evaluations"]
    repeated = say(*same, "--prompt", "a", "--batch", "3", "--seed", "4").json
    assert [row["seed"] for row in repeated] == [4, 5, 6] and repeated[1]["text"] == rows[0]["text"]


def test_stop_strings_end_the_text(say, run):
    whole = say("generate", run, "--prompt", "a", "--seed", "1", "--json", "--decoder", "autoregressive").json["text"]
    stopped = say("generate", run, "--prompt", "a", "--seed", "1", "--json", "--decoder", "autoregressive",
                  "--stop", whole[10:12], "--stop", "never there").json["text"]  # fmt: skip
    assert stopped == whole[: whole.index(whole[10:12])]


def test_prompts_are_taken_as_they_are(say, run):
    for prompt in ("null", "[1, 2]", "{a: 1}", "# 1.0", "-x", "  \n", "[MASK:3]"):
        assert say("generate", run, f"--prompt={prompt}", "--max-new-tokens", "1", "--json").json["prompt"] == prompt


def test_a_prompt_is_printed_with_its_tabs_and_without_what_controls_a_terminal(say, run):
    said = say("generate", run, "--prompt", "if a:\n\tb\u00a0= \x1b[2J\x9b1", "--max-new-tokens", "1", "--seed", "5")
    assert said.out.startswith("if a:\n\tb\u00a0= [2J1")


def test_generate_prints_text_and_statistics(say, run):
    said = say("generate", run, "--prompt", "a1 =", "--max-new-tokens", "60", "--seed", "5")
    result = say("generate", run, "--prompt", "a1 =", "--max-new-tokens", "60", "--seed", "5", "--json").json
    # The terminal is spared what controls it; no line is broken that the model did not break.
    shown, whole = ("".join(c for c in text if c == "\n" or c.isprintable()) for text in (said.out, result["text"]))
    assert shown.startswith(f"a1 ={whole}\n") and len(whole) > 40
    assert f"{result['tokens']} tokens, " in said.err and "cache hit rate" in said.err and "seed 5" in said.err
    assert "cache hit rate" not in said.out  # what is piped on is text alone
    assert say("generate", run, "--template", "b[MASK:2]c").out.startswith("b")


def test_prompts_come_from_files_and_standard_input(say, run, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_bytes(b"a1 =\r\n\tb ")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("é".encode())))
    files = ["--prompt-file", tmp_path / "one.txt", "--prompt-file", "-", "--prompt", "c"]
    results = say("generate", run, *files, "--max-new-tokens", "1", "--json").json
    assert [each["prompt"] for each in results] == ["c", "a1 =\r\n\tb ", "é"]
    (tmp_path / "two.txt").write_text("b[MASK:2]c")
    assert say("generate", run, "--template-file", tmp_path / "two.txt").out.startswith("b")


def test_own_text_is_evaluated_whole_in_the_models_tokens(say, refused, data, run, tmp_path):
    text = "def f(x):\n    return x\n" * 5
    (tmp_path / "own.txt").write_text(text)
    quick = ["--likelihoods", "causal,block", "--json"]
    result = say("evaluate", run, "--data", tmp_path / "own.txt", *quick).json
    tokenizer = caddf.load(run).tokenizer
    assert result["tokens"] == len(tokenizer.encode(text)) + 1 and result["split"] == "test"
    assert result["likelihoods"].keys() == {"causal", "block"}
    say("data", "prepare", "--test", tmp_path / "own.txt", "--tokenizer", data, "--out", tmp_path / "set")
    options = ["--split", "test", "--tail", "score"]
    assert (
        say("evaluate", run, "--data", tmp_path / "set", *options, *quick).json["likelihoods"] == result["likelihoods"]
    )
    shown = ["evaluate", run, "--data", data, "--max-windows", "2", "--samples", "1", "--nfe", "", "--paths", "0"]
    assert "Monte-Carlo" not in say(*shown, "--anchors", "", "--likelihoods", "causal").out
    assert "1 Monte-Carlo samples a window" in say(*shown, "--likelihoods", "diffusion").out
    assert "likelihoods holds 'ppl'; it must be of causal, ar" in refused(
        "evaluate", run, "--data", data, "--likelihoods", "ppl"
    )


def test_show_writes_a_line_a_frame_where_there_is_no_terminal(say, run):
    said = say("generate", run, "--template", "a\n[MASK:4]b", "--decoder", "first_hitting", "--show", "--json")
    assert len(said.err.splitlines()) == 4 and all(line.startswith("a\\n") for line in said.err.splitlines())
    assert [line.count("_") >= 3 - i for i, line in enumerate(said.err.splitlines())] == [True] * 4
    assert said.err.splitlines()[-1] == said.json["text"].replace("\n", "\\n")


def test_show_animates_in_a_terminal(say, run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = say("generate", run, "--prompt", "a", "--max-new-tokens", "8", "--show", "--json")
    assert "\x1b[" in said.err and "\x1b[" not in said.out and said.json["prompt"] == "a"


def test_info_of_a_run_and_of_a_size(say, run):
    own = say("info", run, "--json").json
    assert own["method"] == "caddf-lambda-dce" and own["size"] == "debug" and own["context"] == 32
    counts = own["parameters"]
    assert counts["total"] == sum(p.numel() for p in caddf.load(run).model.parameters())
    assert counts["total"] == sum(counts[part] for part in ("embeddings", "causal", "diffusion", "fusion"))
    assert own["flops_per_token"]["causal"] > 0 and own["memory"]["weights_float32"] == 4 * counts["total"]
    small = say("info", "--model.size", "small", "--json").json
    assert small["vocab_size"] == 50_257 and small["parameters"]["embeddings"] == 50_265 * 768 + 768 * 512
    table = say("info", "--model.size", "medium", "--model.causal", "off").out
    assert "parameters" in table and "memory" in table and "context 4096" in table


# Help.


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith(f"usage: caddf {verb} ")
    for type_name in ("typing", "Optional", "<class", "NoneType", "(type:"):
        assert type_name not in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(say, arguments):
    assert all(f"caddf {verb}" in say(*arguments).out for verb in VERBS)


@pytest.mark.parametrize("group", ["data", "benchmark"])
@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"], ["help"]])
def test_help_of_a_group_lists_its_commands_a_line_each(say, group, asked):
    lines = [line.split() for line in say(group, *asked).out.splitlines() if line.startswith("  ")]
    assert [" ".join(words[1:3]) for words in lines] == [verb for verb in VERBS if verb.startswith(f"{group} ")]


def test_no_two_options_of_a_command_are_explained_by_the_same_words(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        options = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
        texts = [" ".join(option.split()).split(" (default")[0] for option in options]
        said = [re.sub(r"^--\S+( \S+)? ", "", text) for text in texts if text.startswith("--")]
        assert len(said) == len(set(said)) > 0 or verb in ("report", "methods"), (verb, sorted(said))


def test_version(say):
    assert say("--version").out[0].isdigit()


def test_import_warns_of_nothing_and_the_package_is_a_command():
    as_a_module = """
import runpy, sys
sys.argv[1:] = ["evaluate"]
try:
    runpy.run_module("caddf", run_name="__main__")
finally:  # importing what only some commands need would slow all of them down
    print({"datasets", "pyarrow", "tensorboard", "transformers"} & set(sys.modules))
"""
    command = [sys.executable, "-W", "error", "-c", as_a_module]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "set()\n", done.stderr
    assert done.stderr == "caddf: error: model, data must be given; caddf evaluate --help explains every setting\n"


# Training.


def test_a_runs_own_settings_start_another_like_it(say, data, run, tmp_path):
    say("train", "--config", Path(run) / "config.yaml", "--out", tmp_path / "twin")
    assert (tmp_path / "twin" / "config.yaml").read_bytes() == (Path(run) / "config.yaml").read_bytes()
    weights = "checkpoints/latest/model.safetensors"
    assert (tmp_path / "twin" / weights).read_bytes() == (Path(run) / weights).read_bytes()


@pytest.mark.parametrize(
    ("file", "arguments", "method", "found"),
    [
        (None, ["--config", "caddf-t-dce"], "caddf-t-dce", {"denoising": "t-dce"}),
        (None, ["--method=caddf-t-dce"], "caddf-t-dce", {"denoising": "t-dce"}),
        ("method: caddf-t-dce", ["--config", "FILE"], "caddf-t-dce", {"denoising": "t-dce"}),
        ("seed: 3", ["--config=FILE"], "caddf-lambda-dce", {"denoising": "lambda-dce", "seed": 3}),
        ("seed: 3", ["--config", "FILE", "--config", "caddf-t-dce"], "caddf-t-dce", {"denoising": "t-dce", "seed": 3}),
        ("train: {clip: 2}\nseed: 4", ["--seed", "5", "--config", "FILE"], "caddf-lambda-dce", {"seed": 5, "clip": 2}),
        ("model: {causal: off}\ntrain: {learning_rate: 1e-3}", ["--config", "FILE"], "caddf-lambda-dce",
         {"causal": "off", "learning_rate": 1e-3}),
    ],
)  # fmt: skip
def test_methods_files_and_options(data, say, tmp_path, file, arguments, method, found):
    (tmp_path / "file.yaml").write_text(file or "")
    arguments = [argument.replace("FILE", str(tmp_path / "file.yaml")) for argument in arguments]
    none = ["--train.steps", "1", "--train.evaluate_every", "0", "--train.sample_every", "0"]
    say("train", *arguments, *TRAIN, *none, "--data", data, "--out", tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    flat = {**settings, **settings["model"], **settings["objective"], **settings["train"]}
    assert settings["method"] == method
    assert {name: flat[name] for name in found} == found


def test_init_from_on_the_command_line_and_in_a_file(say, data, run, tmp_path):
    weights = caddf.load(run).model.state_dict()
    (tmp_path / "file.yaml").write_text(f"init_from: {run}")
    still = [*TRAIN, "--data", data, "--train.steps", "1", "--train.learning_rate", "1e-12", "--train.ema", "0"]
    for name, arguments in (("option", ["--init-from", run]), ("file", ["--config", tmp_path / "file.yaml"])):
        assert f"weights from {run}\n" in say("train", *still, *arguments, "--out", tmp_path / name).err
        for key, tensor in caddf.load(tmp_path / name).model.state_dict().items():
            torch.testing.assert_close(tensor, weights[key], msg=key)


def test_a_finished_run_says_so(say, run):
    before = sorted(path.name for path in Path(run).rglob("*"))
    said = say("train", "--resume", run)
    assert said.err == f"{run} is finished: all 20 steps are done\n" and said.out == ""
    assert sorted(path.name for path in Path(run).rglob("*")) == before


LONG = ["--train.steps", "40", "--train.checkpoint_every", "7", "--train.log_every", "1", "--train.sample_every", "0"]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("cli") / "whole"
    assert main(["train", *TRAIN, *LONG, "--data", data, "--out", str(run)]) == 0
    return run


def test_stopped_and_resumed_is_uninterrupted(say, data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from caddf.__main__ import main; "
               "raise SystemExit(main())", "train", *TRAIN, *LONG, "--data", data, "--out", str(run)]  # fmt: skip
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while steps_of(run) < 10:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "" and steps_of(run) < 40
    assert process.returncode == 130 and f"go on with: caddf train --resume {run}" in err
    say("train", "--resume", run)
    weights = "checkpoints/latest/model.safetensors"
    assert (run / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    assert losses(run) == losses(uninterrupted)


def rows(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run):
    return max((row["step"] for row in rows(run)), default=0)


def losses(run):
    return [(row["step"], row["loss"], row["parts"]) for row in rows(run) if "loss" in row]


# What is refused: one sentence, exit code 2, and nothing is left behind.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train.steps", "abc"], "train.steps is abc; it must be a whole number"),
        (["--model.size", "huge"], "model.size is huge; it must be one of debug, demo, tiny, small, medium"),
        (["--model.exchange", "both"], "model.exchange is both; it must be one of one_way, mutual"),
        (["--train.stepz", "3"], "there is no setting --train.stepz (did you mean --train.steps?); caddf train --help"),
        (["--train.step=3"], "there is no setting --train.step (did you mean --train.steps?); caddf train --help"),
        (["--steps", "3"], "there is no setting --steps (did you mean --train.steps?); caddf train --help explains"),
        (["--config", "mdlm", "--objective.distill", "1"], "objective.distill is set, but the method mdlm has no such "
         "setting; its objective has form, schedule, times"),
        (["--config", "gpt2", "--objective.x=1"], "objective.x is set, but the method gpt2 has no such setting; its "
         "objective has none"),
        (["stray"], "stray stands by itself, without a setting before it; text of several words needs quotes; caddf"),
        (["--train.steps", "0"], "train.steps is 0; it must be 1 or more"),
        (["--train.learning_rate", ".nan"], "train.learning_rate is nan; it must be above 0, and finite"),
        (["--seed", "-1"], "seed is -1; it must be 0 or more, and less than 2**62"),
        (["--seed", str(2**64)], f"seed is {2**64}; it must be 0 or more, and less than 2**62"),
        (["--device", "tpu"], "device is tpu; it must be one of auto, cpu, cuda, mps"),
        (["--device", "mps"], "device is mps, which this machine does not have; give auto"),
        (["--dtype", "int8"], "dtype is int8; it must be one of auto, float32, bfloat16, float64"),
        (["--model.block_size", "33"], "block_size is 33; it must lie between 1 and the context, 32"),
        (["--method", "abc"], "method is abc; it must be one of caddf-lambda-dce, caddf-t-dce"),
        (["--config", "gpt2", "--method", "mdlm"], "method is mdlm beside config gpt2, which is a method already"),
        (["--config", "nowhere"], "config is nowhere; it must be a method (caddf-lambda-dce, caddf-t-dce"),
        (["--config"], "--config is given without a value; it names a method or a file"),
        (["--data", "nowhere"], "nowhere is no token set: it has no manifest.json; `caddf data prepare` makes one"),
        (["--init-from", "nowhere"], "nowhere does not exist; give a run, a model folder, or OWNER/NAME on the hub"),
        (["--model.context", "9000"], "the training data has"),
        (["--objective.infill", "-1"], "denoise, infill and block are (0.2, -1.0, 0.9)"),
    ],
)  # fmt: skip
def test_train_refuses(data, refused, tmp_path, arguments, sentence):
    if arguments == ["--device", "mps"] and torch.mps.is_available():
        pytest.skip("this machine has the device")
    said = refused("train", "--data", data, "--out", tmp_path / "run", *TRAIN, *arguments)
    assert said.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("train: {steps: abc}", "train.steps is abc; it must be a whole number"),
        ("train: {stepz: 3}", "FILE has train.stepz, which is no setting (did you mean train.steps?); caddf train"),
        ("trian: {steps: 3}", "FILE has trian.steps, which is no setting (did you mean train.steps?); caddf train"),
        ("steps: 3", "FILE has steps, which is no setting (did you mean train.steps?); caddf train --help explains"),
        ("unknown: 3", "FILE has unknown, which is no setting; caddf train --help explains every setting"),
        ("train: 3", "FILE has train, which is no setting (did you mean train.steps or train.batch_size or"),
        ("method: mdlm\nobjective: {distill: 1}", "FILE has objective.distill, but the method mdlm has no such "
         "setting; its objective has form, schedule, times"),
        ("method: abc", "method is abc; it must be one of caddf-lambda-dce, caddf-t-dce"),
        ("method: [a, b]", "method is a,b; it must be one of caddf-lambda-dce, caddf-t-dce"),
        ("- 1", "config is FILE; it must hold lines such as `seed: 1`, and no config of its own"),
        ("", "config is FILE; it must hold lines such as `seed: 1`, and no config of its own"),
        ("config: other.yaml", "config is FILE; it must hold lines such as `seed: 1`, and no config of its own"),
        ("a: : b", "config is FILE, which is not YAML: mapping values are not allowed here"),
    ],
)  # fmt: skip
def test_train_refuses_a_file(data, refused, tmp_path, file, sentence):
    path = tmp_path / "file.yaml"
    path.write_text(file)
    said = refused("train", "--data", data, "--out", tmp_path / "run", *TRAIN, "--config", path)
    assert said.startswith(sentence.replace("FILE", str(path)))
    assert list(tmp_path.iterdir()) == [path]


def test_train_refuses_what_is_missing_there_or_too_much(refused, data, run, tmp_path):
    assert refused("train", "--out", tmp_path / "x").startswith("data is not given; caddf train needs --data SET")
    assert refused("train", "--data", data).startswith("out is not given; caddf train needs --data SET")
    assert refused("train", "--resume", tmp_path).startswith(f"{tmp_path} is no run: it has no config.yaml")
    for other in (
        ["--seed", "0"],
        ["--seed=0"],
        ["--data", data, "--train.steps", "30"],
        ["--config", "caddf-t-dce"],
        ["--method=caddf-t-dce"],
    ):
        for resumed in (["--resume", run], [f"--resume={run}"]):
            assert refused("train", *resumed, *other).startswith(
                f"resume is {run}, beside other settings; a run goes on"
            )
    assert refused("train", *TRAIN, "--data", data, "--out", run).startswith(f"out is {run}, which exists; give a new")
    (tmp_path / "file").write_text("")
    assert refused("train", *TRAIN, "--data", data, "--out", tmp_path / "file" / "run").endswith("Not a directory")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "FILE does not exist; give a file, a folder, stdlib,"),
        (b"", "FILE is empty; it must hold some text"),
        (b" \n", "FILE is empty; it must hold some text"),
        (b"text\xff", "FILE is not UTF-8 at byte 4; convert it to UTF-8"),
    ],
)
def test_data_prepare_refuses(refused, tmp_path, content, sentence):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    for option in ("--input", "--train"):
        said = refused("data", "prepare", option, file, "--out", tmp_path / "set")
        assert said.startswith(sentence.replace("FILE", str(file)))
    assert list(tmp_path.iterdir()) == ([] if content is None else [file])


def test_data_prepare_says_how_to_replace_and_what_a_tokenizer_is_made_of(say, refused, data, tmp_path):
    (tmp_path / "text.txt").write_text(sentences(60, "text"))
    given = ["data", "prepare", "--test", tmp_path / "text.txt"]
    made = f"{tmp_path / 'set'}"
    assert refused(*given, "--out", made).startswith(
        "tokenizer is bpe:8192, which is made from training documents; there are only those of test: give some, or a"
    )
    say(*given, "--out", made, "--tokenizer", data)
    said = refused(*given, "--out", made, "--tokenizer", data)
    assert said == f"out is {made}, which exists; give a new folder, or --overwrite to replace it"
    say(*given, "--out", made, "--tokenizer", data, "--overwrite")


def test_text_shorter_than_one_window_is_refused(say, refused, tmp_path):
    (tmp_path / "text.txt").write_text("short")
    say("data", "prepare", "--train", tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / "set")
    said = refused("train", *TRAIN, "--data", tmp_path / "set", "--out", tmp_path / "run")
    assert "6 tokens; one window needs 32" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--anchors", "0.5,2"], "anchors holds 2.0; each must lie in [0, 1]"),
        (["--anchors", "0.5 1"], "anchors is 0.5 1; it must be numbers, as in 0.5,1"),
        (["--nfe", "0.5"], "nfe is 0.5; it must be whole numbers, as in 1,8"),
        (["--quantize", "int4"], "quantize is int4; it must be one of int8, bf16"),
        (["--samples", "0"], "samples is 0; it must be 1 or more"),
        (["--samples", "few"], "samples is few; it must be a whole number"),
        (["--block-size", "33"], "block_size is 33; it must lie between 1 and the window, 32"),
        (["--block-size", "0"], "block_size is 0; it must be 1 or more"),
        (["--split", "dev"], "SET has no dev split; it has train, validation, test"),
        (["--seed", "-1"], "seed is -1; it must be 0 or more"),
        (["--dtype", "int8"], "dtype is int8; it must be one of float32, bfloat16, float64"),
        (["--device", "abacus"], "device is abacus, which this machine does not have; give auto"),
        (["--data", "nowhere"], "nowhere is no token set: it has no manifest.json; `caddf data prepare` makes one"),
    ],
)
def test_evaluate_refuses(refused, data, run, arguments, sentence):
    assert refused("evaluate", run, "--data", data, *arguments).startswith(sentence.replace("SET", data))


def test_another_tokenizer_is_refused(say, refused, run, tmp_path):
    (tmp_path / "text.txt").write_text(sentences(60, "other"))
    say("data", "prepare", "--train", tmp_path / "text.txt", "--tokenizer", "bytes", "--out", tmp_path / "set")
    said = refused("evaluate", run, "--data", tmp_path / "set", "--split", "train")
    assert said.startswith(f"{tmp_path / 'set'} is tokenised by bytes (") and "tokenizer.json" in said
    assert "has another tokenizer than the data" in refused(
        "train", *TRAIN, "--data", tmp_path / "set", "--out", tmp_path / "run", "--init-from", run
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either a prompt or a template"),
        (["--prompt", "a", "--template", "b[MASK]"], "give either a prompt or a template"),
        (["--template", "a"], "the template has no [MASK] to fill; write [MASK:24] for a hole of 24 tokens"),
        (["--prompt", "z " * 40, "--decoder", "block"], "the prompt has 80 tokens; with this decoder and model it"),
        (["--prompt-file", "nothing.txt"], "nothing.txt cannot be read as text: No such file or directory"),
        (["--prompt", "a", "--stop", ""], "stop holds an empty string, which every text contains; give the text that"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be 1 or more"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan; it must be a number"),
        (
            ["--prompt", "a", "--temperature", ".nan"],
            "temperature is nan; it must be 0 (greedy), or finite and at least 1e-06",
        ),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "temperature is -1.0; it must be 0 (greedy), or finite and at least 1e-06",
        ),
        (["--prompt", "a", "--decoder", "beam"], "decoder is beam; it must be one of ancestral, first_hitting"),
        (["--prompt", "a", "--steps", "4"], "steps is set, but the decoder speculative has no such setting; it has"),
        (["--prompt", "a", "--block-size", "33"], "block_size is 33; it must lie between 1 and the context, 32"),
        (["--prompt", "a", "--target", "draft"], "target is draft; it must be one of causal, fused"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1; it must be 0 or more, and less than 2**62"),
        (["--prompt", "a", "--batch", "0"], "batch is 0; it must be 1 or more"),
        (["--prompt", "a", "--prompt", "b", "--batch", "2"], "batch is 2, which repeats one prompt or template; give"),
        (["--prompt", "a", "--device", "abacus"], "device is abacus, which this machine does not have"),
        (["--prompt"], "--prompt is given without a value"),
    ],
)
def test_generate_refuses(refused, run, arguments, sentence):
    assert refused("generate", run, *arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: truncate(folder / "model.safetensors"), "is truncated or no safetensors file"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "a caddf model of format 1"),
        (shutil.rmtree, "does not exist; give a run, a model folder, or OWNER/NAME on the hub"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused(refused, data, run, tmp_path, damage, sentence):
    folder = Path(shutil.copytree((Path(run) / "checkpoints" / "latest").resolve(), tmp_path / "model"))
    damage(folder)
    assert sentence in refused("evaluate", folder, "--data", data)
    assert sentence in refused("generate", folder, "--prompt", "a")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_info_and_unknown_commands_refuse(refused, run):
    assert refused("info", run, "--model.size", "small").startswith(f"run is {run}, beside settings of a model")
    assert refused("info", "nowhere").startswith("nowhere does not exist")
    assert refused("info", "--vocab-size", "0").startswith("vocab_size is 0")
    assert refused("trian").startswith("there is no command 'trian'; the commands are data prepare, train, evaluate")
    assert refused("data", "prepair") == "there is no command 'data prepair'; the commands are data prepare"


def test_a_token_set_is_no_text(say, data, tmp_path):
    told = say("data", "prepare", "--input", data, "--out", tmp_path / "set", code=2).err
    assert f"{data} is a token set already; give text" in told


def test_a_temporary_file_is_called_by_what_it_will_be():
    for path, name in {
        "a/.run-24156.tmp": "a/run",
        ".x.html-7.tmp": "x.html",
        "/a/.b-3.old.tmp/c": "/a/b/c",
        "/a/.b": "/a/.b",
    }.items():
        assert named(path) == name


@pytest.mark.parametrize("module", ["torch", "caddf.errors"])
def test_interrupted_among_imports_it_says_so_too(module):
    """Before the command line itself is there to catch it."""
    code = (
        "import os, signal, sys, caddf.__main__\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background is born without
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == '{module}': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['caddf', 'methods']\n"
        "caddf.__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "caddf: interrupted\n")


def test_interrupted_and_failed_are_told_apart(say, run, monkeypatch):
    def raising(error):
        def load(*arguments, **settings):
            raise error

        monkeypatch.setattr(generating, "load", load)
        return ["generate", run, "--prompt", "a"]

    assert say(*raising(KeyboardInterrupt()), code=130).err == "caddf: interrupted\n"
    assert say(*raising(TrainingError("the loss is nan")), code=1).err == "caddf: the loss is nan\n"
    with pytest.raises(OSError, match="no file of the user's"):
        main(raising(OSError("no file of the user's")))


def test_where_there_is_no_terminal_progress_is_said_in_lines(monkeypatch, capsys):
    monkeypatch.setattr(display, "SILENCE", 0.0)
    with display.bar("evaluating", "windows") as progress:
        for done in (2, 8):
            progress(done, 8)
    assert capsys.readouterr().err == "evaluating: 2 of 8 windows, about 1 min left\n"
