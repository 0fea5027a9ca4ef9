"""Names to classes, in one table, and the networks that settings build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

from caddf.errors import Checked, InputError, at_least
from caddf.evaluation.block import block_diffusion_bound
from caddf.evaluation.d3pm import d3pm_bound
from caddf.evaluation.plaid import plaid_bound
from caddf.evaluation.score_entropy import score_bound
from caddf.evaluation.suite import Bound
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import PRESETS, BranchConfig, ModelConfig, Preset
from caddf.models.matching import count, matched
from caddf.models.plaid import Plaid, PlaidConfig
from caddf.models.single import SingleBranch, SingleConfig, build_single
from caddf.objectives import (
    D3PM,
    AutoregressiveLoss,
    BlockDiffusion,
    DenoisingConfig,
    Objective,
    PlaidLoss,
    ScoreEntropyConfig,
    Synergistic,
    SynergisticConfig,
)
from caddf.schedules import SCHEDULES

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
            token_shift=self.token_shift is not False,
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
GPT2_LIKE = ("positions", "bias", "token_shift")
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
        settings.preset.causal, positions=settings.positions, bias=settings.bias, token_shift=bool(settings.token_shift)
    )
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


Network = DualBranch | CausalModel | SingleBranch | Plaid


@dataclass(frozen=True)
class Architecture:
    """A kind of network: the class of its settings (`to_dict`, `from_dict`), and the network that they build."""

    config: Any
    network: Callable[[Any], Network]


ARCHITECTURES: dict[str, Architecture] = {
    "dual": Architecture(ModelConfig, DualBranch),
    "causal": Architecture(CausalConfig, CausalModel),
    "single": Architecture(SingleConfig, build_single),
    "plaid": Architecture(PlaidConfig, Plaid),
}


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


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    architecture: a name of `ARCHITECTURES`; configure: `(ModelSettings, V, bos_id)` to its settings.
    settings: the class of its objective's settings, with `defaults`; build: those and the network's to objective.
    bound: settings to its diffusion bound, where that is not the time-free denoiser's. decoder: what `generate` uses.
    objective, likelihood, sampler, source: what a table of methods says of it.
    """

    architecture: str
    configure: Callable[[ModelSettings, int, int], Any]
    settings: type
    build: Callable[[Any, Any], Objective]
    decoder: str
    objective: str
    likelihood: str
    sampler: str
    source: str
    bound: Callable[[Any], Bound] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)


def _synergistic(denoising: str) -> Method:
    return Method(
        architecture="dual",
        configure=ModelSettings.dual,
        settings=SynergisticConfig,
        build=lambda settings, model: Synergistic(settings, model.block_size),
        decoder="speculative",
        objective=f"{denoising} + infill + block + causal (eqs. 6, {8 if denoising == 't-dce' else 9})",
        likelihood="exact causal, ar, block; hybrid and diffusion bounds",
        sampler="speculative, and all others",
        source="CAD-DF",
        defaults={"denoising": denoising, "distill": 1.0},
    )


def _masked(form: str, objective: str, source: str, **defaults: Any) -> Method:
    return Method(
        architecture="dual",
        configure=masked_config,
        settings=DenoisingConfig,
        build=lambda settings, model: settings.build(),
        decoder="ancestral",
        objective=objective,
        likelihood="diffusion bound (eq. 9)",
        sampler="ancestral, evaluated when a token changes",
        source=source,
        defaults={"form": form, **defaults},
    )


def _d3pm(process: str, decoder: str, **defaults: Any) -> Method:
    return Method(
        architecture="single",
        configure=timed_config(),
        settings=D3PM,
        build=lambda settings, model: settings,
        decoder=decoder,
        objective=f"T discrete steps, {process}: KL + reconstruction",
        likelihood="T-step discrete bound",
        sampler="ancestral",
        source="Austin et al. 2021",
        bound=lambda settings: partial(d3pm_bound, process=settings.process, steps=settings.steps),
        defaults={"process": process, **defaults},
    )


