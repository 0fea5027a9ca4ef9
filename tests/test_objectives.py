"""What objectives draw, show to the model, and score."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from catalogue import BLOCK, CONTEXT, DENOISING, MODELS, OBJECTIVES, VOCABULARY, build, draw_tokens
from drawing import generator
from torch import Tensor, nn

from caddf.denoiser import DenoiserModel
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Infill, Pattern
from caddf.objectives import AnyOrderLoss, AutoregressiveLoss, LambdaDCE, Synergistic, SynergisticConfig, TimeDCE
from caddf.objectives.loss import draw_times

MASK = VOCABULARY
TIMES = ["stratified", "antithetic", "independent"]


# Times.


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("times", TIMES)
def test_each_row_s_time_is_uniform(times: str, rows: int) -> None:
    g = generator(rows)
    t = torch.stack([draw_times(rows, times, g) for _ in range(4000)])  # type: ignore[arg-type]
    assert t.dtype == torch.float64 and (t > 0).all() and (t <= 1).all()
    # Kolmogorov-Smirnov: P(sqrt(n) distance > 3) = 2 exp(-18) = 3e-8 for each of the 48 rows tried here.
    ordered, steps = t.sort(0).values, torch.arange(1, 4001)[:, None] / 4000
    assert (ordered - steps).abs().max() < 3 / 4000**0.5 + 1 / 4000


def test_stratified_times_fill_every_part() -> None:
    t = draw_times(50, "stratified", generator())
    assert (t * 50).ceil().sort().values.tolist() == list(range(1, 51))


def test_antithetic_times_come_in_pairs() -> None:
    t = draw_times(6, "antithetic", generator())
    torch.testing.assert_close(t[:3] + t[3:], torch.ones(3, dtype=torch.float64))
    assert len(draw_times(5, "antithetic", generator())) == 5


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_times_at_the_ends_of_the_generator(times: str, u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), u, dtype=torch.float64))
    t = draw_times(16, times, generator())  # type: ignore[arg-type]
    assert (t > 0).all() and (t <= 1).all()


# Denoising: x_t and its weight.


@pytest.mark.parametrize("name", DENOISING)
def test_weights_fit_the_masks(name: str) -> None:
    length = 40_000
    x0 = torch.zeros(6, length, dtype=torch.long)
    objective = DENOISING[name]
    x_t, weight = objective.draw(x0, MASK, generator())
    assert weight.dtype == torch.float64
    assert ((x_t == MASK) | (x_t == x0)).all()
    rate = (x_t == MASK).double().mean(-1)
    if isinstance(objective, AnyOrderLoss):
        torch.testing.assert_close(rate, 1 / weight, rtol=1e-12, atol=0)
        return
    masked = 1 / weight
    if isinstance(objective, TimeDCE):  # the weight is lambda' / lambda at the t whose lambda is the rate
        t = draw_times(6, objective.times, generator())
        masked = objective.schedule.masked(t)
        torch.testing.assert_close(weight, objective.schedule.slope(t) / masked)
    # Six rates within six standard deviations: odds of failing by chance 1e-8.
    assert ((rate - masked).abs() <= 6 * (masked * (1 - masked) / length).sqrt()).all()


def test_any_order_counts_are_uniform_from_1_to_length() -> None:
    x0 = torch.zeros(8, 8, dtype=torch.long)
    x_t, _ = AnyOrderLoss().draw(x0, MASK, generator())
    assert (x_t == MASK).sum(-1).sort().values.tolist() == list(range(1, 9))  # eight rows, one in each part


# What models are shown.


@dataclass
class Recorder:
    """A model that remembers how it was called; its head is uniform."""

    heads: frozenset = frozenset({"fused", "draft", "causal"})
    denoiser: str = "fused"
    vocab_size: int = VOCABULARY
    mask_id: int = MASK
    calls: list[tuple[Tensor, Tensor, Pattern]] = field(default_factory=list)
    scored: list[tuple[Pattern, str, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, prefix, canvas, pattern, caches=None):  # type: ignore[no-untyped-def]
        self.calls.append((prefix, canvas, pattern))
        return self.calls[-1], None

    def nll(self, states, where, targets, head="fused"):  # type: ignore[no-untyped-def]
        self.scored.append((states[2], head, where, states[1]))
        return torch.full((int(where.sum()),), 2.0, dtype=torch.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_the_model_is_shown_and_where_it_is_scored(name: str) -> None:
    model, x0 = Recorder(), draw_tokens(20)
    OBJECTIVES[name](model, x0, generator())  # type: ignore[arg-type]
    left_to_right = [len(prefix) for prefix, _, pattern in model.calls if not isinstance(pattern, AnyOrder)]
    # The mixture reads every row left to right, and denoises some of them besides.
    assert sum(left_to_right or [len(prefix) for prefix, _, _ in model.calls]) == len(x0)
    for prefix, canvas, pattern in model.calls:
        if isinstance(pattern, AnyOrder):
            assert prefix is canvas
        else:
            assert (prefix[:, None] == x0).all(-1).any(-1).all()  # rows of x0
            assert ((canvas == MASK) | (canvas == prefix)).all()
    for pattern, head, where, canvas in model.scored:
        if head == "causal":
            assert not isinstance(pattern, AnyOrder) and where.all()  # with prefix = x_t it would read masks
        else:
            assert torch.equal(where, canvas == MASK)  # elsewhere it would be copying


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_depends_on_the_generator_alone(name: str) -> None:
    model, x0 = build(MODELS["late-mutual-chained"]), draw_tokens(10)
    torch.manual_seed(1)
    first = OBJECTIVES[name](model, x0, generator(3))
    torch.manual_seed(2)
    torch.rand(7)
    second = OBJECTIVES[name](model, x0, generator(3))
    assert torch.equal(first.total, second.total) and first.parts.keys() == second.parts.keys()
    assert not any(part.requires_grad for part in first.parts.values()) and first.total.requires_grad
    if name != "ar":
        assert OBJECTIVES[name](model, x0, generator(4)).total != first.total


def shares(config: SynergisticConfig, rows: int, model: Recorder, seed: int) -> list[float]:
    model.calls.clear()
    Synergistic(config, BLOCK)(model, draw_tokens(rows), generator(seed))  # type: ignore[arg-type]
    return [sum(len(p) for p, _, pattern in model.calls if isinstance(pattern, kind)) for kind in KINDS]


KINDS = (AnyOrder, Infill, Block)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_shares_hold_in_expectation(rows: int) -> None:
    """Every row is read left to right, infilled or in blocks; some are denoised too."""
    config = SynergisticConfig(denoise=0.3, infill=0.2, block=1.2)
    drawn = torch.tensor([shares(config, rows, Recorder(), seed) for seed in range(400)]).double()
    assert (drawn[:, 1:].sum(1) == rows).all()
    expected = rows * torch.tensor([0.3, 1 / 7, 6 / 7], dtype=torch.float64)
    assert ((drawn - expected).abs() < 1).all()  # never off by a whole row
    # Means of numbers of standard deviation at most 1/2, 9 of them within 6 standard errors: 2e-8.
    assert ((drawn.mean(0) - expected).abs() < 6 * 0.5 / 400**0.5).all()


def test_a_share_of_zero_is_not_drawn() -> None:
    for seed in range(50):
        assert shares(SynergisticConfig(denoise=0, infill=1, block=0), 4, Recorder(), seed) == [0, 4, 0]
        assert shares(SynergisticConfig(denoise=1, infill=0, block=1), 4, Recorder(), seed) == [4, 0, 4]
        assert shares(SynergisticConfig(denoise=1, infill=0, block=0), 4, Recorder(), seed) == [4, 0, 0]


def test_without_a_causal_branch_infilling_is_denoising() -> None:
    model = Recorder(frozenset({"draft"}), "draft")
    drawn = [shares(SynergisticConfig(denoise=0.2, infill=0.25, block=0.25), 10, model, seed) for seed in range(20)]
    assert drawn == [[7, 0, 5]] * 20
    assert {head for _, head, _, _ in model.scored} == {"draft"}


def test_parts_and_their_total() -> None:
    config = SynergisticConfig(denoise=1, infill=1, block=2, denoising="ao", draft_weight=0.25, causal_weight=0.5)
    loss = Synergistic(config, BLOCK)(Recorder(), draw_tokens(8), generator())  # type: ignore[arg-type]
    # Every token costs 2 nats; AO's weight L / k on k positions makes that 2 per token.
    names = {"denoise", "denoise_draft", "infill", "infill_draft", "infill_causal"}
    assert loss.parts.keys() == names | {"block", "block_draft", "block_causal"}
    assert all(part.item() == pytest.approx(2) for part in loss.parts.values())
    assert loss.total.item() == pytest.approx(2 * (2 * (1 + 0.25) + 0.5))  # all rows twice, and once by the causal head


def canvases(config: SynergisticConfig, rows: int, length: int = CONTEXT, block_size: int = BLOCK) -> Tensor:
    model = Recorder()
    Synergistic(config, block_size)(model, torch.zeros(rows, length, dtype=torch.long), generator())  # type: ignore[arg-type]
    return model.calls[0][1] == MASK


def test_infill_canvases() -> None:
    masked = canvases(SynergisticConfig(denoise=0, infill=1, block=0, all_masked=0.4), 4000, length=50)
    whole = masked.all(-1)
    # At a uniform rate all of 50 are masked with probability 1 / 51; 6 standard errors: 2e-9.
    expected = 0.4 + 0.6 / 51
    assert abs(whole.double().mean() - expected) < 6 * (expected * (1 - expected) / 4000) ** 0.5
    counts = masked[~whole].sum(-1)
    assert counts.min() == 0 and counts.max() == 49  # all rates
    assert abs(counts.double().mean() - 24.5) < 6 * 14.5 / len(counts) ** 0.5
    assert canvases(SynergisticConfig(denoise=0, infill=1, block=0, all_masked=1), 20).all()


def test_block_canvases() -> None:
    config = SynergisticConfig(denoise=0, infill=0, block=1, revealed=0.3)
    masked = canvases(config, 6000, length=12, block_size=4)
    blocks = masked.view(-1, 4)
    assert (blocks.int().diff(dim=-1) >= 0).all() and blocks[:, -1].all()  # first tokens are shown, never all
    shown = torch.bincount(4 - blocks.sum(-1), minlength=4).double() / len(blocks)
    expected = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    # Four shares of 18,000 blocks within 6 standard errors: 8e-9.
    assert ((shown - expected).abs() < 6 * (expected * (1 - expected) / len(blocks)).sqrt()).all()
    assert canvases(replace(config, revealed=1.0), 20, block_size=1).all()
    assert canvases(replace(config, revealed=0.0), 20).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"denoise": -1.0},
        {"denoise": 1.1},
        {"denoise": 0, "infill": 0, "block": 0},
        {"all_masked": 1.1},
        {"revealed": -0.1},
        {"draft_weight": -1.0},
        {"causal_weight": -0.5},
    ],
    ids=str,
)
def test_settings_that_do_not_fit(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SynergisticConfig(**wrong)


# Gradients.


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_dead_under_the_mixture(name: str) -> None:
    model = build(MODELS[name])
    config = SynergisticConfig(denoise=1, infill=1, block=1)
    Synergistic(config, BLOCK)(model, draw_tokens(12), generator()).total.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    # Padded rows are neither read nor predicted.
    for branch in filter(None, (model.causal, model.diffusion)):
        if isinstance(branch.embedding, nn.Embedding):  # not tied to the other's
            assert not branch.embedding.weight.grad[VOCABULARY + 1 :].any()


def test_autoregressive_loss_is_the_causal_head_s() -> None:
    model, x0 = build(MODELS["late-mutual-factorised"]), draw_tokens(3)
    states, _ = model(x0, x0, Infill())
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    expected = -model.log_probs(states, everywhere, "causal").gather(-1, x0.flatten()[:, None]).mean()
    torch.testing.assert_close(AutoregressiveLoss()(model, x0, generator()).total, expected)


def test_nats_hold_a_row_s_estimate() -> None:
    # A head that is uniform: the bound of a row is L log V whatever the masks, in expectation.
    uniform = DenoiserModel(lambda x: torch.zeros(*x.shape, 4).double().log_softmax(-1), 4)
    x0 = torch.zeros(3, 5, dtype=torch.long)
    nats = AnyOrderLoss().nats(uniform, x0, generator())  # AO: L / k on exactly k positions
    torch.testing.assert_close(nats.sum(-1), torch.full((3,), 5 * torch.tensor(4.0).log().item()).double())
    nats = LambdaDCE().nats(uniform, x0, generator())
    x_t, weight = LambdaDCE().draw(x0, 4, generator())
    torch.testing.assert_close(nats, (x_t == 4) * weight[:, None] * torch.tensor(4.0).double().log())
