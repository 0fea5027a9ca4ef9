"""Left to right: adaptive windows, chains step by step, passes, interruption, templates and ragged batches."""

import itertools
from dataclasses import replace

import pytest
import torch
from catalogue import hear
from drawing import last, p_value, task

from caddf.categorical import RowGenerators, Warp, inverse_cdf
from caddf.decoding import Autoregressive, Speculative, Task
from caddf.errors import InputError
from caddf.interface import Block
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.models.layers import head_log_probs, logits_of

V, T, K = 11, 24, 4
ROWS, ODDS = 2000, 1e-6
KINDS = {
    "mutual": {},
    "chained": {"draft": "chained"},
    "one_way": {"exchange": "one_way"},
    "one_way chained": {"exchange": "one_way", "draft": "chained"},
    "none": {"exchange": "one_way", "fusion": "none", "own_state": False},
    "none chained": {"exchange": "one_way", "fusion": "none", "own_state": False, "draft": "chained"},
}
PROMPTS = [[1, 2, 3] + [V] * 13, [4] + [V] * 15, [V] * 16]
TEMPLATES = [[1, 2, 3] + [V] * 5 + [5, 6] + [V] * 6, [4] + [V] * 7 + [7] * 8, [V, 1] * 8]


def dual(kind: str, vocab: int = V, block_size: int = K) -> DualBranch:
    torch.manual_seed(1)
    branches = {"causal": BranchConfig(1, 16, 2, token_shift=True), "diffusion": BranchConfig(2, 16, 2, alibi=True)}
    model = (
        DualBranch(ModelConfig(vocab, T, block_size=block_size, **{"own_state": True} | branches | KINDS[kind]))
        .double()
        .eval()
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return hear(model).requires_grad_(False)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(("target", "least"), [("causal", 0.1), ("fused", 1.0)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_adaptive_windows_are_exact(kind, target, template, least):
    model, tokens = dual(kind), TEMPLATES if template else PROMPTS
    cached, uncached = (
        last(Speculative(target, least=least, cache=cache)(model, task(model, tokens, template=template)))
        for cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    greedy, plain = (
        last(decoder(model, task(model, tokens, warp=Warp(0.0), template=template)))
        for decoder in (Speculative(target, least=least), Autoregressive(target))
    )
    assert torch.equal(greedy.tokens, plain.tokens)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize(("drafts", "renew"), [(2, 1), (4, 1), (2, 4)])
def test_windows_that_serve_several_rounds_are_exact(drafts, renew, target, template):
    model, tokens = dual("chained", block_size=6), TEMPLATES if template else PROMPTS
    decoder = Speculative(target, drafts=drafts, renew=renew, lookup=0)
    cached, uncached = (
        last(replace(decoder, cache=cache)(model, task(model, tokens, template=template))) for cache in (True, False)
    )
    assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.equal(cached.counts.rounds, uncached.counts.rounds)
    greedy, plain = (
        last(each(model, task(model, tokens, warp=Warp(0.0), template=template)))
        for each in (decoder, Autoregressive(target))
    )
    assert torch.equal(greedy.tokens, plain.tokens)
    if not template and target == "causal":  # of the fused target there are its own passes
        assert (cached.counts.diffusion < cached.counts.rounds).all() == (renew < 4)


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize(
    ("kind", "length", "settings"),
    [
        ("mutual", 3, {"least": 0.4}),
        ("chained", 3, {"least": 0.4}),
        ("chained", 4, {"drafts": 1, "renew": 1}),
        ("chained", 4, {"drafts": 2, "renew": 1, "least": 0.2}),
        ("none", 4, {"block_size": 2}),
        ("none chained", 4, {"block_size": 2}),
    ],
)
def test_windows_draw_the_target(kind, length, settings, target):
    """Chi-squared over all sequences; it fails by chance once in a million."""
    vocab, model = 3, dual(kind, 3, length)
    x = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    states, _ = model(x, torch.full_like(x, vocab), Block(length))
    log_p = -model.nll(states, torch.ones_like(x, dtype=torch.bool), x, target).view(len(x), -1).sum(1)
    frames = list(Speculative(target, **settings)(model, task(model, torch.full((ROWS, length), vocab))))
    drafted = (frames[0].drafts != vocab).sum(1)
    assert drafted.min() < drafted.max() or drafted.max() < length  # some windows are cut
    if "renew" in settings and target == "causal":  # and some serve more than one round
        assert frames[-1].counts.diffusion.sum() < frames[-1].counts.rounds.sum()
    assert p_value(frames[-1].tokens, log_p.exp()) > ODDS


@pytest.mark.parametrize("kind", ["one_way", "one_way chained", "none", "none chained"])
def test_drafts_over_clean_blocks_cost_what_a_block_does(kind):
    """Rows of unequal length, each alone and together; a chain drafts from one window a block."""
    model, tokens, decoder = dual(kind), torch.tensor(PROMPTS), Speculative(lookup=0)
    cached, uncached = (last(replace(decoder, cache=cache)(model, task(model, tokens))) for cache in (True, False))
    assert torch.equal(cached.tokens, uncached.tokens) and torch.equal(cached.counts.rounds, uncached.counts.rounds)
    assert torch.equal(cached.counts.diffusion, uncached.counts.diffusion)
    assert (cached.counts.computed * 2 < uncached.counts.computed).all()
    if model.chained:
        assert (cached.counts.diffusion <= 16 // K).all()
    for row in range(len(tokens)):
        alone = Task(tokens[row : row + 1], torch.tensor([16]), V, RowGenerators(0, [row]))
        assert torch.equal(last(decoder(model, alone)).tokens[0], cached.tokens[row])


def test_fewer_drafts_are_made_where_they_are_unsure():
    model = dual("chained")
    drafts = [
        sum(
            int((frame.drafts != V).sum())
            for frame in Speculative(drafts=K, renew=K, least=least)(model, task(model, PROMPTS))
        )
        for least in (0.0, 0.02, 1.0)
    ]
    assert drafts[0] > drafts[1] > drafts[2]
    with pytest.raises(InputError, match="least is 2"):
        Speculative(least=2.0)
    for name in ("drafts", "renew"):
        with pytest.raises(InputError, match=f"{name} is 0; it must be 1 or more, or not set"):
            Speculative(**{name: 0})


@pytest.mark.parametrize("target, passes", [("causal", 16), ("fused", 16)])
def test_each_token_costs_one_pass(target, passes):
    counts = last(Autoregressive(target)(dual("mutual"), task(dual("mutual"), [[V] * 16]))).counts
    assert int(counts.causal) == passes and int(counts.diffusion) == (0 if target == "causal" else 16 // K)


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("kind", ["mutual", "chained"])
def test_a_round_costs_one_pass_but_where_a_block_starts_from_a_correction(kind, target):
    model, corrected, rounds, starts = dual(kind), 0, 0, 0
    for frame in Speculative(target)(model, task(model, [[V] * T])):
        rounds += 1
        at = (frame.corrected[0] if frame.corrected is not None else torch.zeros(T)).nonzero()
        starts += int(len(at) and (int(at) + 1) % K == 0 and int(at) + 1 < T)
        corrected += len(at)
    again = starts if target == "fused" and kind == "mutual" else 0  # windows of a chain slide over blocks' ends
    assert corrected and int(frame.counts.causal) == rounds + 1 + again


@pytest.mark.parametrize("decoder", [Autoregressive(), Autoregressive("fused"), Speculative(), Speculative("fused")])
def test_an_interrupted_decoder_leaves_model_and_caches_reusable(decoder):
    model = dual("chained")
    whole = last(decoder(model, task(model, PROMPTS))).tokens
    for stop in (1, 3):
        frames = decoder(model, task(model, PROMPTS))
        for _ in range(stop):
            frame = next(frames)
        frames.close()
        other = last(decoder(model, task(model, PROMPTS))).tokens
        assert torch.equal(other, whole)
    assert (frame.tokens == V).any()  # it was in the middle


def test_gpt2_positions_last_to_the_end_of_the_context_in_a_ragged_batch():
    torch.manual_seed(0)
    model = CausalModel(CausalConfig(V, 16, BranchConfig(1, 16, 2, positions="learned", bias=True))).double()
    together = last(Autoregressive()(model, task(model, PROMPTS)))
    alone = last(Autoregressive()(model, task(model, PROMPTS[:1])))
    assert torch.equal(together.tokens[0], alone.tokens[0]) and (together.tokens < V).all()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_few_states_are_those_of_many_up_to_rounding(n, bias):
    torch.manual_seed(0)
    states, table, b = torch.randn(n, 96), torch.randn(301, 96), torch.randn(301) if bias else None
    exact = states.double() @ table.double().T + (0 if b is None else b.double())
    torch.testing.assert_close(logits_of(states, table, b).double(), exact, rtol=1e-5, atol=2e-5)
    log_p = head_log_probs(states, table, b)
    assert log_p.is_contiguous() and torch.allclose(log_p.double(), exact.log_softmax(-1), rtol=0, atol=5e-5)


def test_draws_by_inverse_cdf_never_fall_on_what_is_impossible():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4 + 1e-16, 0.0]])
    for u, expected in ((0.0, [1, 0, 0]), (0.5, [3, 0, 2]), (1 - 2**-53, [3, 0, 3]), (1.0, [3, 0, 3])):
        assert inverse_cdf(probs, torch.full((3,), u, dtype=torch.float64)).tolist() == expected


def test_greedy_draws_are_the_arg_max_of_the_warp():
    log_p = torch.randn(5, V).log_softmax(-1)
    for warp in (Warp(0.0), Warp(0.0, banned=(int(log_p[0].argmax()),))):
        drawn = warp.draw(log_p, torch.full((5,), 0.5))
        assert torch.equal(drawn, inverse_cdf(warp(log_p), torch.full((5,), 0.5)))
