"""D3PM against enumeration: its posteriors, its bound term by term, its objective and its reverse chains.

Chance tests compare means at 5 standard errors (6e-7 a comparison under a normal law) or are chi-squared tests at 1e-6.
Seeds are fixed, so what passes once passes always.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drawing import generator, last, p_value, task
from enumeration import entropy, exact_denoiser, masks, random_denoiser, random_source, sequences, uniform_posterior
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding.d3pm import D3PMAbsorbing, D3PMUniform
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.evaluation import diffusion_bound
from caddf.evaluation.d3pm import CHAINS, AbsorbingChain, UniformChain, d3pm_bound
from caddf.interface import AnyOrder
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.objectives import LambdaDCE
from caddf.objectives.d3pm import D3PM

V, L, T = 3, 2, 4
SOURCE = random_source(V, L)
EVERY = sequences(V, L)
PROCESSES = ["absorbing", "uniform"]


class Told:
    """A denoiser `(x_t, level) -> log p~`, in the place of a network that is told the time."""

    heads, denoiser, chained, block_size = frozenset({"draft"}), "draft", False, 1

    def __init__(self, function, vocab_size: int = V) -> None:
        self.function, self.vocab_size, self.mask_id = function, vocab_size, vocab_size

    def __call__(self, prefix, canvas, pattern, caches=None):
        assert isinstance(pattern, AnyOrder) and prefix is canvas and pattern.level.shape == (len(canvas),)
        return self.function(canvas, pattern.level), None

    def log_probs(self, states, where, head="draft"):
        return states[where]

    def nll(self, states, where, targets, head="draft"):
        return -states[where].gather(-1, targets[where][:, None])[:, 0]


def random_told(chain) -> Told:
    """Conditionals of no joint, other ones at each step."""
    functions = [random_denoiser(V, L, seed) for seed in range(chain.steps + 1)]
    levels = chain.level(torch.arange(chain.steps + 1))

    def function(x_t: Tensor, level: Tensor) -> Tensor:
        step = (level[:, None] - levels).abs().argmin(-1)
        torch.testing.assert_close(levels[step], level)
        return torch.stack([f(x_t) for f in functions])[step, torch.arange(len(x_t))]

    return Told(function)


def kernel(chain, t: int, s: int = 0) -> Tensor:
    """q(x_t | x_s) over the tokens and `[M]`, as a matrix [from, to]."""
    kept = float((1 - chain.noised(torch.tensor(t))) / (1 - chain.noised(torch.tensor(s))))
    fresh = torch.full((V + 1,), 0.0, dtype=torch.float64)
    fresh[V if isinstance(chain, AbsorbingChain) else slice(V)] = 1.0 if isinstance(chain, AbsorbingChain) else 1 / V
    matrix = kept * torch.eye(V + 1, dtype=torch.float64) + (1 - kept) * fresh
    if isinstance(chain, AbsorbingChain):
        matrix[V] = torch.nn.functional.one_hot(torch.tensor(V), V + 1)
    return matrix


def exact_told(chain, source: Tensor = SOURCE) -> Told:
    """The p~ whose eq. 4 is the exact posterior: p(x0_i | x_t but for its i-th token)."""
    contexts, is_token = (V + 1) ** torch.arange(L - 1, -1, -1), torch.nn.functional.one_hot(EVERY, V).double()
    levels, tables = chain.level(torch.arange(chain.steps + 1)), []
    for step in range(chain.steps + 1):
        # q(x_t_i | x0_i) for every x0 and every x_t over V + 1 symbols, [N, S, L]
        each = kernel(chain, step)[EVERY][:, torch.arange(L), sequences(V + 1, L)]
        others = torch.stack([each[..., torch.arange(L) != i].prod(-1) for i in range(L)], -1)
        tables.append(torch.einsum("n,nsi,niv->siv", source.flatten(), others, is_token))
    table = torch.stack(tables)
    table = (table / table.sum(-1, keepdim=True)).log()

    def function(x_t: Tensor, level: Tensor) -> Tensor:
        return table[(level[:, None] - levels).abs().argmin(-1), x_t @ contexts]

    return Told(function)


def reverse(chain, told: Told, x_t: Tensor, t: int) -> Tensor:
    """p(x_{t-1} | x_t) by eq. 4, literally, [B, L, V + 1]."""
    p0 = torch.nn.functional.pad(told.function(x_t, chain.level(torch.full((len(x_t),), t))).exp(), (0, 1))
    back = p0 @ kernel(chain, t - 1) * kernel(chain, t, t - 1).T[x_t]
    return back / back.sum(-1, keepdim=True)


def states_of(chain) -> Tensor:
    return sequences(V + 1, L) if isinstance(chain, AbsorbingChain) else EVERY


def enumerated(chain, told: Told, x0: Tensor) -> Tensor:
    """The terms of the bound of each x0, [B, T], from t = 1 on, by sums over all x_t."""
    terms = []
    for t in range(1, chain.steps + 1):
        total = torch.zeros(len(x0), dtype=torch.float64)
        for x_t in states_of(chain):
            seen = kernel(chain, t)[x0, x_t].prod(-1)
            kl = enumerated_divergence(chain, told, x0, x_t, t)
            total += torch.where(seen > 0, seen * kl, 0)
        terms.append(total)
    return torch.stack(terms, -1)


def enumerated_divergence(chain, told: Told, x0: Tensor, x_t: Tensor, t: int) -> Tensor:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of each x0 and one x_t; not a number where x_t is impossible."""
    p = reverse(chain, told, x_t[None], t)[0]
    q = kernel(chain, t - 1)[x0] * kernel(chain, t, t - 1)[:, x_t].T
    q = q / q.sum(-1, keepdim=True)
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum((-2, -1))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_a_chain_goes_from_clean_to_noise(process, steps):
    chain = CHAINS[process](steps)
    t = torch.arange(steps + 1)
    noised, level = chain.noised(t), chain.level(t)
    assert noised[0] == 0 and noised[-1] == 1  # no prior term
    assert (noised.diff() > 0).all() and (level.diff() > 0).all() and level.isfinite().all() and level[0] == 0
    beta = 1 - (1 - noised[1:]) / (1 - noised[:-1])
    if process == "absorbing":
        torch.testing.assert_close(beta, 1 / (steps - t[:-1]).double())
    else:
        f = torch.cos((t.double() / steps + 0.008) / 1.008 * math.pi / 2)
        torch.testing.assert_close(beta, 1 - f[1:] / f[:-1])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("t", [1, 2, T])
