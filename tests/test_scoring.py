"""Scores of texts and evaluation of token sets, from a loaded model or a plain function."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from over_bytes import text_model
from rich.console import Console

from caddf import InputError, evaluate, load, score
from caddf.cli import main
from caddf.data import TokenSet, prepare
from caddf.evaluation import EvaluationConfig, block_nll, causal_nll
from caddf.evaluation import score as lk_score
from caddf.evaluation.protocol import PRESETS, Protocol
from caddf.experiment import METHODS
from caddf.model_settings import ModelSettings
from caddf.running import RunSettings, ValidationSettings, start
from caddf.scoring import UNNAMED
from caddf.training import TrainConfig

FEW = EvaluationConfig(samples=2, anchors=(0.5,), nfe=(2,), paths=0)


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    for name, count in (("train", 9), ("validation", 5), ("short", 1)):
        (folder / f"{name}.txt").write_text("a few words. " * count)
    splits = {"train": folder / "train.txt", "validation": folder / "validation.txt", "test": folder / "short.txt"}
    return prepare(folder / "set", tokenizer="bytes", **splits)


def test_scores_are_the_likelihoods_token_by_token(model):
    texts = ["some text", "more"]
    rows = [torch.tensor([[*text.encode()]]) for text in texts]
    for scores, row in zip(score(model, texts), rows, strict=True):
        assert scores.shape == (row.shape[1],)
        torch.testing.assert_close(-scores.sum(), causal_nll(model.model, row)[0])
    (blocks,) = score(model, "some text", likelihood="block", block_size=4)
    torch.testing.assert_close(-blocks.sum(), block_nll(model.model, rows[0], 4)[0])
    (own,) = score(model, "some text", likelihood="block")
    torch.testing.assert_close(-own.sum(), block_nll(model.model, rows[0], model.model.block_size)[0])


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        ("", {}, "a text has 0 tokens; to be scored it must have 1 to 32"),
        ("a" * 33, {}, "a text has 33 tokens"),
        ("a", {"likelihood": "diffusion"}, "likelihood is diffusion; it must be one of causal, ar, block"),
        ("a", {"likelihood": "block", "block_size": 0}, "block_size is 0; it must be 1 or more"),
    ],
)
def test_what_has_no_score(model, text, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        score(model, text, **settings)


def test_a_token_set_its_folder_and_its_windows_are_the_same(model, data):
    windows = torch.from_numpy(data.split("validation").windows(32).astype("int64"))
    assert len(windows) == 2
    results = [evaluate(model, each, settings=FEW) for each in (data, data.folder, str(data.folder), windows)]
    cut = [result.pop("protocol", None) for result in results]
    assert cut[3] is None and cut[0] == cut[1] == cut[2]
    documents = [result["per_window"].pop("documents", None) for result in results]
    assert documents == [[0, 0]] * 3 + [None]  # a tensor does not say
    assert results[0] == results[1] == results[2] == results[3]
    causal = results[0]["likelihoods"]["causal"]
    assert math.isclose(causal["nll"], causal_nll(model.model, windows).sum().item() / 64)
    assert causal["bits_per_byte"] == pytest.approx(causal["nll"] / math.log(2))  # a byte a token
    assert results[0]["mtp"]["block_size"] == model.model.block_size


def test_block_size_and_progress_reach_the_suite(model, data):
    seen = []
    settings = EvaluationConfig(samples=1, anchors=(), nfe=(), paths=0, block_size=4, batch_size=1)
    result = evaluate(model, data, split="train", settings=settings, progress=lambda *done: seen.append(done))
    assert result["mtp"]["block_size"] == 4 and seen == [(1, 3), (2, 3), (3, 3)]


def test_a_protocol_cuts_and_counts(model, data):
    """Special tokens beside 30 of text: which count, and that they have no bytes."""
    found = {}
    for name, scored in (("mdlm", 32), ("mdlm-ar", 31), ("bd3lm", 31)):
        protocol = replace(PRESETS[name], length=32, split="train")
        result = found[name] = evaluate(model, data, protocol=protocol, settings=FEW)
        assert (result["windows"], result["tokens"]) == (3, 3 * scored)
        assert result["protocol"] == asdict(replace(protocol, samples=2, max_windows=200))
        causal = result["likelihoods"]["causal"]
        bytes_ = causal["nll"] * causal["tokens"] / math.log(2) / causal["bits_per_byte"]
        assert bytes_ == pytest.approx(3 * 30)  # the 3 windows end before the document does
    nats = {name: each["likelihoods"]["causal"]["nll"] * each["tokens"] for name, each in found.items()}
    text = data.split("train").tokens[:90].astype("int64").reshape(3, 30)
    rows = torch.nn.functional.pad(torch.from_numpy(text), (1, 1), value=model.tokenizer.eos_id)
    token_nats = -lk_score(model.model, rows)
    assert nats["mdlm"] == pytest.approx(token_nats.sum().item())
    assert nats["mdlm-ar"] == nats["bd3lm"] == pytest.approx(token_nats[:, 1:].sum().item())


def test_what_a_protocol_leaves_open_is_resolved(model, data):
    result = evaluate(model, data, split="train")["protocol"]
    assert (result["name"], result["split"], result["length"], result["samples"]) == ("caddf", "train", 32, 8)
    assert evaluate(model, data, settings=FEW)["protocol"]["split"] == "validation"
    seeded = evaluate(model, data, protocol=Protocol(split="train", samples=1, seed=5, max_windows=1))
    assert (seeded["samples"], seeded["windows"]) == (1, 1) and seeded["protocol"]["name"] == "custom"


def test_chosen_windows_keep_their_noise(model, data):
    """However windows are chosen, before they are cut out or after, figures are the same to the bit."""
    few = replace(FEW, max_windows=2, seed=3)
    cut = torch.from_numpy(data.split("train").windows(32).astype("int64"))
    assert (
        evaluate(model, data, split="train", settings=few)["likelihoods"]
        == (evaluate(model, cut, settings=few)["likelihoods"])
    )


def test_a_stride_scores_every_token_once(model, data):
    """The causal branch by hand, its context from the windows before."""
    protocol = Protocol(length=32, stride=10, split="train", tail="score", max_windows=None)
    result = evaluate(model, data, protocol=protocol, settings=FEW)
    text = torch.from_numpy(data.split("train").tokens.astype("int64"))
    nats = [-lk_score(model.model, text[None, :32])[0]]
    for begin in range(10, len(text) - 22, 10):
        nats.append(-lk_score(model.model, text[None, begin : begin + 32])[0, 22:])
    nats = torch.cat(nats)
    assert len(nats) == len(text) == result["tokens"]
    assert result["likelihoods"]["causal"]["nll"] == pytest.approx(nats.mean().item())


@pytest.fixture
def say(capsys):
    """Runs a command; its exit code, output and errors."""

    def say(*arguments):
        return main([str(argument) for argument in arguments]), *capsys.readouterr()

    return say


def test_the_command_names_the_protocol_and_its_choices(model, data, tmp_path, say):
    model.save_pretrained(folder := tmp_path / "model")
    quick = ["--anchors", "[]", "--nfe", "[]", "--paths", "0", "--device", "cpu"]
    command = ["evaluate", folder, "--data", data.folder, *quick]
    code, out, _ = say(*command, "--protocol", "bd3lm", "--length", "32", "--split", "train", "--seed", "4", "--json")
    result = json.loads(out)
    expected = replace(PRESETS["bd3lm"], length=32, split="train", seed=4)
    assert code == 0 and result["protocol"] == asdict(expected) and result["split"] == "train"
    assert result["samples"] == 1 and result["tokens"] == 3 * 31
    python = evaluate(load(folder), data, protocol=expected)
    assert python["likelihoods"]["causal"] == result["likelihoods"]["causal"]
    code, out, _ = say(*command, "--json", "--max-windows", "null", "--samples", "1")
    assert (json.loads(out)["protocol"], code) == (asdict(replace(UNNAMED, length=32, max_windows=None, samples=1)), 0)
    code, out, _ = say(*command, "--protocol", "mdlm", "--length", "20", "--tail", "score", "--eos", "false")
    assert code == 0 and "protocol mdlm: length 20, stride None, documents concatenate, eos False, bos scored" in out
    for wrong, sentence in (
        (["--protocol", "gpt"], "protocol is gpt; it must be one of caddf, sedd, radd, mdlm, mdlm-ar, bd3lm"),
        (["--protocol", "sedd"], "length is 1024; it must be at most the model's context, 32"),
        (["--protocol", "mdlm", "--length", "32", "--stride", "9"], "stride is 9 and bos is scored; what overlaps"),
        (["--stride", "33"], "stride is 33; it must be at most the 32 tokens of text in a window"),
        (["--bos", "last"], "bos is last; it must be one of none, given, scored"),
    ):
        code, out, err = say(*command, *wrong)
        assert (code, out) == (2, "") and sentence in err


TRAINING = "one two three four five. " * 40


@pytest.mark.parametrize("method", METHODS)
def test_every_config_trains_and_evaluates(method, tmp_path):
    """At `debug`, on bytes, under a protocol with given tokens and a tail."""
    (tmp_path / "text.txt").write_text(TRAINING)
    data = prepare(tmp_path / "set", train=tmp_path / "text.txt", validation=tmp_path / "text.txt", tokenizer="bytes")
    settings = RunSettings(
        str(data.folder),
        method=method,
        model=ModelSettings(size="debug"),
        objective=METHODS[method].settings(**METHODS[method].defaults),
        train=TrainConfig(steps=6, batch_size=2, tensorboard=False, sample_every=0),
        validation=ValidationSettings(windows=1, samples=1),
        device="cpu",
        dtype="float32",
    )
    assert start(settings, tmp_path / "run", Console(quiet=True)).step == 6
    protocol = replace(PRESETS["bd3lm"], length=32, stride=15, tail="score", max_windows=4)
    result = evaluate(load(tmp_path / "run"), data, protocol=protocol, settings=replace(FEW, max_windows=4))
    assert result["windows"] == 4 and result["tokens"] < 4 * 31
    name = "causal" if method == "gpt2" else "diffusion"
    assert 0 < result["likelihoods"][name]["nll"] < math.inf and result["likelihoods"][name]["bits_per_byte"] > 0


def test_a_plain_function_in_the_models_place():
    """The uniform distribution has log V nats a token under every likelihood and bound."""

    def uniform(x_t):
        return torch.full((*x_t.shape, 5), -math.log(5), dtype=torch.float64)

    windows = torch.arange(12).remainder(5).reshape(2, 6)
    settings = EvaluationConfig(samples=2, anchors=(0.5,), nfe=(3,), paths=2, importance_steps=2, block_size=3)
    found = evaluate(uniform, windows, vocab_size=5, settings=settings)["likelihoods"]
    every = [found[name] for name in ("causal", "ar", "block", "diffusion")]
    for each in [*every, *found["hybrid"], *found["nfe"], *found["importance_weighted"]]:
        assert each["nll"] == pytest.approx(math.log(5)) and each["bits_per_byte"] is None
    assert found["truncated"]["nll"] == pytest.approx(0.999 * math.log(5))  # it stops at lambda = 0.999


def test_what_cannot_be_evaluated(model, data, tmp_path):
    with pytest.raises(InputError, match="vocab_size is not set"):
        evaluate(lambda x: x, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="the model has no tokenizer; give windows"):
        evaluate(lambda x: x, data, vocab_size=5)
    with pytest.raises(InputError, match="block_size is 33; it must lie between 1 and the window, 32"):
        evaluate(model, data, settings=EvaluationConfig(block_size=33))
    with pytest.raises(InputError, match="protocol is sedd, but data is windows, which are cut already"):
        evaluate(model, torch.zeros(1, 4, dtype=torch.int64), protocol="sedd")
    with pytest.raises(InputError, match="windows is empty"):
        evaluate(model, [])
    with pytest.raises(InputError, match="the test split has 14 tokens; one window needs 32"):
        evaluate(model, data, split="test")
    with pytest.raises(InputError, match="has no dev split; it has train, validation, test"):
        evaluate(model, data, split="dev")
    with pytest.raises(InputError, match="seed is 9223372036854775808"):
        evaluate(model, data, settings=EvaluationConfig(seed=2**63))
    with pytest.raises(InputError, match="is no token set"):
        evaluate(model, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a few other words, and a few words more. " * 20)
    other = prepare(tmp_path / "other", train=text, tokenizer="bpe:260")
    with pytest.raises(InputError, match=r"is tokenised by bpe:260 .*, the model by bytes .*tokenizer.json"):
        evaluate(model, TokenSet.open(other.folder), split="train")
