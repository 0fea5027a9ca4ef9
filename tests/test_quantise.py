"""Int8 weights: what is computed, how near it is to the model, and that decoders stay exact for it."""

import copy

import pytest
import torch
from torch import nn

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import Autoregressive, Speculative, Task
from caddf.errors import InputError
from caddf.interface import Block
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.quantise import INPUT_LEVELS, WEIGHT_LEVELS, QuantisedLinear, quantised

V = 61


def dual(**settings) -> DualBranch:
    torch.manual_seed(0)
    config = ModelConfig(V, 32, BranchConfig(2, 32, 2), BranchConfig(2, 48, 3), block_size=4, **settings)
    model = DualBranch(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_a_map_is_that_of_the_rounded_numbers(bias):
    torch.manual_seed(0)
    weight, x, b = torch.randn(50, 300), torch.randn(4, 5, 300) * torch.rand(4, 5, 1) * 30, torch.randn(50)
    weight[3], x[1, 2] = 0.0, 0.0
    scale, largest = weight.abs().amax(1).clamp(min=1e-12) / WEIGHT_LEVELS, x.abs().amax(-1, keepdim=True)
    whole, inputs = (weight / scale[:, None]).round(), (x / largest.clamp(min=1e-30) * INPUT_LEVELS).round()
    expected = (inputs.double() @ whole.double().T) * scale * largest / INPUT_LEVELS + (b if bias else 0)
    given = QuantisedLinear(weight, b if bias else None)(x)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_largest_numbers_do_not_overflow():
    weight, x = torch.ones(8, 512), torch.ones(1, 512)
    torch.testing.assert_close(QuantisedLinear(weight)(x), torch.full((1, 8), 512.0))
    torch.testing.assert_close(QuantisedLinear(weight)(-x), torch.full((1, 8), -512.0))


def test_a_position_gets_the_same_whatever_is_beside_it():
    torch.manual_seed(0)
    linear, x = QuantisedLinear(torch.randn(70, 130)), torch.randn(9, 130) * torch.arange(1, 10)[:, None]
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@pytest.mark.parametrize("settings", [{}, {"draft": "chained"}, {"exchange": "one_way"}], ids=str)
def test_a_quantised_model_is_near_and_leaves_the_model_as_it_was(settings):
    """Bounds: 0.01 nats of relative entropy per position, perplexity within 1%, where logits spread over 3 nats."""
    model = dual(**settings)
    before, x = copy.deepcopy(model.state_dict()), torch.randint(V, (8, 32), generator=torch.Generator().manual_seed(1))
    small, where = quantised(model, "int8"), torch.ones_like(x, dtype=torch.bool)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, nn.Linear) for module in small.modules()) and not model.readouts
    assert small.parameter_counts() == model.parameter_counts()
    states, rounded = (m(x, torch.full_like(x, V), Block(4))[0] for m in (model, small))
    for head in model.heads:
        log_p, log_q = model.log_probs(states, where, head), small.log_probs(rounded, where, head)
        assert log_p.std() > 0.5 and not torch.equal(log_p, log_q)
        assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 0.01
        nats, near = model.nll(states, where, x, head).mean(), small.nll(rounded, where, x, head).mean()
        assert abs(near - nats) < 0.01
        assert torch.allclose(near, -log_q.gather(1, x.reshape(-1, 1)).mean(), atol=1e-5)


@pytest.mark.parametrize("target", ["causal", "fused"])
def test_greedy_speculation_is_greedy_decoding_of_the_quantised_model(target):
    model = quantised(dual(draft="chained"), "int8")
    tokens = torch.full((3, 32), V)
    tokens[:, :4] = torch.arange(12).view(3, 4)
    plain, drafted = (
        list(decoder(target=target)(model, Task(tokens, torch.full((3,), 32), V, RowGenerators(0, 3), Warp(0.0))))[-1]
        for decoder in (Autoregressive, Speculative)
    )
    assert torch.equal(plain.tokens, drafted.tokens)


def test_a_causal_model_is_quantised_too():
    torch.manual_seed(0)
    model = CausalModel(CausalConfig(V, 16, BranchConfig(1, 32, 2, positions="learned", bias=True))).requires_grad_(
        False
    )
    x, small = torch.arange(16)[None], quantised(model, "int8")
    where = torch.ones_like(x, dtype=torch.bool)
    log_p, log_q = (m.log_probs(m(x, x, Block(4))[0], where) for m in (model, small))
    assert 0 < (log_p - log_q).abs().max() < 0.02


def test_what_cannot_be_done_is_said():
    model = dual()
    with pytest.raises(InputError, match="a quantised model is not saved"):
        quantised(model, "int8").state_dict()
    with pytest.raises(InputError, match="quantize is int4"):
        quantised(model, "int4")
    with pytest.raises(InputError, match="it needs cpu and float32"):
        quantised(model.double(), "int8")
