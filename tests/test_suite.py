"""`evaluate`: what it reports, and that a window's numbers are its own."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from enumeration import entropy, exact_denoiser, random_source, support

from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig, ar_nll, block_nll, causal_nll, evaluate
from caddf.models.backbone import DualBranch
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
        assert a == pytest.approx(b, rel=1e-10)


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
        ({"nfe": (0,)}, "nfe is 0"),
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
