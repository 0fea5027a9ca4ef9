"""Prompt lookup: what is copied, and that copies change no distribution."""

import itertools
from dataclasses import replace

import pytest
import torch
from catalogue import hear
from drawing import p_value, task
from hypothesis import given, settings
from hypothesis import strategies as st

from caddf.categorical import Warp
from caddf.decoding import Autoregressive, Speculative
from caddf.decoding.lookup import lookup
from caddf.errors import InputError
from caddf.interface import Block
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig

ROWS, ODDS = 1500, 1e-6


def slowly(text: list[int], width: int, count: int) -> list[int] | None:
    for start in range(len(text) - 1, width - 1, -1):
        if text[start - width : start] == text[len(text) - width :]:
            copy = list(text)
            for i in range(count):
                copy.append(copy[start + i])
            return copy[len(text) :]
    return None


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=3),
    width=st.integers(1, 4),
    count=st.integers(1, 6),
    beyond=st.integers(0, 3),
)
def test_what_is_copied(rows, width, count, beyond):
    """By the definition, row by row: the last place counts, a copy may copy itself, and what lies behind n does not."""
    length = max(max(map(len, rows)) + beyond, 1)
    x = torch.tensor([row + [3] * (length - len(row)) for row in rows])
    copies, matched = lookup(x, torch.tensor([len(row) for row in rows]), width, count)
    for row, copy, there in zip(rows, copies.tolist(), matched.tolist(), strict=True):
        expected = slowly(row, width, count)
        assert there >= width * (expected is not None) and (there > 0) == (expected is not None)
        if expected is not None:
            start = max(at for at in range(width, len(row)) if row[at - width : at] == row[len(row) - width :])
            alike = 0
            while alike < min(start, max(width, count)) and row[start - 1 - alike] == row[-1 - alike]:
                alike += 1
            assert copy == expected and there == alike


def dual(vocab: int, context: int, block_size: int, **config) -> DualBranch:
    torch.manual_seed(1)
    branches = {"causal": BranchConfig(1, 16, 2, token_shift=True), "diffusion": BranchConfig(2, 16, 2, alibi=True)}
    model = DualBranch(ModelConfig(vocab, context, block_size=block_size, own_state=True, **branches, **config))
    return heard(model)


def gpt2(vocab: int, context: int, block_size: int) -> CausalModel:
    torch.manual_seed(1)
    return heard(CausalModel(CausalConfig(vocab, context, BranchConfig(1, 16, 2), block_size=block_size)))


def heard(model):
    for parameter in model.double().eval().parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    return hear(model).requires_grad_(False)


def written(model, decoder, tokens, warp=None, *, template=False, first=0):
    given = task(model, tokens, rows=range(first, first + len(tokens)), warp=warp, template=template)
    return [replace(frame, counts=frame.counts.copy()) for frame in decoder(model, given)]


KINDS = {"mutual": {}, "chained": {"draft": "chained"}, "one-way": {"exchange": "one_way"}}


def texts(vocab: int, prompts: list[int], length: int, given: int = 0) -> torch.Tensor:
    """Prompts of these lengths, with `given` single tokens behind them."""
    x = torch.randint(vocab, (len(prompts), length), generator=torch.Generator().manual_seed(0))
    open_places = torch.arange(length) >= torch.tensor(prompts)[:, None]
    open_places[:, [length - 3 * each - 2 for each in range(given)]] = False
    return torch.where(open_places, vocab, x)


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_and_caches_and_batches_change_nothing(kind, target, template):
    model, x = dual(5, 24, 4, **KINDS[kind]), texts(5, [7, 2, 0], 21, 2 * template)
    plain = written(model, Autoregressive(target), x, Warp(0.0), template=template)[-1]
    greedy = written(model, Speculative(target, lookup=2), x, Warp(0.0), template=template)[-1]
    assert torch.equal(plain.tokens, greedy.tokens) and greedy.counts.copied.sum() > 0
    decoder = Speculative(target, lookup=1, least=0.3)
    together = written(model, decoder, x, template=template)[-1]
    uncached = written(model, replace(decoder, cache=False), x, template=template)[-1]
    assert torch.equal(together.tokens, uncached.tokens) and together.counts.copied.sum() > 0
    for row in range(len(x)):
        alone = written(model, decoder, x[row : row + 1], template=template, first=row)[-1]
        assert torch.equal(alone.tokens[0], together.tokens[row])
        for name in ("rounds", "copied"):
            assert getattr(alone.counts, name)[0] == getattr(together.counts, name)[row], name


