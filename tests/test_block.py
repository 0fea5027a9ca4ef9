"""Block diffusion (BD3-LM) against enumeration, its decoder with and without a cache, and MDLM as its limit.

Chance tests compare means at 5 standard errors (6e-7 a comparison under a normal law) or are chi-squared tests at 1e-6.
Seeds are fixed, so what passes once passes always.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from catalogue import MODELS, build, draw_tokens
from drawing import generator, last, p_value, task
from enumeration import entropy, exact_denoiser, masks, random_denoiser, random_source, sequences
from torch import Tensor

from caddf.decoding.block import SemiAutoregressive
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation import diffusion_bound
from caddf.evaluation.block import block_diffusion_bound
from caddf.interface import AnyOrder, Block
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.objectives import TimeDCE
from caddf.objectives.block import BlockDiffusion
from caddf.schedules import LogLinear

V, L = 2, 4
SOURCE = random_source(V, L)
EVERY = sequences(V, L)


def network(vocab: int = V, context: int = L, block_size: int = 2, scale: float = 8, **settings) -> DualBranch:
    """A random network, sharp enough that its parts matter; without a causal branch unless told."""
    torch.manual_seed(1)
    settings = {"causal": None, "exchange": "one_way", **settings}
    model = DualBranch(
        ModelConfig(vocab, context, BranchConfig(2, 16, 2, alibi=True), block_size=block_size, **settings)
    ).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    return model.eval().requires_grad_(False)


def named(name: str):
    if name == "exact":
        return as_model(exact_denoiser(SOURCE), V)
    if name == "random":
        return as_model(random_denoiser(V, L), V)
    return network() if name == "network" else network(causal=BranchConfig(1, 16, 2), exchange="mutual")


CASES = [("network", 1), ("network", 2), ("network", 3), ("network", 4), ("exact", 2), ("random", 3), ("mutual", 2)]


def conditional(model, x: Tensor, canvas: Tensor, i: int, size: int) -> Tensor:
    """log q(x_i | blocks before, canvas of its block), for one position of each row."""
    where = torch.zeros_like(x, dtype=torch.bool)
    where[:, i] = True
    states, _ = model(x, canvas, Block(size))
    return -model.nll(states, where, x, "draft")


def block_bound(model, x: Tensor, size: int) -> Tensor:
    """Sum over blocks of the mean over orders of revealing their positions of -log q: by enumeration, exact."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for positions in torch.arange(x.shape[1]).split(size):
        orders = list(itertools.permutations(positions.tolist()))
        for order in orders:
            canvas = torch.full_like(x, model.mask_id)
            for i in order:
                total -= conditional(model, x, canvas, i, size) / len(orders)
                canvas[:, i] = x[:, i]
    return total


def denoised(model, x: Tensor, canvas: Tensor, i: int, size: int) -> Tensor:
    """The same of the any-order denoiser, which reads the row up to the block's end as it stands."""
    start = i // size * size
    part = torch.cat([x[:, :start], canvas[:, start : start + size]], 1)
    where = torch.zeros_like(part, dtype=torch.bool)
    where[:, i] = True
    return -model.nll(model(part, part, AnyOrder())[0], where, x[:, : part.shape[1]], model.denoiser)


def law(model, x: Tensor, size: int, conditional=conditional) -> Tensor:
    """p(x) of the decoder that reveals one token at a time: the product over blocks of the mean over orders of p."""
    log_p = torch.zeros(len(x), dtype=torch.float64)
    for positions in torch.arange(x.shape[1]).split(size):
        parts = []
        for order in itertools.permutations(positions.tolist()):
            canvas, part = torch.full_like(x, model.mask_id), torch.zeros(len(x), dtype=torch.float64)
            for i in order:
                part += conditional(model, x, canvas, i, size)
                canvas[:, i] = x[:, i]
            parts.append(part)
        log_p += torch.stack(parts).logsumexp(0) - math.log(len(parts))
    return log_p.exp()


# The bound.


@pytest.mark.parametrize("name, size", CASES)
def test_the_bound_is_the_enumerated_one(name, size):
    model = named(name)
    exact = block_bound(model, EVERY, size)
    drawn = block_diffusion_bound(model, EVERY.repeat_interleave(300, 0), 2, generator(), size).mean(-1)
    drawn = drawn.view(len(EVERY), -1)
    assert ((drawn.mean(-1) - exact).abs() <= 5 * drawn.std(-1) / drawn.shape[-1] ** 0.5 + 1e-9).all()
    # A bound, of the law of the decoder; and with the exact denoiser, of the source itself.
    assert (exact + law(model, EVERY, size).log() > -1e-9).all()
    mean = float(exact @ SOURCE.flatten())
    assert mean >= entropy(SOURCE) - 1e-9
    if name == "exact":
        assert mean == pytest.approx(entropy(SOURCE))


