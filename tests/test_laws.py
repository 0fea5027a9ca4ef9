"""Laws over everything in the catalogue: what is true of the mathematics whatever the model."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from catalogue import BLOCK, MODELS, SCHEDULE_LIST, Joint, build, draw_tokens
from enumeration import entropy, exact_denoiser, random_source, sequences
from scores import Source
from test_d3pm import exact_told
from test_plaid import Exact as Gaussians
from torch import Tensor

import caddf.objectives.any_order as any_order
import caddf.objectives.dce as dce
from caddf.denoiser import DenoiserModel, as_model
from caddf.evaluation import (
    diffusion_accuracy,
    diffusion_bound,
    finite_step_bound,
    hybrid_bound,
    importance_weighted_bound,
)
from caddf.evaluation.d3pm import UniformChain
from caddf.evaluation.suite import Bound
from caddf.experiment import METHODS, Network, network_of
from caddf.interface import Block, Infill, LanguageModel, Pattern
from caddf.model_settings import ModelSettings
from caddf.models.config import BranchConfig
from caddf.models.plaid import Plaid
from caddf.objectives import AnyOrderLoss, LambdaDCE, Synergistic, SynergisticConfig, TimeDCE
from caddf.schedules import Cosine

V, L = 3, 4
JOINT = Joint.random(V, L)
EXACT = as_model(JOINT, V)
MASKS = torch.tensor(list(itertools.product([False, True], repeat=L)))


def nodes(low: float, high: float, count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre: points and weights on [low, high]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return torch.tensor(low + (high - low) * (x + 1) / 2), torch.tensor((high - low) * w / 2)


def integrate(
    objective: dce.Denoising, model: LanguageModel, times: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> float:
    """The expectation of `objective.nats` over p0, time and masks: exact over x0 and masks, a quadrature over time.

    The objective's draws are replaced by every combination; what it asked for gives each its probability.
    """
    x0 = JOINT.sequences
    of_x0, of_mask, of_time = torch.meshgrid(
        torch.arange(len(x0)), torch.arange(len(MASKS)), torch.arange(len(times)), indexing="ij"
    )
    rows, masks, node = of_x0.flatten(), MASKS[of_mask.flatten()], of_time.flatten()
    probability = torch.zeros(len(rows), dtype=torch.float64)

    def independently(x: Tensor, masked: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
        count = masks.sum(-1)
        probability.copy_(masked**count * (1 - masked) ** (L - count))
        return torch.where(masks, mask_id, x)

    def exactly(x: Tensor, count: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
        subsets = torch.tensor([(MASKS.sum(-1) == k).sum() for k in range(L + 1)])
        probability.copy_((masks.sum(-1) == count).double() / subsets[count])
        return torch.where(masks, mask_id, x)

    for module in (dce, any_order):
        monkeypatch.setattr(module, "draw_times", lambda *_: times[node])
    monkeypatch.setattr(dce, "mask_tokens", independently)
    monkeypatch.setattr(any_order, "mask_exactly", exactly)
    nats = objective.nats(model, x0[rows], torch.Generator()).sum(-1)
    return (JOINT.probs[rows] * weights[node] * probability * nats).sum().item()


def rough(x_t: Tensor) -> Tensor:
    """A denoiser that is wrong: the exact one, blurred."""
    return (0.5 * JOINT(x_t).exp() + 0.5 / V).log()


def test_lambda_dce_of_the_exact_denoiser_is_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    # A polynomial of degree L - 1 in lambda: four nodes are exact.
    bound = integrate(LambdaDCE(), EXACT, *nodes(0, 1, 4), monkeypatch)
    assert bound == pytest.approx(JOINT.entropy(), abs=1e-12)


def test_any_order_loss_of_the_exact_denoiser_is_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    times, weights = (torch.arange(L) + 0.5).double() / L, torch.full((L,), 1 / L).double()
    assert integrate(AnyOrderLoss(), EXACT, times, weights, monkeypatch) == pytest.approx(JOINT.entropy(), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULE_LIST, ids=lambda s: type(s).__name__)
def test_t_dce_and_its_missing_pieces_are_the_entropy(schedule, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    covered = integrate(TimeDCE(schedule), EXACT, *nodes(0, 1, 60), monkeypatch)
    low, high = schedule.limits
    missing = [integrate(LambdaDCE(), EXACT, *nodes(a, b, 4), monkeypatch) for a, b in ((0, low), (high, 1)) if a < b]
    assert covered + sum(missing) == pytest.approx(JOINT.entropy(), abs=1e-9)
    if high < 0.9995:
        assert covered < JOINT.entropy() - 1e-3  # what the truncated form leaves out


def test_the_forms_agree_and_lie_above_the_entropy_for_a_wrong_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_model(rough, V)
    bounds = [
        integrate(LambdaDCE(), model, *nodes(0, 1, 4), monkeypatch),
        integrate(AnyOrderLoss(), model, (torch.arange(L) + 0.5).double() / L, torch.full((L,), 1 / L), monkeypatch),
        integrate(TimeDCE(Cosine()), model, *nodes(0, 1, 60), monkeypatch),
    ]
    assert bounds == pytest.approx([bounds[0]] * 3, abs=1e-7)
    assert bounds[0] > JOINT.entropy() + 0.1


def test_the_time_term_integrates_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Over lambda, at nodes that are symmetric about 1/2, where log((1 - lambda) / lambda) is odd.
    masked, weights = nodes(0, 1, 20)
    t = Cosine().inverse(masked)
    weights = weights / Cosine().slope(t)
    plain, termed = (
        integrate(TimeDCE(Cosine(), time_term=term), EXACT, t, weights, monkeypatch) for term in (False, True)
    )
    assert termed == pytest.approx(plain, abs=1e-10) and plain == pytest.approx(JOINT.entropy(), abs=1e-10)
    one_time = [integrate(TimeDCE(Cosine(), time_term=term), EXACT, t[:1], weights[:1], monkeypatch) for term in (0, 1)]
    assert one_time[0] != pytest.approx(one_time[1], rel=0.1)  # but not at each time


def test_any_order_loss_draws_its_expectation() -> None:
    # Nats per row are bounded, so the mean of 40,000 is normal: 6 standard errors, odds 2e-9.
    generator = torch.Generator().manual_seed(0)
    x0 = JOINT.sequences[torch.multinomial(JOINT.probs, 40_000, replacement=True, generator=generator)]
    for times in ("stratified", "antithetic", "independent"):
        nats = AnyOrderLoss(times).nats(EXACT, x0, generator).sum(-1)
        assert abs(nats.mean().item() - JOINT.entropy()) < 6 * nats.std().item() / len(x0) ** 0.5


@pytest.mark.parametrize("schedule", [Cosine(), None], ids=str)
def test_a_single_row_s_estimate_has_no_bias(schedule: Cosine | None) -> None:
    # Rows keep their place in a batch of evaluation: stratified times must not tie a row to its part of [0, 1].
    objective = LambdaDCE() if schedule is None else TimeDCE(schedule)
    generator = torch.Generator().manual_seed(0)
    uniform = DenoiserModel(lambda x: torch.zeros(*x.shape, V).double().log_softmax(-1), V)
    x0 = torch.zeros(4, 64, dtype=torch.long)
    nats = torch.stack([objective.nats(uniform, x0, generator).mean(-1) for _ in range(1500)])
    # Nats per token have a standard deviation near 0.3 here; a row tied to its part would be off by up to 1.
    assert ((nats.mean(0) - torch.tensor(V).log()).abs() < 6 * nats.std(0) / 1500**0.5).all()


# Exact likelihoods.


@pytest.mark.parametrize("pattern", [Infill(), Block(1), Block(2), Block(3), Block(4)], ids=str)
def test_left_to_right_readings_of_the_exact_denoiser_are_the_log_probability(pattern: Pattern) -> None:
    x0 = JOINT.sequences
    states, _ = EXACT(x0, torch.full_like(x0, V), pattern)
    nll = EXACT.nll(states, torch.ones_like(x0, dtype=torch.bool), x0).view(-1, L).sum(-1)
    torch.testing.assert_close(-nll, JOINT.probs.log())


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.causal])
@pytest.mark.parametrize("pattern", [Infill(), Block(1), Block(3), Block(4)], ids=str)
def test_left_to_right_readings_sum_to_one(name: str, pattern: Pattern) -> None:
    model = build(replace(MODELS[name], vocab_size=V, rows=0, context=L), scale=8)
    x0 = JOINT.sequences  # all of them
    states, _ = model(x0, torch.full_like(x0, V), pattern)
    for head in ("fused", "causal"):
        nll = model.nll(states, torch.ones_like(x0, dtype=torch.bool), x0, head).view(-1, L).sum(-1)  # type: ignore[arg-type]
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert nll.std() > 0.3  # not by being uniform


# Bounds, over the table of methods: of all positions, and of some given others.

BOUNDS = [name for name in METHODS if name != "gpt2"]  # whose likelihood is exact


def bound_of(name: str, **settings: object) -> Bound:
    method = METHODS[name]
    return diffusion_bound if method.bound is None else method.bound(method.settings(**method.defaults | settings))


@functools.cache
def config_of(name: str, vocab_size: int) -> object:
    return METHODS[name].configure(ModelSettings(size="debug", context=8, block_size=2), vocab_size, 0)


def network(name: str, spread: float | None = None, vocab_size: int = V) -> tuple[Network, object]:
    """A method's debug network, and its objective; with `spread` in float64, weights redrawn."""
    method = METHODS[name]
    torch.manual_seed(0)
    config = config_of(name, vocab_size)
    model = network_of({"architecture": method.architecture, "model": config.to_dict()})
    if spread is not None:
        model.double().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=spread)
    return model, method.build(method.settings(**method.defaults), config)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_one_of_any_network_for_any_source(name: str, given: int) -> None:
    """exp(-bound) sums to at most one over all that may follow what is given: so no source has an entropy above it.

    Sums of means of 25, at 5 standard errors: odds of about 1e-6 for each.
    """
    model, _ = network(name, spread=0.05 if name.startswith("sedd") else 0.2)
    every, times = sequences(V, 3), 25
    scored = (torch.arange(3) >= given).expand(len(every) * times, -1)
    bound = bound_of(name)(model, every.repeat_interleave(times, 0), 4, torch.Generator().manual_seed(0), scored=scored)
    nats = bound.mean(-1).view(len(every), times)
    error = nats.std(-1) / times**0.5
    p = (-nats.mean(-1)).exp()
    total, spread = p.view(V**given, -1).sum(-1), (p * error).square().view(V**given, -1).sum(-1).sqrt()
    assert (total < 1 + 5 * spread + 1e-9).all()
    assert nats.mean(-1).std() > 0.01  # not the uniform distribution, for which this would hold whatever is read


