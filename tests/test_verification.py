"""Block verification draws the target exactly, and keeps as much of the drafts as any verification can."""

import itertools

import pytest
import torch
from drawing import p_value
from torch import Tensor

from caddf.categorical import inverse_cdf
from caddf.decoding.verification import residual, shares, verify

V, M, ROWS = 3, 4, 200_000
ODDS = 1e-6  # of a chi-squared test failing by chance
GIVEN = 1


def trees(seed: int, given: int = -1) -> tuple[list[Tensor], list[Tensor]]:
    """p and q behind every path of 0 .. M - 1 tokens, [V^i, V]; at place `given` both are sure of the token GIVEN."""
    generator = torch.Generator().manual_seed(seed)
    out: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tree in out:
        for i in range(M):
            log_p = torch.randn(V**i, V, generator=generator, dtype=torch.float64)
            tree.append(torch.softmax(2 * log_p, -1))
            if i == given:
                tree[-1] = torch.nn.functional.one_hot(torch.full((V**i,), GIVEN), V).double()
    return out


def behind(tree: list[Tensor], tokens: Tensor) -> Tensor:
    """The distributions along each row's path, [rows, M, V]."""
    index, parts = torch.zeros(len(tokens), dtype=torch.long), []
    for i in range(M):
        parts.append(tree[i][index])
        index = index * V + tokens[:, i]
    return torch.stack(parts, 1)


def drawn(tree: list[Tensor], generator: torch.Generator, tokens: Tensor, since: Tensor) -> Tensor:
    """`tokens` with all from each row's place `since` on drawn anew from `tree`."""
    tokens = tokens.clone()
    for i in range(M):
        fresh = inverse_cdf(behind(tree, tokens)[:, i], torch.rand(len(tokens), generator=generator))
        tokens[:, i] = torch.where(i >= since, fresh, tokens[:, i])
    return tokens


def law(tree: list[Tensor]) -> Tensor:
    """The probability of each sequence of M tokens."""
    paths = torch.tensor(list(itertools.product(range(V), repeat=M)))
    return behind(tree, paths).gather(-1, paths[..., None])[..., 0].prod(-1)


@pytest.mark.parametrize("given", [-1, 1, 3])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_what_stands_and_what_follows_is_the_target(least, given):
    """Drafts, one token in place of the first rejected, and the rest from the target: all sequences of four tokens."""
    p_tree, q_tree = trees(0, given)
    generator, rows = torch.Generator().manual_seed(0), torch.arange(ROWS)
    tokens = drawn(q_tree, generator, torch.zeros(ROWS, M, dtype=torch.long), torch.zeros(ROWS, dtype=torch.long))
    p, q = behind(p_tree, tokens), behind(q_tree, tokens)
    drafting = (torch.arange(M) != given).expand(ROWS, M)
    sure = torch.where(drafting, q.amax(-1), 1).cumprod(1)
    count = (sure >= least).long().cumprod(1).sum(1).clamp(min=1)
    u = torch.rand(ROWS, M, generator=generator, dtype=torch.float64) * drafting
    stands, s = verify(p, q * drafting[..., None], tokens, drafting, count, u)
    assert (stands <= count).all() and len(stands.unique()) > 2

    at = stands.clamp(max=M - 1)
    rest = torch.where((stands < count)[:, None], q[rows, at], torch.zeros(V, dtype=torch.float64))
    token = inverse_cdf(residual(s[:, None] * p[rows, at], rest), torch.rand(ROWS, generator=generator))
    tokens[rows, at] = torch.where(stands < M, token, tokens[rows, at])
    tokens = drawn(p_tree, generator, tokens, stands + 1)
    assert p_value(tokens, law(p_tree)) > ODDS


def test_as_many_stand_as_the_two_laws_allow():
    """Of j tokens no more than min(what is drafted, what the target makes of those that stand): within five errors."""
    p_tree, q_tree = trees(2)
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(ROWS, dtype=torch.long)
    tokens = drawn(q_tree, generator, torch.zeros(ROWS, M, dtype=torch.long), none)
    p, q = behind(p_tree, tokens), behind(q_tree, tokens)
    u = torch.rand(ROWS, M, generator=generator, dtype=torch.float64)
    stands, _ = verify(p, q, tokens, torch.ones(ROWS, M, dtype=torch.bool), none + M, u)

    paths = torch.tensor(list(itertools.product(range(V), repeat=M)))
    p, q = (behind(tree, paths).gather(-1, paths[..., None])[..., 0] for tree in (p_tree, q_tree))
    kept, singly = torch.ones(len(paths), dtype=torch.float64), torch.ones(len(paths), dtype=torch.float64)
    for j in range(1, M + 1):
        kept = torch.minimum(q[:, :j].prod(-1), kept * p[:, j - 1])
        singly = singly * torch.minimum(p, q)[:, j - 1]
        share, one_by_one = (each.sum() / V ** (M - j) for each in (kept, singly))
        counted = (stands >= j).double()
        assert (counted.mean() - share).abs() <= 5 * counted.std() / ROWS**0.5
        assert share >= one_by_one and (j == 1 or share > one_by_one + 0.01)


def test_shares():
    p, q = torch.tensor([[0.2, 0.9, 0.1, 0.0]]), torch.tensor([[0.4, 0.3, 0.4, 0.5]])
    torch.testing.assert_close(shares(p, q), torch.tensor([[1.0, 0.5, 1.0, 0.25, 0.0]]))


def test_no_draft_and_equal_laws():
    p = torch.tensor([[[0.25, 0.75]] * 3], dtype=torch.float64)
    none = verify(p, p[:, :0], torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool),
                  torch.zeros(1, dtype=torch.long), p.new_zeros(1, 0))  # fmt: skip
    assert [each.item() for each in none] == [0, 1.0]
    tokens, every = torch.tensor([[0, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)
    for u in (0.0, 1 - 2**-53):
        stands, s = verify(p, p, tokens, every, torch.tensor([3]), torch.full((1, 3), u, dtype=torch.float64))
        assert (stands.item(), s.item()) == (3, 1.0)


def test_greedy_drafts_stand_up_to_the_first_mismatch():
    sure = torch.eye(3, dtype=torch.float64)
    p, q = sure[[0, 1, 2, 0]][None], sure[[0, 1, 0, 0]][None]
    tokens, every = torch.tensor([[0, 1, 0, 0]]), torch.ones(1, 4, dtype=torch.bool)
    for u in (0.0, 0.5, 1 - 2**-53):
        stands, _ = verify(p, q, tokens, every, torch.tensor([4]), torch.full((1, 4), u, dtype=torch.float64))
        assert stands.item() == 2
    token = inverse_cdf(residual(p[:, 2], q[:, 2]), torch.tensor([0.3]))
    assert token.item() == 2
