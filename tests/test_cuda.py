"""What a GPU computes is what a CPU computes. Everything here needs one, and is skipped elsewhere."""

import copy
from functools import partial

import pytest
import torch

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import Autoregressive, Speculative, Task
from caddf.evaluation import block_nll, causal_nll, diffusion_bound
from caddf.experiment import ARCHITECTURES, METHODS
from caddf.graphs import Graphs
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.objectives.reading import read
from caddf.training.compiling import RecordedSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
V = 83


def dual() -> DualBranch:
    """In float64, with weights that are large enough for every part to be heard."""
    torch.manual_seed(0)
    diffusion, causal = BranchConfig(2, 32, 4, alibi=True), BranchConfig(2, 48, 3, token_shift=True)
    model = DualBranch(
        ModelConfig(V, 64, diffusion, causal, embeddings="tied", draft="chained", block_size=6, own_state=True)
    )
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).double()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["caddf-lambda-dce", "gpt2", "radd-lambda-dce", "sedd-scaled", "bd3lm"])
def test_a_training_step_is_the_cpus(method):
    """Loss and gradient, in float32, from the same weights, tokens and noise."""
    kind = METHODS[method]
    config = kind.configure(ModelSettings(size="debug"), 256, 0)
    torch.manual_seed(0)
    model = ARCHITECTURES[kind.architecture].network(config)
    objective = kind.build(kind.settings(**kind.defaults), config)
    x = torch.randint(256, (8, config.context), generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for network in (model, copy.deepcopy(model).cuda()):
        device = next(network.parameters()).device
        loss = objective(network, x.to(device), torch.Generator().manual_seed(2)).total
        loss.backward()
        losses.append(loss.item())
        given = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        gradients.append(torch.cat([each.flatten().cpu().double() for each in given]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_likelihoods_are_the_cpus():
    model, x = dual(), torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    for measure in (
        causal_nll,
        lambda model, x: block_nll(model, x, 6),
        lambda model, x: diffusion_bound(model, x, 4, torch.Generator().manual_seed(0)),
    ):
        there = measure(copy.deepcopy(model).cuda(), x.cuda()).cpu()
        assert torch.allclose(there, measure(model, x), rtol=1e-10, atol=0)


@pytest.mark.parametrize("warp", [Warp(0.0), Warp(0.8), Warp(0.9, 30, 0.8, 0.02)], ids=["greedy", "warm", "filters"])
@pytest.mark.parametrize("decoder", [Autoregressive(), Speculative(), Speculative(least=0.2), Speculative(lookup=1)])
@torch.inference_mode()
def test_rounds_as_graphs_are_their_steps(decoder, warp):
    """Every frame's tokens, recorded and step by step; the second text is written by the first's graphs."""
    plain, model = dual().cuda(), dual().cuda()
    model.graphs = Graphs(model)
    for seed in range(2):
        x = torch.randint(V, (3, 200), generator=torch.Generator().manual_seed(seed))
        x[:, 9:] = V
        lengths = torch.tensor([200, 150, 190])

        def written(network, x=x, lengths=lengths, seed=seed):
            noise = RowGenerators(seed, len(x))
            task = Task(x.cuda(), lengths.cuda(), V, noise, warp)
            return [(frame.tokens, frame.counts.all.clone()) for frame in decoder(network, task)]

        one, two = written(model), written(plain)
        assert len(one) == len(two)
        for (tokens, counts), (expected, all_counts) in zip(one, two, strict=True):
            assert torch.equal(tokens, expected)
            assert torch.equal(counts, all_counts)
    assert not model.graphs.failed
    (engine,) = model.graphs.idle
    assert len(engine.graphs) > 1


@pytest.mark.parametrize("method", ["caddf-lambda-dce", "gpt2", "radd-lambda-dce", "bd3lm"])
def test_recorded_steps_are_the_steps(method):
    """Losses and gradients of batches of several shapes, in float32; a recording serves those that come after it."""
    kind = METHODS[method]
    config = kind.configure(ModelSettings(size="debug"), 256, 0)
    torch.manual_seed(0)
    plain = ARCHITECTURES[kind.architecture].network(config).cuda()
    model = copy.deepcopy(plain)
    objective = kind.build(kind.settings(**kind.defaults), config)
    recorded = RecordedSteps(partial(objective.readings, model), partial(losses, model), list(model.parameters()))
    model.compiled_training = "inductor"
    noise = torch.Generator().manual_seed(2)
    for step in range(12):
        x = torch.randint(256, (8, config.context), generator=torch.Generator().manual_seed(step)).cuda()
        state = noise.get_state()
        total, parts = recorded(x, noise)
        again = torch.Generator()
        again.set_state(state)
        loss = objective(plain, x, again)
        loss.total.backward()
        assert total.item() == pytest.approx(loss.total.item(), rel=1e-5)
        assert {name: part.item() for name, part in parts.items()} == pytest.approx(
            {name: part.item() for name, part in loss.parts.items()}, rel=1e-4
        )
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            if two.grad is not None:
                assert (one.grad - two.grad).norm() <= 1e-4 * two.grad.norm() + 1e-8
            one.grad = two.grad = None
    assert recorded.recordings and not recorded.failed


def losses(model, readings):
    """A loss and its parts, as the trainer reads them."""
    loss = read(model, readings)
    return loss.total, loss.parts