def test_divergences_are_enumerated_ones(process, t):
    chain = CHAINS[process](T)
    told = random_told(chain)
    for x_t in states_of(chain):
        possible = EVERY[(kernel(chain, t)[EVERY, x_t] > 0).all(-1)]
        if not len(possible):
            continue
        at = torch.full((len(possible),), t)
        noisy = x_t.expand_as(possible)
        states, _ = told(noisy, noisy, AnyOrder(chain.level(at)))
        expected = enumerated_divergence(chain, told, possible, x_t, t)
        torch.testing.assert_close(chain.divergence(told, states, possible, noisy, at).sum(-1), expected)


def test_a_step_back_averages_the_posterior_of_x0():
    """Eq. 4 with p~ is the average of q(x_s | x_t, x0) over p(x0 | x_t), which p~ is without x_t's own token."""
    chain, t, x_t = UniformChain(T), 3, torch.arange(V)
    p0 = torch.rand(V, V, dtype=torch.float64, generator=generator())
    p0 = p0 / p0.sum(-1, keepdim=True)
    posterior = p0 * kernel(chain, t)[:V, :V].T
    posterior = posterior / posterior.sum(-1, keepdim=True)
    s, at = (float(chain.noised(torch.tensor(step))) for step in (t - 1, t))
    torch.testing.assert_close(chain.back(p0, x_t, torch.full((V,), t)), uniform_posterior(posterior, x_t, s, at))


def test_chunks_change_nothing():
    chain, x0 = UniformChain(T), EVERY
    x_t, t = EVERY.flip(0), torch.arange(len(EVERY)) % T + 1
    whole, parts = [], []
    for elements, into in ((1 << 25, whole), (2 * V * L, parts)):
        told, log_p = random_told(chain), None
        states, _ = told(x_t, x_t, AnyOrder(chain.level(t)))
        log_p = states.requires_grad_()
        nats = chain.divergence(told, log_p, x0, x_t, t, elements)
        nats.sum().backward()
        assert log_p.grad.isfinite().all()
        into += [nats.detach(), log_p.grad]
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", ["exact", "random"])
def test_the_bound_is_the_sum_over_steps(process, kind):
    chain = CHAINS[process](T)
    told = (exact_told if kind == "exact" else random_told)(chain)
    exact = enumerated(chain, told, EVERY).sum(-1)
    rows = EVERY.repeat_interleave(1500, 0)
    drawn = d3pm_bound(told, rows, 2, generator(), process, T).mean(-1).view(len(EVERY), -1)
    error = drawn.std(-1) / drawn.shape[-1] ** 0.5
    assert ((drawn.mean(-1) - exact).abs() < 5 * error).all()
    assert (exact @ SOURCE.flatten()) > entropy(SOURCE)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_row_s_noise_is_its_own(process):
    told = random_told(CHAINS[process](T))
    together = d3pm_bound(told, EVERY[:3], 2, [generator(r) for r in range(3)], process, T)
    alone = d3pm_bound(told, EVERY[1:2], 2, [generator(1)], process, T)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("process", PROCESSES)
