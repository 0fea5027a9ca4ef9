"""Who takes part: methods, the models that stand for them (trained, or of random weights), and their decoders."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from caddf.benchmarks.hub_gpt2 import TransformersGenerate, copyable
from caddf.compile import Compile, compiled
from caddf.decoding import DECODERS, Decoder
from caddf.errors import InputError, installed, once
from caddf.experiment import ARCHITECTURES, METHODS, Network
from caddf.model_settings import ModelSettings, Size
from caddf.models.config import ModelConfig
from caddf.quantise import Quantisation, quantised
from caddf.text_model import DType, TextModel, fingerprint, load, model_folder, resolve_device
from caddf.tokenizer import Tokenizer

METHODS_SHOWN = ("gpt2", "sedd-scaled", "radd-lambda-dce", "mdlm", "bd3lm", "caddf-lambda-dce")
TRANSFORMERS = "transformers"
"""The name of `transformers.generate` in the place of a decoder."""
OF_OTHERS = ("euler", "tau_leaping", "d3pm_absorbing", "d3pm_uniform", "gaussian")
"""Decoders that the dual branch is not compared by: they are other methods' own."""
TARGETED = ("autoregressive", "speculative")
"""Decoders of a target: the causal head, or the fused one."""


@dataclass(frozen=True)
class Entrant:
    """A row of a table, but for its batch: a model, a decoder and the decoder's settings."""

    model: str
    method: str
    decoder: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tells it from all others."""
        said = [f"{value}" if name == "target" else f"{name} {value}" for name, value in self.settings.items()]
        return " ".join([self.model, self.decoder, *said])

    def build(self, network: Network) -> Decoder:
        """The decoder itself."""
        if self.decoder == TRANSFORMERS:
            return TransformersGenerate(network)  # type: ignore[arg-type]
        return DECODERS[self.decoder](**self.settings)


@dataclass
class Contestant:
    """A model: trained, with its tokenizer, or of random weights, which has neither tokenizer nor quality."""

    method: str
    network: Network
    tokenizer: Tokenizer | None = None
    checkpoint: str | None = None

    @classmethod
    def trained(
        cls,
        source: str,
        device: torch.device,
        dtype: DType,
        quantize: Quantisation | None = None,
        compile: Compile = "auto",
    ) -> Contestant:
        """The latest checkpoint of a run, or a model folder; raises `InputError` where it names no method."""
        model: TextModel = load(source, device=device, dtype=dtype, quantize=quantize, compile=compile)
        method = model.about.get("method")
        if method not in METHODS:
            raise InputError(f"models holds {source}, whose method is {method}; it must be one of {', '.join(METHODS)}")
        return cls(method, model.model, model.tokenizer, model_folder(source).name)

    @cached_property
    def weights(self) -> str | None:
        """The fingerprint of weights that are trained."""
        return None if self.checkpoint is None else fingerprint(self.network)


@dataclass(frozen=True)
class Roster:
    """Models by name, each made or loaded when it is first asked for.

    trained: names to runs; empty, the methods `shown` are built at `size` with random weights.
    shape: `preset` gives a method of one branch the shape of the preset's causal branch; `equal`, as many parameters as
        the dual branch has.
    """

    trained: dict[str, str]
    shown: tuple[str, ...]
    size: Size
    context: int | None
    shape: Literal["preset", "equal"]
    device: torch.device
    dtype: DType
    seed: int
    quantize: Quantisation | None = None
    compile: Compile = "auto"

    @classmethod
    def of(
        cls,
        *,
        models: str | None = None,
        methods: str | None = None,
        size: Size = "demo",
        context: int | None = None,
        shape: Literal["preset", "equal"] = "preset",
        device: str = "auto",
        dtype: DType = "float32",
        seed: int = 0,
        quantize: Quantisation | None = None,
        compile: Compile = "auto",
    ) -> Roster:
        """From settings as the command line has them; raises `InputError` for methods and runs that are not there."""
        trained = runs_of(models) if models is not None else {}
        shown = METHODS_SHOWN if methods is None else tuple(methods.split(","))
        once("methods", shown)
        for method in shown:
            if method not in METHODS:
                raise InputError(f"methods holds {method}; it must be of {', '.join(METHODS)}")
        return cls(trained, shown, size, context, shape, resolve_device(device), dtype, seed, quantize, compile)

    @property
    def names(self) -> list[str]:
        """All models."""
        return list(self.trained or self.shown)

    def context_of(self, name: str) -> int:
        """The context of the model of that name; one of random weights is not built for it."""
        return (
            self[name].network.config.context if self.trained else ModelSettings(self.size, context=self.context).length
        )

    @cached_property
    def _made(self) -> dict[str, Contestant]:
        return {}

    def __getitem__(self, name: str) -> Contestant:
        """The model of that name."""
        if name not in self._made:
            if self.trained:
                how = (self.device, self.dtype, self.quantize, self.compile)
                self._made[name] = Contestant.trained(self.trained[name], *how)
            else:
                self._made[name] = Contestant(name, self._random(name))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def _random(self, method: str) -> Network:
        config = untrained_config(method, self.size, self.context, self.shape)
        torch.manual_seed(self.seed)
        network = ARCHITECTURES[METHODS[method].architecture].network(config)
        network = network.to(device=self.device, dtype=getattr(torch, self.dtype)).eval().requires_grad_(False)
        network = network if self.quantize is None else quantised(network, self.quantize)
        return compiled(network, self.compile)


def same_weights(place: Path, rows: Sequence[dict[str, Any]], models: Mapping[str, Contestant] | Roster) -> None:
    """Raises `InputError` where rows that were measured before are of other weights than `models`."""
    for name, made in dict.fromkeys((row["model"], row.get("weights")) for row in rows):
        if name in models and models[name].weights != made:
            raise InputError(f"out is {place}, whose rows of {name} are of other weights; give another folder")


def named_runs(models: str) -> str:
    """`models` without the folders that runs lie in."""
    if "=" not in models:
        return name_of(models)
    return ",".join(f"{name}={name_of(run)}" for name, run in runs_of(models).items())


def name_of(folder: str) -> str:
    """A folder's own name."""
    return Path(folder).absolute().name


