"""`torch.compile` of the pass over caches, as on a GPU: it is the plain one, and where it fails decoding goes on."""

import shutil

import pytest
import torch
import torch._inductor.config

from caddf.categorical import RowGenerators, Warp
from caddf.compile import CachedPass, compiled
from caddf.decoding import Speculative, Task
from caddf.errors import InputError
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.models.single import SingleBranch, SingleConfig

V, T = 61, 40
NEAR = 2e-5
"""Float32 rounding of states of size one, several times over."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++, which is not here")


def dual() -> DualBranch:
    torch.manual_seed(0)
    config = ModelConfig(V, T, BranchConfig(1, 16, 2), BranchConfig(1, 32, 2, token_shift=True), block_size=4)
    model = DualBranch(config)
    torch.nn.init.normal_(model.causal.shifted.map, std=0.25)  # which starts as 0
    return model.eval().requires_grad_(False)


def with_passes(model):
    """What `compiled` makes of a model on a GPU."""
    model.causal.forward = CachedPass(model.causal, 2 * model.block_size)
    return model


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """As it is set up at first: nothing compiled before; in this process, without trying instructions out in others."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        yield
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.usefixtures("compiler")
@torch.inference_mode()
def test_compiled_is_plain_for_one_slot_and_for_several_wherever_they_are():
    plain, model = dual(), with_passes(dual())
    x = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    own, other = plain.allocate(1, T), model.allocate(1, T)
    upto = 0
    for width in (15, 1, 5, 1, 3, 8, 6):
        positions = torch.arange(upto, upto + width)
        expected, given = plain.read(x, positions, own).causal, model.read(x, positions, other).causal
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(given, expected, rtol=0, atol=NEAR)
        upto += width
    assert upto < T and model.causal.forward.run is not None  # nothing failed
    for one, two in ((own.causal, other.causal), (own.exchange, other.exchange)):
        torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=NEAR)
        torch.testing.assert_close(one.values, two.values, rtol=0, atol=NEAR)


def test_without_a_compiler_decoding_goes_on_and_says_so_once(monkeypatch):
    def fails(function, **options):
        def run(*given):
            raise RuntimeError("\nno compiler\nand much more")

        return run

    tokens = torch.full((1, 24), V)
    monkeypatch.setattr(torch, "compile", fails)
    model = with_passes(dual())
    task = [Task(tokens, torch.tensor([24]), V, RowGenerators(0, 1), Warp()) for _ in range(2)]
    sentence = r"^compile is always, but compiling failed; going on without: no compiler$"
    with pytest.warns(UserWarning, match=sentence) as said:
        last = list(Speculative()(model, task[0]))[-1]
    assert len(said) == 1
    assert torch.equal(last.tokens, list(Speculative()(dual(), task[1]))[-1].tokens)


def test_what_is_long_or_slides_is_not_compiled(monkeypatch):
    calls = []

    def counts(function, **options):
        return lambda *given: calls.append(1) or function(*given)

    monkeypatch.setattr(torch, "compile", counts)
    model = with_passes(CausalModel(CausalConfig(V, 16, BranchConfig(1, 16, 2), block_size=2)).eval())
    assert isinstance(model.causal.forward, CachedPass)
    x, caches = torch.zeros(2, 24, dtype=torch.long), model.allocate(2, 24)
    for positions, more in ((range(6), 0), (range(2), 0), ([6], 1), (range(7, 11), 1), (range(11, 16), 0), ([16], 0)):
        before = len(calls)
        model.read(x, torch.tensor(list(positions)), caches)
        assert len(calls) - before == more


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(InputError, match="compile is always with a SingleBranch that has no causal branch"):
        compiled(SingleBranch(SingleConfig(V, T, BranchConfig(1, 16, 2))))
