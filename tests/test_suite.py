"""`evaluate`: what it reports, and that a window's numbers are its own."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from enumeration import entropy, exact_denoiser, random_denoiser, random_source, support

from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig, ar_nll, block_nll, causal_nll, evaluate
from caddf.evaluation.likelihood import read_exact
from caddf.evaluation.protocol import Protocol, Window
from caddf.evaluation.protocol import windows as cut_windows
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig

SETTINGS = EvaluationConfig(batch_size=4, nfe=(2, 8), block_size=4)


def network(**settings: object) -> DualBranch:
    torch.manual_seed(1)
    values = {"causal": BranchConfig(1, 8, 2), **settings}
    model = DualBranch(ModelConfig(5, 8, BranchConfig(1, 8, 2), block_size=4, **values)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def windows(count: int = 10) -> torch.Tensor:
    return torch.randint(5, (count, 8), generator=torch.Generator().manual_seed(0))


def assert_same(a: object, b: object) -> None:
    """Equal up to the rounding of sums, through all levels."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == (b if b is None or isinstance(b, str) else pytest.approx(b, rel=1e-10))


@pytest.mark.parametrize("draft", ["factorised", "chained"])
def test_no_result_depends_on_the_batch_size(draft: str) -> None:
    model = network(draft=draft)
    results = [
        evaluate(model, windows(), dataclasses.replace(SETTINGS, batch_size=size), byte_lengths=torch.arange(1, 6))
        for size in (1, 3, 100)
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    other = evaluate(model, windows(), dataclasses.replace(SETTINGS, seed=1))
    assert other["likelihoods"]["diffusion"]["nll"] != results[0]["likelihoods"]["diffusion"]["nll"]


@pytest.mark.parametrize("chosen", ["causal", "ar", "block", "diffusion", "hybrid", "nfe", "importance_weighted"])
def test_a_likelihood_alone_is_what_it_is_among_others(chosen: str) -> None:
    """Exact ones to the last digit; of bounds the noise is drawn in turn, so that they are other draws."""
    model = network()
    every = evaluate(model, windows(), SETTINGS)["likelihoods"]
    alone = evaluate(model, windows(), dataclasses.replace(SETTINGS, likelihoods=(chosen,)))
    assert "accuracy" not in alone["mtp"]
    besides = {"diffusion": {"truncated"}, "hybrid": {"ar", "diffusion", "truncated"}}.get(chosen, set())
    assert alone["likelihoods"].keys() == {chosen} | besides
    if chosen in ("causal", "ar", "block", "diffusion", "hybrid"):
        for name in alone["likelihoods"].keys() - {"hybrid"}:
            assert_same(alone["likelihoods"][name], every[name])


def test_likelihoods_that_are_none() -> None:
    with pytest.raises(InputError, match="likelihoods holds 'perplexity'; it must be of causal, ar, block"):
        dataclasses.replace(SETTINGS, likelihoods=("perplexity",))
    left_to_right = CausalModel(CausalConfig(5, 8, BranchConfig(1, 8, 2), block_size=4)).double()
    with pytest.raises(InputError, match="likelihoods is diffusion, of which this model has none"):
        evaluate(left_to_right, windows(), dataclasses.replace(SETTINGS, likelihoods=("diffusion",)))


def test_what_is_reported() -> None:
    model, x0, byte_lengths = network(), windows(), torch.arange(1, 6)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        model, x0.int(), SETTINGS, byte_lengths=byte_lengths, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["tokens"], result["samples"], result["windows"]) == (80, 8, 10)
    likelihoods = result["likelihoods"]
    text_bytes = byte_lengths[x0].sum().item()
    for name, nats in (
        ("causal", causal_nll(model, x0)),
        ("ar", ar_nll(model, x0)),
        ("block", block_nll(model, x0, 4)),
    ):
        nll = nats.sum().item() / 80
        assert likelihoods[name]["nll"] == pytest.approx(nll)
        assert likelihoods[name]["ppl"] == pytest.approx(math.exp(nll))
        assert likelihoods[name]["bits_per_byte"] == pytest.approx(nll * 80 / math.log(2) / text_bytes)
        assert likelihoods[name]["standard_error"] == pytest.approx((nats / 8).std().item() / 10**0.5)
    assert likelihoods["truncated"]["nll"] < likelihoods["diffusion"]["nll"]
    assert [entry["lambda"] for entry in likelihoods["hybrid"]] == [0.25, 0.5, 0.75]
    assert [entry["steps"] for entry in likelihoods["nfe"]] == [2, 8]
    assert [(entry["steps"], entry["paths"]) for entry in likelihoods["importance_weighted"]] == [(4, 2)]
    assert set(result["accuracy"]) == {"ar", "diffusion"}
    assert set(result["mtp"]) == {"accuracy", "agreement", "block_size"}
    own = evaluate(model, x0, dataclasses.replace(SETTINGS, block_size=None))  # 4, as in SETTINGS
    assert_same(own["likelihoods"]["block"]["nll"], likelihoods["block"]["nll"])
    assert own["mtp"]["block_size"] == 4
    assert "bits_per_byte" in evaluate(model, x0, SETTINGS)["likelihoods"]["ar"]


