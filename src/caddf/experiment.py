"""Names to classes, in one table; and models built from settings or loaded from disk and hub."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from caddf.checkpoint import atomic_folder, load_model_config, load_state, save_model
from caddf.errors import InputError
from caddf.models.backbone import DualBranch
from caddf.models.config import PRESETS, ModelConfig, Preset
from caddf.models.gpt2 import causal_state, is_gpt2
from caddf.objectives import Objective, Synergistic, SynergisticConfig
from caddf.tokenizer import Tokenizer

Size = Literal["debug", "demo", "tiny", "small", "medium"]
DType = Literal["float32", "bfloat16", "float64"]
GPT2_ROWS = 50_265
"""Rows of the embedding tables over GPT-2's vocabulary (Table 5's vocabulary size)."""


@dataclass(frozen=True)
class ModelSettings:
    """The model: a preset's sizes, and the choices of Table 4 and section 4.

    size: debug, demo, tiny, or Table 5's small and medium.
    causal: off leaves the diffusion branch with its draft head alone.
    fusion: late (eq. 10, after the last causal layer), layers (eq. 7 too), or none (no cross-attention).
    exchange: mutual (the diffusion branch reads the causal branch's states too) or one_way; not set, mutual with fusion
        late.
    draft: factorised, or chained (a draft knows the drafts before it).
    block_size: k of block training, the block likelihood and block decoding.
    context: length of a training window in tokens; not set, the preset's.
    positions, bias: learned and true build the causal branch as GPT-2's, whose weights can then start it.
    """

    size: Size = "demo"
    causal: Literal["on", "off"] = "on"
    fusion: Literal["late", "layers", "none"] = "late"
    exchange: Literal["one_way", "mutual"] | None = None
    draft: Literal["factorised", "chained"] = "factorised"
    block_size: int = 8
    context: int | None = None
    positions: Literal["rotary", "learned"] = "rotary"
    bias: bool = False

    @property
    def preset(self) -> Preset:
        """Sizes and published training settings."""
        return PRESETS[self.size]

    def config(self, vocab_size: int, bos_id: int) -> ModelConfig:
        """The model over a vocabulary of `vocab_size` tokens; raises `InputError` where choices do not go together."""
        causal = dataclasses.replace(self.preset.causal, positions=self.positions, bias=self.bias)
        exchange = self.exchange or ("mutual" if self.fusion == "late" and self.causal == "on" else "one_way")
        return ModelConfig(
            vocab_size=vocab_size,
            context=self.preset.context if self.context is None else self.context,
            diffusion=self.preset.diffusion,
            causal=causal if self.causal == "on" else None,
            bos_id=bos_id,
            rows=GPT2_ROWS if vocab_size == 50_257 else 0,
            fusion=self.fusion,
            exchange=exchange,
            draft=self.draft,
            block_size=self.block_size,
        )


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    settings: the class of its objective's settings, and `defaults` for them. build: settings and model to objective.
    objective, likelihood, sampler, source: what a table of methods says of it.
    """

    settings: type
    build: Callable[[Any, ModelConfig], Objective]
    objective: str
    likelihood: str
    sampler: str
    source: str
    defaults: dict[str, Any] = field(default_factory=dict)


def _synergistic(denoising: str) -> Method:
    return Method(
        settings=SynergisticConfig,
        build=lambda settings, model: Synergistic(settings, model.block_size),
        objective=f"{denoising} + infill + block + causal (eqs. 6, 8, 9)",
        likelihood="exact causal, ar, block; hybrid and diffusion bounds",
        sampler="speculative, and all others",
        source="CAD-DF",
        defaults={"denoising": denoising},
    )


METHODS: dict[str, Method] = {
    "caddf-lambda-dce": _synergistic("lambda-dce"),
    "caddf-t-dce": _synergistic("t-dce"),
}
DEFAULT_METHOD = "caddf-lambda-dce"


@dataclass
class TextModel:
    """A model with its tokenizer: what is loaded, saved and shared.

    `about` is what its `config.json` says besides: the method, the size, the objective, the data.
    """

    model: DualBranch
    tokenizer: Tokenizer
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.model.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.model.vocab_size}; "
                "they must be those that were saved together"
            )

    @property
    def context(self) -> int:
        """Longest window that the model was trained on, in tokens."""
        return self.model.config.context

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a model folder (weights, settings, tokenizer), whole or not at all; raises `InputError` if there."""
        with atomic_folder(Path(folder)) as partial:
            save_model(partial, self.model.state_dict(), {**self.about, "model": self.model.config.to_dict()})
            self.tokenizer.save(partial)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the model folder to the Hugging Face hub; returns its address there."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(folder := Path(temporary) / "model")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="caddf model"))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: DType | torch.dtype = "float32",
        revision: str | None = None,
        token: str | None = None,
    ) -> TextModel:
        """A model from a run (its latest checkpoint), a model folder, or a repository of the hub, ready to be read.

        Raises `InputError` where there is none, or it is truncated, foreign, or of another version.
        """
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if kind not in (torch.float32, torch.bfloat16, torch.float64):
            raise InputError(f"dtype is {dtype}; it must be one of {', '.join(get_args(DType))}")
        folder = model_folder(source, revision, token)
        about = load_model_config(folder)
        model = DualBranch(ModelConfig.from_dict(about["model"]))
        load_state(model, folder)
        model.to(device=resolve_device(device), dtype=kind).eval().requires_grad_(False)
        return cls(model, Tokenizer.load(folder), {key: value for key, value in about.items() if key != "model"})


load = TextModel.from_pretrained


def model_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Where the model files of `source` lie: a run's latest checkpoint, the folder itself, or what the hub sent."""
    path = Path(source)
    if (path / "checkpoints" / "latest").exists():
        return (path / "checkpoints" / "latest").resolve()
    if path.exists():
        return path
    name = str(source).removeprefix("hf:")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{source} does not exist; give a run, a model folder, or OWNER/NAME on the hub")
    try:
        files = ["config.json", "model.safetensors", "tokenizer.json"]
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{source} is neither a folder here nor to be had from the hub ({reason})") from None


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is a GPU where there is one; raises `InputError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError):
        raise InputError(f"device is {device}, which this machine does not have; give auto, cpu, cuda or mps") from None
    return resolved


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that not every generator takes; rows and processes add their index to it."""
    if not 0 <= seed < 2**62:
        raise InputError(f"seed is {seed}; it must be 0 or more, and less than 2**62")


def initialise_from(model: DualBranch, source: str | Path, tokenizer: Tokenizer) -> list[str]:
    """Takes the weights of another checkpoint, or a GPT-2's for the causal branch; returns what was left as it was.

    Raises `InputError` where branches, shapes or the tokenizer differ.
    """
    folder = model_folder(source)
    if is_gpt2(folder):
        state = causal_state(folder, model)
    else:
        other = DualBranch(ModelConfig.from_dict(load_model_config(folder)["model"]))
        for branch in ("causal", "diffusion"):
            theirs, ours = getattr(other.config, branch), getattr(model.config, branch)
            if None not in (theirs, ours) and theirs != ours:
                raise InputError(f"init_from is {source}, whose {branch} branch is {theirs}; this model's is {ours}")
        if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"init_from is {source}, which has another tokenizer than the data; prepare them with "
                f"--tokenizer {folder / 'tokenizer.json'}"
            )
        load_state(other, folder)
        state = other.state_dict()
    own = model.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name in own}
    for name, tensor in taken.items():
        if own[name].shape != tensor.shape:
            raise InputError(
                f"init_from is {source}, whose {name} has shape {tuple(tensor.shape)}; this model's has "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict(taken, strict=False)
    return sorted(own.keys() - taken.keys())


def describe(settings: ModelSettings, method: str, objective: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of where it comes from."""
    return {
        "method": method,
        "size": settings.size,
        "objective": dataclasses.asdict(objective),
        "data": data,
    }
