"""What the documents show runs as shown."""

import re
from pathlib import Path

import pytest
import torch

from caddf.categorical import RowGenerators
from caddf.decoding import Task
from caddf.experiment import METHODS, ModelSettings
from caddf.models.backbone import DualBranch

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(source: str, **names) -> dict:
    exec(compile(source, "document", "exec"), names)
    return names


@pytest.fixture
def model() -> DualBranch:
    torch.manual_seed(0)
    return DualBranch(ModelSettings(size="debug").dual(vocab_size=20, bos_id=0))


def test_contributing_adds_an_objective(model):
    flat = run(blocks("CONTRIBUTING.md")[0])["Flat"]()
    loss = flat(model, torch.randint(20, (4, 16)), torch.Generator().manual_seed(0)).total
    loss.backward()
    assert loss.isfinite() and model.diffusion.embedding.weight.grad is not None


def test_contributing_adds_a_decoder(model):
    decoder = run(blocks("CONTRIBUTING.md")[1])["LeftFirst"]()
    tokens = torch.tensor([[1, 2] + [20] * 6])
    task = Task(tokens, torch.tensor([8]), 20, RowGenerators(0, 1))
    with torch.no_grad():
        frames = list(decoder(model, task))
    assert [int(frame.fresh[0].nonzero()) for frame in frames] == [2, 3, 4, 5, 6, 7]
    assert (frames[-1].tokens < 20).all()


def test_contributing_adds_a_method(model, monkeypatch):
    import caddf.experiment

    monkeypatch.setattr(caddf.experiment, "METHODS", dict(METHODS))
    added = run(
        blocks("CONTRIBUTING.md")[2], METHODS=caddf.experiment.METHODS, _synergistic=caddf.experiment._synergistic
    )
    method = added["METHODS"]["caddf-ao"]
    objective = method.build(method.settings(**method.defaults), model.config)
    assert objective(model, torch.randint(20, (4, 16)), torch.Generator().manual_seed(0)).total.isfinite()