@pytest.mark.parametrize("name", ["random", "network"])
def test_one_block_is_mdlm_s_bound(name):
    model = named(name)
    rows = EVERY.repeat_interleave(300, 0)
    any_order = diffusion_bound(model, rows, 2, generator()).mean(-1).view(len(EVERY), -1)
    error = any_order.std(-1) / any_order.shape[-1] ** 0.5
    assert ((any_order.mean(-1) - block_bound(model, EVERY, L)).abs() <= 5 * error + 1e-9).all()


def test_one_block_reads_as_the_any_order_denoiser():
    model, x0 = network(7, 8), torch.randint(7, (3, 8), generator=generator())
    x_t = torch.where(torch.rand(3, 8, generator=generator()) < 0.5, 7, x0)
    masked = x_t == 7
    whole, plain = model(x0, x_t, Block(8))[0], model(x_t, x_t, AnyOrder())[0]
    torch.testing.assert_close(model.log_probs(whole, masked, "draft"), model.log_probs(plain, masked, "draft"))


@pytest.mark.parametrize("name", ["random", "network", "mutual"])
def test_blocks_of_one_are_the_chain_rule(name):
    """-sum_i log q(x_i | x_<i, own position masked), without noise; it sums to one over all sequences."""
    model = named(name)
    bound = block_diffusion_bound(model, EVERY, 3, generator(), 1)
    masked = torch.full_like(EVERY, V)
    chain = -sum(conditional(model, EVERY, masked, i, 1) for i in range(L))
    torch.testing.assert_close(bound, chain[:, None].expand(-1, 3))
    assert (-bound[:, 0]).exp().sum().item() == pytest.approx(1)


def test_a_row_s_noise_is_its_own():
    model = network()
    together = block_diffusion_bound(model, EVERY[:3], 2, [generator(r) for r in range(3)], 3)
    alone = block_diffusion_bound(model, EVERY[1:2], 2, [generator(1)], 3)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)


# The objective.


@pytest.mark.parametrize("rate", [0.3, 0.8])
@pytest.mark.parametrize("size", [2, 3])
def test_the_objective_is_the_integrand_of_the_bound(size, rate):
    """At lambda = beta = omega: 1 / lambda E [sum over masked], whose integral over lambda is `block_bound`.

    Blocks of 2, and of 3 and 1. Of one lambda at a time, as 1 / lambda has no variance over all of them.
    """
    model, expected = network(block_size=size), torch.zeros(len(EVERY), dtype=torch.float64)
    for masked in masks(L):
        x_t = torch.where(masked, V, EVERY)
        p = rate ** int(masked.sum()) * (1 - rate) ** int((~masked).sum())
        for i in masked.nonzero()[:, 0].tolist():
            expected -= p / rate * conditional(model, EVERY, x_t, i, size)
    g, objective = generator(), BlockDiffusion(rate, rate)
    drawn = torch.stack([objective(model, EVERY.repeat(16, 1), g).total for _ in range(60)])
    assert abs(drawn.mean() - expected.mean() / L) < 5 * drawn.std() / len(drawn) ** 0.5
    assert drawn.std() < 0.1 * drawn.mean()


def test_clipped_noise_and_its_weights():
    shown = []

    class Uniform:
        heads, chained, vocab_size, mask_id, block_size = frozenset({"draft"}), False, V, V, 50

        def __call__(self, prefix, canvas, pattern):
            assert pattern == Block(50)
            shown.append(canvas == V)
            return canvas, None

        def nll(self, states, where, targets, head):
            assert head == "draft" and torch.equal(where, states == V)
            return torch.ones(int(where.sum()), dtype=torch.float64)

    x0 = torch.zeros(40, 100, dtype=torch.long)
    loss = BlockDiffusion(0.45, 0.95)(Uniform(), x0, generator())
    rate = shown[0].double().view(-1, 50).mean(-1)
    # 80 binomials of 50 at rates within [.45, .95]: six standard deviations (at most .071) out, 1e-7 in all.
    assert rate.min() > 0.45 - 6 * 0.071 and rate.std() > 0.1
    assert abs(rate.mean() - 0.7) < 6 * 0.16 / 80**0.5
    assert abs(loss.total - 1) < 6 * 0.12 / 80**0.5  # standard deviation at most sqrt(.55 / .45 / 50)
    total = BlockDiffusion(1, 1)(Uniform(), x0, generator()).total
    assert total == pytest.approx(1, abs=1e-12) and shown[1].all()


