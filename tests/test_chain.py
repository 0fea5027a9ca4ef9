"""The draft chain: place by place as all at once, block by block; and its small vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import BLOCK, CONTEXT, MODELS, PATTERNS, VOCABULARY, build, draw_tokens
from drawing import p_value, task
from rich.console import Console
from torch import Tensor

from caddf import load
from caddf.categorical import Warp
from caddf.checkpoint import load_model_config, load_state, save_model
from caddf.data import prepare
from caddf.data.token_set import Split
from caddf.decoding import Autoregressive, Counts, Speculative
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Infill
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.models.chain import DraftChain
from caddf.models.config import BranchConfig, ModelConfig
from caddf.objectives import SynergisticConfig
from caddf.running import RunSettings, start
from caddf.training import TrainConfig
from caddf.training.optimizer import build_optimizer

CHAINED = replace(MODELS["late-mutual-chained"], draft_vocab=3)
SMALL = torch.tensor([1, 4, 6])
EVERYWHERE = torch.ones(4, CONTEXT, dtype=torch.bool)


def chain(width: int = 12) -> DraftChain:
    torch.manual_seed(0)
    module = DraftChain(BranchConfig(1, width, 2)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False)


def small() -> DualBranch:
    """A sharp model that drafts the tokens 1, 4 and 6 alone."""
    model = build(CHAINED, scale=8)
    model.choose_draft_tokens(torch.tensor([0, 5, 1, 0, 9, 1, 3]))
    return model.eval().requires_grad_(False)


# Place by place, and all at once.


def test_one_place_after_the_other_is_all_at_once() -> None:
    module, (h_cad, before) = chain(), torch.randn(2, 5, 6, 12, dtype=torch.float64)
    whole, cache = module(h_cad, before), module.allocate(5, 6)
    for j in range(6):
        state = module.step(h_cad[:, j : j + 1], before[:, j : j + 1], torch.tensor([j]), cache)
        torch.testing.assert_close(state[:, 0], whole[:, j], rtol=1e-12, atol=1e-12)
    assert (whole[:, 1:] - module(h_cad[:, 1:], before[:, 1:])).abs().amax(-1).min() > 0.01  # places before matter


def test_rows_stand_at_different_places_and_go_back() -> None:
    module, (h_cad, before) = chain(), torch.randn(2, 2, 6, 12, dtype=torch.float64)
    cache = module.allocate(2, 6)
    rows = torch.arange(2)[:, None]

    def step(places: list[list[int]]) -> None:
        at = torch.tensor(places)
        state = module.step(h_cad[rows, at], before[rows, at], at, cache)
        torch.testing.assert_close(state, module(h_cad, before)[rows, at], rtol=1e-12, atol=1e-12)

    step([[0, 1, 2], [0, 1, 2]])
    step([[3, 4], [3, 4]])
    before[0, 2:] += 1  # row 0 drafts anew from place 2 on, row 1 goes on
    step([[2], [5]])
    step([[3], [5]])


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if isinstance(p, Block)], ids=str)
def test_each_block_is_a_chain_of_its_own(pattern: Block) -> None:
    model, x0 = build(MODELS["late-mutual-chained"], scale=8), draw_tokens(2)
    canvas = torch.where(torch.arange(CONTEXT) % 3 == 0, x0, model.mask_id)
    states, _ = model(x0, canvas, pattern)
    assert model.chain is not None and states.draft is not None and states.chained
    chained, model.chain = model.chain, None
    h_cad = model(x0, canvas, pattern)[0].draft
    before, start = model.diffusion.embedding(model.shift(x0)), pattern.start(torch.arange(CONTEXT)).tolist()
    for first in sorted(set(start)):
        inside = slice(first, first + start.count(first))
        expected = chained(h_cad[:, inside], before[:, inside])
        torch.testing.assert_close(states.draft[:, inside], expected, rtol=1e-10, atol=1e-12)


def test_a_window_drafted_over_caches_is_the_block_drafted_in_one_pass() -> None:
    """Rows whose windows start at different blocks, the window's first token shown."""
    model, x0 = build(CHAINED, scale=8).requires_grad_(False), draw_tokens(2)
    start, lengths = torch.tensor([0, BLOCK]), torch.full((2,), CONTEXT)
    positions = start[:, None] + torch.arange(BLOCK)
    shown = torch.arange(CONTEXT) == start[:, None]
    states, _ = model(x0, torch.where(shown, x0, model.mask_id), Block(BLOCK))
    expected = model.log_probs(
        states, shown.cumsum(1).bool() & (torch.arange(CONTEXT) < start[:, None] + BLOCK), "draft"
    )

    caches = model.allocate(2, CONTEXT)
    model.read(x0, torch.arange(CONTEXT).expand(2, -1), caches)
    window = torch.where(torch.arange(BLOCK) == 0, x0.gather(1, positions), model.mask_id)
    seen = model.encode(window, start, lengths, Block(BLOCK), caches)
    where = torch.ones(2, BLOCK, dtype=torch.bool)
    torch.testing.assert_close(model.log_probs(model.draft(seen, x0), where, "draft"), expected)
    cache = model.allocate_drafts(2, BLOCK)
    for j in range(BLOCK):
        state = model.draft_step(seen, x0, torch.full((2, 1), j), cache)
        log_q = model.log_probs(state, where[:, :1], "draft")
        torch.testing.assert_close(log_q, expected.view(2, BLOCK, -1)[:, j])