def runs_of(models: str) -> dict[str, str]:
    """`NAME=RUN,...`, or the runs in a folder by their names without the seed; raises `InputError` where none is."""
    if "=" in models:
        pairs = [pair.partition("=") for pair in models.split(",")]
        runs = {name: run for name, _, run in pairs if name and run}
        if len(runs) < len(pairs):
            raise InputError(f"models is {models}; it must be NAME=RUN,... with a run for each name, and no name twice")
        return runs
    if (Path(models) / "checkpoints" / "latest").exists() or (Path(models) / "config.json").exists():
        raise InputError(f"models is {models}, which is one model; name it: {Path(models).name}={models}")
    found = sorted(path for path in Path(models).glob("*") if (path / "checkpoints" / "latest").exists())
    if not found:
        what = "holds no run" if Path(models).is_dir() else "does not exist"
        raise InputError(f"models is {models}, which {what}; give NAME=RUN,... or a folder of runs")
    names = [re.sub(r"-\d+$", "", path.name) for path in found]
    return {path.name if names.count(name) > 1 else name: str(path) for name, path in zip(names, found, strict=True)}


@lru_cache
def untrained_config(method: str, size: Size, context: int | None, shape: str) -> Any:
    """The settings of a method's network; a causal one is built as GPT-2 is, so that `transformers` can hold it."""
    causal = METHODS[method].architecture == "causal"
    settings = ModelSettings(size, context=context, positions="learned" if causal else "rotary", bias=causal)
    config = METHODS[method].configure(settings, settings.preset.vocab_size, 0)
    if shape == "equal" or getattr(config, "causal", None) is not None:
        return config
    place, base = "diffusion" if isinstance(config, ModelConfig) else "branch", settings.preset.causal
    branch = dataclasses.replace(getattr(config, place), layers=base.layers, width=base.width, heads=base.heads)
    return dataclasses.replace(config, **{place: branch})