def test_all_masked_blocks_of_one_are_the_chain_rule():
    model = network(block_size=1)
    loss = BlockDiffusion(1.0, 1.0)(model, EVERY, generator()).total
    torch.testing.assert_close(loss, block_diffusion_bound(model, EVERY, 1, generator()).mean() / L)


@pytest.mark.parametrize("name", ["off-factorised", "late-one_way-factorised"])
def test_one_batch_is_learnt_by_heart(name):
    branch = BranchConfig(1, 32, 2)
    config = replace(MODELS[name], diffusion=branch, causal=MODELS[name].causal and branch, block_size=8)
    model, x0 = build(config).float(), draw_tokens(4)
    x0[:, 0] = torch.tensor([2, 3, 4, 5])
    objective, optimizer = BlockDiffusion(0.4, 0.6), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = objective(model, x0, generator(3)).total
        if loss.item() < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 300 steps: {loss.item()}")


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: BlockDiffusion(0.5, 0.4), "beta and omega are 0.5 and 0.4"),
        (lambda: BlockDiffusion(0.0, 0.0), "omega above 0"),
        (lambda: BlockDiffusion()(network(draft="chained"), EVERY, generator()), "draft is chained"),
        (lambda: block_diffusion_bound(network(draft="chained"), EVERY, 1, generator()), "factorised"),
        (lambda: SemiAutoregressive(steps=0), "steps is 0"),
    ],
)
def test_settings_that_do_not_fit(wrong, says):
    with pytest.raises(InputError, match=says):
        wrong()


# The decoder.


@pytest.mark.parametrize("name, size", CASES)
def test_one_token_at_a_time_draws_the_continuous_chain(name, size):
    model = named(name)
    frame = last(SemiAutoregressive(block_size=size)(model, task(model, torch.full((2000, L), V))))
    assert p_value(frame.tokens, law(model, EVERY, size)) > 1e-6
    if name == "exact":
        assert p_value(frame.tokens, SOURCE.flatten()) > 1e-6


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("causal", [BranchConfig(1, 16, 2), None], ids=["dual", "off"])
def test_where_drafts_chain_the_denoiser_fills_the_blocks(causal, size):
    model = network(causal=causal, exchange="mutual" if causal else "one_way", draft="chained")
    expected = law(model, EVERY, size, denoised)
    assert float(expected.sum()) == pytest.approx(1)
    assert 0.5 * (expected - law(model, EVERY, size)).abs().sum() > 0.02  # of the drafts it would be another
    frame = last(SemiAutoregressive(block_size=size)(model, task(model, torch.full((2000, L), V))))
    assert p_value(frame.tokens, expected) > 1e-6


def test_in_steps_it_draws_the_chain_of_each_block():
    """One step a block: all of a block at once, independently, given the blocks before it."""
    model = network()
    masked = torch.full_like(EVERY, V)
    log_p = sum(conditional(model, EVERY, masked, i, 2) for i in range(L))
    frame = last(SemiAutoregressive(steps=1)(model, task(model, torch.full((2000, L), V))))
    assert p_value(frame.tokens, log_p.exp()) > 1e-6 and (frame.counts.rounds == 2).all()
    # Two steps, log-linear: a block's two positions fall into the same half, or do not, with even odds.
    one_by_one = law(model, EVERY, 2)
    parts = []  # of each block, both ways
    for block in ((0, 1), (2, 3)):
        together = sum(conditional(model, EVERY, masked, i, 2) for i in block).exp()
        apart = torch.zeros(len(EVERY), dtype=torch.float64)
        for i, j in (block, block[::-1]):
            canvas = masked.clone()
            canvas[:, i] = EVERY[:, i]
            p = conditional(model, EVERY, masked, i, 2) + conditional(model, EVERY, canvas, j, 2)
            apart += p.exp() / 2
        parts.append((together, apart))
    torch.testing.assert_close(parts[0][1] * parts[1][1], one_by_one)
    expected = (sum(parts[0]) / 2) * (sum(parts[1]) / 2)
    frame = last(SemiAutoregressive(steps=2)(model, task(model, torch.full((2000, L), V), seed=5000)))
    assert p_value(frame.tokens, expected) > 1e-6


