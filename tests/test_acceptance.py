"""The worth of a round, against every path of drafts and against the rounds that the decoder runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawing import generator
from enumeration import exact_denoiser, random_source
from torch import Tensor

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import Counts, Speculative, Task
from caddf.errors import InputError
from caddf.evaluation.acceptance import Acceptance, acceptance
from caddf.interface import Block
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig

V, SIZE = 4, 3
TARGETS = ["causal", "fused"]
DRAFTS: dict[str, dict[str, Any]] = {
    "factorised": {},
    "chained": {"draft": "chained"},
    "small": {"draft": "chained", "draft_vocab": 3},
    "one-way": {"draft": "chained", "exchange": "one_way"},
}


def network(**settings: Any) -> DualBranch:
    torch.manual_seed(3)
    branch = BranchConfig(1, 8, 2)
    model = DualBranch(ModelConfig(V, 2 * SIZE + 1, branch, branch, block_size=SIZE, **settings)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def given_of(model: DualBranch, target: str) -> int:
    """Whether a window begins with a token that stands."""
    return int((target == "causal" or model.chained) and model.sliding)


def by_enumeration(model: DualBranch, x0: Tensor, block: int, target: str) -> Tensor:
    """P(the first j drafts stand) in one block of one row, summed over all paths of drafts."""
    given = given_of(model, target)
    n, first = SIZE - given, block * SIZE + given
    paths = torch.cartesian_prod(*[torch.arange(V)] * n).view(-1, n)
    prefix = x0.repeat(len(paths), 1)
    prefix[:, first : first + n] = paths
    canvas = torch.full_like(prefix, model.mask_id)
    shown = canvas.clone()
    shown[:, first - given : first] = x0[first - given : first]
    where = torch.zeros_like(prefix, dtype=torch.bool)
    where[:, first : first + n] = True
    p, q = (
        model.log_probs(model(prefix, seen, Block(SIZE))[0], where, head)  # type: ignore[arg-type]
        .exp()
        .view(len(paths), n, V)
        .gather(-1, paths[..., None])[..., 0]
        for head, seen in ((target, canvas), ("draft", shown))
    )
    # What can stand of a path is no more than is drafted of it, and than the target makes of what stands before.
    kept, reached = torch.ones(len(paths), dtype=p.dtype), []
    for j in range(n):
        kept = torch.minimum(q[:, : j + 1].prod(-1), kept * p[:, j])
        reached.append(
            kept.sum() / V ** (n - 1 - j)
        )  # of all paths: those of j + 1 tokens are there so many times over
    return torch.stack(reached)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_rounds_are_worth_what_all_their_paths_are(draft: str, target: str) -> None:
    """A mean of 1000 rounds at each of two blocks: beyond 5.5 standard errors with odds of 4e-8 per number."""
    model, x0 = network(**DRAFTS[draft]), torch.tensor([2, 0, 3, 1, 1, 2, 0])
    exact = torch.stack([by_enumeration(model, x0, block, target) for block in (0, 1)]).mean(0)
    drawn = acceptance(model, x0.repeat(2000, 1), target, generator())  # type: ignore[arg-type]
    error = drawn.reached.std(0) / 2000**0.5
    assert ((drawn.reached.mean(0) - exact).abs() <= 5.5 * error + 1e-12).all()
    assert (error > 1e-4).any() and (exact < 0.9).all() and (exact[1:] > 0.01).all()
    tokens = 1 + exact.sum() - (0 if target == "causal" or model.chained else exact[-1])
    assert (drawn.tokens.mean() - tokens).abs() <= 5.5 * drawn.tokens.std() / 2000**0.5


@pytest.mark.parametrize(
    ("draft", "warp"),
    [("factorised", Warp()), ("chained", Warp(temperature=0.5, top_k=3)), ("small", Warp()), ("one-way", Warp())],
    ids=["factorised", "chained-warped", "small", "one-way"],
)
@pytest.mark.parametrize("target", TARGETS)
def test_rounds_are_worth_what_the_decoder_gets(draft: str, warp: Warp, target: str) -> None:
    """First rounds of 1000 rows from each block's start: beyond 5.5 standard errors with odds of 4e-8 per number."""
    model, x0, rows = network(**DRAFTS[draft]), torch.tensor([2, 0, 3, 1, 1, 2, 0]), 1000
    rounds = []
    for block in (0, 1):
        tokens = x0.repeat(rows, 1)
        tokens[:, block * SIZE + given_of(model, target) :] = model.mask_id
        open_places = int((tokens[0] == model.mask_id).sum())
        task = Task(tokens, torch.full((rows,), len(x0)), model.mask_id, RowGenerators(block, rows), warp)
        drafts = Speculative(target=target, drafts=SIZE, lookup=0)  # type: ignore[arg-type]
        frame = next(drafts(model, task, Counts.zeros(rows)))
        rounds.append(open_places - (frame.tokens == model.mask_id).sum(-1).double())
    counted = torch.cat(rounds)
    drawn = acceptance(model, x0.repeat(rows, 1), target, generator(5), warp=warp).tokens  # type: ignore[arg-type]
    error = (counted.var() / len(counted) + drawn.var() / len(drawn)) ** 0.5
    assert (counted.mean() - drawn.mean()).abs() <= 5.5 * error
    assert error < 0.05 and 1.1 < counted.mean() < SIZE + 0.9 - given_of(model, target)


