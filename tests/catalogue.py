"""What exists, as lists: one law runs over everything in them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from caddf.interface import AnyOrder, Block, Infill, Pattern
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.objectives import (
    AnyOrderLoss,
    AutoregressiveLoss,
    Denoising,
    LambdaDCE,
    Objective,
    Synergistic,
    SynergisticConfig,
    TimeDCE,
)
from caddf.schedules import SCHEDULES, Schedule

VOCABULARY, CONTEXT, BLOCK = 7, 8, 3
"""Sizes of the models of the catalogue; blocks do not divide the context, and there are padded rows of embeddings."""

FUSIONS = [("late", "one_way"), ("late", "mutual"), ("layers", "one_way"), ("none", "one_way")]
DRAFTS = ["factorised", "chained"]
CAUSAL = BranchConfig(2, 16, 2)


def _config(
    causal: BranchConfig | None,
    fusion: str,
    exchange: str,
    draft: str,
    alibi: bool = True,
    embeddings: str = "separate",
    own_state: bool = False,
) -> ModelConfig:
    return ModelConfig(
        VOCABULARY,
        CONTEXT,
        BranchConfig(2, 12, 2, alibi=alibi),
        causal,
        bos_id=1,
        rows=VOCABULARY + 4,
        fusion=fusion,  # type: ignore[arg-type]
        exchange=exchange,  # type: ignore[arg-type]
        draft=draft,  # type: ignore[arg-type]
        embeddings=embeddings,  # type: ignore[arg-type]
        own_state=own_state,
        block_size=BLOCK,
    )


MODELS: dict[str, ModelConfig] = {
    **{
        f"{fusion}-{exchange}-{draft}": _config(CAUSAL, fusion, exchange, draft)
        for (fusion, exchange), draft in itertools.product(FUSIONS, DRAFTS)
    },
    **{f"off-{draft}": _config(None, "late", "mutual", draft) for draft in DRAFTS},
    "without-alibi": _config(CAUSAL, "late", "mutual", "factorised", alibi=False),
    "tied": _config(CAUSAL, "late", "mutual", "chained", embeddings="tied"),
    "token-shift": _config(
        BranchConfig(2, 16, 2, token_shift=True), "late", "mutual", "chained", embeddings="tied", own_state=True
    ),
    "own-state-one-way": _config(
        BranchConfig(2, 16, 2, activation="relu2", qk_norm=True), "late", "one_way", "factorised", own_state=True
    ),
    "own-state-layers": _config(CAUSAL, "layers", "one_way", "chained", own_state=True),
    "learned": _config(BranchConfig(2, 16, 2, positions="learned", bias=True), "late", "mutual", "factorised"),
}
"""Every choice of fusion, exchange, draft and causal branch that is valid, one without linear biases, one with
tied embeddings, one with a token shift and the fusion's own state too, one with ReLU^2 and queries and keys of one
length, and GPT-2's positions and biases."""

PATTERNS: list[Pattern] = [AnyOrder(), Infill(), Block(BLOCK), Block(BLOCK, offset=2), Block(1), Block(CONTEXT)]


def build(config: ModelConfig, scale: float = 1.0, seed: int = 0) -> DualBranch:
    """A model of float64 weights; `scale` times the usual ones, so that what reaches an output shows there."""
    torch.manual_seed(seed)
    model = DualBranch(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return hear(model)


def hear(model: DualBranch) -> DualBranch:
    """What starts as 0, so that a model starts as one without it, at random."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.25)
    return model


def draw_tokens(rows: int, length: int = CONTEXT, seed: int = 0) -> Tensor:
    """Uniform tokens `[rows, length]`."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


SCHEDULE_LIST: list[Schedule] = [schedule() for schedule in SCHEDULES.values()]

DENOISING: dict[str, Denoising] = {
    "lambda-dce": LambdaDCE(),
    **{f"t-dce-{name}": TimeDCE(schedule()) for name, schedule in SCHEDULES.items()},
    "ao": AnyOrderLoss(),
}

OBJECTIVES: dict[str, Objective] = {
    **DENOISING,
    "ar": AutoregressiveLoss(),
    **{
        f"synergistic-{form}": Synergistic(SynergisticConfig(denoising=form), BLOCK)  # type: ignore[arg-type]
        for form in ("lambda-dce", "t-dce", "ao")
    },
}


class Joint:
    """A known distribution over sequences, and its exact denoiser: a plain function of `x_t`."""

    def __init__(self, vocab_size: int, sequences: Tensor, probs: Tensor) -> None:
        self.vocab_size, self.sequences, self.probs = vocab_size, sequences, probs

    @classmethod
    def random(cls, vocab_size: int, length: int, seed: int = 0) -> Joint:
        """Unequal probabilities of all V**L sequences."""
        sequences = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(len(sequences), generator=generator, dtype=torch.float64) ** 3
        return cls(vocab_size, sequences, weights / weights.sum())

    def entropy(self) -> float:
        """In nats per sequence."""
        return -(self.probs * self.probs.log()).sum().item()

    def __call__(self, x_t: Tensor) -> Tensor:
        """log p0(x0_i | unmasked part of x_t), `[B, L, V]`, by summing over the sequences that agree with it."""
        agrees = ((x_t[:, None] == self.sequences) | (x_t[:, None] == self.vocab_size)).all(-1)
        one_hot = torch.nn.functional.one_hot(self.sequences, self.vocab_size).double()
        joint = torch.einsum("bs,slv->blv", agrees * self.probs, one_hot)
        return (joint / joint.sum(-1, keepdim=True)).log()