M = 11
PROMPTS = torch.tensor([[1, 2, 3] + [M] * 13, [4] + [M] * 15, [M] * 16, list(range(11)) + [M] * 5])
TEMPLATES = torch.tensor([[1, 2, 3] + [M] * 5 + [5, 6] + [M] * 6, [4] + [M] * 7 + [7] * 8, [M, 1] * 8, [M] * 16])
LENGTHS = [16, 13, 15, 14]
KINDS = {
    "off": {},
    "one_way": {"causal": BranchConfig(1, 16, 2)},
    "layers": {"causal": BranchConfig(1, 16, 2), "fusion": "layers"},
    "mutual": {"causal": BranchConfig(1, 16, 2), "exchange": "mutual"},
    "chained": {"causal": BranchConfig(1, 16, 2), "exchange": "mutual", "draft": "chained"},
}


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("tokens", [PROMPTS, TEMPLATES], ids=["prompts", "templates"])
@pytest.mark.parametrize("kind", ["off", "layers"])
def test_cached_equals_uncached(kind, tokens, block_size, steps):
    model = network(M, 24, **KINDS[kind])
    cached, uncached = (
        last(SemiAutoregressive(steps, block_size=block_size, cache=c)(model, task(model, tokens, lengths=LENGTHS)))
        for c in (True, False)
    )
    inside = torch.arange(16) < torch.tensor(LENGTHS)[:, None]
    assert torch.equal(cached.tokens[inside], uncached.tokens[inside])
    assert torch.equal(cached.counts.needed, uncached.counts.needed)
    assert (uncached.counts.computed == uncached.counts.needed).all()
    assert (cached.counts.computed <= uncached.counts.computed).all()
    if block_size < 16:
        assert cached.counts.computed.sum() < uncached.counts.computed.sum()


def test_cached_states_are_the_uncached_ones():
    """Not the tokens alone: the log-probabilities, for a prompt, the blocks behind it, and rows at different places."""
    model, size = network(M, 24), 3
    x = torch.randint(M, (2, 12), generator=generator())
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, [7, 8]] = masked[1, [3, 5]] = True
    canvas = torch.where(masked, M, x)
    cache = model.allocate_blocks(2, 13)
    positions = torch.tensor([list(range(9)), [*range(6), 12, 12, 12]])
    states = model.read_blocks(canvas.gather(1, positions.clamp(max=11)), positions, Block(size), cache)
    read = masked.gather(1, positions.clamp(max=11)) & (positions < 12)
    whole, _ = model(canvas, canvas, Block(size))
    expected = model.log_probs(whole, masked, "draft")
    torch.testing.assert_close(model.log_probs(states, read, "draft"), expected)
    # Row 1 goes on to its next block: the cleaned block is read again with it.
    canvas = x.clone()
    canvas[:, 9:] = canvas[1, 6:9] = M
    positions = torch.tensor([[*range(6, 12)], [*range(3, 9)]])
    states = model.read_blocks(canvas.gather(1, positions), positions, Block(size), cache)
    where = torch.zeros_like(x, dtype=torch.bool)
    where[0, 9:] = where[1, 6:9] = True
    whole, _ = model(canvas, canvas, Block(size))
    read = where.gather(1, positions)
    torch.testing.assert_close(model.log_probs(states, read, "draft"), model.log_probs(whole, where, "draft"))


