"""Two models on the same windows: what they have in common cancels."""

import dataclasses
import math

import pytest
import torch
from test_suite import SETTINGS, network, windows

from caddf.errors import InputError
from caddf.evaluation import evaluate, paired
from caddf.evaluation.pairing import comparisons
from caddf.evaluation.protocol import Window


def made(per_window: dict[str, list[float]], tokens: list[int], text: str = "a") -> dict:
    return {"per_window": {"text": text, "tokens": tokens, "nats": per_window}}


def test_what_is_common_to_both_cancels() -> None:
    """Windows of one length: the mean difference and its standard error, exponentiated."""
    theirs = torch.tensor([40.0, 10.0, 70.0, 25.0])
    less = torch.tensor([1.0, -2.0, 3.0, 0.5])
    ratio = paired(made({"block": (theirs + less).tolist()}, [8] * 4), made({"causal": theirs.tolist()}, [8] * 4),
                   "block", "causal")  # fmt: skip
    assert ratio.ratio == pytest.approx(math.exp(less.mean() / 8))
    assert ratio.standard_error == pytest.approx(ratio.ratio * less.std().item() / 8 / 2)
    assert (ratio.likelihood, ratio.against) == ("block", "causal")


def test_windows_of_one_document_are_one_observation() -> None:
    rows = [Window(row, torch.ones(8, dtype=torch.bool), document=i // 2) for i, row in enumerate(windows())]
    ours, theirs = (evaluate(network(draft=draft), rows, SETTINGS) for draft in ("factorised", "chained"))
    found = paired(ours, theirs, "causal", "block")
    less = torch.tensor(ours["per_window"]["nats"]["causal"]) - torch.tensor(theirs["per_window"]["nats"]["block"])
    pairs = less.double().view(-1, 2).mean(1) / 8
    assert found.document_error == pytest.approx(found.ratio * pairs.std().item() / len(pairs) ** 0.5)
    assert ours["per_window"]["documents"] == [i // 2 for i in range(len(rows))]
    whole = ours["likelihoods"]["causal"]
    means = torch.tensor(ours["per_window"]["nats"]["causal"]).double().view(-1, 2).mean(1) / 8
    assert whole["document_error"] == pytest.approx(means.std().item() / len(means) ** 0.5, rel=1e-4)
    one = evaluate(network(), windows(), SETTINGS)  # of a tensor they are not known
    assert "documents" not in one["per_window"] and one["likelihoods"]["ar"]["document_error"] is None
    assert paired(one, one, "ar").document_error is None


def test_a_ratio_of_perplexities_is_that_of_the_totals() -> None:
    """Windows of several lengths, of which some tokens are scored."""
    rows = [Window(row, torch.arange(8) >= 2 * (i % 3)) for i, row in enumerate(windows())]
    ours, theirs = (evaluate(network(draft=draft), rows, SETTINGS) for draft in ("factorised", "chained"))
    for name in ("causal", "block", "diffusion"):
        ppl = [each["likelihoods"][name]["ppl"] for each in (ours, theirs)]
        assert paired(ours, theirs, name).ratio == pytest.approx(ppl[0] / ppl[1], rel=1e-4)
    hybrid = [each["likelihoods"]["hybrid"][1]["ppl"] for each in (ours, theirs)]
    assert paired(ours, theirs, "hybrid 0.5").ratio == pytest.approx(hybrid[0] / hybrid[1], rel=1e-4)
    mine = paired(ours, ours, "causal")
    assert (mine.ratio, mine.standard_error) == (1, 0)
    assert paired(*(evaluate(network(), rows[:1], SETTINGS) for _ in "ab"), "ar").standard_error is None


def test_every_likelihood_is_compared_with_its_like() -> None:
    ours = made({"causal": [1.0, 2], "block": [1.0, 2], "diffusion": [3.0, 4], "nfe 4": [5.0, 6]}, [2, 2])
    theirs = made({"causal": [1.0, 2], "diffusion": [3.0, 4]}, [2, 2])
    pairs = [(ratio.likelihood, ratio.against) for ratio in comparisons(ours, theirs)]
    assert pairs == [("causal", "causal"), ("block", "causal"), ("diffusion", "diffusion")]


def test_other_windows_are_not_compared() -> None:
    whole = evaluate(network(), windows(), SETTINGS)
    others = [
        evaluate(network(), windows().flip(0), SETTINGS),  # another text
        evaluate(network(), windows(), dataclasses.replace(SETTINGS, max_windows=3)),
        evaluate(network(), [Window(row, torch.arange(8) > 0) for row in windows()], SETTINGS),
    ]
    for other in others:
        with pytest.raises(InputError, match="of other windows"):
            paired(whole, other, "causal")
    alike = evaluate(network(), windows(), dataclasses.replace(SETTINGS, batch_size=3))
    assert paired(whole, alike, "causal").ratio == pytest.approx(1)
    with pytest.raises(InputError, match="likelihood is importance; this evaluation has causal, ar, block"):
        paired(whole, whole, "importance")
    del alike["per_window"]
    with pytest.raises(InputError, match="no per_window"):
        paired(whole, alike, "causal")
