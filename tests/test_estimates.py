"""Averages over rows, and how often their standard errors cover the truth."""

from __future__ import annotations

import math

import pytest
import torch
from drawing import generator
from enumeration import entropy, exact_denoiser, random_source, support

from caddf.denoiser import as_model
from caddf.evaluation.bounds import diffusion_bound
from caddf.evaluation.estimates import estimate

V, L = 2, 4
SOURCE = random_source(V, L)


def test_estimate() -> None:
    nats = torch.tensor([[6.0, 10.0], [16.0, 16.0]])
    result = estimate(nats, 4, 16)
    assert (result.nll, result.tokens, result.rows, result.samples) == (3.0, 8, 2, 2)
    assert result.standard_error == pytest.approx(1.0)  # rows of 2 and 4 nats per token: sd sqrt(2), over sqrt(2)
    assert result.ppl == pytest.approx(math.exp(3))
    assert result.bits_per_byte == pytest.approx(24 / math.log(2) / 16)
    assert {"nll", "standard_error", "ppl", "bits_per_byte"} <= set(result.to_dict())
    assert estimate(torch.tensor([8.0]), 4).standard_error is None
    assert estimate(torch.tensor([8.0]), 4).bits_per_byte is None
    assert estimate(torch.tensor([8.0, 2.0]), torch.tensor([4, 1])).nll == pytest.approx(2)
    assert estimate(torch.tensor([8.0, 2.0]), torch.tensor([4, 1])).standard_error == 0


def test_standard_error_covers_a_ratio_of_unequal_rows() -> None:
    """Of 1,000 estimates over 100 rows of 1 to 9 tokens, whose nats per token depend on their number.

    About 95% lie within two errors; fewer than 91% or more than 98% has odds below 1e-6.
    """
    noise = generator()
    counts = torch.randint(1, 10, (1000, 100), generator=noise)
    nats = counts * (1 + 1 / counts) + counts**0.5 * torch.randn(1000, 100, dtype=torch.float64, generator=noise)
    truth = 1 + 1 / 5  # 5 tokens a row
    estimates = [estimate(part, count) for part, count in zip(nats, counts, strict=True)]
    covered = sum(abs(e.nll - truth) < 2 * e.standard_error for e in estimates) / 1000
    assert 0.91 < covered < 0.98


def test_standard_error_covers_the_truth() -> None:
    """Of 400 estimates over 100 windows about 95% lie within two errors; fewer than 88% has odds below 1e-6."""
    model = as_model(exact_denoiser(SOURCE), V)
    x0, p = support(SOURCE)
    rows = p.multinomial(400 * 100, replacement=True, generator=generator())
    nats = diffusion_bound(model, x0[rows], 2, generator()).view(400, 100, 2)
    estimates = [estimate(part, L) for part in nats]
    covered = sum(abs(e.nll - entropy(SOURCE) / L) < 2 * e.standard_error for e in estimates)
    assert covered / 400 > 0.88
