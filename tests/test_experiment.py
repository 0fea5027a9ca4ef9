"""The table of methods, and the networks that settings build."""

import pytest
import torch

from caddf import InputError
from caddf.experiment import METHODS, network_of
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.tokenizer import Tokenizer

BYTES = Tokenizer.plain_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_a_network_of_equal_size_and_an_objective_that_trains_it(method):
    chosen, settings = METHODS[method], ModelSettings(size="debug")
    config = chosen.configure(settings, 257, 256)
    network = network_of({"architecture": chosen.architecture, "model": config.to_dict()})
    assert network.config == config
    wanted = settings.parameters(257)
    assert abs(sum(p.numel() for p in network.parameters()) - wanted) <= 0.02 * wanted
    objective = chosen.build(chosen.settings(**chosen.defaults), config)
    loss = objective(network, torch.randint(257, (4, 32)), torch.Generator().manual_seed(0)).total
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_presets_of_table_5_have_its_padded_vocabulary():
    for size, layers, width, other in (("small", 12, 768, 512), ("medium", 20, 1440, 1024)):
        with torch.device("meta"):
            model = DualBranch(ModelSettings(size=size).dual(50_257, bos_id=50_256))
        counts = model.parameter_counts()
        assert counts["embeddings"] == 50_265 * width + width * other and model.mask_id == 50_257  # tied by a map
        layer = 12 * width**2 + 2 * width  # matrices and the norms' scales
        assert counts["causal"] == layers * layer + width + width**2  # and the token shift


DUAL = ("caddf-lambda-dce", "caddf-t-dce")


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DUAL])
@pytest.mark.parametrize(
    ("name", "value"),
    [("causal", "off"), ("fusion", "layers"), ("exchange", "one_way"), ("draft", "chained"), ("draft_vocab", 100)],
)
def test_choices_of_the_dual_branch_are_its_own(method, name, value):
    with pytest.raises(InputError, match=f"model.{name} is {value}"):
        METHODS[method].configure(ModelSettings(size="debug", **{name: value}), 257, 256)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*DUAL, "gpt2")])
def test_networks_that_read_both_ways_have_rotary_positions(method):
    with pytest.raises(InputError, match=r"model\.positions is learned"):
        METHODS[method].configure(ModelSettings(size="debug", positions="learned"), 257, 256)


def test_a_context_of_zero_is_not_the_presets():
    with pytest.raises(InputError, match="context is 0"):
        ModelSettings(size="debug", context=0).dual(257, 0)


@pytest.mark.parametrize(
    ("vocab_size", "given", "drafted"),
    [(8192, {}, None), (16_384, {}, None), (50_257, {}, 8192), (50_257, {"draft_vocab": 50_257}, 50_257),
     (50_257, {"draft": "factorised"}, None), (50_257, {"causal": "off"}, None)],
)  # fmt: skip
def test_chains_draft_from_a_part_of_a_large_vocabulary(vocab_size, given, drafted):
    assert ModelSettings("debug", **given).dual(vocab_size, 0).draft_vocab == drafted
