"""The settings of models, and the networks' own settings that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from caddf.errors import Checked, InputError, at_least
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import PRESETS, Activation, BranchConfig, ModelConfig, Preset
from caddf.models.matching import count, matched
from caddf.models.plaid import Plaid, PlaidConfig
from caddf.models.single import SingleConfig, build_single

Size = Literal["debug", "demo", "tiny", "small", "medium"]
GPT2_ROWS = 50_265
"""Rows of the embedding tables over GPT-2's vocabulary (Table 5's vocabulary size)."""

DRAFTED = 8192
"""Tokens that chained drafts are of where the vocabulary is large: each step reads a head, and is verified anyway."""


@dataclass(frozen=True)
class ModelSettings(Checked):
    """The model: a preset's sizes, and the choices of Table 4 and section 4 (those are the dual branch's alone).

    size: debug, demo, tiny, or Table 5's small and medium; other methods get as many parameters as the dual branch.
    match: parameters in all, which width and depth are brought to within 2%; not set, the preset's sizes as they are.
    causal: off leaves the diffusion branch with its draft head alone.
    fusion: late (eq. 10, after the last causal layer), layers (eq. 7 too), or none (no cross-attention).
    exchange: mutual (the diffusion branch reads the causal branch's states too) or one_way; not set, mutual with fusion
        late.
    embeddings: separate for each branch, or tied (the diffusion branch's are the causal branch's under one map); not
        set, tied where there is a causal branch.
    causal_layers: of the causal branch; not set, the preset's.
    diffusion_layers: of the diffusion branch; not set, the preset's.
    draft: factorised, or chained (a draft knows the drafts before it); not set, chained where there is a causal branch.
    draft_vocab: how many tokens, the most frequent of the training data, chained drafts are of; not set, all,
        or 8,192 of more than 16,384.
    block_size: k of block training, the block likelihood and block decoding.
    context: length of a training window in tokens; not set, the preset's.
    positions: of the causal branch: rotary, or learned as GPT-2's (with bias true, GPT-2's weights can start it).
    bias: of the causal branch's maps and norms: true as in GPT-2 (with positions learned).
    alibi: linear biases in attention in both directions, by which heads see what is next to them first; not set, true
        for the dual branch.
    token_shift: of the causal branch: its inputs are two tokens, one mapped, and not one, as is what a chain of drafts
        hears; not set, true for the dual branch.
    activation: of the causal branch: gelu, or relu2, max(x, 0)^2; with qk_norm, after some million tokens, it has a
        lower exact perplexity, a higher diffusion bound and fewer drafts that stand.
    qk_norm: of the causal branch: queries and keys of one length.
    own_state: the fusion reads the canvas state of its own position besides what cross-attention finds; not set, true
        where there is cross-attention.
    """

    section = "model."

    size: Size = "demo"
    match: int | None = None
    causal: Literal["on", "off"] = "on"
    fusion: Literal["late", "layers", "none"] = "late"
    exchange: Literal["one_way", "mutual"] | None = None
    embeddings: Literal["separate", "tied"] | None = None
    causal_layers: int | None = None
    diffusion_layers: int | None = None
    draft: Literal["factorised", "chained"] | None = None
    draft_vocab: int | None = None
    block_size: int = 8
    context: int | None = None
    positions: Literal["rotary", "learned"] = "rotary"
    bias: bool = False
    alibi: bool | None = None
    token_shift: bool | None = None
    activation: Activation = "gelu"
    qk_norm: bool = False
    own_state: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "match", "causal_layers", "diffusion_layers")

    @property
    def preset(self) -> Preset:
        """Sizes and published training settings."""
        return PRESETS[self.size]

    @property
    def length(self) -> int:
        """The context."""
        return self.preset.context if self.context is None else self.context

    def dual(self, vocab_size: int, bos_id: int) -> ModelConfig:
        """CAD-DF over a vocabulary of `vocab_size` tokens; raises `InputError` where choices do not go together."""
        exchange = self.exchange or ("mutual" if self.fusion == "late" and self.causal == "on" else "one_way")
        layers = self.causal_layers or self.preset.causal.layers
        causal = dataclasses.replace(
            self.preset.causal, layers=layers, positions=self.positions, bias=self.bias,
            token_shift=self.token_shift is not False, activation=self.activation,
            qk_norm=self.qk_norm,
        )  # fmt: skip
        layers = self.diffusion_layers or self.preset.diffusion.layers
        diffusion = dataclasses.replace(self.preset.diffusion, layers=layers, alibi=self.alibi is not False)
        draft = self.draft or ("chained" if self.causal == "on" else "factorised")
        large = vocab_size > 2 * DRAFTED and draft == "chained" and self.causal == "on"
        whole = ModelConfig(
            vocab_size=vocab_size,
            context=self.length,
            diffusion=diffusion,
            causal=causal if self.causal == "on" else None,
            bos_id=bos_id,
            rows=rows_of(vocab_size),
            fusion=self.fusion,
            exchange=exchange,
            embeddings=self.embeddings or ("tied" if self.causal == "on" else "separate"),
            draft=draft,
            own_state=self.own_state if self.own_state is not None else self.causal == "on" and self.fusion != "none",
            draft_vocab=DRAFTED if self.draft_vocab is None and large else self.draft_vocab,
            block_size=self.block_size,
        )
        if self.match is None:
            return whole

        def scaled(branch: BranchConfig) -> ModelConfig:
            """The causal branch (or the only one) as given, the other in proportion."""
            if whole.causal is None:
                return dataclasses.replace(whole, diffusion=branch)
            share, other = branch.width / causal.width, diffusion
            size = max(2, round(other.width * share / other.heads / 2) * 2)
            depth = max(1, round(other.layers * branch.layers / causal.layers))
            return dataclasses.replace(
                whole, causal=branch, diffusion=dataclasses.replace(other, width=size * other.heads, layers=depth)
            )

        base, step = (whole.diffusion, 16) if whole.causal is None else (whole.causal, 8)  # two branches step further
        return scaled(matched(lambda branch: DualBranch(scaled(branch)), base, self.match, step))

    def refuse(self, *names: str) -> None:
        """Raises `InputError` where one of these is set, which a network does not have."""
        for each in dataclasses.fields(self):
            if each.name in names and (value := getattr(self, each.name)) != each.default:
                raise InputError(
                    f"model.{each.name} is {value}, which this method's network does not have; leave it out"
                )

    def parameters(self, vocab_size: int) -> int:
        """What a method with one branch gets: `match`, or as many parameters as the dual branch of this size has."""
        if self.match is not None:
            return self.match
        plain = ModelSettings(self.size, context=self.context, block_size=self.block_size)
        return count(lambda: DualBranch(plain.dual(vocab_size, 0)))


TWO_BRANCHES = (
    "causal", "fusion", "exchange", "embeddings", "causal_layers", "diffusion_layers", "draft", "draft_vocab",
    "own_state",
)  # fmt: skip
"""Choices that a network of one branch does not have."""
GPT2_LIKE = ("positions", "bias", "token_shift", "activation", "qk_norm")
"""Choices of causal branches alone."""


def rows_of(vocab_size: int) -> int:
    """Rows of an embedding table: Table 5's over GPT-2's vocabulary; 0 leaves it to the model."""
    return GPT2_ROWS if vocab_size == 50_257 else 0


def causal_config(settings: ModelSettings, vocab_size: int, bos_id: int) -> CausalConfig:
    """A causal Transformer alone, of the preset's shape."""

    def config(branch: BranchConfig) -> CausalConfig:
        return CausalConfig(vocab_size, settings.length, branch, bos_id, rows_of(vocab_size), settings.block_size)

    settings.refuse(*TWO_BRANCHES, "alibi")
    base = dataclasses.replace(
        settings.preset.causal, positions=settings.positions, bias=settings.bias, activation=settings.activation,
        token_shift=bool(settings.token_shift), qk_norm=settings.qk_norm,
    )  # fmt: skip
    return config(matched(lambda branch: CausalModel(config(branch)), base, settings.parameters(vocab_size)))