def test_what_a_model_does_not_have_is_absent() -> None:
    result = evaluate(network(causal=None, exchange="one_way"), windows(), dataclasses.replace(SETTINGS, paths=0))
    assert set(result["likelihoods"]) == {"diffusion", "truncated", "nfe"}
    assert set(result["accuracy"]) == {"diffusion"}
    assert set(result["mtp"]) == {"accuracy", "block_size"}


def test_an_exact_denoiser_scores_the_entropy() -> None:
    """A function in the place of a model; 400 windows, at 5 standard errors (odds of 6e-7 for each of 7 numbers)."""
    p0 = random_source(2, 4)
    x0, p = support(p0)
    drawn = x0[p.multinomial(400, replacement=True, generator=torch.Generator().manual_seed(0))]
    settings = EvaluationConfig(batch_size=100, block_size=2, nfe=(2,), paths=0, samples=4)
    likelihoods = evaluate(exact_denoiser(p0), drawn, settings, vocab_size=2)["likelihoods"]
    truth = entropy(p0) / 4
    for result in [*(likelihoods[name] for name in ("causal", "ar", "block", "diffusion")), *likelihoods["hybrid"]]:
        assert abs(result["nll"] - truth) < 5 * result["standard_error"]
    assert likelihoods["nfe"][0]["nll"] > truth


def test_figures_are_those_of_earlier_versions() -> None:
    """Recorded before windows could hold given tokens: where all are scored, nothing has changed, draws included."""
    x0 = torch.randint(3, (11, 5), generator=torch.Generator().manual_seed(0))
    settings = EvaluationConfig(4, samples=4, nfe=(3,), max_windows=9, seed=3, block_size=2, anchors=(0.5,))
    result = evaluate(random_denoiser(3, 5), x0, settings, vocab_size=3)
    found = result["likelihoods"]
    figures = {name: (found[name]["nll"], found[name]["standard_error"]) for name in ("ar", "diffusion", "truncated")}
    for name in ("hybrid", "nfe", "importance_weighted"):
        figures[name] = (found[name][0]["nll"], found[name][0]["standard_error"])
    assert_same(list(figures.values()), [
        (1.7930673825231436, 0.13499072082891075), (1.7187270877529783, 0.14275793327817796),
        (1.7171418404386296, 0.14261654522803555), (1.7598942227833618, 0.20247006984364627),
        (1.5695020221880756, 0.20246925932756066), (1.3762883657929206, 0.1793297389310581),
    ])  # fmt: skip
    assert_same(result["accuracy"], {"ar": 0.24444444444444446, "diffusion": 0.27175925925925926})
    assert_same(result["mtp"], {"accuracy": 0.3055555555555556, "agreement": 0.6111111111111112, "block_size": 2})


# Windows of given and scored tokens.


def ragged() -> list[Window]:
    """Of two lengths and three numbers of given tokens, mixed; the last has no whole block of scored ones."""
    x0, every = windows(9), []
    for i, (length, given) in enumerate([(8, 0), (8, 2), (6, 1), (8, 0), (8, 2), (8, 2), (6, 1), (8, 0), (6, 3)]):
        every.append(Window(x0[i, :length], torch.arange(length) >= given))
    return every


def test_windows_that_are_all_scored_are_a_tensor() -> None:
    model, x0 = network(), windows()
    listed = [Window(row, torch.ones(8, dtype=torch.bool)) for row in x0]
    assert evaluate(model, listed, SETTINGS) == evaluate(model, x0, SETTINGS)


@pytest.mark.parametrize("draft", ["factorised", "chained"])
def test_unequal_windows_do_not_depend_on_the_batch_size(draft: str) -> None:
    model, lengths = network(draft=draft), torch.arange(1, 6)
    sizes = [dataclasses.replace(SETTINGS, batch_size=size, block_size=3) for size in (1, 2, 100)]
    results = [evaluate(model, ragged(), size, byte_lengths=lengths) for size in sizes]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_totals_are_over_scored_tokens_alone() -> None:
    model, byte_lengths, every = network(), torch.arange(1, 6), ragged()
    settings = dataclasses.replace(SETTINGS, block_size=3)
    result = evaluate(model, every, settings, byte_lengths=byte_lengths)
    counts = torch.tensor([int(row.scored.sum()) for row in every])
    tokens = torch.cat([row.tokens[row.scored] for row in every])
    assert (result["tokens"], result["windows"]) == (len(tokens), 9) == (counts.sum(), len(every))
    right = 0.0
    for name in ("causal", "ar", "block"):
        nats = []
        for row in every:
            out = read_exact(model, row.tokens[None], name, 3)
            nats.append(out.nats[0, row.scored].sum())
            right += (out.best[0] == row.tokens)[row.scored].sum().item() if name == "ar" else 0
        nats, found = torch.stack(nats), result["likelihoods"][name]
        nll = (nats.sum() / counts.sum()).item()
        assert found["nll"] == pytest.approx(nll)
        assert found["bits_per_byte"] == pytest.approx(nats.sum().item() / math.log(2) / byte_lengths[tokens].sum())
        spread = (nats - nll * counts).std(correction=0) * (9 / 8) ** 0.5 / counts.double().mean() / 3
        assert found["standard_error"] == pytest.approx(spread.item())
    assert result["accuracy"]["ar"] == pytest.approx(right / len(tokens))
    # Each window as it is alone: its noise is that of its place, which it may carry with it.
    parts = []
    for i, row in enumerate(every):
        alone = Window(row.tokens, row.scored, index=i)
        parts.append(evaluate(model, [alone], settings)["likelihoods"])
    for name in ("diffusion", "truncated"):
        total = sum(part[name]["nll"] * int(count) for part, count in zip(parts, counts, strict=True))
        assert result["likelihoods"][name]["nll"] == pytest.approx(total / len(tokens))


