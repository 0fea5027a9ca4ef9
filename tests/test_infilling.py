"""Infilling against a known source: both sides in sight, the left alone, and greedy filling."""

import pytest
import torch
from enumeration import exact_denoiser, random_source, sequences
from torch import Tensor

from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation.infilling import fill_spans, readings
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig

V, L = 3, 4
SOURCE = random_source(V, L)
EXACT = exact_denoiser(SOURCE)


def denoise(x_t: Tensor) -> Tensor:
    """Of short rows too: what is not there is masked."""
    return EXACT(torch.nn.functional.pad(x_t, (0, L - x_t.shape[1]), value=V))[:, : x_t.shape[1]]


MODEL = as_model(denoise, V)
X0 = sequences(V, L)


def generators(rows: int = len(X0)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(rows)]


def log_p(start: int, size: int, upto: int) -> Tensor:
    """log p0(span | the other tokens before `upto`) of each row of X0: two marginals."""
    joint = SOURCE.sum(tuple(range(upto, L))) if upto < L else SOURCE
    rest = joint.sum(tuple(range(start, start + size)), keepdim=True).expand_as(joint)
    index = tuple(X0[:, i] for i in range(upto))
    return (joint[index] / rest[index]).log()


@pytest.mark.parametrize(("start", "size"), [(0, 1), (1, 2), (2, 1), (0, 3), (3, 1), (0, 4)])
def test_both_sides_and_the_left_alone_are_the_sources_conditionals(start, size):
    at = torch.full((len(X0),), start)
    for reading, upto in (("infill", L), ("causal", start + size)):
        filled = fill_spans(MODEL, X0, at, size, reading, 1, generators())
        torch.testing.assert_close(filled.nats, -log_p(start, size, upto) / size)


def test_the_any_order_reading_is_exact_of_one_token_and_a_bound_of_more():
    """With the exact denoiser the bound is tight: its mean over 200 masked sets of all rows, at 5 standard errors
    (chance: once in 1e6)."""
    one = fill_spans(MODEL, X0, torch.full((len(X0),), 2), 1, "diffusion", 1, generators())
    torch.testing.assert_close(one.nats, -log_p(2, 1, L))
    rows = X0.repeat(50, 1)
    more = fill_spans(MODEL, rows, torch.ones(len(rows), dtype=torch.long), 3, "diffusion", 4, generators(len(rows)))
    gap = more.nats * 3 + log_p(1, 3, L).repeat(50)
    assert abs(gap.mean()) < 5 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("reading", ["infill", "causal"])
def test_spans_at_places_of_their_own_are_filled_greedily(reading):
    start = torch.arange(len(X0)) % 3
    filled = fill_spans(MODEL, X0, start, 2, reading, 1, generators())
    for row, (x0, s) in enumerate(zip(X0, start.tolist(), strict=True)):
        x = x0.clone()
        x[s : s + 2 if reading == "infill" else L] = V
        for i in (s, s + 1):
            x[i] = denoise(x[None])[0, i].argmax()
        assert filled.exact[row] == bool((x[s : s + 2] == x0[s : s + 2]).all())
    assert 0 < filled.exact.double().mean() < 1


def test_the_surest_place_is_filled_first():
    """Of two tokens, the surer by itself, then the other with it in sight."""
    start = torch.ones(len(X0), dtype=torch.long)
    filled = fill_spans(MODEL, X0, start, 2, "diffusion", 1, generators())
    for row, x0 in enumerate(X0):
        x = x0.clone()
        x[1:3] = V
        first = 1 + int(denoise(x[None])[0, 1:3].amax(-1).argmax())
        for i in (first, 3 - first):
            x[i] = denoise(x[None])[0, i].argmax()
        assert filled.exact[row] == bool((x == x0).all())


def test_what_is_all_but_sure_is_filled_one_by_one():
    """0 where the token before is masked, 1 where it stands, each with a probability near 1 in float32."""

    def sure(x_t: Tensor) -> Tensor:
        best = torch.nn.functional.one_hot((x_t.roll(1, -1) != V).long(), V)
        return torch.where(best == 1, 1 - 2e-6, 1e-6).log()

    x0 = torch.tensor([[0, 1, 1, 0]])
    filled = fill_spans(as_model(sure, V), x0, torch.tensor([1]), 2, "diffusion", 1, generators(1))
    assert filled.exact.all()


def test_what_a_model_cannot_read_is_refused():
    causal = CausalModel(CausalConfig(V, L, BranchConfig(1, 8, 1))).eval()
    assert readings(causal) == ("causal",) and readings(MODEL) == ("infill", "diffusion", "causal")
    start = torch.zeros(len(X0), dtype=torch.long)
    assert fill_spans(causal, X0, start, 2, "causal", 1, generators()).nats.shape == (len(X0),)
    with pytest.raises(InputError, match="reading is infill; this model has causal"):
        fill_spans(causal, X0, start, 1, "infill", 1, generators())
    with pytest.raises(InputError, match="size is 3; spans from 2 on leave rows of 4 tokens"):
        fill_spans(MODEL, X0, start + 2, 3, "infill", 1, generators())
