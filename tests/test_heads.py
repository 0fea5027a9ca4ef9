"""Losses of several heads with their gradients made at once, against autograd through all logits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from catalogue import CONTEXT, MODELS, VOCABULARY, build, draw_tokens
from test_synergistic import SMALL

from caddf.interface import Head, Projection
from caddf.objectives import heads as module
from caddf.objectives.distillation import Distillation
from caddf.objectives.heads import Term, score

ROWS = 5
KINDS = {"tied": MODELS["tied"], "separate": MODELS["late-mutual-chained"], "small": SMALL["late-mutual-small"]}


class Plain:
    """A model without `projection`: what is asked of it goes through all logits, and autograd."""

    def __init__(self, model) -> None:
        self.nll, self.log_probs = model.nll, model.log_probs


def readings(model, dtype=torch.float64):
    """States of three heads that want gradients, tokens, and weights that are 0 at some positions."""
    torch.manual_seed(1)
    drawn = {
        head: torch.randn(ROWS, CONTEXT, width, dtype=dtype).requires_grad_()
        for head, width in (("fused", 16), ("draft", 12), ("causal", 16))
    }
    x0, masked = draw_tokens(ROWS), torch.rand(ROWS, CONTEXT) < 0.6
    known = masked if model.draft_tokens is None else masked & torch.isin(x0, model.draft_tokens)
    weights = torch.rand(3, ROWS, CONTEXT, dtype=torch.float64)
    terms: dict[Head, Term] = {
        "fused": Term(masked * weights[0]),
        "draft": Term(known * weights[1], 0.7),
        "causal": Term(weights[2], 1.3),
    }
    return SimpleNamespace(**drawn, chained=True), x0, terms


def learnt(model, asked, states, x0, terms, how, through=1.0):
    """Total, parts, and every gradient of `through` times the total."""
    model.zero_grad()
    for head in ("fused", "draft", "causal"):
        getattr(states, head).grad = None
    scores = score(asked, states, x0, terms, how)
    (through * scores.total).backward()
    gradients = {head: getattr(states, head).grad for head in ("fused", "draft", "causal")}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    return scores, {name: gradient for name, gradient in gradients.items() if gradient is not None and gradient.any()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [None, *(Distillation(*each) for each in itertools.product((0.3, 1.0), ("causal", "fused"), ("kl", "tv")))],
    ids=str,
)
@pytest.mark.parametrize("rows", [3, 256])
def test_totals_and_gradients_are_those_of_autograd(monkeypatch, kind, how, rows):
    monkeypatch.setattr(module, "FEWEST", rows)
    monkeypatch.setattr(module, "ELEMENTS", rows * VOCABULARY)
    model = build(KINDS[kind], scale=8)
    states, x0, terms = readings(model)
    ours, gradients = learnt(model, model, states, x0, terms, how, through=2.5)
    plain, expected = learnt(model, Plain(model), states, x0, terms, how, through=2.5)
    torch.testing.assert_close(ours.total, plain.total)
    assert ours.parts.keys() == plain.parts.keys()
    for name, part in plain.parts.items():
        torch.testing.assert_close(ours.parts[name], part)
        assert not ours.parts[name].requires_grad
    assert gradients.keys() == expected.keys() >= {"fused", "draft", "causal"}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


@pytest.mark.parametrize("alone", ["fused", "draft", "causal"])
def test_one_head_alone_and_a_source_that_is_not_scored(alone):
    model = build(KINDS["tied"], scale=8)
    states, x0, terms = readings(model)
    terms = {alone: terms[alone]}
    for how in (None, Distillation(0.5, "causal", "kl")) if alone == "draft" else (None,):
        ours, gradients = learnt(model, model, states, x0, terms, how)
        plain, expected = learnt(model, Plain(model), states, x0, terms, how)
        torch.testing.assert_close(ours.total, plain.total)
        assert gradients.keys() == expected.keys() and ours.parts.keys() == plain.parts.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient)


class Biased:
    """A linear head over given states."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tokens, self.bias = (torch.randn(*shape, requires_grad=True) for shape in ((VOCABULARY, 4), (VOCABULARY,)))

    def projection(self, states, head):
        return Projection(states, self.tokens, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_learns_and_autocast_keeps_losses_in_float32(dtype):
    model, x0 = Biased(), draw_tokens(ROWS)
    states = torch.randn(ROWS, CONTEXT, 4, requires_grad=True)
    weights = torch.rand(ROWS, CONTEXT)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = score(model, states, x0, {"causal": Term(weights)}).total
        logits = torch.nn.functional.linear(states, model.tokens, model.bias)
    assert total.dtype == torch.float32
    given = (states, model.tokens, model.bias)
    ours = torch.autograd.grad(total, given)
    nats = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none")
    expected = torch.autograd.grad((nats * weights.flatten()).sum(), given)
    near = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, **near)


def test_nothing_to_score_and_nothing_to_learn():
    model = build(KINDS["tied"], scale=8)
    states, x0, terms = readings(model)
    nothing = {head: Term(torch.zeros_like(term.weights)) for head, term in terms.items()}
    scores, gradients = learnt(model, model, states, x0, nothing, Distillation(1.0, "causal", "kl"))
    assert scores.total == 0 and not gradients
    with torch.no_grad():
        torch.testing.assert_close(score(model, states, x0, terms).total, score(Plain(model), states, x0, terms).total)


def test_logits_never_stand_in_memory():
    """8,000 rows of 5,000 logits are made in the room of 256."""
    torch.manual_seed(0)
    model = Biased()
    model.tokens = torch.randn(5_000, 4, requires_grad=True)
    model.bias = None
    states, x0 = torch.randn(8, 1_000, 4, requires_grad=True), torch.randint(5_000, (8, 1_000))
    sizes = []
    new = torch.Tensor.new_empty

    def seen(tensor, *shape, **kind):
        made = new(tensor, *shape, **kind)
        sizes.append(made.numel())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", seen)
        score(model, states, x0, {"causal": Term(torch.ones(8, 1_000))}).total.backward()
    assert sizes and max(sizes) <= module.FEWEST * 5_000
