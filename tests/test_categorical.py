"""Warps against a plain version of each filter, inverse-CDF draws, and rows that draw what they draw alone."""

import math

import pytest
import torch
from torch import Tensor

from caddf.categorical import RowGenerators, Warp, inverse_cdf
from caddf.errors import InputError


def by_hand(log_probs: list[float], warp: Warp) -> list[float]:
    """One row, token by token: the definition of each filter in the order in which they are applied."""
    tokens = range(len(log_probs))
    logs = [-math.inf if i in warp.banned else log_probs[i] for i in tokens]
    if warp.temperature == 0:
        best = max(tokens, key=lambda i: logs[i])
        return [float(i == best) for i in tokens]
    p = [math.exp(log / warp.temperature) for log in logs]
    p = [x / sum(p) for x in p]
    ranked = sorted(tokens, key=lambda i: -p[i])
    if warp.top_k:
        p = [p[i] if i in ranked[: warp.top_k] else 0.0 for i in tokens]
        p = [x / sum(p) for x in p]
    if warp.top_p < 1:
        nucleus, mass = set(), 0.0
        for i in ranked:  # the smallest set whose mass reaches top_p
            if mass >= warp.top_p:
                break
            nucleus.add(i)
            mass += p[i]
        p = [p[i] if i in nucleus else 0.0 for i in tokens]
        p = [x / sum(p) for x in p]
    p = [x if x >= warp.min_p * max(p) else 0.0 for x in p]
    return [x / sum(p) for x in p]


WARPS = [
    Warp(),
    Warp(temperature=0),
    Warp(temperature=0.5),
    Warp(temperature=3.0, min_p=0.6),
    Warp(top_k=1),
    Warp(top_k=3),
    Warp(top_k=99),
    Warp(top_p=0.6),
    Warp(top_p=1e-9),
    Warp(min_p=0.2),
    Warp(min_p=1.0),
    Warp(banned=(0, 4)),
    Warp(temperature=0, banned=(0, 4)),
    Warp(temperature=0.8, top_k=5, top_p=0.7, min_p=0.1, banned=(2,)),
]


def random_log_probs(rows: int, size: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, size, generator=generator, dtype=torch.float64)).log_softmax(-1)


@pytest.mark.parametrize("warp", WARPS, ids=str)
def test_warp_against_its_definition(warp: Warp) -> None:
    log_probs = random_log_probs(50)
    expected = torch.tensor([by_hand(row, warp) for row in log_probs.tolist()], dtype=torch.float64)
    torch.testing.assert_close(warp(log_probs), expected)
    assert warp(log_probs.view(5, 10, 7)).shape == (5, 10, 7)
    assert warp(log_probs.float()).dtype == torch.float64


def test_warp_keeps_what_has_no_probability_without_it() -> None:
    log_probs = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for warp in (Warp(temperature=2.0), Warp(top_k=2), Warp(top_p=0.9), Warp(min_p=0.1)):
        assert warp(log_probs).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
    ],
    ids=str,
)
def test_warp_refuses(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Warp(**wrong)


def test_inverse_cdf_inverts() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probs.expand(6, -1), u).tolist() == [1, 1, 3, 3, 4, 4]
    assert inverse_cdf(probs, u[0]).item() == 1


def test_inverse_cdf_never_draws_a_token_without_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2_000, 9, generator=generator, dtype=torch.float64)
    probs = probs * (torch.rand(2_000, 9, generator=generator) < 0.4)
    probs[:, 4] += 1e-12
    probs = probs / probs.sum(-1, keepdim=True)
    for u in (0.0, 0.3, 1 - 2**-53):
        token = inverse_cdf(probs, torch.full((2_000,), u, dtype=torch.float64))
        assert (probs.gather(-1, token[:, None]) > 0).all()
    # Each boundary of the distribution function belongs to the token after it.
    cdf = probs.cumsum(-1)
    for i in range(8):
        token = inverse_cdf(probs, (cdf[:, i] / cdf[:, -1]).clamp(max=1 - 2**-53))
        assert (probs.gather(-1, token[:, None]) > 0).all()


def test_inverse_cdf_draws_the_distribution() -> None:
    probs = random_log_probs(1, seed=3).exp()
    u = torch.arange(10_000, dtype=torch.float64) / 10_000  # equally spaced: each token its share, to within one
    counts = torch.bincount(inverse_cdf(probs.expand(10_000, -1), u), minlength=7)
    assert (counts - 10_000 * probs[0]).abs().max() <= 1 + 1e-6


def test_inverse_cdf_keeps_rare_tokens() -> None:
    # In float32 the rare tokens would vanish beside 1, and u would have 24 bits.
    probs = torch.tensor([1.0 - 1e-9, 1e-9], dtype=torch.float64)
    assert inverse_cdf(probs, torch.tensor(1 - 0.5e-9, dtype=torch.float64)).item() == 1


def test_a_row_draws_what_it_draws_alone() -> None:
    together = RowGenerators(5, 3)
    marks = [torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]), torch.tensor([[0, 1, 0], [1, 1, 0], [1, 0, 0]])]
    drawn = [together.uniform(where.bool()) for where in marks]
    for row in range(3):
        alone = RowGenerators(5, [row])
        for where, u in zip(marks, drawn, strict=True):
            assert torch.equal(alone.uniform(where[row : row + 1].bool())[0], u[row])
    assert (drawn[0][1] == 0).all() and drawn[0].dtype == torch.float64
    assert len(set(torch.cat(drawn).flatten().tolist()) - {0.0}) == 5 + 4


def test_a_row_draws_the_same_whatever_the_width() -> None:
    narrow = RowGenerators(0, 1).uniform(torch.tensor([[True, True]]))
    wide = RowGenerators(0, 1).uniform(torch.tensor([[True, False, False, True]]))
    assert narrow[0].tolist() == wide[0, [0, 3]].tolist()
    assert RowGenerators(0, 2).uniform(torch.tensor([True, False])).tolist() == [narrow[0, 0].item(), 0.0]