# The small vocabulary.


def test_chained_drafts_are_of_the_small_vocabulary() -> None:
    model, x0 = small(), draw_tokens(4)
    masked = torch.full_like(x0, model.mask_id)
    outside = torch.ones(VOCABULARY, dtype=torch.bool)
    outside[SMALL] = False
    states, _ = model(x0, masked, Block(BLOCK))
    log_q = model.log_probs(states, EVERYWHERE, "draft")
    assert (log_q[:, outside] == -torch.inf).all() and log_q[:, SMALL].isfinite().all()
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(4 * CONTEXT, dtype=torch.float64))
    nats = model.nll(states, EVERYWHERE, x0, "draft")
    assert torch.equal(nats, -log_q.gather(-1, x0[EVERYWHERE][:, None])[:, 0])
    assert nats.isinf().any() and nats.isfinite().any()
    for head in ("fused", "causal"):
        assert model.log_probs(states, EVERYWHERE, head).isfinite().all()  # type: ignore[arg-type]


def test_without_a_chain_in_the_reading_drafts_are_of_all_tokens() -> None:
    model, x0 = small(), draw_tokens(4)
    for prefix, canvas, pattern in ((x0, x0, AnyOrder()), (x0, torch.full_like(x0, model.mask_id), Infill())):
        states, _ = model(prefix, canvas, pattern)
        assert model.log_probs(states, EVERYWHERE, "draft").isfinite().all()
        assert model.nll(states, EVERYWHERE, x0, "draft").isfinite().all()


def test_the_most_frequent_tokens_are_chosen() -> None:
    model = build(CHAINED)
    assert torch.equal(model.draft_tokens, torch.arange(3))
    model.choose_draft_tokens(torch.tensor([0, 5, 1, 0, 9, 1, 3]))
    assert torch.equal(model.draft_tokens, SMALL)
    model.choose_draft_tokens(torch.tensor([0, 5, 1, 1, 9, 1, 1]))  # ties go to the first
    assert torch.equal(model.draft_tokens, torch.tensor([1, 2, 4]))
    build(MODELS["late-mutual-chained"]).choose_draft_tokens(torch.ones(7))  # all tokens: nothing to choose


def test_what_is_kept_of_the_embeddings_follows_them() -> None:
    model, x0 = small(), draw_tokens(4)
    masked = torch.full_like(x0, model.mask_id)

    def drafts() -> Tensor:
        states, _ = model(x0, masked, Block(BLOCK))
        log_q = model.log_probs(states, EVERYWHERE, "draft")
        with torch.enable_grad():
            model.diffusion.embedding.weight.requires_grad_(True)
            expected = model.log_probs(states, EVERYWHERE, "draft").detach()
            model.diffusion.embedding.weight.requires_grad_(False)
        assert torch.equal(log_q, expected)
        return log_q

    first = drafts()
    assert torch.equal(drafts(), first)
    weight = model.diffusion.embedding.weight
    weight.data = weight.data.flip(0)  # as the averaged weights take their place
    assert not torch.equal(drafts(), first)
    weight.mul_(1.5)  # as a step of the optimiser
    drafts()
    model.choose_draft_tokens(torch.arange(VOCABULARY))
    assert not torch.equal(drafts(), first)
    model.load_state_dict(small().state_dict())
    assert torch.equal(drafts(), first)


def test_a_split_counts_its_tokens() -> None:
    tokens = np.array([3, 1, 3, 3, 0], dtype=np.uint16)
    assert Split("train", tokens, 1, 5).counts(6).tolist() == [1, 1, 0, 3, 0, 0]


def test_the_small_vocabulary_is_saved_with_the_model(tmp_path: Path) -> None:
    model = small()
    save_model(tmp_path, model.state_dict(), {"model": model.config.to_dict()})
    other = DualBranch(ModelConfig.from_dict(load_model_config(tmp_path)["model"])).double()
    load_state(other, tmp_path)
    assert torch.equal(other.draft_tokens, SMALL)