def decoders_of(given: str | None) -> list[str]:
    """The decoders of `speculative,ancestral`, or all that are the dual branch's; raises `InputError` for others."""
    chosen = [name for name in DECODERS if name not in OF_OTHERS] if given is None else given.split(",")
    once("decoders", chosen)
    for name in chosen:
        if name not in DECODERS:
            raise InputError(f"decoders holds {name}; it must be of {', '.join(DECODERS)}")
    return chosen


def entrants(
    roster: Roster,
    decoders: str | None,
    steps: list[int],
    transformers: bool,
    lookups: Sequence[int] = (),
    drafts: Sequence[int] = (),
) -> list[Entrant]:
    """Every model with its decoders: the dual branch with all that are its own, or the chosen ones, others with theirs.

    A chain of steps is entered once for each of `steps`, speculation of trained models once for each of `lookups` with
    each of `drafts`; a model of one branch can but copy. Raises `InputError` for a decoder that is not there.
    """
    chosen = decoders_of(decoders)
    rows: list[Entrant] = []
    for name in roster.names:
        contestant = roster[name]
        if "fused" in contestant.network.heads:
            rows += [each for decoder in chosen for each in _of_dual(name, contestant, decoder, steps, lookups, drafts)]
            continue
        decoder = METHODS[contestant.method].decoder
        decoder = "ancestral" if decoder == "speculative" else decoder  # a dual branch without its causal branch
        rows += _with_steps(Entrant(name, contestant.method, decoder, _own(contestant, decoder)), steps)
        if contestant.tokenizer and contestant.network.heads == {"causal"} and "speculative" in chosen:
            rows += [Entrant(name, contestant.method, "speculative", {"lookup": each}) for each in lookups if each]
        if transformers and copyable(contestant.network):
            rows.append(Entrant(name, contestant.method, TRANSFORMERS))
    return rows


def _of_dual(
    name: str,
    contestant: Contestant,
    decoder: str,
    steps: list[int],
    lookups: Sequence[int],
    drafts: Sequence[int],
) -> list[Entrant]:
    method = contestant.method
    if decoder == "speculative" and lookups and contestant.tokenizer:
        size = contestant.network.block_size
        if max(drafts, default=0) > size:
            raise InputError(
                f"drafts holds {max(drafts)}; it must be at most the block size, which is {size} in {name}"
            )
        each = product(("causal", "fused"), lookups, [{"drafts": most} for most in drafts] or [{}])
        return [Entrant(name, method, decoder, {"target": target, "lookup": n} | most) for target, n, most in each]
    if decoder in TARGETED:
        return [Entrant(name, method, decoder, {"target": target}) for target in ("causal", "fused")]
    if decoder == "hybrid":  # infilled one token at a time, or by speculation: the same distribution
        return [Entrant(name, method, decoder, {"speculate": speculate}) for speculate in (False, True)]
    return _with_steps(Entrant(name, method, decoder), steps)


def _own(contestant: Contestant, decoder: str) -> dict[str, Any]:
    """What a method's own decoder must be told: the schedule that its scores belong to."""
    schedule = METHODS[contestant.method].defaults.get("schedule")
    return {"schedule": schedule} if decoder == "tau_leaping" and schedule else {}


def _with_steps(entrant: Entrant, steps: list[int]) -> list[Entrant]:
    """One for each number of steps, where the decoder is a chain that needs one."""
    fields = {each.name: each for each in dataclasses.fields(DECODERS[entrant.decoder])}  # type: ignore[arg-type]
    if "steps" not in fields or fields["steps"].default is None:
        return [entrant]
    return [dataclasses.replace(entrant, settings={**entrant.settings, "steps": n}) for n in steps]


def needs(package: str) -> None:
    """Raises `InputError` where a package of the extra `bench` is missing."""
    installed(package, "bench", "benchmarks need")