def test_with_the_exact_network_the_bound_converges_to_the_entropy(process):
    """The gap is that of revealing several tokens in a step: it falls as 1 / T."""
    probs, gaps = SOURCE.flatten(), []
    for steps in (1, 4, 16, 48):
        chain = CHAINS[process](steps)
        gaps.append(float(enumerated(chain, exact_told(chain), EVERY).sum(-1) @ probs) - entropy(SOURCE))
    assert all(0 < after < before / 2 for before, after in itertools.pairwise(gaps))
    assert gaps[-1] < 0.05 * gaps[0]


def test_the_absorbing_bound_converges_to_the_continuous_one():
    """For a network without time: eq. 9, which `diffusion_bound` gives, here by enumeration over masked sets."""
    function = random_denoiser(V, L)
    continuous = torch.zeros(len(EVERY), dtype=torch.float64)
    for where in masks(L)[1:]:
        k = int(where.sum())
        log_p = function(torch.where(where, V, EVERY)).gather(-1, EVERY[..., None])[..., 0]
        continuous -= (log_p * where).sum(-1) / k / math.comb(L, k)
    told = Told(lambda x, level: function(x))
    gaps = [(enumerated(AbsorbingChain(n), told, EVERY).sum(-1) - continuous).abs().max() for n in (8, 16, 32)]
    assert gaps[0] > 0.01 and gaps[1] < 0.6 * gaps[0] and gaps[2] < 0.6 * gaps[1]
    drawn = diffusion_bound(as_model(function, V), EVERY.repeat_interleave(2000, 0), 1, generator())
    drawn = drawn.view(len(EVERY), -1)
    assert ((drawn.mean(-1) - continuous).abs() < 5 * drawn.std(-1) / 2000**0.5).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_the_objective_is_the_bound_per_token(process):
    chain = CHAINS[process](T)
    told, objective = random_told(chain), D3PM(process, T)
    exact = enumerated(chain, told, EVERY).sum(-1).mean() / L
    g = generator()
    drawn = torch.stack([objective(told, EVERY.repeat(T, 1), g).total for _ in range(400)])
    assert abs(drawn.mean() - exact) < 5 * drawn.std() / len(drawn) ** 0.5


def test_the_auxiliary_term_is_cross_entropy_everywhere():
    told = Told(lambda x, level: torch.full((*x.shape, V), 1 / V, dtype=torch.float64).log())
    loss = D3PM("uniform", T, auxiliary=0.01)(told, EVERY, generator())
    assert loss.parts["cross_entropy"].item() == pytest.approx(math.log(V))
    assert loss.total.item() == pytest.approx(loss.parts["denoise"].item() + T * 0.01 * math.log(V))


def test_a_step_of_the_absorbing_objective_weighs_as_lambda_dce_does():
    """T KL at t is nats / lambda_t: on the same draws, the two losses are one."""
    model = network()
    x0 = torch.randint(7, (4, 8), generator=generator())
    t = torch.tensor([1, 4, 7, 10])
    x_t = torch.where(torch.rand(4, 8, generator=generator()) < t[:, None] / 10, 7, x0)
    states, _ = model(x_t, x_t, AnyOrder(AbsorbingChain(10).level(t)))
    ours = 10 * AbsorbingChain(10).divergence(model, states, x0, x_t, t)

    class Fixed(LambdaDCE):
        def draw(self, x0, mask_id, generator):
            return x_t, 10 / t.double()

    torch.testing.assert_close(ours, Fixed().nats(model, x0, generator()))


def network(vocab: int = 7) -> DualBranch:
    torch.manual_seed(0)
    return DualBranch(ModelConfig(vocab, 8, BranchConfig(2, 32, 2), None, exchange="one_way"))


class TimedNetwork(torch.nn.Module):
    """A bidirectional network that is told the time in the plainest way."""

    heads, denoiser, chained, block_size = frozenset({"draft"}), "draft", False, 1
    vocab_size = mask_id = 7

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = torch.nn.Embedding(8, 64), torch.nn.Embedding(8, 64)
        self.net = torch.nn.Sequential(torch.nn.Linear(64 * 9, 256), torch.nn.GELU(), torch.nn.Linear(256, 8 * 7))
        self.time = torch.nn.Linear(1, 64)

    def __call__(self, prefix, canvas, pattern, caches=None):
        x = (self.tokens(canvas) + self.places.weight).flatten(1)
        time = self.time(pattern.level[:, None].float())
        return self.net(torch.cat([x, time], 1)).view(-1, 8, 7).log_softmax(-1), None

    log_probs, nll = Told.log_probs, Told.nll


