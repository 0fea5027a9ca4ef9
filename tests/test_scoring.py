"""Scores of texts and evaluation of token sets, from a loaded model or a plain function."""

import math

import pytest
import torch

from caddf import InputError, TextModel, evaluate, score
from caddf.data import TokenSet, prepare
from caddf.evaluation import EvaluationConfig, block_nll, causal_nll
from caddf.experiment import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.tokenizer import Tokenizer

FEW = EvaluationConfig(samples=2, anchors=(0.5,), nfe=(2,), paths=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.plain_bytes()
    config = ModelSettings(size="debug").dual(tokenizer.vocab_size, tokenizer.eos_id)
    return TextModel(DualBranch(config).double().eval().requires_grad_(False), tokenizer)


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
        ("a", {"likelihood": "block", "block_size": 0}, "block_size is 0; it must be at least 1"),
    ],
)
def test_what_has_no_score(model, text, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        score(model, text, **settings)


def test_a_token_set_its_folder_and_its_windows_are_the_same(model, data):
    windows = torch.from_numpy(data.split("validation").windows(32).astype("int64"))
    assert len(windows) == 2
    results = [evaluate(model, each, settings=FEW) for each in (data, data.folder, str(data.folder), windows)]
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
