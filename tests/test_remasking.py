"""ReMDM against eq. 6 enumerated state by state, its marginals, and the ancestral chain as its limit.

Chance tests are chi-squared tests that fail by chance with probability `ODDS`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from drawing import last, p_value, task
from enumeration import exact_denoiser, random_denoiser, random_source, sequences
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding import Ancestral, Remasking
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.schedules import SCHEDULES

V, L, ROWS = 3, 2, 3000
ODDS = 1e-6
P0 = (random_source(V, L, seed=3) + 1 / V**L) / 2  # no sequence is rare
LOOP = {"hold": 0.3, "start": 0.6, "end": 0.2}
VARIANTS = {
    "cap": {"eta": 0.5},
    "cosine": {"eta": 0.5, "schedule": "cosine"},
    "rescale": {"remask": "rescale", "eta": 0.7},
    "most": {"remask": "rescale", "eta": 1.0},
    "switch": {"eta": 0.6, "start": 0.7, "end": 0.3},
    "loop": {"eta": 0.3, **LOOP},
    "confident": {"eta": 0.9, "confident": True},
}


def law(model, decoder: Remasking) -> list[Tensor]:
    """p over the (V+1)^L states after each step, by eq. 6 in alpha, position by position."""
    states = sequences(V + 1, L)
    p = (states == V).all(-1).double()
    out = [p]
    q = model.function(states).exp()
    for step in decoder.plan():
        alpha_t, alpha_s, sigma = 1 - step.upper, 1 - step.lower, step.sigma
        reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        one = torch.zeros(len(states), L, V + 1, dtype=torch.float64)
        for n, state in enumerate(states.tolist()):
            for i, token in enumerate(state):
                if token == V:
                    one[n, i, :V], one[n, i, V] = reveal * q[n, i], 1 - reveal
                else:
                    one[n, i, token], one[n, i, V] = 1 - sigma, sigma
        assert one.min() >= -1e-12
        p = p @ torch.einsum("nv,nw->nvw", one[:, 0], one[:, 1]).flatten(1)
        out.append(p)
    return out


def clean(p: Tensor) -> Tensor:
    """Of the states those without masks."""
    full = (sequences(V + 1, L) < V).all(-1)
    assert p[~full].sum() < 1e-12
    return p[full]


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"confident"}))
@pytest.mark.parametrize("steps", [2, 7])
def test_samples_are_the_chain_s(variant, steps):
    model, decoder = as_model(random_denoiser(V, L), V), Remasking(steps, **VARIANTS[variant])
    frame = last(decoder(model, task(model, torch.full((ROWS, L), V))))
    assert p_value(frame.tokens, clean(law(model, decoder)[-1])) > ODDS


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"confident"}))
def test_its_kernel_keeps_the_marginals_of_masking(variant):
    """Theorem 3.1: after each step lambda of a token is masked, and what stands is p0's, with the exact denoiser."""
    p0 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    model, decoder = as_model(exact_denoiser(p0), V), Remasking(9, **VARIANTS[variant])
    levels = [1.0, *(step.lower for step in decoder.plan())]
    for p, masked in zip(law_of_one(model, decoder), levels, strict=True):
        torch.testing.assert_close(p, torch.cat([(1 - masked) * p0, p0.new_tensor([masked])]), atol=1e-12, rtol=0)
    # And what the decoder does in all its steps: its masked share when interrupted, and its tokens at the end.
    rows = 6000
    given = task(model, torch.full((rows, 1), V))
    frames, at = [frame.tokens[:, 0] for frame in decoder(model, given)], levels[1:]
    assert len(frames) == len(at)  # with this many rows something changes in every step
    for tokens, masked in zip(frames, at, strict=True):
        assert p_value(tokens[:, None], torch.cat([(1 - masked) * p0, p0.new_tensor([masked])])) > ODDS / 10


def law_of_one(model, decoder: Remasking) -> list[Tensor]:
    """As `law`, for one token."""
    q, p = model.function(torch.tensor([[V]]))[0, 0].exp(), torch.tensor([0.0] * V + [1.0], dtype=torch.float64)
    out = [p]
    for step in decoder.plan():
        reveal = ((1 - step.lower) - (1 - step.sigma) * (1 - step.upper)) / step.upper
        masked = p[V]
        p = torch.cat([(1 - step.sigma) * p[:V] + masked * reveal * q, p.new_zeros(1)])
        p[V] = 1 - p[:V].sum()
        out.append(p)
    return out


def test_a_longer_loop_brings_the_chain_nearer_to_the_source():
    """What drawing two tokens at once got wrong is drawn again: KL(p0 || p) falls while levels are as few as they were.

    The chain goes down to lambda = 0.1 in two steps and on from there in two; all other steps wait and remask.
    """
    model = as_model(exact_denoiser(P0), V)

    def divergence(steps: int) -> float:
        decoder = Remasking(steps, eta=0.05, hold=0.1, start=1 - 1.5 / steps, end=1.5 / steps)
        assert len({step.lower for step in decoder.plan()}) == 4
        p = clean(law(model, decoder)[-1])
        return (P0.flatten() * (P0.flatten() / p).log()).sum().item()

    few, more, many = (divergence(steps) for steps in (4, 16, 32))
    assert few > 5 * more > 25 * many > 0


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_without_remasking_it_is_ancestral_draw_for_draw(schedule):
    model = as_model(random_denoiser(V, 5), V)
    ours, other = (
        list(decoder(model, task(model, torch.full((20, 5), V))))
        for decoder in (Remasking(9, schedule, eta=0.0), Ancestral(9, schedule))
    )
    assert len(ours) == len(other)
    for one, two in zip(ours, other, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.fresh, two.fresh)
    for name in ("causal", "diffusion", "computed", "needed", "rounds"):
        assert torch.equal(getattr(ours[-1].counts, name), getattr(other[-1].counts, name)), name


