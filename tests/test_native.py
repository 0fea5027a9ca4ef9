"""The kernels in C give what the modules give, and the same bits alone, in a batch, and verified together."""

import copy
import ctypes
import gc
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from drawing import p_value

from caddf import native
from caddf.caches import Slots
from caddf.categorical import RowGenerators, Warp, inverse_cdf
from caddf.compile import compiled
from caddf.decoding import Autoregressive, SemiAutoregressive, Speculative, Task
from caddf.decoding.cached_reader import CachedReader
from caddf.decoding.plan import Plan
from caddf.decoding.task import Counts, DecodingError
from caddf.errors import InputError
from caddf.evaluation import mtp
from caddf.interface import Block, Drafting, Infill
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig
from caddf.models.single import SingleBranch, SingleConfig
from caddf.native import build
from caddf.native.passes import Weights
from caddf.native.structures import MIRRORED, CAttention, CMap, CPass, compare
from caddf.quantise import integers, is_bf16, quantised
from caddf.training.optimizer import build_optimizer

V, T = 83, 64
NEAR = 1e-5
"""Float32 rounding of states of size one, several times over."""
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the kernels need a C compiler, which is not here")


@pytest.fixture(autouse=True)
def proposed(monkeypatch):
    """What only proposes is read in float32, unless a test says so."""
    monkeypatch.setattr("caddf.native.model.PROPOSED", None)


def dual(context: int = T, alibi: bool = True, bias: bool = False, draft_vocab: int | None = None) -> DualBranch:
    torch.manual_seed(4)
    diffusion = BranchConfig(2, 32, 4, bias=bias, alibi=alibi)
    config = ModelConfig(
        V, context, diffusion, BranchConfig(2, 48, 3, bias=bias, token_shift=True), embeddings="tied",
        draft="chained", block_size=6, draft_vocab=draft_vocab, own_state=True,
    )  # fmt: skip
    return loud(DualBranch(config))


def odd() -> DualBranch:
    """Widths and head sizes that fill no vector, the other activation, and queries and keys of one length."""
    torch.manual_seed(0)
    other = {"bias": True, "activation": "relu2", "qk_norm": True}
    config = ModelConfig(
        V, T, BranchConfig(2, 44, 2, alibi=True, **other), BranchConfig(2, 42, 3, **other), embeddings="tied",
        draft="chained", block_size=6,
    )  # fmt: skip
    return loud(DualBranch(config))


def gpt2() -> CausalModel:
    torch.manual_seed(0)
    return loud(CausalModel(CausalConfig(V, T, BranchConfig(2, 48, 3, positions="learned", bias=True), block_size=6)))


def loud(model):
    """Weights that are large enough for every part to be heard, biases among them.

    They are numbers of bfloat16, but for one, so that all are read in float32.
    """
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).bfloat16().float()
    model.causal.layers[0].mlp.up.weight.data[0, 0] = 1 / 3
    return model.eval().requires_grad_(False)


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(rows))


PASSES = (
    torch.arange(20),
    torch.arange(20, 21),
    torch.arange(21, 29),
    torch.tensor([[29, 30, 31], [27, 28, 29], [30, 31, 32]]),
    torch.arange(33, 48),
)


@pytest.mark.parametrize("make", [dual, lambda: dual(context=24), lambda: dual(bias=True, alibi=False), odd, gpt2])
@torch.inference_mode()
def test_a_causal_pass_is_the_modules_wherever_its_rows_stand(make):
    plain, fast = make(), native.attach(make())
    x, caches = tokens(3), [model.allocate(3, T) for model in (plain, fast)]
    where = torch.ones(3, 1, dtype=torch.bool)
    for positions in PASSES:
        (one, two), width = (
            (m.read(x, positions, c) for m, c in zip((plain, fast), caches, strict=True)),
            positions.shape[-1],
        )
        assert one.causal.abs().max() > 1
        torch.testing.assert_close(two.causal, one.causal, rtol=0, atol=NEAR)
        read = [model.log_probs(one, where.expand(3, width), "causal") for model in (plain, fast)]
        torch.testing.assert_close(*read, rtol=0, atol=10 * NEAR)
    for kind in ("causal", "exchange") if caches[0].exchange is not None else ("causal",):
        for part in ("keys", "values"):
            one, two = (getattr(getattr(cache, kind), part) for cache in caches)
            assert one.abs().max() > 0.5
            torch.testing.assert_close(two, one, rtol=0, atol=NEAR)


@pytest.mark.parametrize("start", [[30, 30], [30, 17], [0, 0]])
@pytest.mark.parametrize("make", [dual, lambda: dual(context=24), lambda: dual(bias=True, alibi=False), odd])
@torch.inference_mode()
def test_windows_and_chains_are_the_modules(make, start):
    plain, fast = make(), native.attach(make())
    x, caches, start = tokens(2), [model.allocate(2, T) for model in (plain, fast)], torch.tensor(start)
    canvas = torch.full((2, 6), V)
    canvas[0, 0] = x[0, start[0]]
    windows, chains = [], []
    for model, cache in zip((plain, fast), caches, strict=True):
        model.read(x, torch.arange(40), cache)
        windows.append(model.encode(canvas, start, torch.tensor([T, T]), Block(6), cache))
        chains.append(model.allocate_drafts(2, 6))
    assert windows[0].states.std(1).max() > 0.1  # positions differ
    torch.testing.assert_close(windows[1].states, windows[0].states, rtol=0, atol=NEAR)
    n, u = start + 1, torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drafts, q, _ = fast.draw_drafts(windows[1], x, start, n, u, chains[1], warp=Warp(), least=0.0)
    text, where = x.scatter(1, n[:, None] + torch.arange(5), drafts), (torch.arange(6) > 0).expand(2, -1)
    log_q = plain.log_probs(plain.draft_step(windows[0], text, torch.arange(6), chains[0]), where, "draft")
    torch.testing.assert_close(q.view(10, -1), log_q.exp().double(), rtol=0, atol=NEAR)