def exact_network(name: str, p0: Tensor) -> object:
    """What a method's network is at best, for a source of `V` tokens and length 2."""
    if name == "plaid":
        return Gaussians(p0, -8, 9)
    if name == "d3pm-uniform":
        return exact_told(UniformChain(8), p0)
    return Source(p0, bound_process(name)) if name.startswith("sedd") else as_model(exact_denoiser(p0), V)


def bound_process(name: str) -> str:
    return "uniform" if name == "sedd-uniform" else "absorbing"


@pytest.mark.parametrize("name", BOUNDS)
def test_with_the_exact_network_a_bound_is_the_conditional_entropy(name: str) -> None:
    """H(x_1 | x_0), x_0 given; the network is that of the source as it is once x_0 is known.

    Of one token the steps of D3PM lose nothing. What PLAID and SEDD's uniform chain leave out at their ends is below
    1e-3. Means of 300 at 5 standard errors (odds of 6e-7).
    """
    p0 = random_source(V, 2)
    bound = bound_of(name, **{"steps": 8} if name.startswith("d3pm") else {})
    mean, variance, times = 0.0, 0.0, 300
    for first in range(V):
        known = torch.zeros_like(p0)
        known[first] = p0[first]
        x0 = torch.tensor([[first, second] for second in range(V)]).repeat_interleave(times, 0)
        scored = torch.tensor([False, True]).expand(len(x0), -1)
        model = exact_network(name, known / known.sum())
        nats = bound(model, x0, 4, torch.Generator().manual_seed(first), scored=scored).mean(-1).view(V, times)
        mean += float(p0[first] @ nats.mean(-1))
        variance += float(p0[first] ** 2 @ nats.var(-1)) / times
    assert mean == pytest.approx(entropy(p0) - entropy(p0.sum(1)), abs=5 * variance**0.5 + 1e-3)
    assert variance**0.5 < 0.02