def _sedd(kind: str, schedule: str, **network: Any) -> Method:
    return Method(
        architecture="single",
        configure=timed_config(**network),
        settings=ScoreEntropyConfig,
        build=lambda settings, model: settings.build(),
        decoder="tau_leaping",
        objective=f"score entropy, {kind}",
        likelihood="DSE bound: diffusion + prior + reconstruction",
        sampler="Tweedie tau-leaping, Euler",
        source="Lou et al. 2024",
        bound=lambda settings: partial(score_bound, schedule=SCHEDULES[settings.schedule]()),
        defaults={"schedule": schedule},
    )


METHODS: dict[str, Method] = {
    "caddf-lambda-dce": _synergistic("lambda-dce"),
    "caddf-t-dce": _synergistic("t-dce"),
    "gpt2": Method(
        architecture="causal",
        configure=causal_config,
        settings=AutoregressiveLoss,
        build=lambda settings, model: settings,
        decoder="autoregressive",
        objective="cross-entropy",
        likelihood="exact causal",
        sampler="autoregressive, KV cache",
        source="Radford et al. 2019",
    ),
    "d3pm-absorbing": _d3pm("absorbing", "d3pm_absorbing", auxiliary=0.01),
    "d3pm-uniform": _d3pm("uniform", "d3pm_uniform"),
    "plaid": Method(
        architecture="plaid",
        configure=plaid_config,
        settings=PlaidLoss,
        build=lambda settings, model: settings,
        decoder="gaussian",
        objective="VDM bound on learned embeddings and schedule",
        likelihood="bound: reconstruction + prior + diffusion",
        sampler="ancestral, score temperature",
        source="Gulrajani & Hashimoto 2023",
        bound=lambda settings: cast(Bound, plaid_bound),
    ),
    "sedd-uniform": _sedd("uniform", "geometric", score="unscaled", process="uniform"),
    "sedd-unscaled": _sedd("absorbing, unscaled", "loglinear", score="unscaled"),
    "sedd-scaled": _sedd("absorbing, scaled", "loglinear", score="scaled"),
    "radd-dse": Method(
        architecture="dual",
        configure=masked_config,
        settings=ScoreEntropyConfig,
        build=lambda settings, model: settings.build(),
        decoder="ancestral",
        objective="score entropy of a denoiser",
        likelihood="diffusion bound (eq. 9)",
        sampler="ancestral, evaluated when a token changes",
        source="Ou et al. 2025",
    ),
    "radd-t-dce": _masked("t-dce", "t-DCE (eq. 8)", "Ou et al. 2025"),
    "radd-lambda-dce": _masked("lambda-dce", "lambda-DCE (eq. 9)", "Ou et al. 2025"),
    "radd-ao": _masked("ao", "any-order autoregressive", "Ou et al. 2025"),
    "mdlm": _masked("t-dce", "t-DCE, log-linear (SUBS): radd-t-dce's", "Sahoo et al. 2024"),
    "bd3lm": Method(
        architecture="dual",
        configure=masked_config,
        settings=BlockDiffusion,
        build=lambda settings, model: settings,
        decoder="block",
        objective="lambda-DCE in blocks, [x_t ; x0]",
        likelihood="block diffusion bound",
        sampler="block by block, with a block cache",
        source="Arriola et al. 2025",
        bound=lambda settings: block_diffusion_bound,
    ),
}
DEFAULT_METHOD = "caddf-lambda-dce"


def network_of(about: dict[str, Any]) -> Network:
    """The network that a model folder's `config.json` describes, with new weights; raises `InputError`."""
    name = about.get("architecture", "dual")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(f"architecture is {name}; this version has {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name].network(ARCHITECTURES[name].config.from_dict(about["model"]))


def describe(settings: ModelSettings, method: str, objective: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of where it comes from."""
    return {
        "method": method,
        "architecture": METHODS[method].architecture,
        "size": settings.size,
        "objective": dataclasses.asdict(objective),
        "data": data,
    }