def test_training_drafts_the_most_frequent_tokens_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("aaaa eee tt " * 60)
    data = prepare(tmp_path / "set", train=tmp_path / "text.txt", tokenizer="bytes").folder
    settings = RunSettings(
        str(data),
        model=ModelSettings(size="debug", draft="chained", draft_vocab=3),
        objective=SynergisticConfig(),
        train=TrainConfig(steps=1, batch_size=2, tensorboard=False, sample_every=0),
        device="cpu",
        dtype="float32",
    )
    start(settings, tmp_path / "run", Console(quiet=True))
    model = load(tmp_path / "run")
    assert sorted(model.tokenizer.decode([i]) for i in model.model.draft_tokens.tolist()) == [" ", "a", "e"]


def test_settings_of_older_checkpoints_still_load() -> None:
    for name, config in MODELS.items():
        values = config.to_dict()
        assert ModelConfig.from_dict(values) == config, name
        del values["draft_vocab"]
        assert ModelConfig.from_dict(values) == config, name
        assert not any("draft_tokens" in key for key in build(config).state_dict())
    assert ModelConfig.from_dict(CHAINED.to_dict()) == CHAINED
    assert ModelSettings("debug", draft="chained", draft_vocab=100).dual(512, 0).draft_vocab == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_vocab": 0}, "draft_vocab is 0; it must lie between 1 and the 7 tokens"),
        ({"draft_vocab": 8}, "draft_vocab is 8"),
        ({"draft_vocab": 3, "draft": "factorised"}, "set draft to chained"),
        ({"draft_vocab": 3, "causal": None}, "causal to on"),
    ],
)
def test_small_vocabularies_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CHAINED, **settings)


# Decoding with it.


def run(model: DualBranch, decoder: Autoregressive | Speculative, tokens: Tensor, warp: Warp) -> list[Tensor]:
    """Canvas and drafts of every frame."""
    frames = list(decoder(model, task(model, tokens, warp=warp), Counts.zeros(len(tokens))))
    return [frames[-1].tokens, *(frame.drafts for frame in frames if frame.drafts is not None)]


@pytest.mark.parametrize("target", ["causal", "fused"])
def test_a_small_vocabulary_changes_no_greedy_text(target: str) -> None:
    model, open_rows = small(), torch.full((6, CONTEXT), VOCABULARY)
    open_rows[:, :2] = draw_tokens(6)[:, :2]
    slow, *_ = run(model, Autoregressive(target=target), open_rows, Warp(temperature=0))  # type: ignore[arg-type]
    drafted = Speculative(target=target, lookup=0)  # type: ignore[arg-type]
    fast, *drafts = run(model, drafted, open_rows, Warp(temperature=0))
    assert torch.equal(slow, fast)
    every = torch.stack(drafts)
    assert torch.isin(every[every != VOCABULARY], SMALL).all() and (every != VOCABULARY).any()
    assert not torch.isin(fast[:, 2:], SMALL).all()  # what cannot be drafted is written all the same


@pytest.mark.parametrize("target", ["causal", "fused"])
def test_a_small_vocabulary_changes_no_distribution(target: str) -> None:
    """Two tokens of 3, drafts of 2 of them: a chi-squared test of 9 outcomes, failing by chance with odds of 1e-6."""
    v, rows = 3, 4000
    model = build(replace(CHAINED, vocab_size=v, rows=0, context=2, block_size=2, draft_vocab=2), scale=8)
    x0 = torch.cartesian_prod(torch.arange(v), torch.arange(v))
    states, _ = model.requires_grad_(False)(x0, torch.full_like(x0, v), Block(2))
    log_p = -model.nll(states, torch.ones_like(x0, dtype=torch.bool), x0, target).view(-1, 2).sum(-1)  # type: ignore[arg-type]
    drawn, *_ = run(model, Speculative(target=target), torch.full((rows, 2), v), Warp())  # type: ignore[arg-type]
    assert p_value(drawn, log_p.exp()) > 1e-6


@pytest.mark.parametrize("config", [MODELS["late-mutual-chained"], CHAINED], ids=["all", "small"])
def test_steps_of_an_optimizer_reach_what_is_kept(config: ModelConfig) -> None:
    """A fused step is not counted as a write, nor a change of `.data`: what may learn is not kept."""
    config = replace(config, embeddings="tied")
    model, other, x0 = build(config), build(config), draw_tokens(4)
    model.requires_grad_(True)
    optimizer = build_optimizer(model, 0.01, 0.0)

    def read(network: DualBranch) -> Tensor:
        states, _ = network(x0, torch.full_like(x0, model.mask_id), Block(BLOCK))
        return torch.cat([network.log_probs(states, EVERYWHERE, head).exp() for head in ("draft", "causal")])

    for _ in range(3):
        with torch.no_grad():
            before = read(model)
        read(model).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(read(model), read(other))
            assert not torch.equal(read(model), before)