@pytest.mark.parametrize("name", BOUNDS)
def test_given_tokens_are_never_noised(name: str) -> None:
    """What the networks are shown: of the given positions the clean tokens, of the others not."""
    model, _ = network(name, spread=0.1)
    row = torch.randint(V, (8,), generator=torch.Generator().manual_seed(0))
    x0 = row.expand(20, -1).contiguous()  # a network may be shown some rows alone
    scored = torch.arange(8).expand(20, -1) >= 3
    changed = torch.zeros(8, dtype=torch.bool)

    def look(module: object, arguments: tuple, settings: dict) -> None:
        if isinstance(model, Plaid):
            z, gamma, embeddings, *estimate = arguments
            shown = torch.isclose(z, torch.sigmoid(-gamma).sqrt()[:, None, None] * embeddings[row]).all(-1)
            for xhat in estimate:
                shown &= True if xhat is None else torch.isclose(xhat, embeddings[row]).all(-1)
        else:
            prefix, canvas, _ = arguments
            shown = (canvas == row) & ((prefix == row) | (prefix == canvas))
        assert shown[:, :3].all()
        changed.logical_or_(~shown.all(0))

    model.register_forward_pre_hook(look, with_kwargs=True)
    noise = torch.Generator().manual_seed(0)
    bound_of(name)(model, x0, 8, noise, scored=scored)
    if METHODS[name].bound is None:
        finite_step_bound(model, x0, 3, 4, noise, scored=scored)
        importance_weighted_bound(model, x0, 3, 2, noise, scored=scored)
        diffusion_accuracy(model, x0, 4, noise, scored=scored)
    if "fused" in model.heads:
        hybrid_bound(model, x0, 0.5, 4, noise, scored=scored)
    assert changed.tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_one_batch_by_heart(name: str) -> None:
    """Of one row, its loss under one draw of the noise comes down to a fifth in 100 steps.

    A draw that shows a token of each copy: where all are `[M]`, rotary attention cannot tell positions apart.
    """
    model, objective = network(name, vocab_size=7)
    x0 = torch.tensor([[2, 0, 3, 3, 1, 2, 5, 4]]).expand(4, -1).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = math.inf
    for step in range(100):
        loss = objective(model, x0, torch.Generator().manual_seed(2)).total
        first = loss.item() if step == 0 else first
        if loss.item() < first / 5:
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pytest.fail(f"from {first} to {loss.item()}")


