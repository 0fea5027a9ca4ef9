"""Accuracies against enumeration, and the chained drafter against a draft made token by token."""

from __future__ import annotations

import pytest
import torch
from drawing import generator
from enumeration import exact_denoiser, masks, random_denoiser, random_source, sequences
from torch import Tensor

from caddf.errors import InputError
from caddf.evaluation import autoregressive_accuracy, diffusion_accuracy, mtp
from caddf.interface import Block
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig


def network(**settings: object) -> DualBranch:
    torch.manual_seed(2)
    values = {"causal": BranchConfig(2, 8, 2), **settings}
    model = DualBranch(ModelConfig(5, 7, BranchConfig(1, 8, 2), block_size=3, **values)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def best_given(p0: Tensor, x0: Tensor, known: int, i: int) -> Tensor:
    """Arg max of p0(x_i | x_<known), by summing the table."""
    others = [d for d in range(known, p0.ndim) if d != i]
    table = p0.sum(others) if others else p0
    return table.expand(len(x0), *table.shape)[(torch.arange(len(x0)), *x0[:, :known].T)].argmax(-1)


def test_accuracies_of_the_exact_denoiser() -> None:
    p0 = random_source(3, 4, seed=2)
    x0, denoiser = sequences(3, 4), exact_denoiser(p0)
    fused = torch.stack([best_given(p0, x0, i, i) for i in range(4)], -1)
    right = autoregressive_accuracy(denoiser, x0, vocab_size=3)
    assert torch.equal(right, (fused == x0).double().mean(-1))
    assert 0 < right.mean() < 1
    for k in (1, 2, 4):
        drafts = torch.stack([best_given(p0, x0, i // k * k, i) for i in range(4)], -1)
        out = mtp(denoiser, x0, k, vocab_size=3)
        assert torch.equal(out.accuracy, (drafts == x0).double().mean(-1))
        assert torch.equal(out.agreement, (drafts == fused).double().mean(-1))
    assert out.agreement.mean() < 1 == mtp(denoiser, x0, 1, vocab_size=3).agreement.mean()


def test_diffusion_accuracy_is_the_average_over_masks() -> None:
    """The mean of 2000 draws per row against all masks: beyond 5 standard errors with odds of 6e-7 per row."""
    x0, denoiser = sequences(3, 3), random_denoiser(3, 3)
    exact = torch.zeros(len(x0), dtype=torch.float64)
    for k in (1, 2, 3):
        chosen = masks(3)[masks(3).sum(-1) == k]
        for where in chosen:
            best = denoiser(torch.where(where, 3, x0)).argmax(-1)
            exact += ((best == x0) & where).sum(-1) / k / len(chosen) / 3
    drawn = diffusion_accuracy(denoiser, x0.repeat_interleave(1000, 0), 2, generator(), vocab_size=3)
    drawn = drawn.mean(-1).view(len(x0), 1000)
    assert ((drawn.mean(-1) - exact).abs() <= 5 * drawn.std(-1) / 1000**0.5 + 1e-12).all()


@pytest.mark.parametrize(("fusion", "exchange"), [("late", "mutual"), ("late", "one_way"), ("layers", "one_way")])
def test_a_chained_draft_reads_its_own_drafts(fusion: str, exchange: str) -> None:
    """Block 1 of two whole ones; a tail of one token belongs to no whole block."""
    model, size = network(fusion=fusion, exchange=exchange, draft="chained"), 3
    x0 = torch.randint(5, (40, 7), generator=generator())
    canvas = torch.full_like(x0, model.mask_id)
    everywhere = torch.ones_like(x0, dtype=torch.bool)

    def draft_at(prefix: Tensor, head: str = "draft") -> Tensor:
        states, _ = model(prefix, canvas, Block(size))
        return model.log_probs(states, everywhere, head).view(40, 7, 5).argmax(-1)

    drafts = torch.full_like(x0, -1)
    for block in (0, 1):
        prefix = x0.clone()
        for i in range(block * size, (block + 1) * size):  # one token at a time, from a prefix that ends there
            prefix[:, i:] = 0
            drafts[:, i] = prefix[:, i] = draft_at(prefix)[:, i]
    fused = draft_at(x0, "fused")
    forced = draft_at(x0)
    assert (forced[:, :6] != drafts[:, :6]).any(-1).sum() > 5  # teacher forcing would say something else

    out = mtp(model, x0, size, [generator(r) for r in range(40)])
    chosen = [int(torch.rand(1, generator=generator(r), dtype=torch.float64) * 2) for r in range(40)]
    assert 5 < sum(chosen) < 35
    for r, block in enumerate(chosen):
        inside = slice(block * size, (block + 1) * size)
        assert out.accuracy[r] == pytest.approx((drafts[r, inside] == x0[r, inside]).double().mean().item())
        assert out.agreement[r] == pytest.approx((drafts[r, inside] == fused[r, inside]).double().mean().item())


def test_factorised_drafts_use_every_whole_block() -> None:
    model = network()
    x0 = torch.randint(5, (6, 7), generator=generator())
    states, _ = model(x0, torch.full_like(x0, model.mask_id), Block(3))
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    best = model.log_probs(states, everywhere, "draft").view(6, 7, 5).argmax(-1)
    assert torch.allclose(mtp(model, x0, 3).accuracy, (best == x0)[:, :6].double().mean(-1))


def test_given_tokens_do_not_count() -> None:
    """Only scored positions, and only blocks that are scored throughout; of a chain, one of those."""
    x0 = torch.randint(5, (40, 7), generator=generator())
    scored = torch.arange(7).expand(40, -1) >= 2
    model = network()
    states, _ = model(x0, torch.full_like(x0, model.mask_id), Block(3))
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    right = model.log_probs(states, everywhere, "draft").view(40, 7, 5).argmax(-1) == x0
    assert torch.allclose(mtp(model, x0, 3, scored=scored).accuracy, right[:, 3:6].double().mean(-1))
    chain = network(draft="chained")
    for r in range(40):
        one = mtp(chain, x0[r : r + 1], 3, generator(r), scored=scored[:1])
        alone = mtp(chain, x0[r : r + 1, :6], 3, generator(r), scored=torch.arange(6)[None] >= 3)
        assert one.accuracy == alone.accuracy  # block 1, whatever is drawn
    with pytest.raises(InputError, match="block_size is 6; a row has no block of so many scored tokens"):
        mtp(model, x0, 6, scored=scored)

    p0 = random_source(3, 4, seed=2)
    rows, denoiser = sequences(3, 4), exact_denoiser(p0)
    late = torch.arange(4).expand(len(rows), -1) >= 1
    best = torch.stack([best_given(p0, rows, i, i) for i in range(4)], -1)
    expected = (best == rows)[:, 1:].double().mean(-1)
    assert torch.equal(autoregressive_accuracy(denoiser, rows, scored=late, vocab_size=3), expected)
    last = torch.arange(4).expand(len(rows), -1) == 3  # with one scored position it is masked in every draw
    drawn = diffusion_accuracy(denoiser, rows, 2, generator(), scored=last, vocab_size=3)
    assert torch.equal(drawn, (best == rows)[:, 3:].double().expand(-1, 2))


def test_without_a_causal_branch() -> None:
    model = network(causal=None, exchange="one_way")
    x0 = torch.randint(5, (3, 7), generator=generator())
    assert mtp(model, x0, 3).agreement is None
    assert diffusion_accuracy(model, x0, 2, generator()).shape == (3, 2)
    with pytest.raises(InputError, match="causal branch off"):
        autoregressive_accuracy(model, x0)


def test_bad_blocks() -> None:
    for size in (0, 8):
        with pytest.raises(InputError, match=f"block_size is {size}"):
            mtp(network(), torch.zeros(1, 7, dtype=torch.int64), size)
