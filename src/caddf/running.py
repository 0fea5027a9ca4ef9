"""A training run from its settings: everything is checked and built, then the loop goes, or goes on."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from rich.console import Console
from torch import nn

from caddf.checkpoint import atomic_folder, locked, read_json, write_json_atomic, write_text_atomic
from caddf.data import Batches, TokenSet
from caddf.errors import Checked, InputError, at_least, check_seed
from caddf.evaluation import block_nll, causal_nll, diffusion_bound
from caddf.evaluation.suite import Bound
from caddf.experiment import ARCHITECTURES, DEFAULT_METHOD, METHODS, Network, describe
from caddf.generation import generate
from caddf.interface import LanguageModel
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.text_model import TextModel, initialise_from, resolve_device
from caddf.training import Result, TrainConfig, train
from caddf.training.config import Device, Precision

SETTINGS, IDENTITY = "config.yaml", "data.json"
TrainingDType = Literal["auto", "float32", "bfloat16", "float64"]
PRECISIONS: dict[str, Precision] = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}
OWN = ("device", "precision", "seed")
"""Settings of the loop that a run sets once for all its parts."""


@dataclass(frozen=True)
class ValidationSettings(Checked):
    """The evaluation during training, which decides which checkpoint is the best.

    likelihood: what is measured (nats per token); auto is block, or the diffusion bound without a causal branch.
    windows: how many windows of the validation split.
    samples: Monte-Carlo samples per window, for the diffusion bound.
    sample_tokens: length of the sample of text.
    """

    section = "validation."

    likelihood: Literal["auto", "causal", "block", "diffusion"] = "auto"
    windows: int = 32
    samples: int = 4
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "windows", "samples", "sample_tokens")


@dataclass(frozen=True)
class RunSettings(Checked):
    """All that decides a run; saved as `config.yaml` in its folder, and read from there to resume it.

    device, dtype and seed stand here once for all parts; `train` has the same in the words of the loop.
    """

    data: str
    method: str = DEFAULT_METHOD
    init_from: str | None = None
    device: Device = "auto"
    dtype: TrainingDType = "auto"
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        precision = PRECISIONS[self.dtype]
        own = dataclasses.replace(self.train, device=self.device, precision=precision, seed=self.seed)
        object.__setattr__(self, "train", own)

    def save(self, run: Path) -> None:
        """Writes `config.yaml`, which `caddf train --config` takes too."""
        values = dataclasses.asdict(self)
        for name in OWN:
            del values["train"][name]
        write_text_atomic(run / SETTINGS, yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, run: Path) -> RunSettings:
        """Reads a run's `config.yaml`; raises `InputError` where there is none or it does not fit."""
        try:
            values = yaml.safe_load((run / SETTINGS).read_text(encoding="utf-8"))
            sections = {"model": ModelSettings, "train": TrainConfig, "validation": ValidationSettings}
            values |= {name: section(**values[name]) for name, section in sections.items()}
            return cls(**values | {"objective": METHODS[values["method"]].saved(values["objective"])})
        except OSError:
            raise InputError(f"{run} is no run: it has no {SETTINGS}; start one with caddf train --out {run}") from None
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{run / SETTINGS} does not fit this version: {error}") from None


def start(settings: RunSettings, run: Path, console: Console) -> Result:
    """Trains into the new folder `run`; raises `InputError` before it is made if anything does not fit."""
    main = os.environ.get("RANK", "0") == "0"  # of several processes, the first makes the folder for all
    if main and run.exists():
        raise InputError(f"out is {run}, which exists; give a new folder, or go on with caddf train --resume {run}")
    settings = dataclasses.replace(settings, data=_absolute(settings.data))
    if settings.init_from is not None:
        settings = dataclasses.replace(settings, init_from=_absolute(settings.init_from))
    data = TokenSet.open(settings.data)
    go = _prepare(settings, data, run, console, resumed=False)
    if main:
        with atomic_folder(run) as partial:
            settings.save(partial)
            write_json_atomic(partial / IDENTITY, _identity(data))
    try:
        with locked(run) if main else nullcontext():
            return go()
    except InputError:
        if main and _is_empty(run):
            shutil.rmtree(run)
        raise


