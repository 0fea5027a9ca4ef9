"""Law 2: forward marginals and reverse posteriors equal enumeration."""

import itertools

import pytest
import torch
from drawing import generator
from enumeration import absorbing_posterior, uniform_posterior
from torch import Tensor

from caddf.forward_process import (
    mask_exactly,
    mask_tokens,
    resample_tokens,
)

V = 3
MASK = V


def absorbing(kept: float) -> Tensor:
    """q(x_t | x0) as a matrix over the V tokens and the mask, row x0."""
    matrix = kept * torch.eye(V + 1, dtype=torch.float64)
    matrix[:, MASK] += 1 - kept
    return matrix


def uniform(kept: float) -> Tensor:
    return kept * torch.eye(V, dtype=torch.float64) + (1 - kept) / V


def posterior(forward_s: Tensor, step: Tensor, p0: Tensor, x_t: int) -> Tensor:
    """p(x_s | x_t) by Bayes' rule over all (x0, x_s)."""
    joint = (p0[:, None] * forward_s[: len(p0)]).sum(0) * step[:, x_t]
    return joint / joint.sum()


def bayes(forward_t: Tensor, p0: Tensor, x_t: int) -> Tensor:
    joint = p0 * forward_t[: len(p0), x_t]
    return joint / joint.sum()


P0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.2, 0.7), (0.69, 0.7), (0.9, 1.0)])
def test_absorbing_posterior_is_bayes(s: float, t: float) -> None:
    forward_s, step = absorbing(1 - s), absorbing((1 - t) / (1 - s))
    torch.testing.assert_close(forward_s @ step, absorbing(1 - t))  # the chain has the stated marginals
    for x_t in range(V + 1) if t < 1 else [MASK]:
        q0 = bayes(absorbing(1 - t), P0, x_t)
        given = absorbing_posterior(q0, torch.tensor(x_t == MASK), torch.tensor(x_t), s, t)
        torch.testing.assert_close(given, posterior(forward_s, step, P0, x_t))


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.2, 0.7), (0.69, 0.7), (0.9, 1.0)])
def test_uniform_posterior_is_bayes(s: float, t: float) -> None:
    forward_s, step = uniform(1 - s), uniform((1 - t) / (1 - s))
    torch.testing.assert_close(forward_s @ step, uniform(1 - t))
    for x_t in range(V):
        q0 = bayes(uniform(1 - t), P0, x_t)
        given = uniform_posterior(q0, torch.tensor(x_t), s, t)
        torch.testing.assert_close(given, posterior(forward_s, step, P0, x_t))


def test_posteriors_work_on_batches() -> None:
    q0 = torch.rand(2, 4, V, generator=generator(), dtype=torch.float64).softmax(-1)
    x_t = torch.tensor([[0, MASK, 2, MASK], [MASK, 1, MASK, 0]])
    given = absorbing_posterior(q0, x_t == MASK, x_t, 0.2, 0.5)
    torch.testing.assert_close(given.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(given[0, 1], torch.cat([0.6 * q0[0, 1], torch.tensor([0.4]).double()]))
    given = uniform_posterior(q0, x_t.clamp(max=V - 1), 0.2, 0.5)
    assert given.shape == q0.shape


def agrees(counts: Tensor, expected: Tensor) -> None:
    """Chi-squared: fails by chance less than once in 10**6, by P(chi2 > k + 2 sqrt(k x) + 2 x) <= e^-x at x = 14."""
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi2 = ((counts - expected) ** 2 / expected)[possible].sum().item()
    freedom, x = int(possible.sum()) - 1, 14
    assert chi2 <= freedom + 2 * (freedom * x) ** 0.5 + 2 * x


N = 20_000


def test_masking_has_its_marginals_independently() -> None:
    x0 = torch.tensor([[2, 0, 1]]).expand(N, -1)
    for masked in (0.0, 0.3, 1.0):
        x_t = mask_tokens(x0, torch.full((N,), masked), MASK, generator(1))
        assert ((x_t == MASK) | (x_t == x0)).all()
        pattern = ((x_t == MASK) * torch.tensor([4, 2, 1])).sum(-1)
        expected = torch.tensor([masked**k * (1 - masked) ** (3 - k) for k in (0, 1, 1, 2, 1, 2, 2, 3)])
        agrees(torch.bincount(pattern, minlength=8).double(), N * expected.double())


def test_each_row_has_its_own_probability() -> None:
    x0 = torch.zeros(2, N, dtype=torch.long)
    x_t = mask_tokens(x0, torch.tensor([0.0, 1.0]), MASK, generator())
    assert (x_t[0] == 0).all() and (x_t[1] == MASK).all()
    x_t = resample_tokens(x0, torch.tensor([0.0, 1.0]), V, generator())
    assert (x_t[0] == 0).all() and (x_t[1] != 0).any()


def test_exact_masking_chooses_every_subset_alike() -> None:
    x0 = torch.tensor([[2, 0, 1, 1]]).expand(N, -1)
    for k in range(5):
        x_t = mask_exactly(x0, torch.full((N,), k), MASK, generator(2))
        assert ((x_t == MASK).sum(-1) == k).all()
        pattern = ((x_t == MASK) * torch.tensor([8, 4, 2, 1])).sum(-1)
        weights = torch.tensor([float(bin(p).count("1") == k) for p in range(16)], dtype=torch.float64)
        agrees(torch.bincount(pattern, minlength=16).double(), N * weights / weights.sum())


def test_resampling_has_its_marginals_independently() -> None:
    x0 = torch.tensor([[2, 0]]).expand(N, -1)
    x_t = resample_tokens(x0, torch.full((N,), 0.6), V, generator(3))
    matrix = uniform(0.4)
    expected = torch.stack([matrix[2, a] * matrix[0, b] for a, b in itertools.product(range(V), repeat=2)])
    agrees(torch.bincount(V * x_t[:, 0] + x_t[:, 1], minlength=9).double(), N * expected)
