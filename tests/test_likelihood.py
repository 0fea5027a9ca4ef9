"""Exact likelihoods against enumeration over all sequences, and what they read of a model (float64, V and L tiny)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drawing import generator
from enumeration import CONFIGS, exact_denoiser, masked_nats, masks, random_network, random_source, sequences, support

from caddf.errors import InputError
from caddf.evaluation.bounds import hybrid_bound
from caddf.evaluation.likelihood import ar_nll, block_nll, causal_nll, score
from caddf.evaluation.reading import read
from caddf.interface import Infill

V, L = 2, 4
SOURCE = random_source(V, L)
network = partial(random_network, V, L)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_exact_likelihoods_sum_to_one(settings: dict) -> None:
    model, every = network(**settings), sequences(V, L)
    if settings.get("causal", "on") is None:
        with pytest.raises(InputError, match="causal branch off"):
            ar_nll(model, every)
        return
    for nll in (
        causal_nll(model, every),
        ar_nll(model, every),
        *(block_nll(model, every, k) for k in (1, 2, 3)),
    ):
        assert nll.exp().reciprocal().sum().item() == pytest.approx(1, abs=1e-10)
        assert nll.std() > 0.1  # not the uniform distribution, for which this would hold whatever is read


@pytest.mark.parametrize("settings", CONFIGS[1:], ids=str)
def test_infilling_sums_to_one_over_completions(settings: dict) -> None:
    model, every = network(**settings), sequences(V, L)
    for masked in masks(L)[1:]:
        total = masked_nats(model, every, masked, infill=True).neg().exp()
        context = (every * ~masked) @ V ** torch.arange(L)
        for value in context.unique():
            assert total[context == value].sum().item() == pytest.approx(1, abs=1e-10)


def test_exact_denoiser_gives_exact_likelihoods() -> None:
    x0, p = support(SOURCE)
    for nll in (
        causal_nll(exact_denoiser(SOURCE), x0, vocab_size=V),
        ar_nll(exact_denoiser(SOURCE), x0, vocab_size=V),
        block_nll(exact_denoiser(SOURCE), x0, 3, vocab_size=V),
        hybrid_bound(exact_denoiser(SOURCE), x0, 1.0, 1, generator(), vocab_size=V)[:, 0],
    ):
        torch.testing.assert_close(nll, -p.log())


def test_score() -> None:
    model, x0 = network(), sequences(V, L)
    for which in ("causal", "ar", "block"):
        rows = score(model, x0, which, 2)
        assert rows.shape == x0.shape and rows.dtype == torch.float64 and not rows.requires_grad
        listed = score(model, [[0, 1, 1], [1]], which, 2)
        assert [len(row) for row in listed] == [3, 1]
        for row, tokens in zip(listed, ([0, 1, 1], [1]), strict=True):
            torch.testing.assert_close(row, score(model, torch.tensor([tokens]), which, 2)[0])
        # What follows does not change what came before: the states of an all-masked canvas do not know its length.
        torch.testing.assert_close(score(model, x0[:, :2], which, 2), rows[:, :2])


@pytest.mark.parametrize("elements", [1, 40])
def test_reading_in_chunks_changes_nothing(elements: int) -> None:
    model, x0 = network(), sequences(V, L)
    where = masks(L)
    states, _ = model(x0, torch.where(where, V, x0), Infill())
    whole, parts = read(model, states, where, x0, "fused"), read(model, states, where, x0, "fused", elements)
    assert torch.equal(whole.nats, parts.nats) and torch.equal(whole.best, parts.best)
    assert (whole.best[~where] == -1).all() and (whole.nats[~where] == 0).all()
    torch.testing.assert_close(whole.nats[where], model.nll(states, where, x0, "fused").detach())


def test_bad_input() -> None:
    model, x0 = network(), sequences(V, L)
    with pytest.raises(InputError, match="holds the id 2"):
        ar_nll(model, torch.full((1, L), V))
    with pytest.raises(InputError, match="likelihood is diffusion"):
        score(model, x0, "diffusion")
    with pytest.raises(InputError, match="block_size is 0"):
        block_nll(model, x0, 0)
