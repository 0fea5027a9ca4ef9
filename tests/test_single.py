"""The single branch: time reaches its output, scores have the factors they should, and it is the diffusion branch."""

import dataclasses

import pytest
import torch

from caddf.concrete_score import ScoreModel
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Infill, LanguageModel
from caddf.models.accounts import accounts
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.models.single import ScoreNetwork, SingleBranch, SingleConfig, build_single

V, L = 5, 6
BRANCH = BranchConfig(2, 16, 2)
CONFIGS = {
    "denoiser": SingleConfig(V, L, BRANCH),
    "no-time": SingleConfig(V, L, BRANCH, time=False),
    "unscaled": SingleConfig(V, L, BRANCH, score="unscaled"),
    "scaled": SingleConfig(V, L, BRANCH, score="scaled"),
    "uniform": SingleConfig(V, L, BRANCH, score="unscaled", process="uniform"),
    "linear": SingleConfig(V, L, BRANCH, level_scale="linear", mlp_bias=True),
    "untied": SingleConfig(V, L, BRANCH, time=False, norm_bias=True, mlp_bias=True, tied=False),
}
X = torch.tensor([[0, V, 2, V, 4, 1], [V, V, V, 1, 1, 0]])
LEVEL = torch.tensor([0.3, 2.0], dtype=torch.float64)


def network(name: str, spread: float = 0.3) -> SingleBranch:
    """Weights large enough, the zero ones too, for all that reaches the output to show."""
    torch.manual_seed(0)
    model = build_single(CONFIGS[name]).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return model


def read(model: SingleBranch, x=X, level=LEVEL):
    where = x == V
    if model.config.process == "uniform":
        x = x % V
    states, _ = model(x, x, AnyOrder(level))
    return model.log_scores(states, where) if isinstance(model, ScoreNetwork) else model.log_probs(states, where)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_survive_the_trip(name):
    config = CONFIGS[name]
    assert SingleConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="do not fit"):
        SingleConfig.from_dict({**config.to_dict(), "wings": 2})


@pytest.mark.parametrize(
    "change",
    [{"score": "scaled", "process": "uniform"}, {"score": "unscaled", "time": False}, {"rows": V}, {"bos_id": V}],
)
def test_settings_that_do_not_go_together_are_refused(change):
    with pytest.raises(InputError, match=r"; |must"):
        dataclasses.replace(CONFIGS["denoiser"], **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_speaks_the_interface(name):
    model = network(name)
    assert isinstance(model, LanguageModel)
    assert isinstance(model, ScoreModel) == (model.config.score is not None)
    costs = accounts(model)
    assert costs["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert costs["parameters"]["embeddings"] + costs["parameters"]["diffusion"] == costs["parameters"]["total"]
    with pytest.raises(InputError, match="AnyOrder" if model.config.time else "block size is 3 in a row of 6"):
        model(X, X, Infill() if model.config.time else Block(3))
    with pytest.raises(InputError, match="context ends"):
        model(long := torch.zeros(1, L + 1, dtype=torch.long), long, AnyOrder(LEVEL[:1]))
    if model.config.time:
        with pytest.raises(InputError, match="level"):
            model(X, X, AnyOrder())


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.time])
def test_time_reaches_the_output_of_its_own_row(name):
    model = network(name)
    before, after = read(model), read(model, level=torch.tensor([0.3, 1.0], dtype=torch.float64))
    if model.config.score == "scaled":  # beyond the factor
        before = before + torch.expm1(LEVEL).log()[(X == V).nonzero()[:, 0]][:, None]
        after = after + torch.expm1(torch.tensor([0.3, 1.0])).log()[(X == V).nonzero()[:, 0]][:, None]
    first = (X == V).nonzero()[:, 0] == 0
    torch.testing.assert_close(after[first], before[first], atol=1e-6, rtol=0)
    assert (after[~first] - before[~first]).abs().max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name):
    model = network(name, spread=0.1)
    read(model).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_without_time_it_is_the_dual_branch_without_a_causal_branch():
    model, twin = (
        network("no-time"),
        DualBranch(ModelConfig(V, L, BRANCH, None, exchange="one_way", block_size=2)).double(),
    )
    twin.load_state_dict(model.state_dict())
    states, _ = twin(X, X, AnyOrder())
    torch.testing.assert_close(read(model), twin.log_probs(states, X == V, "draft"), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["no-time", "untied"])