@pytest.mark.parametrize("shorter", [0, 7])
@pytest.mark.parametrize("make", [dual, odd])
@torch.inference_mode()
def test_whole_canvases_are_the_modules(make, shorter, monkeypatch):
    """Holes at different places of two rows, and rows that end earlier; each the same bits as alone."""
    plain, fast, read = make(), native.attach(make()), []
    window = native.Native.window
    monkeypatch.setattr(native.Native, "window", lambda *given: (read.append(given), window(*given))[1])
    x, lengths = tokens(2), torch.tensor([T, T - shorter])
    x[0, 9:14], x[1, 30] = V, V
    seen = []
    for model in (plain, fast):
        cache = model.allocate(2, T)
        model.read(x, torch.arange(T), cache)
        seen.append(model.encode(x, torch.zeros(2, dtype=torch.long), lengths, Infill(), cache))
    assert len(read) == 1
    inside = torch.arange(T) < lengths[:, None]
    for r in range(2):
        cache, row = fast.allocate(1, T), x[r : r + 1]
        fast.read(row, torch.arange(T), cache)
        length = lengths[r : r + 1]
        alone = fast.encode(row[:, : int(length)], torch.zeros(1, dtype=torch.long), length, Infill(), cache)
        assert torch.equal(alone.states[0], seen[1].states[r, : int(length)])
    torch.testing.assert_close(seen[1].states[inside], seen[0].states[inside], rtol=0, atol=NEAR)
    assert torch.equal(seen[1].visible, seen[0].visible)


@pytest.mark.parametrize("make", [dual, lambda: dual(context=24), odd, gpt2])
@torch.inference_mode()
def test_a_prompt_is_read_in_pieces_to_the_same_bits(make, monkeypatch):
    model, x = native.attach(make()), tokens(3)
    whole, pieces = model.allocate(3, T), model.allocate(3, T)
    one = model.read(x, torch.arange(50), whole)
    monkeypatch.setattr("caddf.native.model.WIDEST", 3 * 17)
    two = model.read(x, torch.arange(50), pieces)
    assert torch.equal(one.causal, two.causal) and torch.equal(
        whole.causal.keys[:, :, :, :50], pieces.causal.keys[:, :, :, :50]
    )
    monkeypatch.setattr("caddf.native.model.WIDEST", 2)  # fewer positions than rows: the modules do it
    torch.testing.assert_close(model.read(x, torch.arange(50), pieces).causal, one.causal, rtol=0, atol=NEAR)


@torch.inference_mode()
def test_bits_depend_neither_on_the_batch_nor_on_the_width_of_a_pass():
    model, x = native.attach(dual()), tokens(3)
    together = model.allocate(3, T)
    wide = model.read(x, torch.arange(24), together)
    logits = model.native.heads["causal"](wide.causal.flatten(0, 1)).view(3, 24, V)
    for row in range(3):
        alone = model.allocate(1, T)
        for i in range(24):
            state = model.read(x[row : row + 1], torch.arange(i, i + 1), alone)
            assert torch.equal(state.causal[0, 0], wide.causal[row, i])
            assert torch.equal(model.native.heads["causal"](state.causal[0])[0], logits[row, i])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("drafts", ["bf16", "int8"])
@torch.inference_mode()
def test_speculation_in_float32_is_greedy_autoregression_to_the_token(threads, kind, drafts, monkeypatch):
    monkeypatch.setattr("caddf.native.model.PROPOSED", drafts)
    monkeypatch.setattr("caddf.native.passes.ALONE", 0)  # small as it is, by as many threads as there are
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, x = native.attach(quantised(dual(), kind) if kind else dual()), tokens(3)
    x[:, 9:] = V
    written = []
    for decoder in (Autoregressive(), Speculative(), Speculative(block_size=3)):
        task = Task(x, torch.tensor([T, T - 5, T]), V, RowGenerators(0, 3), Warp(temperature=0))
        *_, last = decoder(model, task)
        written.append(last.tokens)
    assert (written[0][0] != V).all() and written[0][:, 9:].unique().numel() > 4
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


