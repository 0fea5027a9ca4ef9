"""A model with its tokenizer: loaded from disk and hub, saved, shared, and started from the weights of others."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from caddf.checkpoint import atomic_folder, load_model_config, load_state, save_model
from caddf.compile import Compile, compiled
from caddf.errors import InputError, check_arguments
from caddf.evaluation.suite import Bound
from caddf.experiment import METHODS, Method, Network, network_of
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig
from caddf.models.published import Published, causal_state, recognise
from caddf.quantise import Quantisation, quantised
from caddf.tokenizer import Tokenizer

DType = Literal["float32", "bfloat16", "float64"]
GPT2_TOKENS = 50_257
_FILES = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", "model*.safetensors", "*.safetensors.index.json"]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


@dataclass
class TextModel:
    """A model with its tokenizer: what is loaded, saved and shared.

    `about` is what its `config.json` says besides: the method, the size, the objective, the data.
    """

    model: Network
    tokenizer: Tokenizer
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.vocab_size != self.model.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.model.vocab_size}; "
                "they must be those that were saved together"
            )

    @property
    def method(self) -> Method | None:
        """How it was trained, where `about` says so."""
        return METHODS.get(self.about.get("method", ""))

    @property
    def bound(self) -> Bound | None:
        """Its own diffusion bound, where that is not the time-free denoiser's."""
        if self.method is None or self.method.bound is None:
            return None
        return self.method.bound(self.method.saved(self.about["objective"]))

    @property
    def decoder(self) -> str:
        """The decoder that fits it: its method's, but for ablations that cannot read left to right."""
        if self.method is None or (self.method.decoder == "speculative" and "fused" not in self.model.heads):
            return "speculative" if "fused" in self.model.heads else "ancestral"
        return self.method.decoder

    @property
    def context(self) -> int:
        """Longest window that the model was trained on, in tokens."""
        return self.model.config.context

    @property
    def slides(self) -> bool:
        """Whether it reads left to right beyond its context: learned positions end there."""
        return getattr(getattr(self.model, "causal", None), "table", None) is None

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
        quantize: Quantisation | None = None,
        compile: Compile = "auto",
        revision: str | None = None,
        token: str | None = None,
    ) -> TextModel:
        """A model from a run (its latest checkpoint), a model folder, or a repository of the hub, ready to be read.

        `quantize` rounds its matrices to int8 or bf16, for decoding on CPUs (`caddf.quantise`);
        `compile` says whether decoding goes through compiled kernels, or on a GPU CUDA graphs (`caddf.compile`).
        GPT-2, SEDD, RADD and MDLM are read as their authors published them (`caddf.models.published`).
        Raises `InputError` where there is none, or it is truncated, foreign, or of another version.
        """
        check_arguments(cls.from_pretrained, {name: value for name, value in locals().items() if name != "cls"})
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if kind not in (torch.float32, torch.bfloat16, torch.float64):
            raise InputError(f"dtype is {dtype}; it must be one of {', '.join(get_args(DType))}")
        folder = model_folder(source, revision, token)
        published, tokenizer = _published(folder)
        about = load_model_config(folder) if published is None else _about(published)
        if tokenizer is None:
            tokenizer = Tokenizer.load(folder) if published is None else _gpt2_tokenizer(folder)
        _check_method(folder, about)
        model = network_of(about).to(kind)
        if published is None:
            load_state(model, folder)
        else:
            model.load_state_dict(published.state(folder))
        for name, parameter in model.named_parameters():
            if not bool(parameter.sum().isfinite()):
                raise InputError(
                    f"{folder} holds numbers in {name} that are not finite (as {parameter.dtype}): it is damaged, or "
                    "was trained beyond that type"
                )
        model.to(resolve_device(device)).eval().requires_grad_(False)
        if quantize is not None:
            model = quantised(model, quantize)
        model = compiled(model, compile)
        return cls(model, tokenizer, {key: value for key, value in about.items() if key != "model"})


load = TextModel.from_pretrained


def describe_folder(folder: Path) -> dict[str, Any]:
    """What a model folder's `config.json` says; for a published checkpoint, what it would say once saved from here."""
    published, _ = _published(folder)
    return load_model_config(folder) if published is None else _about(published)


def _check_method(folder: Path, about: dict[str, Any]) -> None:
    """Raises `InputError` for a model of a method that is not there, whose measure would be another's."""
    if (name := about.get("method")) is None:
        return
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"{folder / 'config.json'} has the method {name!r}; this version has {', '.join(METHODS)}")
    if "objective" not in about and METHODS[name].bound is None:  # which would measure by it
        return
    try:
        METHODS[name].saved(about["objective"])
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{folder / 'config.json'} has an objective that {name} does not have here: {error}") from None


def _published(folder: Path) -> tuple[Published | None, Tokenizer | None]:
    """The checkpoint of other authors in `folder`, if it is one, and the tokenizer beside it, if there is one."""
    read = recognise(folder)
    if read is None:
        return None, None
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder)
    elif (folder / "vocab.json").is_file() or (folder / "encoder.json").is_file():
        tokenizer = Tokenizer.gpt2(folder)
    return read(GPT2_TOKENS if tokenizer is None else tokenizer.vocab_size), tokenizer


def _gpt2_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's, which all published checkpoints here share; raises `InputError` where it is not to be had."""
    try:
        return Tokenizer.gpt2()
    except InputError:
        raise InputError(
            f"{folder} holds no tokenizer, and GPT-2's is not to be had from the hub; put vocab.json and merges.txt "
            "beside the weights"
        ) from None


def _about(published: Published) -> dict[str, Any]:
    method = METHODS[published.method]
    objective = method.settings(**{**method.defaults, **published.objective})
    return {
        "method": published.method,
        "architecture": published.architecture,
        "objective": dataclasses.asdict(objective),
        "model": published.config.to_dict(),
    }


def fingerprint(network: Network) -> str:
    """By what weights are told from others: the same of a model, and of what rounds it to bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        rounded = tensor.detach().bfloat16() if tensor.is_floating_point() else tensor.detach()
        digest.update(name.encode() + rounded.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
        download = partial(snapshot_download, name, revision=revision, token=token)
        folder = Path(download(allow_patterns=_FILES))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(download(allow_patterns=_PICKLED))
        return folder
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{source} does not exist here, and is not to be had from the hub ({reason})") from None


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is a GPU where there is one; raises `InputError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError):
        there = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
        has = " or ".join(["auto", *(name for name, available in there.items() if available), "cpu"])
        raise InputError(f"device is {device}, which this machine does not have; give {has}") from None
    return resolved


def _branch(network: Network, name: str) -> BranchConfig | None:
    """What a branch is made of; None where the network does not have it."""
    module = getattr(network, name, None)
    return getattr(module, "config", None)


def initialise_from(model: Network, source: str | Path, tokenizer: Tokenizer) -> list[str]:
    """Takes the weights of another checkpoint, or a GPT-2's for the causal branch; returns what was left as it was.

    Raises `InputError` where branches, shapes or the tokenizer differ.
    """
    folder = model_folder(source)
    published, _ = _published(folder)
    if published is not None and published.method == "gpt2":
        if not isinstance(model, DualBranch):
            raise InputError(f"init_from is {source}, a GPT-2, which starts the causal branch of the dual branch alone")
        state = causal_state(folder, model)
    else:
        other = network_of(load_model_config(folder))
        for branch in ("causal", "diffusion"):
            theirs, ours = (_branch(network, branch) for network in (other, model))
            if ours is None or theirs is None:
                continue
            if theirs not in (ours, dataclasses.replace(ours, token_shift=False)):  # a token shift begins as none
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
