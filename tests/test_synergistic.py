"""CAD-DF's mixture: how drafts are weighed, what a small vocabulary ignores, and distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import BLOCK, CONTEXT, MODELS, VOCABULARY, build, draw_tokens
from drawing import generator
from torch import Tensor

from caddf.errors import InputError
from caddf.interface import Block, Pattern
from caddf.models.backbone import DualBranch
from caddf.objectives import Synergistic, SynergisticConfig
from caddf.objectives.distillation import Distillation, divergence
from caddf.objectives.heads import Term, score

MASK = VOCABULARY
BLOCKS = {"denoise": 0.0, "infill": 0.0, "block": 1.0}
SMALL = {**MODELS, "late-mutual-small": replace(MODELS["late-mutual-chained"], draft_vocab=3)}


def loss_of(model: Any, x0: Tensor, seed: int = 0, **config: Any) -> Any:
    return Synergistic(SynergisticConfig(**config), BLOCK)(model, x0, generator(seed))


def seen(model: DualBranch, x0: Tensor, **config: Any) -> tuple[Tensor, Any]:
    """The block canvas that the loss of the same settings scores, and its states."""
    record = Places()
    loss_of(record, x0, **BLOCKS, **config)
    (canvas,) = record.canvases
    return canvas == MASK, model(x0, canvas, Block(BLOCK))[0]


@dataclass
class Places:
    """A model whose nats at a position are its place in the block; it keeps the canvases."""

    heads: frozenset = frozenset({"fused", "draft", "causal"})
    denoiser: str = "fused"
    mask_id: int = MASK
    canvases: list[Tensor] = field(default_factory=list)

    def __call__(self, prefix: Tensor, canvas: Tensor, pattern: Pattern) -> tuple[None, None]:
        self.canvases.append(canvas)
        return None, None

    def nll(self, states: None, where: Tensor, targets: Tensor, head: str) -> Tensor:
        return (torch.arange(CONTEXT, dtype=torch.float64) % BLOCK).expand(where.shape)[where]


# Blocks.


def test_the_default_is_the_mean_of_each_head_over_what_it_scores() -> None:
    model, x0 = build(MODELS["late-mutual-chained"], scale=8), draw_tokens(4)
    masked, states = seen(model, x0)
    fused, draft = (model.nll(states, masked, x0, head).mean() for head in ("fused", "draft"))  # type: ignore[arg-type]
    causal = model.nll(states, torch.ones_like(masked), x0, "causal").mean()
    torch.testing.assert_close(loss_of(model, x0, **BLOCKS).total, fused + 0.5 * draft + 2 * causal)


@pytest.mark.parametrize("most", [1, 2, None, 9])
def test_no_more_than_so_many_tokens_are_revealed(most: int | None) -> None:
    """1500 blocks, the first of them whole: a number that can be drawn is not with odds of 2 (1/2)^1000."""
    model = Places()
    loss_of(model, draw_tokens(1000), revealed=1.0, revealed_most=most, **BLOCKS)
    shown = (model.canvases[0] != MASK).view(1000, CONTEXT)[:, :BLOCK].sum(-1)
    assert set(shown.tolist()) == set(range(1, min(most or BLOCK, BLOCK - 1) + 1))


def test_later_drafts_weigh_less() -> None:
    model, x0 = Places(), draw_tokens(3)
    parts = loss_of(model, x0, draft_decay=0.5, revealed=0.0, **BLOCKS).parts
    places = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1], dtype=torch.float64)
    assert parts["block_draft"].item() == pytest.approx(((0.5**places) * places).sum() / (0.5**places).sum())
    assert parts["block"].item() == parts["block_causal"].item() == pytest.approx(places.mean())
    # Drafts are counted from the first masked place.
    parts = loss_of(model, x0, draft_decay=0.5, revealed=1.0, revealed_most=1, **BLOCKS).parts
    places = torch.tensor([1, 2, 1, 2, 1], dtype=torch.float64)
    weights = 0.5 ** (places - 1)
    assert parts["block_draft"].item() == pytest.approx((weights * places).sum() / weights.sum())
    assert loss_of(model, x0, draft_decay=0.0, **BLOCKS).parts["block_draft"].isfinite()


def test_what_cannot_be_drafted_is_ignored() -> None:
    model, x0 = build(SMALL["late-mutual-small"], scale=8), draw_tokens(4)
    masked, states = seen(model, x0)
    nats = model.nll(states, masked, x0, "draft")
    inside = x0[masked] < 3
    assert torch.equal(nats.isfinite(), inside) and 0 < inside.sum() < len(inside)
    out = loss_of(model, x0, **BLOCKS)
    torch.testing.assert_close(out.parts["block_draft"], nats[inside].mean())
    out.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # A batch that has nothing to be drafted teaches the drafts nothing.
    nothing = loss_of(model, torch.full_like(x0, 5), **BLOCKS, draft_decay=0.5)
    assert nothing.parts["block_draft"] == 0 and nothing.total.isfinite()


# Distillation.


def log_probs(rows: int, seed: int, tokens: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, tokens, dtype=torch.float64, generator=generator(seed)).log_softmax(-1)


def restricted(log_q: Tensor) -> Tensor:
    """The same over the tokens 1, 4 and 6 alone."""
    outside = torch.ones(VOCABULARY, dtype=torch.bool)
    outside[[1, 4, 6]] = False
    return log_q.masked_fill(outside, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("form", ["kl", "tv"])
def test_nothing_is_between_equals(form: str) -> None:
    log_p = log_probs(5, 0)
    assert divergence(log_p, log_p, form).abs().max() < 1e-14  # type: ignore[arg-type]
    assert (divergence(log_p, log_probs(5, 1), form) > 0.05).all()  # type: ignore[arg-type]


def test_divergences_are_what_they_are_called() -> None:
    log_p, log_q = log_probs(5, 0), log_probs(5, 1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(log_p, log_q, "kl"), expected)
    torch.testing.assert_close(divergence(log_p, log_q, "tv"), (log_p.exp() - log_q.exp()).abs().sum(-1) / 2)


def test_over_a_small_vocabulary() -> None:
    log_p, log_q = log_probs(5, 0), restricted(log_probs(5, 1))
    inside = log_p.exp()[:, [1, 4, 6]]
    share = inside.sum(-1)
    own = F.kl_div(log_q[:, [1, 4, 6]], inside / share[:, None], reduction="none").sum(-1)
    torch.testing.assert_close(divergence(log_p, log_q, "kl"), share * own)
    torch.testing.assert_close(divergence(log_p, restricted(log_p), "kl"), torch.zeros(5, dtype=torch.float64))
    assert (divergence(log_p, log_q, "tv") >= 1 - share).all()


def test_kl_teaches_what_texts_drawn_from_the_target_would() -> None:
    """Over a small vocabulary too: the gradient of E_p[-log q(x); x in S]."""
    log_p, logits = log_probs(5, 0), log_probs(5, 1).requires_grad_()
    (kl,) = torch.autograd.grad(divergence(log_p, restricted(logits), "kl").sum(), logits)
    log_q = restricted(logits)
    expected = -(log_p.exp() * log_q.masked_fill(log_q == -torch.inf, 0)).sum()
    torch.testing.assert_close(kl, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("form", ["kl", "tv"])
@pytest.mark.parametrize("name", ["late-mutual-factorised", "late-mutual-small"])
def test_drafts_learn_the_target_and_not_the_reverse(name: str, form: str) -> None:
    model = build(SMALL[name], scale=8)
    where = torch.rand(3, CONTEXT, generator=generator()) < 0.5
    fused, draft, causal = (
        (6 * torch.randn(3, CONTEXT, width, dtype=torch.float64)).requires_grad_() for width in (16, 12, 16)
    )
    states = SimpleNamespace(fused=fused, draft=draft, causal=causal, chained="small" in name)
    x0 = draw_tokens(3)
    drafts = {"draft": Term(where / 7)}
    gaps = score(model, states, x0, drafts, Distillation(1.0, "causal", form))  # type: ignore[arg-type]
    log_p, log_q = (model.log_probs(states, where, head).detach() for head in ("causal", "draft"))  # type: ignore[arg-type]
    torch.testing.assert_close(gaps.total, (divergence(log_p, log_q, form) / 7).sum())  # type: ignore[arg-type]
    gaps.total.backward()
    assert causal.grad is None and model.causal.embedding.weight.grad is None
    taught = draft.grad.abs().sum(-1) > 0  # tv teaches nothing where q is above p in all of a small vocabulary
    assert torch.equal(taught, where) or (form == "tv" and taught.any() and not taught[~where].any())


@pytest.mark.parametrize("source", ["causal", "fused"])
@pytest.mark.parametrize("form", ["kl", "tv"])
def test_a_share_of_the_draft_s_loss_is_distilled(form: str, source: str) -> None:
    model, x0 = build(MODELS["late-mutual-chained"], scale=8), draw_tokens(4)
    masked, states = seen(model, x0)
    log_p, log_q = (model.log_probs(states, masked, head) for head in (source, "draft"))  # type: ignore[arg-type]
    gap = divergence(log_p, log_q, form).mean()  # type: ignore[arg-type]
    plain = loss_of(model, x0, **BLOCKS)
    out = loss_of(model, x0, **BLOCKS, distill=0.3, distill_form=form, distill_from=source)
    torch.testing.assert_close(out.parts["block_distill"], gap.detach())
    torch.testing.assert_close(out.total - plain.total, 0.5 * 0.3 * (gap - plain.parts["block_draft"]))


def test_drafts_that_are_distilled_come_nearer() -> None:
    """Trained on the divergence alone a chain reaches the target: the text before is all there is to know."""
    config = replace(MODELS["late-mutual-chained"], block_size=2)
    model, x0 = build(config), draw_tokens(8)
    model.requires_grad_(False)
    for part in (model.diffusion, model.chain):
        part.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = SynergisticConfig(**BLOCKS, distill=1.0, draft_weight=1.0, causal_weight=0.0, revealed=0.0)
    with torch.no_grad():
        model.causal.embedding.weight.mul_(20)  # a target that is not uniform
    gaps = []
    for _ in range(120):
        loss = Synergistic(settings, 2)(model, x0, generator())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        gaps.append(loss.parts["block_distill"].item())
    assert gaps[0] > 0.05 and gaps[-1] < gaps[0] / 10


# Everything trains.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_every_model_trains_a_step(name: str, distill: float) -> None:
    model, x0 = build(SMALL[name]), draw_tokens(10)
    out = loss_of(model, x0, distill=distill, draft_decay=0.8, revealed_most=1)
    assert ("block_distill" in out.parts) == (distill > 0 and model.causal is not None)
    out.total.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not without
    assert model.chain is None or all(p.grad.abs().sum() > 0 for p in model.chain.parameters())
    before = out.total.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)
    after = loss_of(model, x0, distill=distill, draft_decay=0.8, revealed_most=1).total.item()
    assert math.isfinite(after) and after < before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill": 1.5}, "distill is 1.5; it must lie in"),
        ({"draft_decay": -0.1}, "draft_decay is -0.1"),
        ({"revealed_most": 0}, "revealed_most is 0; it must be 1 or more"),
        ({"revealed": 2.0}, "revealed is 2.0"),
        ({"draft_weight": -1.0}, "draft_weight is -1.0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SynergisticConfig(**settings)


def test_without_anything_else_all_rows_are_denoised() -> None:
    record, x0 = Places(), draw_tokens(6)
    loss_of(record, x0, denoise=0.2, infill=0.0, block=0.0)
    (canvas,) = record.canvases
    assert canvas.shape == x0.shape


def test_choices_are_checked() -> None:
    with pytest.raises(InputError, match="times is antithetc; it must be one of stratified, antithetic, independent"):
        SynergisticConfig(times="antithetc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="distill_form is js; it must be one of kl, tv"):
        SynergisticConfig(distill_form="js")  # type: ignore[arg-type]