@torch.inference_mode()
def test_drafts_in_int8_are_drawn_from_nearly_the_same():
    n, u = torch.tensor([20]), torch.full((1, 1), 0.5, dtype=torch.float64)
    drawn = []
    for kind in ("bf16", "int8"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("caddf.native.model.PROPOSED", kind)
            model = native.attach(dual())
            states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
            cache, _ = model.allocate_drafts(1, 6), model.allocate(1, T)
            drawn.append(model.native.drafts(states, tokens(1), n - 1, n, u, cache, warp=Warp(), least=0.0)[1])
            assert {model.native.stacks[name].weights.kind for name in ("look", "chain")} == {kind}
            assert model.native.heads["chain"].tokens()[1].kind == kind
    assert 0 < (drawn[0] - drawn[1]).abs().sum() / 2 < 0.02


@pytest.mark.parametrize("settings", [{"draft": "chained"}, {"draft": "chained", "draft_vocab": 40}, {}])
@pytest.mark.parametrize("embeddings", ["tied", "separate"])
@torch.inference_mode()
def test_what_is_no_proposal_is_the_modules(embeddings, settings, monkeypatch):
    """Where drafts are the result, their head is not rounded: neither as proposals are nor as matrices of bfloat16."""
    monkeypatch.setattr("caddf.native.model.PROPOSED", "int8")
    branches = BranchConfig(2, 32, 4), BranchConfig(2, 48, 3)
    model = loud(DualBranch(ModelConfig(V, T, *branches, embeddings=embeddings, block_size=6, **settings)))
    model.causal.layers[0].mlp.up.weight.data[0, 0] = 0.375
    x, where, results = tokens(2), torch.ones(2, T, dtype=torch.bool), []
    for kernels in (False, True):
        if kernels:
            native.attach(model).native.refresh()
            assert model.native.kind == "bf16"
        states, _ = model(x, torch.full_like(x, V), Block(6))
        task = Task(x.masked_fill(torch.arange(T) > 8, V), torch.full((2,), T), V, RowGenerators(0, 2))
        *_, last = SemiAutoregressive()(model, task)
        results.append((model.log_probs(states, where, "draft"), last.tokens, mtp(model, x, 6)))
    (one, text, shares), (two, same, others) = results
    torch.testing.assert_close(two, one, rtol=0, atol=NEAR)
    assert torch.equal(same, text) and torch.equal(others.accuracy, shares.accuracy)


@torch.inference_mode()
def test_what_is_no_number_stays_none_in_int8():
    x = torch.ones(3, 40)
    x[0, 3], x[2, 37], y = torch.nan, torch.inf, torch.empty(3, 9)
    weights = Weights("int8")
    made = weights.map(torch.ones(9, 40))
    build.library().caddf_map(ctypes.addressof(made), 3, x.data_ptr(), y.data_ptr(), 1)
    assert y[0].isnan().all() and y[1].isfinite().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("template", [False, True])
@torch.inference_mode()
def test_a_row_of_many_is_what_it_is_alone(template, monkeypatch):
    """However many rows there are: whole rounds are for some, steps for more."""
    monkeypatch.setattr("caddf.native.model.PROPOSED", "int8")
    monkeypatch.setattr("caddf.native.rounds.MOST", 20)
    monkeypatch.setattr("caddf.native.passes.WIDEST", 20)
    model, rounds = native.attach(dual()), []
    for rows in (2, 9):
        x = tokens(9)[:rows].clone()
        x[:, 9:] = V
        if template:
            x[:, -5:] = tokens(9)[:rows, -5:]
        task = Task(x, torch.full((rows,), T), V, RowGenerators(0, rows), Warp(0.9), template=template)
        *_, last = Speculative()(model, task)
        rounds.append(last)
    assert torch.equal(rounds[0].tokens, rounds[1].tokens[:2])
    assert torch.equal(rounds[0].counts.rounds, rounds[1].counts.rounds[:2])


@pytest.mark.parametrize(
    "kind",
    ["autoregressive", "drafts", "copies", "windows used up, fused", "windows used up in a template", "a template"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_a_row_that_goes_ahead_writes_what_it_does_round_by_round(kind, temperature, monkeypatch):
    """To its length, and to an end that is met on the way; from any uniforms, and with as many counted."""
    make, decoder = ROUNDS[kind]
    model, x, written, template = native.attach(make()), tokens(1), [], "template" in kind
    x[:, 9:] = torch.where(torch.tensor([i % 7 == 0 and template for i in range(9, T)]), x[:, 9:], V)
    monkeypatch.setattr("caddf.native.rounds.AHEAD", 1e9)
    for most, end in itertools.product((1, 5, 16), (T, 30)):
        monkeypatch.setattr("caddf.native.rounds.MOST_AHEAD", most)
        monkeypatch.setattr("caddf.native.rounds.perf_counter", itertools.cycle((0, 1e8, 1e8, 1e9)).__next__)

        def met(rows: torch.Tensor, end: int = end) -> torch.Tensor:
            return (rows[:, :end] != V).all(1)

        task = Task(x, torch.tensor([T]), V, RowGenerators(0, 1), Warp(temperature), met, template)
        written.append([(frame, frame.counts.copy()) for frame in decoder(model, task)])
    assert len(written[0]) > len(written[1]) > 3
    for some, one in zip(written[2:], written[:2] * 2, strict=True):
        assert len(some) == len(one)
        for (frame, counts), (other, counted) in zip(some, one, strict=True):
            assert torch.equal(frame.tokens, other.tokens) and torch.equal(frame.fresh, other.fresh)
            assert torch.equal(counts.all, counted.all)


@pytest.mark.parametrize("decoder", [Autoregressive(), Speculative(), Speculative("fused"), Speculative(lookup=1)])
@torch.inference_mode()
def test_texts_after_one_that_was_left_in_the_middle_are_what_they_are(decoder):
    model, x, left = native.attach(dual()), tokens(3), 0
    x[:, 9:] = V

    def frames(seed: int):
        return decoder(model, Task(x, torch.tensor([T, T - 5, T]), V, RowGenerators(seed, 3)))

    *_, whole = frames(0)
    for stop in (1, 2, 4):
        other = frames(stop)
        for _ in range(stop):
            left += int((next(other).tokens[0] == V).any())
        other.close()
        *_, again = frames(0)
        assert torch.equal(again.tokens, whole.tokens)
    assert left > 3


def test_rounds_hold_what_they_read():
    model = native.attach(dual()).requires_grad_(True)  # whose heads are laid out anew whenever they are read
    with torch.inference_mode():
        rounds = model.rounds(torch.tensor([T]), Drafting(6, 6, proposes=True), model.allocate(1, T), warp=Warp())
        heads = [model.native.heads[name] for name in ("causal", "chain")]
        panels = [weakref.ref(head.held[1][1]) for head in heads]
        for head in heads:
            assert head.tokens()[1] is not head.tokens()[1]
        assert model.diffusion.embedding.weight is not model.diffusion.embedding.weight
    gc.collect()
    assert all(panel() is not None for panel in panels)
    held = {
        each.data_ptr() for kept in rounds.kept if isinstance(kept, tuple) for each in kept if torch.is_tensor(each)
    }
    assert {rounds.draft.embedding, rounds.draft.shifted} <= held and model.chain.shifted is not None
    del rounds
    gc.collect()
    assert all(panel() is None for panel in panels)


@pytest.mark.parametrize("make", [dual, lambda: dual(alibi=False, bias=True), odd], ids=["biases", "none", "odd"])
@torch.inference_mode()
def test_the_fusion_is_the_modules(make):
    plain, fast = make(), native.attach(make())
    x, lengths = tokens(3), torch.tensor([T, T - 9, T])
    x[:, 20:50] = V
    fused = []
    for model in (plain, fast):
        caches = model.allocate(3, T)
        states = model.read(x, torch.arange(30), caches)
        one = model.encode(torch.full((3, 6), V), torch.tensor([12, 3, 18]), lengths, Block(6), caches)
        two = model.encode(x, torch.zeros(3, dtype=torch.long), lengths, Infill(), caches)
        places = torch.arange(18, 25)
        states = model.read(x, places, caches)
        made = [model.fuse(states, places, caches, seen).fused for seen in (one, model.prepare(two, caches))]
        fused.append(made)
    assert fast.native.fusion is not None
    for one, two in zip(*fused, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=NEAR)


@torch.inference_mode()
def test_a_small_draft_vocabulary_and_threads_change_no_draft(monkeypatch):
    drawn = []
    for threads in (1, 2):
        monkeypatch.setattr("caddf.native.passes.ALONE", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        model, x = native.attach(dual(draft_vocab=40)), tokens(2)
        x[:, 9:] = V
        *_, last = Speculative()(model, Task(x, torch.tensor([T, T]), V, RowGenerators(0, 2)))
        drawn.append(last.tokens)
    assert torch.equal(*drawn)


def greedy(model, rows: int) -> torch.Tensor:
    x = tokens(rows)
    x[:, 9:] = V
    *_, last = Speculative()(model, Task(x, torch.full((rows,), T), V, RowGenerators(0, rows), Warp(temperature=0)))
    return last.tokens


def test_threads_serve_several_callers_at_once_and_are_hired_anew_by_a_forked_process(monkeypatch):
    monkeypatch.setattr("caddf.native.passes.ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    models = [native.attach(dual()) for _ in range(4)]
    with torch.inference_mode():
        alone = greedy(models[0], 2)

    def write(model):
        with torch.inference_mode():
            return [greedy(model, 2) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(alone, each) for made in pool.map(write, models) for each in made)
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: sending.send(write(models[0])[0].tolist()), daemon=True
    )
    child.start()
    assert receiving.poll(60), "the forked process waits for threads that it has not"
    assert receiving.recv() == alone.tolist()
    child.join()


def test_callers_wait_while_weights_are_laid_out(monkeypatch):
    """Who came second used to decode without kernels."""
    model, made, begun = native.attach(dual()), native.model._window_pass, threading.Event()

    def slow(*given):
        begun.set()
        time.sleep(0.1)
        return made(*given)

    monkeypatch.setattr("caddf.native.model._window_pass", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(model.native.refresh)
        assert begun.wait(60)
        assert pool.submit(lambda: (model.native.refresh(), set(model.native.stacks))[1]).result() >= {
            "window",
            "chain",
        }
        first.result()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_weights_of_bf16_are_read_as_that_and_no_bit_is_another(temperature, monkeypatch):
    monkeypatch.setattr("caddf.native.model.PROPOSED", "bf16")
    model = dual()
    model.causal.layers[0].mlp.up.weight[0, 0] = 0.375

    def run():
        x, model.native = tokens(2), None
        x[:, 9:] = V
        *_, last = Speculative()(
            native.attach(model), Task(x, torch.full((2,), T), V, RowGenerators(0, 2), Warp(temperature))
        )
        caches = model.allocate(1, T)
        states = model.native.causal(tokens(1), Slots.of(torch.arange(T)), caches, tokens(1).roll(1))
        return last.tokens, states, model.native.kind, model.native.bytes

    small = run()
    monkeypatch.setattr("caddf.native.model.is_bf16", lambda model: False)
    large = run()
    assert torch.equal(small[0], large[0]) and torch.equal(small[1], large[1])
    assert (small[2], large[2]) == ("bf16", None) and small[3] < 0.6 * large[3]
    assert not is_bf16(dual())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@torch.inference_mode()
def test_kernels_of_rounded_weights_are_the_rounded_model(kind):
    model = dual()
    for parameter in model.parameters():
        parameter.data *= 1.01
    rounded = quantised(model, kind)
    assert not torch.equal(rounded.causal.embedding.weight, model.causal.embedding.weight)
    assert torch.equal(rounded.causal.norm.weight, model.causal.norm.weight)
    plain, fast, x = rounded, native.attach(quantised(model, kind)), tokens(1)
    one, two = (model.read(x, torch.arange(20), model.allocate(1, T)) for model in (plain, fast))
    near = {"bf16": NEAR, "int8": 50 * NEAR}[kind]  # with int8 inputs have 16 bits
    torch.testing.assert_close(two.causal, one.causal, rtol=0, atol=near)
    where = torch.ones(1, 20, dtype=torch.bool)
    p, q = (model.log_probs(state, where, "causal").double() for model, state in ((plain, one), (fast, two)))
    torch.testing.assert_close(p, q, rtol=0, atol=10 * near)
    assert (p.exp() * (p - q)).sum(-1).max() < 1e-6


@pytest.mark.parametrize(("out", "width"), [(83, 41), (16, 8), (130, 1300), (7, 1)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 9, 14, 60])
def test_int8_maps_are_sums_of_integers(out, width, rows):
    generator = torch.Generator().manual_seed(out)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((out, width), (rows, width)))
    if width > 1000:  # the largest sums there are
        weight, x = weight.sign(), x.sign().mul(x[:, :1].abs())
        weight[0], x[0] = 1, 3
    weights, y = Weights("int8"), torch.empty(rows, out)
    made = weights.map(weight)
    build.library().caddf_map(ctypes.addressof(made), rows, x.data_ptr(), y.data_ptr(), 1)
    whole, scales = integers(weight)
    steps = x.abs().amax(1, keepdim=True).double() / 32767
    expected = ((x.double() / steps).round() @ whole.double().T) * steps * scales.double()
    # Inputs halfway between two integers may go to either.
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=float(steps.max() * weight.abs().max()))
    alone = torch.empty(1, out)
    build.library().caddf_map(ctypes.addressof(made), 1, x[-1:].data_ptr(), alone.data_ptr(), 1)
    assert torch.equal(alone[0], y[-1])


@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
def test_threads_share_a_map_out_among_them(kind):
    """What each of them does depends on who is sooner; what comes out does not, wherever the shares end."""
    generator = torch.Generator().manual_seed(0)
    for out, width, rows in ((7, 5, 1), (83, 41, 3), (300, 64, 1), (1000, 96, 9), (130, 1300, 31)):
        weight, x = (torch.randn(shape, generator=generator) for shape in ((out, width), (rows, width)))
        weights, made = Weights(kind, far=rows > 6), []
        held = weights.map(weight)
        for threads in (1, 2, 3, 7):
            for _ in range(3):
                made.append(torch.full((rows, out), torch.nan))
                build.library().caddf_map(ctypes.addressof(held), rows, x.data_ptr(), made[-1].data_ptr(), threads)
        assert all(torch.equal(each, made[0]) for each in made[1:])


def test_weights_that_change_are_laid_out_anew():
    model, x = native.attach(dual()), tokens(1)

    @torch.inference_mode()
    def read() -> torch.Tensor:
        states = model.read(x, torch.arange(9), model.allocate(1, T))
        return model.log_probs(states, torch.ones(1, 9, dtype=torch.bool), "causal")

    before = read()
    for weight in (model.causal.layers[0].mlp.up.weight, model.causal.embedding.weight):
        weight.mul_(2)
        assert not torch.allclose(read(), before)
        weight.mul_(0.5)
        assert torch.equal(read(), before)
    model.requires_grad_(True)  # a fused step is not counted as a write
    optimizer = build_optimizer(model, 0.01, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        before = read()
        optimizer.step()
        other = native.attach(dual())
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(read(), before)
        with torch.inference_mode():
            states = other.read(x, torch.arange(9), other.allocate(1, T))
            assert torch.equal(read(), other.log_probs(states, torch.ones(1, 9, dtype=torch.bool), "causal"))


def test_a_copy_reads_with_its_own_modules():
    model = native.attach(dual())
    copied = copy.deepcopy(model)
    assert copied.native is None and model.native is not None
    assert torch.equal(copied.tokens_of("causal"), model.tokens_of("causal"))


def test_learning_goes_through_the_modules():
    model = native.attach(dual())
    model.requires_grad_(True)
    x = tokens(1)[:, :9]
    states, _ = model(x, x, Block(6))
    model.log_probs(states, torch.ones(1, 9, dtype=torch.bool), "causal").sum().backward()
    assert model.causal.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: dual().double(), "double"),
        (lambda: DualBranch(ModelConfig(V, T, BranchConfig(1, 516, 2), BranchConfig(1, 16, 2))), "heads of 258"),
        (
            lambda: DualBranch(
                ModelConfig(V, T, BranchConfig(1, 16, 2), BranchConfig(1, 16, 2), fusion="layers", exchange="one_way")
            ),
            "fusion layers",
        ),
        (lambda: SingleBranch(SingleConfig(V, T, BranchConfig(1, 16, 2))), "no causal branch"),
    ],
)
def test_other_models_stay_as_they_are(make, why):
    model = make()
    assert not native.suits(model), why
    assert compiled(model, "auto") is model and getattr(model, "native", None) is None
    with pytest.raises(InputError, match="compile is always"):
        compiled(model, "always")
    assert compiled(model, "never") is model


def test_without_a_compiler_decoding_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    build.library.cache_clear()
    try:
        assert compiled(dual(), "auto").native is None
        with pytest.warns(UserWarning, match="compiling failed; going on without: /bin/false failed"):
            assert compiled(dual(), "always").native is None
        monkeypatch.setenv("CC", "no-such-compiler")
        with pytest.raises(native.BuildError, match="no no-such-compiler"):
            build.library()
    finally:
        build.library.cache_clear()
    assert not list((tmp_path / "caddf").iterdir())


def test_the_library_is_built_once_and_kept(monkeypatch, tmp_path):
    """By a compiler that has arguments, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -DNOTHING=1")
    monkeypatch.setattr(build, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in build.FLAGS])  # sooner
    build.library.cache_clear()
    try:
        build.library()
        (made,) = (tmp_path / "caddf").iterdir()
        monkeypatch.setattr(build, "_compile", None)
        build.library.cache_clear()
        build.library()
        assert [made] == list((tmp_path / "caddf").iterdir())
    finally:
        build.library.cache_clear()


def test_libraries_that_nobody_uses_go_when_another_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, made: made.touch())
    monkeypatch.setenv("CC", "cc -DNOTHING=1")
    loaded, old = build._built(), time.time() - build.KEPT - 60
    others = [tmp_path / "caddf" / name for name in ("kernels-recent.so", "kernels-old.so", "else.so")]
    for path in others:
        path.touch()
    (folder := tmp_path / "caddf" / "kernels-folder.so").mkdir()  # which cannot be unlinked
    for path in (loaded, folder, *others[1:]):
        os.utime(path, (old, old))
    assert build._built() == loaded and others[1].exists()  # nothing was built
    monkeypatch.setenv("CC", "cc -DNOTHING=2")
    kept = {loaded, build._built(), folder, *others} - {others[1]}
    assert {*(tmp_path / "caddf").iterdir()} == kept


def test_a_folder_for_want_of_a_cache_goes_with_its_process(tmp_path):
    (tmp_path / "cache").touch()  # no folder
    told = subprocess.run(
        [sys.executable, "-c", "from caddf.native import build; path = build._cache(); print(path, path.is_dir())"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert told[0].startswith(str(tmp_path / "caddf-")) and told[1] == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def swapped(fields, one, other):
    order = list(fields)
    order[one], order[other] = order[other], order[one]
    return order


@pytest.mark.parametrize(
    ("structure", "fields", "wrong"),
    [
        (CAttention, swapped(CAttention._fields_, 0, 1), "query, norm"),
        (CMap, swapped(CMap._fields_, 3, 4), "in, out"),  # of the same size
        (CPass, CPass._fields_[1:], "n, x,"),
        (CPass, CPass._fields_[:-1], "its size, first"),
        (CMap, (*CMap._fields_, ("more", ctypes.c_int64)), "more, its size"),
        (CMap, (*CMap._fields_[:-1], ("far", ctypes.c_int32)), "far"),  # which padding hides
    ],
)
def test_structures_are_laid_out_as_in_c(structure, fields, wrong):
    library = build.library()
    compare(library)
    other = type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})
    with pytest.raises(RuntimeError, match=rf"^{structure.__name__} of structures.py .*: .*{wrong}"):
        compare(library, [other if each is structure else each for each in MIRRORED])


WARPS = {
    "greedy": Warp(0.0),
    "temperature": Warp(0.8),
    "top-k": Warp(top_k=7),
    "one": Warp(0.7, top_k=1),
    "top-p": Warp(0.9, top_p=0.7),
    "min-p": Warp(min_p=0.2),
    "all filters": Warp(1.1, 30, 0.9, 0.05),
}


@pytest.mark.parametrize("draft_vocab", [None, 40])
@pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)
@torch.inference_mode()
def test_drafts_at_one_go_are_those_step_by_step(warp, draft_vocab, monkeypatch):
    """The same uniforms give the same tokens, and q is the warped draft head's, whatever the rows' places."""
    x, drawn = tokens(3), []
    n, u = torch.tensor([20, 22, 0]), torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for at_once in (True, False):
        model = native.attach(dual(draft_vocab=draft_vocab))
        task = Task(x, torch.full((3,), T), V, RowGenerators(0, 3), warp)
        reader = CachedReader(model, Plan.of(model, task, "causal", 6), Counts.zeros(3))
        rows, text = torch.ones(3, dtype=torch.bool), x.clone()
        for row in range(3):
            text[row, n[row] :] = V
        look, _ = reader.look(reader.start(), text, n, (n - 1).clamp(min=0), 6, rows)
        if at_once:
            drawn.append(reader.chain(look, text, n, u, warp, 0.0)[:2])
            continue
        parts = []
        for j in range(5):
            q = warp(reader.drafts(look, text, n + j, n + j + 1, rows))
            text[torch.arange(3), n + j] = inverse_cdf(q[:, 0], u[:, j])
            parts.append(q)
        drawn.append((torch.stack([text[row, n[row] : n[row] + 5] for row in range(3)]), torch.cat(parts, 1)))
    assert drawn[0][0].unique().numel() > 2
    assert torch.equal(drawn[0][0], drawn[1][0])
    torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=0, atol=NEAR)
    torch.testing.assert_close(drawn[0][1].sum(-1), torch.ones(3, 5, dtype=torch.float64))


FILTERS = {
    "top-k": [Warp(top_k=k) for k in range(1, V + 2)],
    "top-p": [Warp(top_p=p / 40) for p in range(1, 40)],
    "min-p": [Warp(min_p=p / 40) for p in range(1, 40)],
    "top-k and top-p": [Warp(1.0, k, p / 10) for k in (3, 20, 60) for p in range(1, 10)],
}


@pytest.mark.parametrize("kind", FILTERS)
@torch.inference_mode()
def test_filters_keep_what_the_warp_keeps(kind):
    """Of the first draft of each row, which is drawn from the same logits whatever the filter."""
    model, x, n = native.attach(dual()), tokens(3), torch.tensor([20, 30, 40])
    task = Task(x, torch.full((3,), T), V, RowGenerators(0, 3))
    reader = CachedReader(model, Plan.of(model, task, "causal", 6), Counts.zeros(3))
    look, _ = reader.look(reader.start(), x, n, n - 1, 6, torch.ones(3, dtype=torch.bool))
    u = torch.rand(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = reader.chain(look, x, n, u, Warp(), 0.0)[1][:, 0]
    kept = set()
    for warp in FILTERS[kind]:
        q = reader.chain(look, x, n, u, warp, 0.0)[1][:, 0]
        torch.testing.assert_close(q, warp(whole.log()), rtol=0, atol=NEAR)
        kept |= {*(q > 0).sum(-1).tolist()}
    assert len(kept) > 8


@torch.inference_mode()
def test_drafting_ends_where_drafts_are_unsure():
    model, x, n = native.attach(dual()), tokens(2), torch.tensor([20, 30])
    task = Task(x, torch.full((2,), T), V, RowGenerators(0, 2))
    reader = CachedReader(model, Plan.of(model, task, "causal", 6), Counts.zeros(2))
    look, _ = reader.look(reader.start(), x, n, n - 1, 6, torch.ones(2, dtype=torch.bool))
    u = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    *_, q, whole = reader.chain(look, x, n, u, Warp(), 0.0)
    assert whole.tolist() == [5, 5]
    sure = q.amax(-1).cumprod(1)
    for least in (0.9, float(sure[0, 1]) * 0.999, float(sure[1, 2]) * 0.999):
        *_, some, drafts = reader.chain(look, x, n, u, Warp(), least)
        expected = (sure >= least).long().cumprod(1).sum(1).clamp(min=1)
        assert drafts.tolist() == expected.tolist()
        inside = torch.arange(5) < drafts[:, None]
        assert torch.equal(some[inside], q[inside]) and not some[~inside].any()


@torch.inference_mode()
def test_matrices_are_laid_out_for_caches_alone():
    model, x = native.attach(dual()), tokens(1)
    states, _ = model(x, x, Block(6))
    model.log_probs(states, torch.ones(1, T, dtype=torch.bool), "causal")
    assert model.native.bytes == 0
    model.allocate(1, T)
    assert model.native.bytes > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_drafts_of_a_broken_model_are_tokens_still(temperature):
    model = native.attach(dual())
    model.chain.norm.weight.fill_(torch.nan)
    cache, states = model.allocate_drafts(1, 6), torch.zeros(1, 6, 32)
    model.allocate(1, T)
    n, u = torch.tensor([20]), torch.full((1, 5), 0.5, dtype=torch.float64)
    drawn, _, _ = model.native.drafts(states, tokens(1), n - 1, n, u, cache, warp=Warp(temperature), least=0.0)
    assert ((drawn >= 0) & (drawn < V)).all()


@pytest.mark.parametrize("decoder", [Autoregressive(), Speculative("fused")], ids=["causal", "fused"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["all", 5, V - 1])
@torch.inference_mode()
def test_rounds_of_a_broken_model_end_with_an_error(temperature, decoder, broken):
    """All logits, or one among numbers."""
    model, x = native.attach(dual()), tokens(2) % 5
    if broken == "all":
        model.causal.norm.weight.fill_(torch.nan)
    else:
        model.causal.embedding.weight[broken] = torch.nan
    x[:, 9:] = V
    with pytest.raises(DecodingError):
        for _ in decoder(model, Task(x, torch.tensor([T, T]), V, RowGenerators(0, 2), Warp(temperature))):
            pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [dual, gpt2])
def test_a_model_that_is_converted_is_left_to_its_modules(make, dtype):
    """The kernels read float32 alone, and read again what comes back to it."""
    model, plain = native.attach(make()), make()
    before = greedy(model, 2)
    assert torch.equal(greedy(model.to(dtype), 2), greedy(plain.to(dtype), 2)) and not model.native.stacks
    again = greedy(model.to(torch.float32), 2)
    assert model.native.stacks and (dtype is torch.bfloat16 or torch.equal(again, before))


@torch.inference_mode()
def test_what_is_banned_must_be_a_token():
    model, x = native.attach(dual()), tokens(1)
    x[:, 9:] = V
    with pytest.raises(IndexError):
        next(Speculative()(model, Task(x, torch.tensor([T]), V, RowGenerators(0, 1), Warp(banned=(V,)))))


@torch.inference_mode()
def test_a_template_of_single_holes_costs_a_pass_for_each():
    model, x = native.attach(dual()), tokens(1)
    x[:, 9::2] = V
    *_, last = Autoregressive()(model, Task(x, torch.tensor([T]), V, RowGenerators(0, 1), template=True))
    holes = int((x == V).sum())
    assert (last.tokens < V).all() and int(last.counts.causal) <= holes + 1


@pytest.mark.parametrize("draft_vocab", [None, 40])
@pytest.mark.parametrize("warp", [Warp(0.0), Warp(0.8, top_p=0.9)], ids=["greedy", "drawn"])
@torch.inference_mode()
def test_templates_are_drafted_at_one_go_around_what_is_given_and_banned(warp, draft_vocab):
    x, filled, counts = tokens(3), [], []
    holes = torch.ones(3, T, dtype=torch.bool)
    holes[:, :9] = holes[:, -4:] = holes[:, 14] = holes[0, 20:23] = holes[1, 17::2] = False
    free = x.masked_fill(holes, V)
    for banned in ((), tuple(range(0, V, 2))):
        for at_once in (True, False):
            model, drawn_from = native.attach(dual(draft_vocab=draft_vocab)), replace(warp, banned=banned)
            given = Task(free, torch.tensor([T, T - 6, T]), V, RowGenerators(0, 3), drawn_from, template=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(model), "rounds", lambda *_, **__: None)  # whole rounds are compared with these
                if not at_once:
                    patch.setattr(native.Native, "drafts", lambda *args, **settings: None)
                *_, last = Speculative()(model, given)
            filled.append(last.tokens)
            counts.append(last.counts.rounds)
        assert torch.equal(filled[-1], filled[-2]) and torch.equal(counts[-1], counts[-2])
        assert not torch.isin(filled[-1][holes & (filled[-1] != V)], torch.tensor(banned, dtype=torch.long)).any()
    assert not torch.equal(filled[0], filled[2])
    assert torch.equal(filled[0][~holes], x[~holes]) and (filled[0][0] != V).all()


ROUNDS = {
    "autoregressive": (dual, Autoregressive()),
    "of a model of one branch": (gpt2, Autoregressive()),
    "drafts": (dual, Speculative()),
    "drafts of all places": (dual, Speculative(drafts=6, renew=1)),
    "a window each round": (dual, Speculative(drafts=6, renew=6)),
    "windows used up": (dual, Speculative(block_size=8, drafts=2, renew=1, lookup=1, least=0.05)),
    "few drafts": (dual, Speculative(block_size=2)),
    "no drafts": (dual, Speculative(block_size=1)),
    "unsure drafts": (dual, Speculative(least=0.2)),
    "copies": (dual, Speculative(lookup=1)),
    "unsure copies of a small vocabulary": (lambda: dual(draft_vocab=40), Speculative(lookup=1, least=0.2)),
    "copies of a model of one branch": (gpt2, Speculative(lookup=1)),
    "few copies": (dual, Speculative(block_size=2, lookup=1)),
    "long copies": (dual, Speculative(block_size=2, lookup=1, copies=12)),
    "long copies of a model of one branch": (gpt2, Speculative(block_size=2, lookup=1)),
    "copies of fused drafts": (dual, Speculative("fused", lookup=1)),
    "copies of a template": (dual, Speculative(lookup=1)),
    "a context that slides": (lambda: dual(context=24), Speculative(block_size=4)),
    "a small vocabulary": (lambda: dual(draft_vocab=40), Speculative()),
    "odd widths": (odd, Speculative()),
    "fused": (dual, Autoregressive("fused")),
    "fused drafts": (dual, Speculative("fused")),
    "few fused drafts": (dual, Speculative("fused", block_size=2)),
    "no fused drafts": (dual, Speculative("fused", block_size=1)),
    "windows used up, fused": (dual, Speculative("fused", block_size=8, drafts=2, renew=1)),
    "unsure fused drafts": (dual, Speculative("fused", least=0.2)),
    "a context that slides, fused": (lambda: dual(context=24), Speculative("fused", block_size=4)),
    "odd widths, fused": (odd, Speculative("fused", block_size=5)),
    "a template": (dual, Autoregressive()),
    "drafts of a template": (dual, Speculative()),
    "windows used up in a template": (dual, Speculative(block_size=8, drafts=2, renew=1, lookup=1)),
    "unsure drafts of a template": (dual, Speculative(least=0.2)),
    "odd widths of a template": (odd, Speculative()),
    "fewer than have matched": (dual, Speculative(block_size=2, lookup=2, copies=1)),
}


MANY = ("autoregressive", "drafts", "copies")
"""Kinds under every warp, with a prompt and without; others once, as `FEW` says in turn."""
FEW = ((0, "temperature"), (9, "greedy"), (9, "all filters"))


@pytest.mark.parametrize(
    ("kind", "prompt", "name"),
    [
        each
        for each in itertools.product(ROUNDS, (0, 9), WARPS)
        if each[0] in MANY or each[1:] == FEW[list(ROUNDS).index(each[0]) % 3]
    ],
)
@torch.inference_mode()
def test_a_round_is_what_its_steps_are(kind, prompt, name, monkeypatch):
    """Rows of unequal length, one of which meets its end early: the same tokens, marks and counts, frame by frame."""
    (make, decoder), warp = ROUNDS[kind], WARPS[name]
    model, x, lengths, template = native.attach(make()), tokens(3), torch.tensor([T, T - 5, T - 1]), "template" in kind
    holes = torch.arange(T) >= torch.full((3, 1), prompt)
    if long := "long" in kind:
        x = x[:, torch.arange(T) % 3]
    if template:  # given are single tokens, some of which end a window, two together, and what no window reaches over
        holes[:, 30] = holes[0, 21:23] = holes[1, 17:25:2] = holes[2, 40:52] = holes[:, -7:-3] = False
    x[holes] = V

    def early(rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([False, False, True]) & (rows[:, prompt + 20] != V) & (not template)

    written = []
    for stepwise in (False, True):
        with monkeypatch.context() as patch:
            if stepwise:
                patch.setattr(type(model), "rounds", lambda *_, **__: None)  # every reading by itself
            drawn_from = replace(warp, banned=(3, 50)) if template else warp
            task = Task(x, lengths, V, RowGenerators(0, 3), drawn_from, finished=early, template=template)
            frames = [replace(frame, counts=frame.counts.copy()) for frame in decoder(model, task)]
        written.append(frames)
    assert len(written[0]) == len(written[1]) > 4
    for whole, steps in zip(*written, strict=True):
        for name in ("tokens", "fresh", "drafts", "corrected"):
            one, two = getattr(whole, name), getattr(steps, name)
            assert (one is None and two is None) or torch.equal(one, two), name
        # Rounds read what is given by itself, steps together with drafts for which no window is read: a pass more.
        passes = slice(int(template), None)
        assert torch.equal(whole.counts.all[passes], steps.counts.all[passes])
        assert (whole.counts.all >= steps.counts.all).all()
    assert ("copies" in kind) <= bool(written[0][-1].counts.copied.sum() > 2)
    assert not long or not prompt or (written[0][0].drafts != V).sum(1).tolist() == [6, 6, 6]
    assert written[0][-1].tokens[:2].unique().numel() > 1 + 4 * (warp.temperature > 0 and warp.top_k != 1)


@torch.inference_mode()
def test_what_lies_beyond_a_row_is_not_looked_at():
    model, lengths, written = native.attach(dual()), torch.tensor([20, 12]), []
    for beyond in (V, -(10**15)):
        x = tokens(2)[:, :20]
        x[:, 9:], x[1, 12:] = V, beyond
        *_, last = Speculative()(model, Task(x, lengths, V, RowGenerators(0, 2)))
        written.append([row[:length] for row, length in zip(last.tokens, lengths.tolist(), strict=True)])
    assert all(torch.equal(*rows) for rows in zip(*written, strict=True))


@torch.inference_mode()
def test_rounds_of_a_row_are_its_own():
    model, x, lengths = native.attach(dual()), tokens(3), [T, T - 5, T - 1]
    x[:, 9:] = V
    *_, together = Speculative()(model, Task(x, torch.tensor(lengths), V, RowGenerators(0, 3)))
    for row, length in enumerate(lengths):
        task = Task(x[row : row + 1, :length], torch.tensor([length]), V, RowGenerators(0, [row]))
        *_, alone = Speculative()(model, task)
        assert torch.equal(alone.tokens[0], together.tokens[row, :length])
        assert torch.equal(alone.counts.all[:, 0], together.counts.all[:, row])


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("block_size", [2, 5])
@torch.inference_mode()
def test_rounds_draw_the_target(block_size, target):
    """Chi-squared over all texts of three tokens, which fails by chance once in a million times."""
    torch.manual_seed(2)
    branch = BranchConfig(1, 16, 2)
    model = loud(DualBranch(ModelConfig(3, T, branch, branch, embeddings="tied", draft="chained", block_size=4)))
    for parameter in model.parameters():
        parameter.data.mul_(2)
    rows, texts = 8, torch.cartesian_prod(*[torch.arange(3)] * 3)
    states, _ = model(texts, torch.full_like(texts, 3), Block(block_size))
    log_p = -model.nll(states, torch.ones_like(texts, dtype=torch.bool), texts, target).view(-1, 3).sum(1)
    expected, drawn = log_p.double().exp(), []
    native.attach(model)
    for batch in range(500):
        generators = RowGenerators(0, range(batch * rows, batch * rows + rows))
        empty = torch.full((rows, 3), 3)
        *_, last = Speculative(target, block_size)(model, Task(empty, torch.full((rows,), 3), 3, generators))
        drawn.append(last.tokens)
    assert (expected * 500 * rows >= 5).sum() > 9
    assert p_value(torch.cat(drawn), expected) > 1e-6