def pattern(x: Tensor) -> Tensor:
    """A denoiser of rows of any length, so that rows of several lengths fit one batch."""
    return torch.sin(x.cumsum(-1)[..., None] * torch.arange(1, V + 1, dtype=torch.float64)).log_softmax(-1)


TOKENS, LENGTHS = torch.tensor([[V, 1, V, V, V, V], [V, V, V, 0, 1, 1], [2, V, V, V, V, 0]]), [6, 3, 6]


@pytest.mark.parametrize("variant", VARIANTS)
def test_given_tokens_stay_and_a_row_gets_what_it_would_get_alone(variant):
    model, decoder = as_model(pattern, V), Remasking(12, **VARIANTS[variant])
    given = task(model, TOKENS, lengths=LENGTHS)
    masked_again, before = False, TOKENS
    for frame in decoder(model, given):
        assert torch.equal(frame.tokens[~given.wanted], TOKENS[~given.wanted])
        masked_again |= bool(((before < V) & (frame.tokens == V)).any())
        assert (frame.tokens[frame.fresh] < V).all() or masked_again
        before = frame.tokens
    assert masked_again and (frame.tokens[given.wanted] < V).all()
    for r in range(3):
        alone = last(decoder(model, task(model, TOKENS[r : r + 1, : LENGTHS[r]], rows=[r])))
        assert torch.equal(alone.tokens[0], frame.tokens[r, : LENGTHS[r]])
        for name in ("diffusion", "computed", "needed", "rounds"):
            assert getattr(alone.counts, name)[0] == getattr(frame.counts, name)[r], name


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(variant):
    model = as_model(pattern, V)
    cached, uncached = (
        last(Remasking(40, **VARIANTS[variant], cache=cache)(model, task(model, TOKENS, lengths=LENGTHS)))
        for cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens) and torch.equal(cached.counts.needed, uncached.counts.needed)
    assert torch.equal(uncached.counts.computed, uncached.counts.needed)
    assert (cached.counts.computed < uncached.counts.computed).all()


def test_sure_tokens_are_masked_less():
    """Two tokens stand, drawn with probability 1 and 1/V: the softmax of -q gives their shares of sigma."""

    def function(x: Tensor) -> Tensor:
        sure = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        return torch.stack([sure, torch.full_like(sure, 1 / V)]).log().expand(len(x), -1, -1)

    model, rows = as_model(function, V), 4000
    decoder = Remasking(2, eta=1.0, confident=True)
    first, second = itertools.islice(decoder(model, task(model, torch.full((rows, 2), V))), 2)
    assert decoder.plan()[0].sigma == 1.0 and (second.tokens < V).all()
    # In the first step nothing stands; with three steps what the first revealed is masked again in the second.
    decoder = Remasking(3, eta=1.0, confident=True)
    first, second, _ = decoder(model, task(model, torch.full((rows, 2), V)))
    both = (first.tokens < V).all(1)
    again = (second.tokens[both] == V).double()
    step, share = decoder.plan()[1], torch.tensor([-1.0, -1 / V], dtype=torch.float64).softmax(0)
    expected = step.sigma * share
    error = (expected * (1 - expected) / both.sum()).sqrt()
    assert ((again.mean(0) - expected).abs() < 5 * error).all()


def test_a_row_ends_when_its_tokens_are_final():
    model, tokens = as_model(pattern, V), torch.full((2, 6), V)

    def ended(x: Tensor) -> Tensor:
        return torch.tensor([True, False]) & (x[:, 0] < V)

    free = last(Remasking(30, eta=0.1, end=0.4)(model, task(model, tokens)))
    frames = Remasking(30, eta=0.1, end=0.4)(model, task(model, tokens, finished=ended))
    stopped = last(frames)
    assert (stopped.tokens[1] < V).all() and torch.equal(stopped.tokens[1], free.tokens[1])
    assert (stopped.tokens[0] == V).any() and stopped.counts.computed[0] < free.counts.computed[0]
    known = stopped.tokens[0] < V
    assert known[0] and torch.equal(stopped.tokens[0, known], free.tokens[0, known])
    given = task(model, tokens, finished=lambda x: torch.tensor([True, False]))
    never = last(Remasking(8)(model, given))
    assert never.counts.computed[0] == 0 and (never.tokens[0] == V).all()


def test_banned_tokens_are_never_drawn():
    model = as_model(pattern, V)
    for frame in Remasking(20, eta=0.5)(model, task(model, torch.full((20, 6), V), warp=Warp(banned=(1,)))):
        assert not (frame.tokens == 1).any()


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"steps": 0}, "steps is 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"remask": "all"}, "remask is all"),
        ({"start": 0.2, "end": 0.5}, "start is 0.2"),
        ({"hold": 0.1}, "hold is 0.1"),
        ({"hold": 1.0, "start": 0.6, "end": 0.2}, "hold is 1.0"),
        ({**LOOP, "confident": True}, "confident is set"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    with pytest.raises(InputError, match=says):
        Remasking(**settings)
