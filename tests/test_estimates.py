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


def test_rows_of_one_document_are_one_observation() -> None:
    nats = torch.tensor([2.0, 2.0, 6.0, 6.0])
    alone, together = estimate(nats, 1, documents=[4, 5, 6, 7]), estimate(nats, 1, documents=[3, 3, 8, 8])
    assert alone.document_error == pytest.approx(alone.standard_error) and together.nll == 4
    assert together.document_error == pytest.approx(2.0)  # that of two rows of 2 and 6
    assert together.standard_error == pytest.approx(alone.standard_error)
    assert estimate(nats, 1, documents=[1] * 4).document_error is None and estimate(nats, 1).document_error is None
    assert together.to_dict()["document_error"] == together.document_error


def test_document_error_covers_what_documents_differ_by() -> None:
    """Of 1,000 estimates over 40 documents of 1 to 9 rows, each of a level of its own.

    About 94% lie within two errors over documents (fewer than 90% has odds below 1e-6), and two in three at best within
    two errors over rows.
    """
    noise = generator()
    inside, naive = 0, 0
    for _ in range(1000):
        sizes = torch.randint(1, 10, (40,), generator=noise)
        documents = torch.arange(40).repeat_interleave(sizes)
        rows = torch.randn(40, generator=noise)[documents] + 0.3 * torch.randn(len(documents), generator=noise)
        found = estimate(rows, 1, documents=documents.tolist())
        inside += abs(found.nll) < 2 * found.document_error
        naive += abs(found.nll) < 2 * found.standard_error
    assert inside > 900 and naive < 750


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