def test_what_is_given_is_context() -> None:
    """The exact denoiser of a source: every figure is the conditional entropy, per scored token.

    Of 600 windows at 5 standard errors (odds of 6e-7 for each of 7 numbers).
    """
    p0 = random_source(2, 4, seed=2)
    x0, p = support(p0)
    drawn = x0[p.multinomial(600, replacement=True, generator=torch.Generator().manual_seed(0))]
    listed = [Window(row, torch.arange(4) >= 2) for row in drawn]
    settings = EvaluationConfig(batch_size=100, block_size=2, nfe=(2,), paths=0, samples=4, max_windows=None)
    found = evaluate(exact_denoiser(p0), listed, settings, vocab_size=2)["likelihoods"]
    truth = (entropy(p0) - entropy(p0.sum((2, 3)))) / 2
    assert truth != pytest.approx(entropy(p0) / 4, abs=0.05)
    for result in [*(found[name] for name in ("causal", "ar", "block", "diffusion")), *found["hybrid"]]:
        assert abs(result["nll"] - truth) < 5 * result["standard_error"] and result["tokens"] == 1200


def markov(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A first token's law and a matrix of transitions."""
    generator = torch.Generator().manual_seed(0)
    first, steps = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (states, (states, states))
    )
    return first.softmax(-1), (2 * steps).softmax(-1)


@pytest.mark.parametrize("bos", ["none", "given"])
@pytest.mark.parametrize("stride", [1, 2, None])
def test_a_stride_over_an_exact_causal_model_is_the_direct_sum(stride: int | None, bos: str) -> None:
    """A Markov chain needs one token of context: with a stride all have it, without one the first of a window not."""
    first, steps = markov(5)

    def model(x_t: torch.Tensor) -> torch.Tensor:
        before = torch.nn.functional.pad(x_t[:, :-1], (1, 0), value=5)
        return torch.cat([steps, first[None]]).log()[before]

    text = torch.randint(1, 5, (23,), generator=torch.Generator().manual_seed(1))
    text[[9, 22]] = 0  # two documents' ends
    protocol = Protocol(length=6 + (bos == "given"), stride=stride, bos=bos, tail="score", max_windows=None)
    cut = cut_windows(text.numpy(), protocol, eos_id=0)
    assert len({len(row.tokens) for row in cut}) == (1 if stride == 1 else 2)
    found = evaluate(model, cut, dataclasses.replace(SETTINGS, nfe=(), anchors=(), paths=0), vocab_size=5)
    expected = -steps.log()[text[:-1], text[1:]].sum() - (first if bos == "none" else steps[0]).log()[text[0]]
    for start in (6, 12, 18) if stride is None else ():
        begun = (first if bos == "none" else steps[0]).log()[text[start]]
        expected += steps.log()[text[start - 1], text[start]] - begun
    for name in ("causal", "ar", "block"):
        assert found["likelihoods"][name]["nll"] == pytest.approx(expected.item() / 23) and found["tokens"] == 23


def test_a_choice_of_windows() -> None:
    model, x0 = network(), windows(30)
    some = dataclasses.replace(SETTINGS, max_windows=7)
    result = evaluate(model, x0, some)
    assert result["windows"] == 7 and result == evaluate(model, x0, some)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:7]
    assert result["likelihoods"]["ar"]["nll"] == pytest.approx(ar_nll(model, x0[order]).mean().item() / 8)
    assert evaluate(model, x0[:3], some)["windows"] == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"anchors": (0.5, 2.0)}, "anchors holds 2.0"),
        ({"nfe": (0,)}, "nfe holds 0"),
        ({"paths": -1}, "paths is -1"),
        ({"max_windows": 0}, "max_windows is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**setting)


def test_no_windows() -> None:
    with pytest.raises(InputError, match="at least one window"):
        evaluate(network(), torch.zeros(0, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"windows has shape \(8,\)"):
        evaluate(network(), torch.zeros(8, dtype=torch.int64))