def test_without_time_a_whole_row_has_one_reading(name):
    model, where = network(name), X == V
    other = (X + 1) % V  # the prefix is not read
    for pattern in (Infill(), Block(L), Block(L + 2)):
        states, _ = model(other, X, pattern)
        torch.testing.assert_close(model.log_probs(states, where), read(model), rtol=0, atol=0)


def test_settings_of_before_still_load():
    values = CONFIGS["scaled"].to_dict()
    for name in ("level_scale", "norm_bias", "mlp_bias", "tied"):
        del values[name]
    assert SingleConfig.from_dict(values) == CONFIGS["scaled"]


def test_an_untied_head_is_linear_with_a_bias():
    model = network("untied")
    states, _ = model(X, X, AnyOrder())
    logits = states.draft[X == V] @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(read(model), logits.log_softmax(-1))
    targets = torch.ones_like(X)
    torch.testing.assert_close(model.nll(states, X == V, targets), -read(model)[:, 1])


def test_biases_stand_where_they_are_asked_for():
    names = {n for n, _ in network("untied").diffusion.named_parameters() if n.endswith("bias")}
    layer = {f"layers.{i}.{part}.bias" for i in (0, 1) for part in ("attention_norm", "mlp_norm", "mlp.up", "mlp.down")}
    assert names == layer | {"norm.bias"}


def test_a_fresh_network_does_not_look_at_the_time_yet():
    """adaLN-zero: all layers are the identity at first, whatever the level."""
    model = build_single(CONFIGS["denoiser"]).double()
    torch.testing.assert_close(read(model), read(model, level=LEVEL + 1), rtol=0, atol=0)


def test_scaled_is_unscaled_after_moving_the_factor():
    scaled, unscaled = network("scaled"), network("unscaled")
    unscaled.load_state_dict(scaled.state_dict())
    factor = (-torch.expm1(LEVEL).log() - torch.tensor(V).log())[(X == V).nonzero()[:, 0]][:, None]
    torch.testing.assert_close(read(scaled), read(unscaled) + factor)


def test_a_fresh_scaled_network_says_uniform():
    model = build_single(CONFIGS["scaled"]).double()
    expected = (1 / torch.expm1(LEVEL) / V)[(X == V).nonzero()[:, 0]][:, None].expand(-1, V)
    torch.testing.assert_close(read(model).exp(), expected)


def test_the_absorbing_posterior_is_that_of_the_scores():
    for name in ("scaled", "unscaled"):
        model = network(name)
        states, _ = model(X, X, AnyOrder(LEVEL))
        log_q = model.log_probs(states, X == V)
        torch.testing.assert_close(log_q, read(model).log_softmax(-1))
        expected = -log_q.gather(-1, torch.ones_like(log_q[:, :1], dtype=torch.long))[:, 0]
        torch.testing.assert_close(model.nll(states, X == V, torch.ones_like(X)), expected)


def test_the_uniform_score_of_what_stands_there_is_one():
    model, x = network("uniform"), X % V
    states, _ = model(x, x, AnyOrder(LEVEL))
    log_s = model.log_scores(states, torch.ones_like(x, dtype=torch.bool))
    assert (log_s.gather(-1, x.view(-1, 1)) == 0).all() and (log_s != 0).sum() == x.numel() * (V - 1)
    with pytest.raises(InputError, match="uniform"):
        model.log_probs(states, x >= 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_autocast_gives_float32(name):
    model = build_single(CONFIGS[name]).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = read(model)
    assert out.dtype == torch.float32 and out.isfinite().all()
