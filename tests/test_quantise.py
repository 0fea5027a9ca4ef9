"""Rounded weights: how near they are to the model, and that decoders stay exact for it."""

import copy
import json

import pytest
import torch
from over_bytes import text_model
from rich.console import Console

from caddf import generate, load
from caddf.benchmarks import DecodeSettings, decode
from caddf.benchmarks.trial import weights_held, weights_read
from caddf.categorical import RowGenerators, Warp
from caddf.cli import main
from caddf.compile import compiled
from caddf.data import prepare
from caddf.decoding import Autoregressive, Speculative, Task
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.quantise import WEIGHT_LEVELS, integers, quantised

V = 61


def dual(**settings) -> DualBranch:
    torch.manual_seed(0)
    config = ModelConfig(V, 32, BranchConfig(2, 32, 2), BranchConfig(2, 48, 3), block_size=4, **settings)
    model = DualBranch(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("embedding.map"):  # what it maps is scaled
            parameter.mul_(8)
    return model


def test_integers_are_the_nearest_and_those_of_their_product_are_the_same():
    torch.manual_seed(0)
    matrix = torch.randn(50, 300) * torch.rand(50, 1) * 30
    matrix[3] = 0.0
    whole, scales = integers(matrix)
    assert whole.dtype == torch.int8 and whole.abs().amax(1).unique().tolist() == [0, WEIGHT_LEVELS]
    assert ((whole * scales[:, None] - matrix).abs() <= 0.5001 * scales[:, None]).all()
    again, same = integers(whole * scales[:, None])
    assert torch.equal(again, whole)
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"draft": "chained"}, {"exchange": "one_way"}, {"embeddings": "tied"}], ids=str
)
def test_a_quantised_model_is_near_and_leaves_the_model_as_it_was(settings):
    """Bounds: 0.01 nats of relative entropy per position, perplexity within 1%, where logits spread over 3 nats."""
    model = dual(**settings)
    before, x = copy.deepcopy(model.state_dict()), torch.randint(V, (8, 32), generator=torch.Generator().manual_seed(1))
    small, where = quantised(model, "int8"), torch.ones_like(x, dtype=torch.bool)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
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
    with pytest.raises(InputError, match="quantize is int4"):
        quantised(model, "int4")
    with pytest.raises(InputError, match="it needs cpu and float32"):
        quantised(model.double(), "int8")


@pytest.mark.parametrize(("kind", "each"), [("bf16", 2), ("int8", 1)])
def test_kernels_read_rounded_weights_at_their_own_size(kind, each):
    model, small = (compiled(m) for m in (dual(draft="factorised"), quantised(dual(draft="factorised"), kind)))
    for each_one in (small, model):
        each_one.allocate(1, 8)  # lays the matrices out
    read, whole = weights_read(small, True, True), weights_read(model, True, True)
    floats = sum(p.numel() for p in model.parameters() if p.ndim < 2)  # norms stay as they are
    assert sum(read.values()) - 4 * floats == (sum(whole.values()) - 4 * floats) * each / 4
    parameters = sum(p.nbytes for p in model.parameters())
    assert weights_held(small) - parameters == (weights_held(model) - parameters) * each / 4


@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
def test_what_only_proposes_is_read_in_one_byte(kind):
    model = dual(draft="chained")
    model = compiled(model if kind is None else quantised(model, kind))
    read, fewer = (weights_read(model, False, drafts) for drafts in (True, False))
    matrices = sum(p.numel() for p in model.chain.parameters() if p.ndim > 1) + model.tokens_of("draft").numel()
    norms = sum(p.nbytes for p in model.chain.parameters() if p.ndim < 2)
    assert read["draft"] == matrices + norms and fewer["draft"] == 0
    layers = [p for part in (model.diffusion.layers, model.diffusion.norm) for p in part.parameters()]
    assert fewer["diffusion"] == sum(p.numel() * (1 if p.ndim > 1 else 4) for p in layers)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    text_model().save_pretrained(folder := tmp_path_factory.mktemp("quantise") / "model")
    return folder


def test_loaded_quantised_is_quantised_loaded(saved):
    x = torch.arange(32)[None]
    one, other = load(saved, quantize="int8").model, quantised(load(saved).model, "int8")
    log_p, log_q = (m.log_probs(m(x, x, AnyOrder())[0], torch.ones_like(x, dtype=torch.bool)) for m in (one, other))
    assert torch.equal(log_p, log_q)
    with pytest.raises(InputError, match=r"quantize is int8 with device cpu, dtype torch.float64; it needs cpu"):
        load(saved, quantize="int8", dtype="float64")


def test_the_command_line_quantises(saved, tmp_path, capsys):
    """Greedy text is that of the quantised model; its likelihood is near, and not the same."""
    said = ["generate", str(saved), "--prompt", "ab", "--max-new-tokens", "12", "--temperature", "0", "--json"]
    assert main([*said, "--device", "cpu", "--quantize", "int8"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    model = load(saved, quantize="int8")
    assert text == list(generate(model, "ab", max_new_tokens=12, temperature=0.0))[-1].text
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i % 7}.\n\n" for i in range(400)))
    prepare(tmp_path / "set", input=str(tmp_path / "text.txt"), tokenizer="bytes")
    quick = ["--samples", "1", "--anchors", "[0.5]", "--nfe", "[2]", "--paths", "0", "--max-windows", "2"]
    nats = []
    for given in ([], ["--quantize", "int8"]):
        arguments = ["evaluate", str(saved), "--data", str(tmp_path / "set"), *quick, "--device", "cpu", "--json"]
        assert main([*arguments, *given]) == 0
        nats.append(json.loads(capsys.readouterr().out)["likelihoods"]["causal"]["nll"])
    assert 0 < abs(nats[0] - nats[1]) < 0.01
    assert main([*said, "--quantize", "int4"]) == 2
    assert "quantize is int4; it must be" in capsys.readouterr().err


def test_benchmarks_decode_quantised(tmp_path):
    settings = DecodeSettings(
        size="debug", methods="gpt2", context=24, new_tokens=4, batch="1", repeats=1, memory=False, device="cpu",
        quantize="int8", out=str(tmp_path),
    )  # fmt: skip
    rows = decode(settings, Console(quiet=True)).values["rows"]
    assert [row["decoder"] for row in rows] == ["autoregressive", "transformers"]
