"""What is compiled where: kernels on a CPU, graphs on a GPU, and what cannot be is said."""

from types import SimpleNamespace

import pytest
import torch

from caddf.compile import compiled
from caddf.errors import InputError
from caddf.graphs import Graphs
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.models.single import SingleBranch, SingleConfig

V, T = 61, 40
BRANCH = BranchConfig(1, 16, 2)


def dual(**settings) -> DualBranch:
    return DualBranch(ModelConfig(V, T, BRANCH, BRANCH, **settings)).eval().requires_grad_(False)


def on_a_gpu(model, monkeypatch):
    """`model`, which seems to be on a GPU."""
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda:0"))]))
    return model


@pytest.mark.parametrize("when", ["auto", "always"])
@pytest.mark.parametrize("make", [dual, lambda: CausalModel(CausalConfig(V, T, BRANCH))])
def test_on_a_gpu_rounds_are_graphs(make, when, monkeypatch):
    model = on_a_gpu(make(), monkeypatch)
    assert compiled(model, "never").graphs is None
    assert compiled(model, when) is model and isinstance(model.graphs, Graphs) and model.native is None


def test_what_cannot_be_compiled_is_said(monkeypatch):
    with pytest.raises(InputError, match="compile is always with a SingleBranch that has no causal branch"):
        compiled(SingleBranch(SingleConfig(V, T, BRANCH)))
    with pytest.raises(InputError, match=r"^compile is always; on a CPU it needs float32 weights, .* leave it out$"):
        compiled(dual().double())
    layers = on_a_gpu(dual(fusion="layers", exchange="one_way"), monkeypatch)
    with pytest.raises(InputError, match="on a GPU it needs a causal branch that reads no canvas"):
        compiled(layers)
    elsewhere = dual().to("meta")
    with pytest.raises(InputError, match="it is for cpu and cuda, not for meta"):
        compiled(elsewhere)
    for model in (layers, elsewhere):
        assert compiled(model, "auto").graphs is None