def test_drafts_that_are_the_target_all_stand() -> None:
    independent = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    model, x0 = (lambda x: independent.expand(*x.shape, 3)), torch.zeros(3, 8, dtype=torch.long)
    for target, tokens in (("causal", 4), ("fused", 4)):
        out = acceptance(model, x0, target, generator(), block_size=4, vocab_size=3)  # type: ignore[arg-type]
        torch.testing.assert_close(out.tokens, torch.full((3,), tokens, dtype=torch.float64))
        torch.testing.assert_close(out.by_offset()[0], torch.ones(4 - (target == "causal"), dtype=torch.float64))


def test_a_function_is_a_model_too() -> None:
    """The first draft of a block is the exact conditional: it always stands; later ones are marginals, and may not."""
    x0 = torch.zeros(50, 4, dtype=torch.long)
    out = acceptance(exact_denoiser(random_source(3, 4)), x0, "fused", generator(), block_size=2, vocab_size=3)
    torch.testing.assert_close(out.reached[:, 0], torch.ones(50, dtype=torch.float64))
    assert (out.reached[:, 1] < 1).any()


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_row_s_rounds_are_its_own(draft: str) -> None:
    """In any batch and in any number of pieces."""
    model, x0 = network(**DRAFTS[draft]), torch.randint(V, (6, 7), generator=generator())
    together = acceptance(model, x0, "causal", [generator(r) for r in range(6)], rounds=3)
    pieces = acceptance(model, x0, "causal", [generator(r) for r in range(6)], rounds=3, elements=1)
    torch.testing.assert_close(pieces.reached, together.reached)
    alone = acceptance(model, x0[4:5], "causal", [generator(4)], rounds=3)
    torch.testing.assert_close(alone.reached[0], together.reached[4])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("draft", ["factorised", "chained", "small"])
def test_caches_change_nothing(draft: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x0 = network(**DRAFTS[draft]), torch.randint(V, (6, 7), generator=generator())
    assert model.incremental(Block(SIZE))
    cached = acceptance(model, x0, target, generator(), rounds=4)  # type: ignore[arg-type]
    monkeypatch.setattr(DualBranch, "incremental", lambda *_: False)
    torch.testing.assert_close(acceptance(model, x0, target, generator(), rounds=4).reached, cached.reached)  # type: ignore[arg-type]


def test_shares_by_offset_and_their_errors() -> None:
    reached = torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.6, 0.2]])
    share, error = Acceptance(reached, bonus=True).by_offset()
    torch.testing.assert_close(share, torch.tensor([0.7, 1.2 / 2.1]))
    # The first is a mean; the second a ratio of means, whose error is that of its residuals.
    torch.testing.assert_close(error[0], reached[:, 0].std() / 3**0.5)
    residual = reached[:, 1] - reached[:, 0] * 1.2 / 2.1
    torch.testing.assert_close(error[1], residual.std() / 0.7 / 3**0.5)
    torch.testing.assert_close(Acceptance(reached, bonus=True).tokens, torch.tensor([2.5, 2.0, 1.8]))
    torch.testing.assert_close(Acceptance(reached, bonus=False).tokens, torch.tensor([2.0, 1.5, 1.6]))


def test_what_cannot_be_measured() -> None:
    model, x0 = network(), torch.zeros(2, 7, dtype=torch.long)
    single = DualBranch(ModelConfig(V, 7, BranchConfig(1, 8, 2), None, exchange="one_way", block_size=SIZE)).double()
    with pytest.raises(InputError, match="target is causal; this model has the heads draft alone"):
        acceptance(single, x0, "causal", generator())
    for target, size in (("causal", 1), ("fused", 8)):
        with pytest.raises(InputError, match=f"block_size is {size}; with target {target}"):
            acceptance(model, x0, target, generator(), block_size=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rounds is 0"):
        acceptance(model, x0, "fused", generator(), rounds=0)
