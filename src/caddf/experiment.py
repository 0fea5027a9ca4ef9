"""Names to classes, in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from caddf.errors import InputError
from caddf.evaluation.block import block_diffusion_bound
from caddf.evaluation.d3pm import d3pm_bound
from caddf.evaluation.plaid import plaid_bound
from caddf.evaluation.score_entropy import score_bound
from caddf.evaluation.suite import Bound
from caddf.model_settings import ModelSettings, causal_config, masked_config, plaid_config, timed_config
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import ModelConfig
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

    def saved(self, objective: dict[str, Any]) -> Any:
        """The objective's settings as runs and models hold them; raises `TypeError` for others than it has.

        Block diffusion once had a block size of its own, which is held as None where it was the model's.
        """
        return self.settings(**{k: v for k, v in objective.items() if (k, v) != ("block_size", None)})


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
