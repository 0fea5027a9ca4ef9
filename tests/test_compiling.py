"""Compiled steps are the steps, and what is recorded of them serves whatever has the same shapes."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caddf.experiment import ARCHITECTURES, METHODS
from caddf.model_settings import ModelSettings
from caddf.models.layers import nearest
from caddf.objectives.reading import read
from caddf.training.compiling import (
    RecordedSteps,
    _Recording,
    compiled_steps,
    compiles,
    shape_of,
    tensors_of,
    with_tensors,
)

BY_READINGS = ["caddf-lambda-dce", "gpt2", "radd-lambda-dce", "radd-ao", "bd3lm"]


def made(method, seed=0, **settings):
    """A small network and its objective; weights are large enough for every part to be heard."""
    kind = METHODS[method]
    config = kind.configure(ModelSettings(size="debug"), 256, 0)
    torch.manual_seed(seed)
    model = ARCHITECTURES[kind.architecture].network(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model, kind.build(kind.settings(**kind.defaults, **settings), config)


def tokens(step, rows=8, length=32):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(step))


def gradient(model):
    given = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    return given


@pytest.mark.parametrize("method", ["caddf-lambda-dce", "sedd-scaled"])
def test_compiled_steps_are_the_steps(method):
    """Losses, parts and gradients, of batches whose readings have several numbers of rows."""
    model, objective = made(method)
    plain = copy.deepcopy(model)
    with compiled_steps(model, backend="eager"):
        for step in range(2):
            one, two = (objective(each, tokens(step), torch.Generator().manual_seed(step)) for each in (model, plain))
            one.total.backward()
            two.total.backward()
            assert one.total.item() == pytest.approx(two.total.item(), rel=1e-5)
            assert {k: v.item() for k, v in one.parts.items()} == pytest.approx(
                {k: v.item() for k, v in two.parts.items()}, rel=1e-4, abs=1e-6
            )
            for a, b in zip(gradient(model), gradient(plain), strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-7
    assert model.compiled_training is None
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("settings", [{"distill": 0.5}, {"distill_form": "tv"}, {"distill_from": "fused"}, {}])
def test_compiled_losses_are_the_losses(settings):
    """Scored at all positions, with a small draft vocabulary and without."""
    for vocab in (None, 40):
        kind = METHODS["caddf-lambda-dce"]
        config = kind.configure(ModelSettings(size="debug", draft_vocab=vocab), 256, 0)
        torch.manual_seed(0)
        model = ARCHITECTURES[kind.architecture].network(config).double()
        objective = kind.build(kind.settings(**(kind.defaults | settings)), config)
        wanted = objective(model, tokens(0), torch.Generator().manual_seed(1))
        wanted.total.backward()
        expected = gradient(model)
        model.compiled_training = "eager"
        for failing in (False, True):  # what the compiler fails at is done without it, and is the same
            with torch.compiler.set_stance("force_eager" if failing else "default"):
                found = objective(model, tokens(0), torch.Generator().manual_seed(1))
                found.total.backward()
            assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-12)
            for a, b in zip(gradient(model), expected, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-12)


class Replay:
    """What stands for a graph on a CPU: reads its inputs again, and writes over what it left before."""

    def __init__(self, recorded, own):
        self.recorded, self.own = recorded, own
        self.losses = recorded._learn(own)
        self.gradients = [parameter.grad for parameter in recorded.parameters]
        recorded._forget()

    def replay(self):
        total, parts = self.recorded._learn(self.own)
        self.losses[0].copy_(total)
        for name, part in parts.items():
            self.losses[1][name].copy_(part)
        for parameter, gradient in zip(self.recorded.parameters, self.gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                gradient.copy_(parameter.grad)
        self.recorded._forget()


@pytest.mark.parametrize("method", BY_READINGS)
def test_a_recording_serves_all_readings_of_its_shapes(method, monkeypatch):
    def losses(model, readings):
        loss = read(model, readings)
        return loss.total, loss.parts

    def record(self, readings):
        inputs = [tensor.clone() for tensor in tensors_of(readings)]
        graph = Replay(self, with_tensors(readings, inputs))
        return _Recording(graph, inputs, graph.losses, graph.gradients)

    monkeypatch.setattr(RecordedSteps, "_record", record)
    model, objective = made(method)
    plain = copy.deepcopy(model)
    recorded = RecordedSteps(partial(objective.readings, model), partial(losses, model), list(model.parameters()))
    steps, noise, again = 12, torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for step in range(steps):
        total, parts = recorded(tokens(step), noise)
        loss = objective(plain, tokens(step), again)
        loss.total.backward()
        assert total.item() == loss.total.item()
        assert {k: v.item() for k, v in parts.items()} == {k: v.item() for k, v in loss.parts.items()}
        for a, b in zip(gradient(model), gradient(plain), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    replayed = steps - sum(min(count, 2) for count in recorded.seen.values())
    assert recorded.recordings and replayed > 0


def test_where_recording_fails_it_goes_on_without(monkeypatch):
    def broken(*_):
        raise RuntimeError("no capture here")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    model, objective = made("gpt2")

    def losses(readings):
        loss = read(model, readings)
        return loss.total, loss.parts

    recorded = RecordedSteps(partial(objective.readings, model), losses, list(model.parameters()))
    recorded(tokens(0), torch.Generator())
    gradient(model)
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs: no capture here"):
        recorded(tokens(1), torch.Generator())
    objective(model, tokens(1), torch.Generator()).total.backward()
    twice = gradient(model)
    recorded(tokens(1), torch.Generator())  # no second warning, which would be an error
    for a, b in zip(gradient(model), twice, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(2 * a, b, rtol=1e-4, atol=1e-6)


def test_shapes_tell_rows_patterns_and_what_is_one_tensor():
    model, objective = made("caddf-lambda-dce")
    readings = [objective.readings(model, tokens(step), torch.Generator().manual_seed(5)) for step in range(2)]
    shapes = [shape_of(each, tensors_of(each)) for each in readings]
    assert shapes[0] == shapes[1]
    fewer = objective.readings(model, tokens(0, rows=4), torch.Generator().manual_seed(5))
    assert shape_of(fewer, tensors_of(fewer)) != shapes[0]
    apart = with_tensors(readings[0], [tensor.clone() for tensor in tensors_of(readings[0])])
    assert shape_of(apart, tensors_of(apart)) == shapes[0]
    assert apart[0].prefix is apart[0].canvas  # as an any-order reading asks for
    assert not {id(each) for each in tensors_of(apart)} & {id(each) for each in tensors_of(readings[0])}


class Host(TorchDispatchMode):
    """Notes what goes between the host and a device, for which `meta` stands here."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)}
        if "cpu" in devices:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("method", BY_READINGS)
def test_reading_asks_nothing_of_the_device(method, monkeypatch):
    """What is recorded once may neither wait for a number nor be given one: on `meta` there are none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model, objective = made(method)
    readings = objective.readings(model, tokens(0), torch.Generator().manual_seed(0))
    readings = with_tensors(readings, [tensor.to("meta") for tensor in tensors_of(readings)])
    model = model.to("meta")
    model.compiled_training = "eager"
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):  # slopes are brought there once
            host = Host()
            with host:
                read(model, readings).total.backward()
    assert host.seen == []
    nearest.cache_clear()


def test_what_auto_compiles():
    assert compiles("always", torch.device("cpu")) and not compiles("never", torch.device("cuda"))
    assert not compiles("auto", torch.device("cpu"))
