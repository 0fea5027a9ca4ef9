"""Decoders draw what they claim: against enumeration, against their uncached twins, and against a row alone."""

import dataclasses
import itertools

import pytest
import torch
from catalogue import hear
from drawing import last, p_value, task
from enumeration import absorbing_posterior, denoiser_of, sequences
from torch import Tensor

from caddf.categorical import Warp
from caddf.decoding import (
    DECODERS,
    Ancestral,
    Autoregressive,
    Confidence,
    EntropyBound,
    FirstHitting,
    Hybrid,
    Speculative,
)
from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.interface import Block, Infill
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.schedules import SCHEDULES

KINDS = {
    "mutual": {},
    "chained": {"draft": "chained"},
    "one_way": {"exchange": "one_way"},
    "layers": {"exchange": "one_way", "fusion": "layers"},
    "none": {"exchange": "one_way", "fusion": "none"},
}
V, L = 3, 3
ROWS = 2000
ODDS = 1e-6  # of a chi-squared test failing by chance


def dual(kind: str, vocab: int = V, block_size: int = 2, context: int = 24) -> DualBranch:
    """A random network, sharp enough that its parts matter."""
    torch.manual_seed(2)
    config = {"exchange": "mutual", "fusion": "late", "draft": "factorised", "own_state": kind != "none", **KINDS[kind]}
    branches = {"causal": BranchConfig(1, 16, 2, token_shift=True), "diffusion": BranchConfig(2, 16, 2, alibi=True)}
    model = DualBranch(ModelConfig(vocab, context, block_size=block_size, **branches, **config)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return hear(model).requires_grad_(False)


def left_to_right(model, x: Tensor, target: str, canvas: Tensor | None = None) -> Tensor:
    """log p of each row of `x`, at the masked positions of `canvas`."""
    wanted = torch.ones_like(x, dtype=torch.bool) if canvas is None else canvas.expand_as(x) == model.mask_id
    masked = torch.full_like(x, model.mask_id)
    if canvas is not None:
        states, _ = model(x, canvas.expand_as(x).contiguous(), Infill())
    else:
        states, _ = model(x, masked, Block(model.block_size))
    nats = model.nll(states, wanted, x, target)
    return -torch.zeros(x.shape, dtype=nats.dtype).masked_scatter(wanted, nats).sum(1)


@pytest.mark.parametrize("decoder", [Autoregressive, Speculative])
@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("kind", ["mutual", "chained", "one_way", "layers"])
def test_left_to_right_draws_the_target(decoder, target, kind):
    model = dual(kind)
    frame = last(decoder(target=target)(model, task(model, torch.full((ROWS, L), V))))
    assert p_value(frame.tokens, left_to_right(model, sequences(V, L), target).exp()) > ODDS


@pytest.mark.parametrize("kind", ["mutual", "chained", "one_way"])
def test_speculation_draws_the_fused_target_of_a_template(kind):
    model, canvas = dual(kind), torch.tensor([V, 1, V])
    x = sequences(V, L)
    x = x[x[:, 1] == 1]
    log_p = torch.full((V**L,), -torch.inf, dtype=torch.float64)
    log_p[(x * V ** torch.arange(L - 1, -1, -1)).sum(1)] = left_to_right(model, x, "fused", canvas)
    frame = last(Speculative()(model, task(model, canvas.expand(ROWS, L), template=True)))
    assert p_value(frame.tokens, log_p.exp()) > ODDS


def test_a_warp_is_applied_to_target_and_drafts_alike():
    model, warp = dual("mutual"), Warp(temperature=0.7, top_k=2)
    x = sequences(V, 2)
    log_p = torch.zeros(len(x), dtype=torch.float64)
    for i in range(2):
        states, _ = model(x, torch.full_like(x, V), Block(2))
        where = torch.zeros_like(x, dtype=torch.bool)
        where[:, i] = True
        log_p += warp(model.log_probs(states, where, "causal")).log().gather(1, x[:, i : i + 1])[:, 0]
    frame = last(Speculative()(model, task(model, torch.full((ROWS, 2), V), warp=warp)))
    assert p_value(frame.tokens, log_p.exp()) > ODDS


def chain(model, levels: list[float], canvas: Tensor) -> dict[tuple[int, ...], float]:
    """The law of the reverse chain over the levels of lambda, state by state."""
    law = {tuple(canvas.tolist()): 1.0}
    for upper, lower in itertools.pairwise(levels):
        after: dict[tuple[int, ...], float] = {}
        for state, probability in law.items():
            x = torch.tensor([state])
            q = denoiser_of(model)(x, torch.ones_like(x, dtype=torch.bool)).exp()
            steps = absorbing_posterior(q, x[0] == V, x[0], lower, upper)
            options = [[(v, p) for v, p in enumerate(row.tolist()) if p > 0] for row in steps]
            for choice in itertools.product(*options):
                to = tuple(v for v, _ in choice)
                after[to] = after.get(to, 0.0) + probability * float(torch.tensor([p for _, p in choice]).prod())
        law = after
    return law


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_ancestral_draws_its_chain(schedule):
    model = dual("mutual")
    law = chain(model, SCHEDULES[schedule]().grid(3).flip(0).tolist(), torch.full((3,), V))
    log_p = torch.tensor([law[tuple(x)] for x in sequences(V, 3).tolist()], dtype=torch.float64).log()
    frame = last(Ancestral(steps=3, schedule=schedule)(model, task(model, torch.full((ROWS, 3), V))))
    assert p_value(frame.tokens, log_p.exp()) > ODDS


def any_order(model, x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """p of each row's tokens at `positions`, all else masked, averaged over the orders of revealing them."""
    orders = list(itertools.permutations(positions))
    total = torch.zeros(len(x), dtype=torch.float64)
    for order in orders:
        canvas, log_p = torch.full_like(x, V), torch.zeros(len(x), dtype=torch.float64)
        for i in order:
            where = torch.zeros_like(x, dtype=torch.bool)
            where[:, i] = True
            log_p += denoiser_of(model)(canvas, where).gather(1, x[:, i : i + 1])[:, 0]
            canvas = torch.where(where, x, canvas)
        total += log_p.exp()
    return total / len(orders)


def test_first_hitting_draws_the_continuous_chain():
    model, x = dual("mutual"), sequences(V, 3)
    frame = last(FirstHitting()(model, task(model, torch.full((ROWS, 3), V))))
    assert p_value(frame.tokens, any_order(model, x, (0, 1, 2))) > ODDS


@pytest.mark.parametrize("speculate", [False, True])
def test_hybrid_draws_what_its_bound_is_of(speculate):
    """p(x) = E over the positions masked at l* of any-order anchors, then the fused infilling of the rest."""
    model, x, anchor = dual("mutual"), sequences(V, 3), 0.6
    p = torch.zeros(len(x), dtype=torch.float64)
    for masked in itertools.product([False, True], repeat=3):
        hidden = torch.tensor(masked)
        weight = anchor ** int(hidden.sum()) * (1 - anchor) ** int((~hidden).sum())
        anchors = tuple((~hidden).nonzero()[:, 0].tolist())
        z = torch.where(hidden, V, x)
        states, _ = model(x, z, Infill())
        where = hidden.expand_as(x)
        nats = torch.zeros(x.shape, dtype=torch.float64).masked_scatter(where, model.nll(states, where, x, "fused"))
        p += weight * any_order(model, x, anchors) * (-nats.sum(1)).exp()
    frame = last(Hybrid(anchor=anchor, speculate=speculate)(model, task(model, torch.full((ROWS, 3), V))))
    assert p_value(frame.tokens, p) > ODDS


PROMPTS = [[1, 2, 3] + [11] * 13, [4] + [11] * 15, [11] * 16]
# The first row copies at once.
TEMPLATES = [[1, 2, 3, 1, 2, 3] + [11] * 2 + [5, 6] + [11] * 6, [4] + [11] * 7 + [7] * 8, [11, 1] * 8]


OTHER_NETWORKS = {"euler", "tau_leaping", "d3pm_absorbing", "d3pm_uniform", "gaussian"}
"""Decoders of networks that are told the time or read no tokens, with tests of their own."""
VARIANTS = [
    (name, settings)
    for name in DECODERS
    if name not in OTHER_NETWORKS
    for settings in ([{"target": "causal"}, {"target": "fused"}] if name in ("autoregressive", "speculative") else [{}])
]


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    "kind, name, settings",
    [
        (kind, *variant)
        for kind in ("mutual", "chained", "one_way")
        for variant in VARIANTS
        if kind == "mutual" or variant[0] == "speculative"  # nobody else looks at drafts, or at the exchange
    ],
)
def test_a_row_gets_what_it_would_get_alone(kind, name, settings, template):
    model, tokens, lengths = dual(kind, 11, 4), TEMPLATES if template else PROMPTS, [16, 12, 15]
    decoder = DECODERS[name](**settings)
    together = last(decoder(model, task(model, tokens, lengths=lengths, template=template)))
    for r, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        alone = last(decoder(model, task(model, [row[:length]], rows=[r], template=template)))
        assert torch.equal(alone.tokens[0], together.tokens[r, :length])
        for name_ in ("causal", "diffusion", "rounds", "computed", "needed"):
            assert getattr(alone.counts, name_)[0] == getattr(together.counts, name_)[r], name_


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("decoder", [Autoregressive, Speculative])
@pytest.mark.parametrize("kind", list(KINDS))
def test_cached_equals_uncached(kind, decoder, target, template):
    model, tokens = dual(kind, 11, 4), TEMPLATES if template else PROMPTS
    cached, uncached = (
        last(decoder(target=target, cache=cache)(model, task(model, tokens, template=template)))
        for cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.equal(cached.counts.needed, uncached.counts.needed)
    assert (uncached.counts.computed == uncached.counts.needed).all()
    assert (cached.counts.computed <= uncached.counts.computed).all()


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize(("kind", "decoder"), [("mutual", Autoregressive), *((kind, Speculative) for kind in KINDS)])
def test_beyond_the_context_attention_slides(kind, decoder, target):
    model, short = dual(kind, 11, 4, context=8), torch.full((2, 30), 11)
    cached, uncached = (last(decoder(target=target, cache=c)(model, task(model, short))) for c in (True, False))
    assert torch.equal(cached.tokens, uncached.tokens)


@pytest.mark.parametrize("name", ["ancestral", "hybrid"])
def test_a_canvas_ends_at_the_context(name):
    model = dual("mutual", 11, 4, context=8)
    with pytest.raises(InputError, match="a row has 9 tokens"):
        last(DECODERS[name]()(model, task(model, torch.full((1, 9), 11))))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("block_size", [1, 8])
def test_greedy_speculation_is_greedy_decoding(kind, target, template, block_size):
    model, tokens, greedy = dual(kind, 11, 4), TEMPLATES if template else PROMPTS, Warp(temperature=0)
    settings = {"target": target, "block_size": block_size}
    plain, drafted = (
        last(decoder(**settings)(model, task(model, tokens, warp=greedy, template=template)))
        for decoder in (Autoregressive, Speculative)
    )
    assert torch.equal(plain.tokens, drafted.tokens)
    assert (drafted.counts.rounds <= plain.counts.rounds).all()


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("kind", ["mutual", "chained"])
def test_greedy_speculation_is_greedy_decoding_whatever_the_weights_the_prompts_and_k(kind, target):
    """Six networks, each with prompts of its own, of every length, under another k."""
    for seed, k in enumerate((1, 2, 3, 5, 8, 13)):
        model, draw = dual(kind, 11, max(k, 2)), torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        prompts = torch.randint(11, (6, 18), generator=draw)
        prompts[torch.arange(18) >= torch.randint(17, (6, 1), generator=draw)] = 11
        plain, drafted = (
            last(decoder(model, task(model, prompts, warp=Warp(temperature=0))))
            for decoder in (Autoregressive(target, block_size=k), Speculative(target, block_size=k))
        )
        assert torch.equal(plain.tokens, drafted.tokens), (seed, k)


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_given_tokens_stay_and_everything_wanted_is_filled(name, settings):
    model = dual("mutual", 11, 4)
    for template, tokens in ((False, PROMPTS), (True, TEMPLATES)):
        given, filled = torch.tensor(tokens), torch.zeros(3, 16, dtype=torch.bool)
        for frame in DECODERS[name](**settings)(model, task(model, tokens, template=template)):
            assert torch.equal(frame.tokens[given != 11], given[given != 11])
            filled |= frame.fresh
        assert torch.equal(filled, given == 11)
        assert (frame.tokens < 11).all()


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_a_function_serves_as_the_model(name, settings):
    """A source in which all tokens are equal: every exact denoiser that sees one knows the rest."""

    def function(x_t: Tensor) -> Tensor:
        counts = torch.nn.functional.one_hot(x_t, V + 1)[..., :V].sum(1).double()
        p = torch.where(counts.sum(1, keepdim=True) > 0, counts / counts.sum(1, keepdim=True).clamp(min=1), 1 / V)
        return p.log()[:, None].expand(-1, x_t.shape[1], -1)

    several = {"ancestral": {"steps": 10_000}, "remasking": {"steps": 10_000, "eta": 0.0}, "margin": {"threshold": 2.0}}
    if name in several:  # at once, from an all-masked canvas: not exact
        settings = several[name]
    model = as_model(function, V)
    frame = last(DECODERS[name](**settings)(model, task(model, torch.full((50, 5), V))))
    assert (frame.tokens == frame.tokens[:, :1]).all()
    assert frame.tokens.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name, settings", [(n, s | {"eta": 0.0} if n == "remasking" else s) for n, s in VARIANTS])
def test_a_finished_row_works_no_more(name, settings):
    """Remasking, while it remasks, has a test of its own: none of its tokens is final."""
    model = dual("mutual", 11, 4)
    given = task(model, torch.full((3, 12), 11))

    def second_row_ends_at_once(tokens: Tensor) -> Tensor:
        return (tokens[:, 0] != 11) & (torch.arange(3) == 1)

    stopped_at = None
    for frame in DECODERS[name](**settings)(model, dataclasses.replace(given, finished=second_row_ends_at_once)):
        if stopped_at is None and frame.tokens[1, 0] != 11:
            stopped_at = int(frame.counts.computed[1])
    assert (frame.tokens[[0, 2]] < 11).all()
    assert int(frame.counts.computed[1]) == stopped_at


def test_evaluations_of_the_ancestral_chain_follow_the_formula():
    """n (1 - (1 - 1/n)^L) expected; the mean of 400 rows lies within 5 standard errors, but for odds of 1e-6."""
    model, steps, length = dual("mutual", 11, 4), 8, 12
    frame = last(Ancestral(steps=steps)(model, task(model, torch.full((400, length), 11))))
    counts = frame.counts.diffusion.double()
    expected = steps * (1 - (1 - 1 / steps) ** length)
    assert abs(counts.mean() - expected) < 5 * counts.std() / len(counts) ** 0.5 + 1e-3  # lambda(1) is .999, not 1


def test_the_cache_serves_what_the_formula_leaves():
    """Hits are 1 - (1 - (1 - 1/n)^L) of all token-positions while every row is open: here n = 32 steps, L = 12 tokens.

    A row is done at its last reveal, so that evaluations are counted against the steps up to there alone; both means
    lie within 5 standard errors, but for odds of 1e-6.
    """
    model, steps, length = dual("mutual", 11, 4), 32, 12
    counts = last(Ancestral(steps=steps)(model, task(model, torch.full((300, length), 11)))).counts
    full, evaluations = 2 * length, counts.diffusion.double()
    assert torch.equal(counts.computed, full * counts.diffusion) and torch.equal(counts.rounds, counts.diffusion)
    expected = steps * (1 - (1 - 1 / steps) ** length)
    assert abs(evaluations.mean() - expected) < 5 * evaluations.std() / len(evaluations) ** 0.5 + 1e-2
    done = counts.needed.double() / full  # the step of the last reveal: P(<= j) = (j / n)^L
    last_step = sum(1 - (j / steps) ** length for j in range(steps))
    assert abs(done.mean() - last_step) < 5 * done.std() / len(done) ** 0.5 + 0.05  # lambda(1) is .999, not 1


ANY_ORDER = [
    ("ancestral", {"steps": 9}),
    ("ancestral", {"steps": 40, "schedule": "cosine"}),
    ("ancestral", {"steps": 20, "until": 0.4}),
    ("remasking", {"steps": 20, "eta": 0.2}),
    ("euler", {"steps": 20}),
    ("tau_leaping", {"steps": 20}),
    ("tau_leaping", {"steps": 40, "schedule": "geometric"}),
    ("hybrid", {"steps": 30}),
]


@pytest.mark.parametrize("name, settings", ANY_ORDER)
@pytest.mark.parametrize(
    "warp, template", [(Warp(), False), (Warp(0.7, top_k=5, top_p=0.9, banned=(3,)), True)], ids=["plain", "template"]
)
def test_an_unchanged_canvas_costs_nothing_and_changes_nothing(warp, name, settings, template):
    model, tokens, lengths = dual("mutual", 11, 4), TEMPLATES if template else PROMPTS, [16, 12, 15]
    cached, uncached = (
        list(
            DECODERS[name](**settings, cache=cache)(
                model, task(model, tokens, lengths=lengths, template=template, warp=warp)
            )
        )
        for cache in (True, False)
    )
    assert len(cached) == len(uncached)
    for one, other in zip(cached, uncached, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.fresh, other.fresh)
    one, other = cached[-1].counts, uncached[-1].counts
    assert torch.equal(one.needed, other.needed) and torch.equal(other.computed, other.needed)
    assert (one.computed <= one.needed).all() and one.computed.sum() < one.needed.sum()


class Reads:
    """A model that notes the rows and positions that are read of it."""

    def __init__(self, model) -> None:
        self.model, self.canvases, self.places = model, [], []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, prefix, canvas, pattern, caches=None):
        self.canvases += canvas.tolist()
        return self.model(prefix, canvas, pattern, caches)

    def log_probs(self, states, where, head="fused"):
        self.places.append(where.sum().item())
        return self.model.log_probs(states, where, head)


@pytest.mark.parametrize("name", ["ancestral", "first_hitting", "euler", "tau_leaping", "remasking"])
def test_no_canvas_is_read_twice_and_heads_where_something_is_drawn(name):
    model = Reads(dual("mutual", 11, 4))
    settings = {} if name == "first_hitting" else {"steps": 60}
    frame, drawn = None, 0
    for frame in DECODERS[name](**settings)(model, task(model, torch.full((1, 16), 11))):
        drawn += int(frame.fresh.sum())
    assert sum(model.places) == drawn and len(model.canvases) == int(frame.counts.diffusion[0]) <= drawn
    if name != "remasking":  # which may come back to where it was
        assert len({tuple(canvas) for canvas in model.canvases}) == len(model.canvases)


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_an_interrupted_decoder_leaves_nothing_behind(name, settings):
    model, tokens, lengths = dual("mutual", 11, 4), PROMPTS, [16, 12, 15]
    whole = last(DECODERS[name](**settings)(model, task(model, tokens, lengths=lengths)))
    frames = DECODERS[name](**settings)(model, task(model, tokens, lengths=lengths))
    for _ in range(3):
        next(frames)
    frames.close()
    again = last(DECODERS[name](**settings)(model, task(model, tokens, lengths=lengths)))
    assert torch.equal(whole.tokens, again.tokens) and torch.equal(whole.counts.computed, again.counts.computed)


COMMITTING = [("confidence", {}), ("confidence", {"steps": 3}), ("margin", {}), ("entropy_bound", {"bound": 3.0})]


@pytest.mark.parametrize("name, settings", COMMITTING)
def test_committing_decoders_stop_at_the_end_of_text(name, settings):
    """A row ends once an EOS stands with no mask before it, and what it drew is what it would have drawn anyway."""
    model, eos, lengths = dual("mutual", 11, 4), 5, [16, 12, 15]
    model.causal.embedding.weight[eos] = model.causal.embedding.weight[:11].mean(0)

    def ended(x: Tensor) -> Tensor:
        reached = (x != 11).long().cumprod(1).bool() & (torch.tensor(PROMPTS) == 11)
        return (reached & (x == eos)).any(1)

    stops = 0
    for seed in range(8):
        if seed > 2 and stops:
            break
        free = last(DECODERS[name](**settings)(model, task(model, PROMPTS, seed=seed, lengths=lengths)))
        given = dataclasses.replace(task(model, PROMPTS, seed=seed, lengths=lengths), finished=ended)
        frame = last(DECODERS[name](**settings)(model, given))
        done = ended(frame.tokens) | ~(given.wanted & (frame.tokens == 11)).any(1)
        assert done.all()
        known = frame.tokens != 11
        assert torch.equal(frame.tokens[known], free.tokens[known])
        early = (given.wanted & (frame.tokens == 11)).any(1)
        assert (frame.counts.rounds[early] < free.counts.rounds[early]).all()
        stops += int(early.sum())
    assert stops > 0


@pytest.mark.parametrize("name, settings", [*VARIANTS, ("euler", {}), ("tau_leaping", {})])
@pytest.mark.parametrize("template", [False, True])
def test_banned_tokens_are_never_drawn(name, settings, template):
    model, banned = dual("mutual", 11, 4), (0, 2, 9)
    tokens, warp = TEMPLATES if template else PROMPTS, Warp(banned=banned)
    given = task(model, tokens, lengths=[16, 12, 15], template=template, warp=warp)
    frame = last(DECODERS[name](**settings)(model, given))
    drawn = frame.tokens[given.wanted]
    assert not torch.isin(drawn, torch.tensor(banned)).any() and (drawn < 11).all()


def test_confidence_steps_share_the_positions_out():
    model = dual("mutual", 11, 4)
    frames = list(Confidence(steps=4)(model, task(model, torch.full((2, 16), 11))))
    assert [int(frame.fresh[0].sum()) for frame in frames] == [4, 4, 4, 4]


@pytest.mark.parametrize(
    "decoder, settings",
    [(Ancestral, {"steps": 0}), (Hybrid, {"anchor": 1.5}), (Confidence, {"steps": 0}), (EntropyBound, {"bound": -1.0})],
)
def test_bad_settings_are_named(decoder, settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"{name} is"):
        decoder(**settings)


def test_a_model_without_a_causal_branch_says_so():
    config = ModelConfig(11, 24, BranchConfig(1, 16, 2), None, exchange="one_way")
    model = DualBranch(config)
    with pytest.raises(InputError, match="does not read left to right"):
        last(Speculative()(model, task(model, PROMPTS)))