def masked_config(settings: ModelSettings, vocab_size: int, bos_id: int) -> ModelConfig:
    """A bidirectional denoiser without time: the diffusion branch alone, of the preset's causal shape."""

    def config(branch: BranchConfig) -> ModelConfig:
        return ModelConfig(
            vocab_size, settings.length, branch, None, bos_id, rows_of(vocab_size), exchange="one_way",
            block_size=settings.block_size,
        )  # fmt: skip

    settings.refuse(*TWO_BRANCHES, *GPT2_LIKE)
    base = dataclasses.replace(settings.preset.causal, alibi=bool(settings.alibi))
    return config(matched(lambda branch: DualBranch(config(branch)), base, settings.parameters(vocab_size)))


def timed_config(**kind: Any) -> Callable[[ModelSettings, int, int], SingleConfig]:
    """A bidirectional network that is told the time: a denoiser, or with `score` a score network."""

    def configure(settings: ModelSettings, vocab_size: int, bos_id: int) -> SingleConfig:
        def config(branch: BranchConfig) -> SingleConfig:
            level_width = min(128, branch.width)  # the authors', but for networks narrower than that
            return SingleConfig(
                vocab_size, settings.length, branch, bos_id, rows_of(vocab_size), level_width=level_width, **kind
            )

        settings.refuse(*TWO_BRANCHES, *GPT2_LIKE)
        parameters = settings.parameters(vocab_size)
        base = dataclasses.replace(settings.preset.causal, alibi=bool(settings.alibi))
        return config(matched(lambda branch: build_single(config(branch)), base, parameters))

    return configure


def plaid_config(settings: ModelSettings, vocab_size: int, bos_id: int) -> PlaidConfig:
    """PLAID's network, of the preset's causal shape."""

    def config(branch: BranchConfig) -> PlaidConfig:
        return PlaidConfig(vocab_size, settings.length, branch)

    settings.refuse(*TWO_BRANCHES, *GPT2_LIKE, "alibi")
    parameters = settings.parameters(vocab_size)
    return config(matched(lambda branch: Plaid(config(branch)), settings.preset.causal, parameters))