# A chain's drafts are a distribution too: they sum to one over a block.


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.draft == "chained"])
def test_chained_drafts_sum_to_one(name: str) -> None:
    model = build(replace(MODELS[name], vocab_size=V, rows=0, context=L), scale=8)
    x0 = JOINT.sequences
    states, _ = model(x0, torch.full_like(x0, V), Block(L))
    nll = model.nll(states, torch.ones_like(x0, dtype=torch.bool), x0, "draft").view(-1, L).sum(-1)
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


# Learning.

READINGS = {
    "denoise": SynergisticConfig(denoise=1, infill=0, block=0, denoising="ao"),
    "infill": SynergisticConfig(denoise=0, infill=1, block=0, all_masked=0),
    "block": SynergisticConfig(denoise=0, infill=0, block=1, revealed=1),
}


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        *(("late-mutual-chained", reading) for reading in READINGS),
        ("late-mutual-factorised", "block"),
        ("layers-one_way-factorised", "infill"),
        ("layers-one_way-factorised", "block"),
        ("off-chained", "denoise"),
    ],
)
def test_one_batch_is_learnt_by_heart(name: str, reading: str) -> None:
    """Four rows and one draw of the noise that shows a token of each: every head comes down to nothing.

    Except the causal head, which cannot know the first token: log 4 nats for it.
    """
    branch = BranchConfig(1, 32, 2)
    config = replace(MODELS[name], diffusion=branch, causal=MODELS[name].causal and branch)
    model = build(config).float()
    x0 = draw_tokens(4)
    x0[:, 0] = torch.tensor([2, 3, 4, 5])  # not BOS, after which rotary attention could not tell slots 0 and 1 apart
    loss = Synergistic(READINGS[reading], BLOCK)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    least = {f"{reading}_causal": math.log(4) / x0.shape[1]}
    for _ in range(300):
        step = loss(model, x0, torch.Generator().manual_seed(18))
        if all(value.item() < least.get(part, 0) + 0.05 for part, value in step.parts.items()):
            return
        optimizer.zero_grad()
        step.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pytest.fail(f"after 300 steps: {step.parts}")