def resume(run: Path, console: Console, data: str | None = None, device: Device | None = None) -> Result:
    """Goes on from the latest checkpoint of `run`, with its own settings; raises `InputError` if its data changed.

    `data` is where its data lies by now, and `device` what it goes on with: they are its own from then on.
    """
    before = settings = RunSettings.load(run)
    if data is not None:
        settings = dataclasses.replace(settings, data=_absolute(data))
    if device is not None:
        settings = dataclasses.replace(settings, device=device)
    tokens = TokenSet.open(settings.data)
    if _identity(tokens) != read_json(run / IDENTITY):
        raise InputError(f"{settings.data} is not the data that {run} was started on; its tokens have changed")
    go = _prepare(settings, tokens, run, console, resumed=not _is_empty(run))
    main = os.environ.get("RANK", "0") == "0"
    with locked(run) if main else nullcontext():
        if settings != before and main:
            settings.save(run)
        return go()


def _prepare(settings: RunSettings, data: TokenSet, run: Path, console: Console, resumed: bool) -> Callable[[], Result]:
    """Builds model, objective and data, and returns what trains them; raises `InputError` where they do not fit."""
    resolve_device(settings.device)
    config = settings.train.resolved(settings.model.preset)
    tokenizer = data.tokenizer
    method = METHODS[settings.method]
    model_config = method.configure(settings.model, tokenizer.vocab_size, tokenizer.eos_id)
    batches = Batches(data.split("train").tokens, model_config.context, config.rows_per_pass, config.seed)
    torch.manual_seed(config.seed)
    model = ARCHITECTURES[method.architecture].network(model_config)
    if isinstance(model, DualBranch) and model.draft_tokens is not None:
        model.choose_draft_tokens(data.split("train").counts(model.vocab_size))
    if settings.init_from is not None and not resumed:
        kept = initialise_from(model, settings.init_from, tokenizer)
        said = f"weights from {settings.init_from}" + (f"; {len(kept)} tensors start anew" if kept else "")
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    about = describe(settings.model, settings.method, settings.objective, _identity(data))

    return partial(
        train,
        run,
        model,
        method.build(settings.objective, model_config),
        batches,
        config,
        describe={**about, "model": model_config.to_dict()},
        tokenizer_file=data.folder / "tokenizer.json",
        validate=_validation(settings, data, model),
        sample=_sampling(settings, data, about),
        console=console,
        resume=resumed,
    )


def _validation(settings: RunSettings, data: TokenSet, model: Network) -> Callable[[nn.Module], float] | None:
    """The measure of a checkpoint (nats per token), or None where the data have no validation split."""
    method, wanted = METHODS[settings.method], settings.validation
    if wanted.likelihood == "auto":
        likelihood = "block" if "fused" in model.heads else "causal" if "causal" in model.heads else "diffusion"
    else:
        likelihood = wanted.likelihood
    needs = {
        "block": "fused" in model.heads,
        "causal": "causal" in model.heads,
        "diffusion": model.denoiser != "causal",
    }
    if not needs[likelihood]:
        has = [name for name, there in needs.items() if there]
        raise InputError(f"validation.likelihood is {likelihood}; this model has {', '.join(has)}")
    if "validation" not in data.manifest["splits"]:
        return None
    context = model.config.context
    windows = data.split("validation").spread(context, wanted.windows)
    bound: Bound = diffusion_bound if method.bound is None else method.bound(settings.objective)

    def validate(module: nn.Module) -> float:
        device, total = next(module.parameters()).device, 0.0
        generator = torch.Generator().manual_seed(settings.seed)
        smooth = cast(LanguageModel, module)
        for x0 in windows.to(device).split(8):
            if likelihood == "diffusion":
                nats = bound(smooth, x0, wanted.samples, generator).mean(-1)
            else:
                nats = causal_nll(smooth, x0) if likelihood == "causal" else block_nll(smooth, x0, smooth.block_size)
            total += float(nats.sum())
        return total / len(windows) / context

    return validate


def _sampling(settings: RunSettings, data: TokenSet, about: dict[str, Any]) -> Callable[[nn.Module], str]:
    """A sample of text from nothing, by the method's own decoder."""

    def sample(module: nn.Module) -> str:
        model = TextModel(cast(Network, module), data.tokenizer, about)
        new = min(settings.validation.sample_tokens, model.context)
        *_, last = generate(model, "", max_new_tokens=new, seed=settings.seed)
        return last.text

    return sample


def _identity(data: TokenSet) -> dict[str, Any]:
    """What tells one token set from another: the tokenizer and the hash of each split."""
    hashes = {name: split["sha256"] for name, split in data.manifest["splits"].items()}
    return {"tokenizer": data.tokenizer.fingerprint, "splits": hashes}


def _absolute(place: str) -> str:
    """A path that holds wherever the run is resumed from; a name on the hub stays what it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _is_empty(run: Path) -> bool:
    """Whether the run was stopped before its first checkpoint was on disk."""
    return not any((run / "checkpoints").glob("step-*"))
