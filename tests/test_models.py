"""The dual-branch model: what each output reads, caches, heads, precision, accounts."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from catalogue import BLOCK, CAUSAL, CONTEXT, MODELS, PATTERNS, VOCABULARY, build, draw_tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Infill, Pattern
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig
from caddf.models.config import PRESETS, BranchConfig, ModelConfig
from caddf.models.layers import head_log_probs, head_nll, nearness, rotate, rotation
from caddf.models.plaid import PlaidConfig
from caddf.models.single import SingleConfig

MASK = VOCABULARY
EVERYWHERE = torch.ones(1, CONTEXT, dtype=torch.bool)

each_model = pytest.mark.parametrize("name", MODELS)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
BLOCKS = [pattern for pattern in PATTERNS if isinstance(pattern, Block)]

# Canvases of one row, 1 where masked.
SHOWN = {"all-masked": [1] * 8, "some": [0, 1, 1, 0, 1, 1, 0, 1], "first": [0, 0, 1, 1, 0, 1, 1, 1]}


def canvas_of(x0: Tensor, masked: list[int]) -> Tensor:
    return torch.where(torch.tensor(masked).bool(), MASK, x0)


def readings(model: DualBranch, prefix: Tensor, canvas: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """Log-probabilities `[B, L, V]` of every head."""
    states, _ = model(prefix, canvas, pattern)
    where = EVERYWHERE.expand(len(prefix), -1)
    return {head: model.log_probs(states, where, head).view(len(prefix), CONTEXT, -1) for head in model.heads}


def reads(model: DualBranch, x0: Tensor, canvas: Tensor, pattern: Pattern, change: str) -> dict[str, Tensor]:
    """For each head the matrix [i, j]: does output i depend on token j of the `prefix` or the `canvas`?

    Token j of one row each is replaced; one forward pass over these rows and the original.
    """
    changed = {"prefix": x0.repeat(CONTEXT + 1, 1), "canvas": canvas.repeat(CONTEXT + 1, 1)}
    rows = torch.arange(CONTEXT)
    changed[change][rows, rows] = (x0[0] + 1) % VOCABULARY
    if isinstance(pattern, AnyOrder):
        changed["prefix"] = changed["canvas"]
    outputs = readings(model, changed["prefix"], changed["canvas"], pattern)
    return {head: ((log_p[:-1] - log_p[-1]).abs().amax(-1) > 1e-9).T for head, log_p in outputs.items()}


OUT, IN = torch.meshgrid(torch.arange(CONTEXT), torch.arange(CONTEXT), indexing="ij")
NOTHING, ALL = torch.zeros_like(OUT, dtype=torch.bool), torch.ones_like(OUT, dtype=torch.bool)


def check(given: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(given, expected), f"{what}: reads\n{given.int()}\nshould read\n{expected.int()}"


@each_model
@pytest.mark.parametrize("shown", SHOWN)
def test_any_order_outputs_depend_on_x_t_alone(name: str, shown: str) -> None:
    model, x0 = build(MODELS[name], scale=8), draw_tokens(1)
    given = reads(model, x0, canvas_of(x0, SHOWN[shown]), AnyOrder(), "canvas")
    for head in model.heads & {"draft", "fused"}:
        check(given[head], ALL, head)
    with pytest.raises(InputError, match="AnyOrder"):
        model(x0, canvas_of(x0, SHOWN[shown]), AnyOrder())


@each_model
@pytest.mark.parametrize("shown", SHOWN)
def test_infill_reads_no_hidden_token(name: str, shown: str) -> None:
    config, x0 = MODELS[name], draw_tokens(1)
    model, masked = build(config, scale=8), torch.tensor(SHOWN[shown]).bool()
    canvas = canvas_of(x0, SHOWN[shown])
    given = reads(model, x0, canvas, Infill(), "prefix")
    mutual = config.causal is not None and config.exchange == "mutual"
    # With mutual exchange the canvas states know the prefix up to the first masked position, where the canvas shows it.
    through_exchange = (IN < int(masked.int().argmax())) if mutual else NOTHING
    check(given["draft"], through_exchange, "draft")
    assert not given["draft"][:, masked].any()
    if config.causal is not None:
        check(given["causal"], IN < OUT, "causal")
        check(given["fused"], (IN < OUT) | through_exchange, "fused")
        assert not (given["fused"] & (IN >= OUT))[:, masked].any()
    given = reads(model, x0, canvas, Infill(), "canvas")
    check(given["draft"], ALL, "draft")
    if config.causal is not None:
        check(given["causal"], NOTHING, "causal")
        check(given["fused"], NOTHING if config.fusion == "none" else ALL, "fused")


@each_model
@pytest.mark.parametrize("pattern", BLOCKS, ids=str)
@pytest.mark.parametrize("shown", SHOWN)
def test_block_reads_the_prefix_and_its_own_canvas(name: str, pattern: Block, shown: str) -> None:
    config, x0 = MODELS[name], draw_tokens(1)
    model, start = build(config, scale=8), pattern.start(OUT)
    canvas = canvas_of(x0, SHOWN[shown])
    within = pattern.index(OUT) == pattern.index(IN)
    given = reads(model, x0, canvas, pattern, "prefix")
    drafted_from = IN < start
    if config.draft == "chained":
        # A chain also reads the token before each place of its block, the one before the block included.
        drafted_from = drafted_from | (within & (IN < OUT))
    check(given["draft"], drafted_from, "draft")
    if config.causal is not None:
        check(given["causal"], IN < OUT, "causal")
        check(given["fused"], IN < OUT, "fused")
    given = reads(model, x0, canvas, pattern, "canvas")
    check(given["draft"], within, "draft")
    if config.causal is not None:
        check(given["causal"], NOTHING, "causal")
        check(given["fused"], NOTHING if config.fusion == "none" else within, "fused")


@each_model
def test_a_row_does_not_see_other_rows(name: str) -> None:
    model, x0 = build(MODELS[name], scale=8), draw_tokens(3)
    canvas = canvas_of(x0, SHOWN["some"])
    for pattern in PATTERNS:
        prefix = canvas if isinstance(pattern, AnyOrder) else x0
        together = readings(model, prefix, canvas, pattern)
        alone = readings(model, prefix[1:2], canvas[1:2], pattern)
        for head, log_p in alone.items():
            torch.testing.assert_close(log_p[0], together[head][1], rtol=1e-9, atol=1e-11)


CAUSAL_MODELS = [name for name, config in MODELS.items() if config.causal]


def at(states: Tensor | None, positions: Tensor) -> Tensor:
    """The states of `positions [B, n]`."""
    assert states is not None
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def same(given: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_cached_reading_equals_the_forward_pass(name: str) -> None:
    model, x0 = build(MODELS[name], scale=8), draw_tokens(2)
    states, none = model(x0, canvas_of(x0, SHOWN["some"]), Infill())
    assert none is None
    # Row 0 reads 0-3 and 4-7; row 1 reads 0-3, with other tokens from 2 on, goes back to 2-5, and ends with 4-7.
    other, caches = x0.clone(), model.allocate(2, CONTEXT)
    other[1, 2:] = (x0[1, 2:] + 1) % VOCABULARY
    slots = torch.arange(4).expand(2, -1)
    model.read(other, slots, caches)
    for first in ((4, 3), (4, 4)):
        positions = slots + torch.tensor(first)[:, None]
        same(model.read(x0, positions, caches).causal, at(states.causal, positions))


@pytest.mark.parametrize("name", [name for name in CAUSAL_MODELS if build(MODELS[name]).incremental(Block(BLOCK))])
@pytest.mark.parametrize(
    ("offset", "starts"), [(0, (0, 3)), (0, (3, 3)), (0, (6, 0)), (2, (2, 5)), (2, (5, 2))], ids=str
)
def test_cached_block_equals_the_forward_pass(name: str, offset: int, starts: tuple[int, int]) -> None:
    config = replace(MODELS[name], context=CONTEXT + 1)  # the last block reaches beyond the row
    model, x0, start = build(config, scale=8), draw_tokens(2), torch.tensor(starts)
    canvas = canvas_of(x0, SHOWN["some"])
    states, _ = model(x0, canvas, Block(BLOCK, offset))
    caches, every = model.allocate(2, CONTEXT + 1), torch.arange(CONTEXT).expand(2, -1)
    model.read(x0, every, caches)  # also slots after the block's start, which the block must not see
    positions = start[:, None] + torch.arange(BLOCK)
    window = F.pad(canvas, (0, 1), value=MASK).gather(1, positions)
    seen = model.encode(window, start, torch.tensor([CONTEXT, CONTEXT]), Block(BLOCK, offset), caches)
    inside = positions < CONTEXT
    for given, expected in (
        (model.draft(seen, x0).draft, states.draft),
        (model.fuse(model.read(x0, positions, caches), positions, caches, seen).fused, states.fused),
    ):
        assert given is not None
        same(given[inside], at(expected, positions.clamp(max=CONTEXT - 1))[inside])


@pytest.mark.parametrize("name", [name for name in CAUSAL_MODELS if build(MODELS[name]).incremental(Infill())])
@pytest.mark.parametrize("shown", SHOWN)
def test_cached_infilling_equals_the_forward_pass(name: str, shown: str) -> None:
    model, x0, lengths = build(MODELS[name], scale=8), draw_tokens(2), torch.tensor([CONTEXT, 6])
    canvas = canvas_of(x0, SHOWN[shown])
    caches, every = model.allocate(2, CONTEXT), torch.arange(CONTEXT).expand(2, -1)
    model.read(x0, every, caches)
    seen = model.encode(canvas, torch.zeros(2, dtype=torch.long), lengths, Infill(), caches)
    given, drafts = model.fuse(model.read(x0, every, caches), every, caches, seen).fused, model.draft(seen, x0).draft
    assert given is not None and drafts is not None
    for row, length in enumerate(lengths.tolist()):
        alone, _ = model(x0[row : row + 1, :length], canvas[row : row + 1, :length], Infill())
        same(given[row, :length], alone.fused[0])
        same(drafts[row, :length], alone.draft[0])


def test_what_can_be_read_piece_by_piece() -> None:
    models = {name: build(MODELS[name]) for name in CAUSAL_MODELS}
    late = {name for name in CAUSAL_MODELS if MODELS[name].fusion == "late"}
    assert {name for name, model in models.items() if model.incremental(Infill())} == late
    mutual = {name for name in late if MODELS[name].exchange == "mutual"}
    assert {name for name, model in models.items() if model.incremental(Block(BLOCK))} == mutual


@pytest.mark.parametrize("name", [name for name in CAUSAL_MODELS if MODELS[name].exchange == "mutual"])
def test_forward_fills_the_caches_it_is_given(name: str) -> None:
    model, x0 = build(MODELS[name], scale=8), draw_tokens(2)
    canvas, caches = canvas_of(x0, SHOWN["all-masked"]), model.allocate(2, CONTEXT + 1)
    cached, returned = model(x0, canvas, Block(BLOCK), caches)
    assert returned is caches
    same(cached.fused, model(x0, canvas, Block(BLOCK))[0].fused)
    # Going on from there: slot 8 reads the last token, after all of the row.
    last = torch.full((2, 1), CONTEXT)
    if model.causal is not None and model.causal.table is None:
        longer = torch.cat([x0, x0[:, :1]], 1)
        same(model.read(x0, last, caches).causal, model(longer, longer, Block(BLOCK))[0].causal[:, -1:])
    else:
        with pytest.raises(InputError, match="context is 8"):
            model.read(x0, last, caches)


def test_block_reading_of_mutual_exchange_makes_no_second_copy() -> None:
    widths: dict[str, set[int]] = {}
    for name in ("late-mutual-factorised", "late-one_way-factorised"):
        model = build(MODELS[name])
        seen = widths.setdefault(name, set())
        model.diffusion.norm.register_forward_hook(lambda _, inputs, out, seen=seen: seen.add(out.shape[1]))
        model(draw_tokens(1), draw_tokens(1), Block(4))
    assert widths == {"late-mutual-factorised": {CONTEXT}, "late-one_way-factorised": {2 * CONTEXT}}


@each_model
@each_pattern
def test_probability_is_normalised_over_the_real_tokens(name: str, pattern: Pattern) -> None:
    model, x0 = build(MODELS[name], scale=8), draw_tokens(2)
    canvas = canvas_of(x0, SHOWN["some"])
    prefix = canvas if isinstance(pattern, AnyOrder) else x0
    model.zero_grad()
    for log_p in readings(model, prefix, canvas, pattern).values():
        assert log_p.shape[-1] == VOCABULARY
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, CONTEXT, dtype=torch.float64))
    states, _ = model(prefix, canvas, pattern)
    where = canvas == MASK
    for head in model.heads:
        expected = -model.log_probs(states, where, head).gather(-1, x0[where][:, None])[:, 0]
        torch.testing.assert_close(model.nll(states, where, x0, head), expected)


@each_model
@each_pattern
def test_initial_loss_is_that_of_guessing(name: str, pattern: Pattern) -> None:
    model, x0 = build(MODELS[name]), draw_tokens(8)
    canvas = canvas_of(x0, SHOWN["some"])
    states, _ = model(canvas if isinstance(pattern, AnyOrder) else x0, canvas, pattern)
    for head in model.heads:
        # Logits have standard deviation 0.02 sqrt(width) < 0.1 at first.
        assert model.nll(states, canvas == MASK, x0, head).mean().item() == pytest.approx(math.log(VOCABULARY), abs=0.1)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_near_float64(name: str, dtype: torch.dtype) -> None:
    model, x0 = build(MODELS[name], scale=3), draw_tokens(2)
    canvas = canvas_of(x0, SHOWN["some"])
    single = DualBranch(MODELS[name])
    single.load_state_dict(model.state_dict())
    for pattern in PATTERNS:
        prefix = canvas if isinstance(pattern, AnyOrder) else x0
        exact = readings(model, prefix, canvas, pattern)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            given = readings(single, prefix, canvas, pattern)
            states, _ = single(prefix, canvas, pattern)
            loss = sum(single.nll(states, canvas == MASK, x0, head).mean() for head in single.heads)
        loss.backward()
        for head, log_p in given.items():
            assert log_p.dtype == torch.float32
            error = (log_p.double() - exact[head]).abs().max().item()
            assert error < (1e-4 if dtype == torch.float32 else 0.15)
    assert all(p.grad is None or p.grad.isfinite().all() for p in single.parameters())


def test_rotation_is_exact_and_relative() -> None:
    size, far = 8, torch.tensor([3, 1_000_003])
    q, k = torch.randn(2, 1, 1, 1, size, dtype=torch.float64).unbind()
    by = [rotation(p[None], size) for p in far]
    shifted = [rotation(p[None] + 4, size) for p in far]
    dots = [(rotate(q, a) * rotate(k, b)).sum().item() for a, b in zip(by, shifted, strict=True)]
    assert dots[0] == pytest.approx(dots[1], abs=1e-8)  # position 10**6 in float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotation(far[1:], size)[0], by[1][0])
    assert rotate(q, None) is q


def test_nearness_looks_next_door_on_both_sides() -> None:
    at = torch.arange(6)
    scores = nearness(at, at, 4, torch.zeros((), dtype=torch.float64), sides=True)
    assert scores.shape == (4, 6, 6)
    right, left, far_right, far_left = scores
    assert right.argmax(-1).tolist() == [1, 2, 3, 4, 5, 5]
    assert left.argmax(-1).tolist() == [0, 0, 1, 2, 3, 4]
    assert right[2].tolist() == [-6, -4, -2, 0, -2, -4]  # slope 2 times the distance from position 3
    torch.testing.assert_close(far_right, right / 64, rtol=0, atol=0)
    torch.testing.assert_close(far_left, left / 64, rtol=0, atol=0)
    rows = nearness(
        torch.stack([at, at + 9]), torch.stack([at, at + 9]), 4, scores, sides=True
    )  # relative, and of any batch
    torch.testing.assert_close(rows, scores.expand(2, -1, -1, -1), rtol=0, atol=0)
    own = nearness(at, at, 1, scores)
    assert own.shape == (1, 6, 6) and own[0].argmax(-1).tolist() == at.tolist()


@pytest.mark.parametrize("autocast", [False, True])
def test_head_nll_in_chunks(autocast: bool) -> None:
    states, tokens = torch.randn(50, 6), torch.randn(11, 6)
    targets = torch.randint(11, (50,))
    results = []
    for elements in (11 * 7, 1, 1 << 20):
        s, w = states.clone().requires_grad_(), tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll = head_nll(s, w, targets, elements)
            assert nll.dtype == torch.float32
        (nll * torch.arange(50)).sum().backward()  # backward outside, as in training
        results.append((nll.detach(), s.grad, w.grad))
    for chunked in results[:2]:
        for given, expected in zip(chunked, results[2], strict=True):
            # bf16 gradients of the weights are rounded once per chunk.
            scale = expected.abs().max().item()
            torch.testing.assert_close(given, expected, rtol=0, atol=scale * (2e-2 if autocast else 1e-6))
    if not autocast:
        direct = F.cross_entropy(states @ tokens.T, targets, reduction="none")
        torch.testing.assert_close(results[0][0], direct)
        torch.testing.assert_close(head_log_probs(states, tokens).gather(-1, targets[:, None])[:, 0], -direct)


def test_head_nll_of_nothing() -> None:
    assert head_nll(torch.randn(0, 6), torch.randn(11, 6), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_head_nll_keeps_no_logits() -> None:
    states, tokens = torch.randn(64, 4, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head_nll(states, tokens, torch.zeros(64, dtype=torch.long), elements=8 * 512)
    assert max(kept) <= 512 * 4


@each_model
def test_parameters_are_counted_once(name: str) -> None:
    model = build(MODELS[name])
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == sum(value for part, value in counts.items() if part != "total")
    assert (counts["causal"] > 0) == (MODELS[name].causal is not None)


def test_tied_embeddings_are_those_of_the_causal_branch_under_a_map() -> None:
    model, separate = build(MODELS["tied"]), build(MODELS["late-mutual-chained"])
    model.requires_grad_(False)  # what may learn is made anew at each reading
    rows, width, narrow = VOCABULARY + 4, 16, 12
    saved = separate.parameter_counts()["embeddings"] - model.parameter_counts()["embeddings"]
    assert saved == rows * narrow - width * narrow
    assert model.diffusion.embedding.map.std().item() == pytest.approx(width**-0.5, rel=0.2)
    assert "diffusion.embedding.map" in model.state_dict()
    assert not any("_of" in name for name in model.state_dict())
    tokens = draw_tokens(2)
    with torch.no_grad():
        for _ in range(2):  # kept between readings, and made anew once a weight has changed
            expected = model.causal.embedding.weight @ model.diffusion.embedding.map.t()
            torch.testing.assert_close(model.tokens_of("draft"), expected[:VOCABULARY], rtol=0, atol=0)
            assert model.tokens_of("draft").data_ptr() == model.tokens_of("draft").data_ptr()
            torch.testing.assert_close(model.diffusion.embedding(tokens), expected[tokens])
            model.causal.embedding.weight.mul_(2)
            model.diffusion.embedding.map.add_(1)
    model.requires_grad_(True)
    states, _ = model(tokens, torch.full_like(tokens, MASK), Block(BLOCK))
    model.nll(states, torch.ones_like(tokens, dtype=torch.bool), tokens, "draft").sum().backward()
    assert model.diffusion.embedding.map.grad.abs().sum() > 0


@each_model
def test_flops_against_a_count(name: str) -> None:
    # Wide against the norms' vectors; the counter sees causal attention whole, so its half is put back.
    context, width = 64, 32
    config = replace(
        MODELS[name],
        context=context,
        vocab_size=97,
        rows=0,
        diffusion=BranchConfig(2, width, 2),
        causal=MODELS[name].causal and replace(CAUSAL, width=width),
    )
    model = DualBranch(config).requires_grad_(False)
    x_t = torch.zeros(1, context, dtype=torch.long)
    with (
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        states, _ = model(x_t, x_t, AnyOrder())
        for head in model.heads & {"draft", "causal"}:
            model.log_probs(states, torch.ones_like(x_t, dtype=torch.bool), head)
    counted = counter.get_total_flops() / context
    if config.causal is not None:
        passes = 2 if config.fusion == "layers" else 1  # the causal head reads states that saw no canvas
        counted -= passes * 2 * context * width * config.causal.layers
        if passes == 2:
            plain = 12 * width * width * config.causal.layers
            counted -= 2 * plain + 2 * context * width * config.causal.layers
    if model.chain is not None:  # runs in blocks alone
        counted += 2 * sum(p.numel() for p in model.chain.parameters())
    assert sum(model.flops_per_position(context).values()) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("size", "vocab_size", "millions"),
    [
        ("debug", 512, (0.0, 0.2)),
        ("demo", 4096, (3.5, 4.5)),
        ("tiny", 8192, (18, 22)),
        ("small", 50_257, (170, 190)),
        ("medium", 50_257, (700, 850)),
    ],
)
def test_preset_sizes(size: str, vocab_size: int, millions: tuple[float, float]) -> None:
    preset = PRESETS[size]
    with torch.device("meta"):
        model = DualBranch(ModelConfig(vocab_size, preset.context, preset.diffusion, preset.causal))
    low, high = millions
    assert low < model.parameter_counts()["total"] / 1e6 < high


def test_table_5() -> None:
    def sizes(name: str) -> list[tuple[int, int, int]]:
        return [(b.layers, b.width, b.heads) for b in (PRESETS[name].causal, PRESETS[name].diffusion)]

    assert sizes("small") == [(12, 768, 12), (6, 512, 8)]
    assert sizes("medium") == [(20, 1440, 24), (10, 1024, 16)]


@each_model
def test_config_round_trip(name: str) -> None:
    config = MODELS[name]
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_rows_are_padded_to_eights() -> None:
    assert replace(MODELS["late-mutual-factorised"], vocab_size=7, rows=0).rows == 8
    assert replace(MODELS["late-mutual-factorised"], vocab_size=8, rows=0).rows == 16


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rows": VOCABULARY}, "rows"),
        ({"bos_id": VOCABULARY}, "bos_id"),
        ({"context": 0}, "context"),
        ({"block_size": 0}, "block_size"),
        ({"embeddings": "tied", "causal": None}, "embeddings is tied"),
        ({"block_size": 9}, "block_size"),
        ({"fusion": "layers"}, "exchange is mutual with fusion layers"),
        ({"fusion": "none"}, "exchange is mutual with fusion none"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(MODELS["late-mutual-factorised"], **wrong)


@pytest.mark.parametrize(
    ("wrong", "named"), [({"context": 0}, "context is 0"), ({"vocab_size": 0}, "vocab_size is 0"),
                         ({"bos_id": VOCABULARY}, "bos_id is"), ({"rows": 4}, "rows is 4; 7 tokens and the mask"),
                         ({"block_size": 0}, "block_size is 0")], ids=str,
)  # fmt: skip
def test_settings_of_other_networks_that_do_not_fit(wrong: dict, named: str) -> None:
    for kind in (CausalConfig, SingleConfig, PlaidConfig):
        if {*wrong} <= {each.name for each in fields(kind)}:
            with pytest.raises(InputError, match=f"^{named}"):
                kind(**{"vocab_size": VOCABULARY, "context": CONTEXT, "branch": CAUSAL} | wrong)


def test_branch_settings_that_do_not_fit() -> None:
    for wrong in ((0, 8, 2), (1, 8, 3), (1, 6, 2)):
        with pytest.raises(InputError):
            BranchConfig(*wrong)
    with pytest.raises(InputError, match="do not fit"):
        ModelConfig.from_dict({**MODELS["learned"].to_dict(), "colour": "red"})


def test_a_head_that_does_not_exist_is_named() -> None:
    model, x0 = build(MODELS["off-factorised"]), draw_tokens(1)
    states, _ = model(x0, x0, AnyOrder())
    assert model.heads == {"draft"} and model.denoiser == "draft"
    with pytest.raises(InputError, match="head is fused"):
        model.log_probs(states, EVERYWHERE, "fused")
    with pytest.raises(InputError, match="agree"):
        model(x0, x0[:, :-1], Infill())


def test_maps_into_a_residual_stream_start_smaller() -> None:
    model = DualBranch(replace(MODELS["learned"], causal=BranchConfig(3, 64, 2, bias=True)))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        layers = 2 if name.startswith("diffusion") else 3
        into_stream = name.endswith(("out.weight", "down.weight"))
        expected = 0.02 / math.sqrt(2 * layers) if into_stream else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.25), name