def test_beyond_the_context_attention_slides():
    model, x = network(M, 8, block_size=3), torch.randint(M, (2, 27), generator=generator())
    cached, uncached = (
        last(SemiAutoregressive(cache=c)(model, task(model, torch.full((2, 26), M)))) for c in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    x[:, 24:] = M
    positions, where = torch.arange(27).expand(2, -1), x == M
    states = model.read_blocks(x, positions, Block(3), model.allocate_blocks(2, 27))
    whole, _ = model(x, x, Block(3))
    torch.testing.assert_close(model.log_probs(states, where, "draft"), model.log_probs(whole, where, "draft"))


@pytest.mark.parametrize("tokens", [PROMPTS, TEMPLATES], ids=["prompts", "templates"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_what_it_would_get_alone_and_given_tokens_stay(kind, tokens):
    model = network(M, 24, 4, **KINDS[kind])
    filled = torch.zeros_like(tokens, dtype=torch.bool)
    for frame in SemiAutoregressive()(model, task(model, tokens, lengths=LENGTHS)):
        assert torch.equal(frame.tokens[tokens < M], tokens[tokens < M])
        filled |= frame.fresh
    assert torch.equal(filled, task(model, tokens, lengths=LENGTHS).wanted)
    for r, length in enumerate(LENGTHS):
        alone = last(SemiAutoregressive()(model, task(model, tokens[r : r + 1, :length], rows=[r])))
        assert torch.equal(alone.tokens[0], frame.tokens[r, :length])
        for name in ("causal", "diffusion", "rounds", "computed", "needed"):
            assert getattr(alone.counts, name)[0] == getattr(frame.counts, name)[r], name


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_behind_a_block_is_heard_before_its_turn(kind, steps, monkeypatch):
    """Whatever is given in the last block, those before are the same; in any order no pass goes beyond its block."""
    model, size, seen = network(M, 24, 4, **KINDS[kind]), 4, []
    passed = type(model).forward

    def spied(self, prefix, canvas, *more):
        seen.append(prefix.shape)
        return passed(self, prefix, canvas, *more)

    monkeypatch.setattr(type(model), "forward", spied)
    written = []
    for given in (1, 9):
        x = torch.full((3, 16), M)
        x[:, 13:15] = given
        seen.clear()
        frames = SemiAutoregressive(steps, cache=False)(model, task(model, x, lengths=[16, 15, 15]))
        written.append([(frame.tokens.clone(), frame.counts.copy()) for frame in frames])
    for (one, counts), (two, counted) in zip(*written, strict=False):
        assert torch.equal(one[:, :12], two[:, :12]) and torch.equal(counts.computed, counted.computed)
    if model.chained:
        assert {int(length) for _, length in seen} == {size, 2 * size, 3 * size, 15, 16}
        assert int(counted.computed.sum()) == 2 * sum(rows * length for rows, length in seen)


def test_a_finished_row_works_no_more():
    model = network(M, 24, 4)

    def second_row_ends_at_once(tokens: Tensor) -> Tensor:
        return (tokens[:, 0] != M) & (torch.arange(len(tokens)) == 1)

    given = task(model, torch.full((3, 16), M), finished=second_row_ends_at_once)
    stopped_at = None
    for frame in SemiAutoregressive()(model, given):
        if stopped_at is None and frame.tokens[1, 0] != M:
            stopped_at = int(frame.counts.computed[1])
    assert (frame.tokens[[0, 2]] < M).all() and (frame.tokens[1, 4:] == M).all()
    assert int(frame.counts.computed[1]) == stopped_at


# MDLM.


def test_t_dce_on_the_diffusion_branch_is_mdlm_s_loss():
    """Sahoo et al. 2024, eq. 10 with SUBS, from logits over all rows of the embedding: their loss, written out.

    Per position: -log x_theta(x0) * dsigma / (e^sigma - 1), sigma = -log(1 - (1 - eps) t); x_theta gives `[M]` no
    probability, and an unmasked token all of it to itself, so that it costs nothing. The mean is over all tokens.
    Their "antithetic" draw, one t in each of B equal parts, is `stratified` here.
    """
    eps, model = 1e-3, network(7, 8)
    objective = TimeDCE(LogLinear(eps), times="stratified")
    x0, g = torch.randint(7, (5, 8), generator=generator(1)), generator(2)
    x_t, t = objective._corrupt(x0, 7, generator(2))
    assert 0 < (x_t == 7).sum() < x_t.numel()
    states, _ = model(x_t, x_t, AnyOrder())
    logits = states.draft @ model.diffusion.embedding.weight[:8].T  # `[M]` is row 7
    logits[..., 7] = -torch.inf
    x_theta = torch.where((x_t == 7)[..., None], logits.softmax(-1), torch.nn.functional.one_hot(x_t, 8).double())
    sigma, dsigma = -torch.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)
    nats = -x_theta.gather(-1, x0[..., None])[..., 0].log()
    theirs = (nats * (dsigma / torch.expm1(sigma))[:, None]).mean()
    torch.testing.assert_close(objective(model, x0, g).total, theirs)
    torch.testing.assert_close(torch.exp(-sigma), 1 - objective.schedule.masked(t))  # and x_t is drawn as theirs
    assert sorted((t * 5).ceil().tolist()) == [1, 2, 3, 4, 5]