@pytest.mark.parametrize("process", PROCESSES)
def test_one_batch_is_learnt_by_heart(process):
    """Four rows under one draw of the noise, which leaves each row a token of its own."""
    model, x0 = TimedNetwork(), torch.randint(7, (4, 8), generator=generator(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    objective = D3PM(process, 10, auxiliary=0.01)
    first = objective(model, x0, generator(2)).total.item()
    for _ in range(300):
        loss = objective(model, x0, generator(2)).total
        if loss.item() < 0.05:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"from {first} to {loss.item()}")


# Reverse chains.


def law(chain, told: Told) -> Tensor:
    """p(x_0) of the reverse chain, state by state."""
    states = states_of(chain)
    if isinstance(chain, AbsorbingChain):
        p = (states == V).all(-1).double()
    else:
        p = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for t in range(chain.steps, 0, -1):
        back = reverse(chain, told, states, t)  # [from, L, W]
        to = torch.stack([back[:, i][:, states[:, i]] for i in range(L)]).prod(0)
        p = torch.where(p > 0, p, 0) @ to.nan_to_num()
    return p[(states < V).all(-1)]


@pytest.mark.parametrize("process, decoder", [("absorbing", D3PMAbsorbing), ("uniform", D3PMUniform)])
def test_samples_are_the_chain_s(process, decoder):
    chain = CHAINS[process](T)
    told = random_told(chain)
    frame = last(decoder(T)(told, task(told, torch.full((4000, L), V))))
    assert p_value(frame.tokens, law(chain, told)) > 1e-6


TOLD = Told(lambda x, t: torch.sin(x.cumsum(-1)[..., None] * torch.arange(1, V + 1) + t[:, None, None]).log_softmax(-1))


@pytest.mark.parametrize("decoder", [D3PMAbsorbing, D3PMUniform])
def test_given_tokens_stay_and_a_row_gets_what_it_would_get_alone(decoder):
    tokens, lengths = torch.tensor([[V, 1, V, V], [V, V, V, 0], [2, V, V, V]]), torch.tensor([4, 3, 4])
    filled = torch.zeros_like(tokens, dtype=torch.bool)
    for frame in decoder(6)(TOLD, task(TOLD, tokens, lengths=lengths)):
        assert torch.equal(frame.tokens[tokens < V], tokens[tokens < V])
        filled |= frame.fresh
    wanted = task(TOLD, tokens, lengths=lengths).wanted
    assert torch.equal(filled, wanted) and (frame.tokens[wanted] < V).all()
    for r in range(3):
        one = task(TOLD, tokens[r : r + 1, : lengths[r]], rows=[r])
        alone = last(decoder(6)(TOLD, one))
        assert torch.equal(alone.tokens[0], frame.tokens[r, : lengths[r]])
        assert alone.counts.computed[0] == frame.counts.computed[r]


def test_the_absorbing_chain_costs_nothing_where_nothing_is_revealed():
    tokens, lengths = torch.tensor([[V, 1, V, V], [V, V, V, 0], [2, V, V, V]]), torch.tensor([4, 3, 4])
    cached, uncached = (
        last(D3PMAbsorbing(40, cache=cache)(TOLD, task(TOLD, tokens, lengths=lengths))) for cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens) and torch.equal(cached.counts.needed, uncached.counts.needed)
    assert torch.equal(uncached.counts.computed, uncached.counts.needed)
    assert (cached.counts.computed < uncached.counts.computed).all()


@pytest.mark.parametrize("decoder", [D3PMAbsorbing, D3PMUniform])
def test_the_warp_is_on_the_prediction_of_x0(decoder):
    told = Told(lambda x, level: torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().expand(*x.shape, V))
    frame = last(decoder(T)(told, task(told, torch.full((20, L), V), warp=Warp(temperature=0))))
    assert (frame.tokens == 1).all()


def test_exact_samples_of_the_source():
    """With the exact network and many steps the uniform chain draws the source: total variation, not chi-squared."""
    chain = UniformChain(64)
    assert (law(chain, exact_told(chain)) - SOURCE.flatten()).abs().sum() / 2 < 0.01


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: D3PM(steps=0), "steps is 0"),
        (lambda: D3PM("masking"), "process is masking"),
        (lambda: D3PM(auxiliary=-1.0), "auxiliary is -1.0"),
        (lambda: D3PMAbsorbing(0), "steps is 0"),
        (lambda: D3PMUniform(0), "steps is 0"),
    ],
)
def test_settings_that_do_not_fit(wrong, says):
    with pytest.raises(InputError, match=says):
        wrong()


def test_the_absorbing_exact_network_needs_no_time():
    """p(x0_i | unmasked part) is the same at every step, and `exact_told` finds it."""
    chain = AbsorbingChain(T)
    x = torch.tensor([[V, 0], [2, V], [V, V]])
    masked = x == V
    told, plain = exact_told(chain).function(x, chain.level(torch.tensor([1, 2, 3]))), exact_denoiser(SOURCE)(x)
    torch.testing.assert_close(told[masked], plain[masked])