@pytest.mark.parametrize(("target", "size"), [("causal", 4), ("fused", 4), ("causal", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_draw_the_target(kind, target, size):
    """Chi-squared over all continuations of a text that repeats; it fails by chance once in a million.

    Windows of two are shorter than copies may be where the target is known behind them.
    """
    vocab, prompt, length = 3, [0, 1, 2, 0, 1], 4
    model = dual(vocab, 9, size, **KINDS[kind])
    x = torch.tensor([[*prompt, *rest] for rest in itertools.product(range(vocab), repeat=length)])
    states, _ = model(x, torch.full_like(x, vocab), Block(size))
    new = (torch.arange(x.shape[1]) >= len(prompt)).expand(x.shape)
    log_p = -model.nll(states, new, x, target).view(len(x), -1).sum(1)
    start = torch.tensor([[*prompt, *[vocab] * length]]).expand(ROWS, -1)
    for width in (1, 2):
        frames = written(model, Speculative(target, lookup=width), start)
        counts = frames[-1].counts
        assert (frames[0].counts.copied == 1).all()
        assert width == 1 or (counts.copied < counts.rounds).any()  # every single token has stood before
        assert p_value(frames[-1].tokens[:, len(prompt) :], log_p.exp()) > ODDS


def test_a_model_of_one_branch_copies_or_writes_one_by_one():
    model, x = gpt2(5, 30, 4), texts(5, [7, 2, 0], 26)
    plain = written(model, Autoregressive(), x, Warp(0.0))[-1]
    greedy = written(model, Speculative(lookup=1), x, Warp(0.0))[-1]
    assert torch.equal(plain.tokens, greedy.tokens)
    assert (greedy.counts.rounds < plain.counts.rounds).all() and (greedy.counts.copied > 0).all()
    assert (greedy.counts.diffusion == 0).all()
    uncached = written(model, Speculative(lookup=1, cache=False), x, Warp(0.0))[-1]
    assert torch.equal(uncached.tokens, greedy.tokens)
    states, _ = model(tokens := torch.tensor(list(itertools.product(range(5), repeat=3))), tokens, Block(4))
    log_p = -model.nll(states, torch.ones_like(tokens, dtype=torch.bool), tokens).view(-1, 3).sum(1)
    drawn = written(model, Speculative(lookup=1), torch.full((ROWS, 3), 5))[-1]
    assert drawn.counts.copied.sum() > ROWS / 20 and p_value(drawn.tokens, log_p.exp()) > ODDS


def test_a_copy_is_as_long_as_what_has_matched():
    """As many tokens, at most `copies`; where the target is fused, or nothing has matched for long, a window's."""
    model = dual(9, 60, 4, draft="chained")
    for period, most, expected in ((12, None, 4), (3, None, 12), (3, 7, 7), (3, 1, 4)):
        x = torch.full((1, 60), 9)
        x[0, :15] = torch.arange(15) % period % 9
        for target, long in (("causal", expected), ("fused", 4)):
            first = written(model, Speculative(target, lookup=3, copies=most), x)[0]
            assert int((first.drafts != 9).sum()) == (long if long > 4 else 3), (period, most, target)


def test_what_cannot_be():
    with pytest.raises(InputError, match="lookup is -1"):
        Speculative(lookup=-1)
    with pytest.raises(InputError, match="copies is 0; it must be 1 or more, or not set"):
        Speculative(copies=0)
    with pytest.raises(InputError, match="copies is 65; it must be at most 64"):
        Speculative(copies=65)
    with pytest.raises(InputError, match="nothing to draft with but lookup, which is 0"):
        written(gpt2(5, 30, 4), Speculative(lookup=0), torch.full((1, 4), 5))
