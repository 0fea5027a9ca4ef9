"""GPT-2's published weights, for the causal branch (Radford et al. 2019; the layout of `transformers`)."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from caddf.checkpoint import load_tensors, read_json
from caddf.errors import InputError
from caddf.models.backbone import DualBranch


def is_gpt2(folder: Path) -> bool:
    """Whether a model folder is a GPT-2 in the layout of `transformers`."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "gpt2"


def causal_state(folder: Path, model: DualBranch) -> dict[str, Tensor]:
    """GPT-2's weights under the names that `model` has for them; the rows of `[M]` and beyond stay `model`'s.

    Raises `InputError` where the causal branch is built differently, or the weights are truncated or foreign.
    """
    if model.causal is None or model.causal.config.positions != "learned" or not model.causal.config.bias:
        raise InputError(
            f"init_from is {folder}, a GPT-2; it needs a causal branch with learned positions and biases "
            "(model.positions learned, model.bias true)"
        )
    config, found = model.causal.config, read_json(folder / "config.json")
    needed = {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "vocab_size": model.vocab_size,
    }
    for name, value in needed.items():
        if found.get(name) != value:
            raise InputError(
                f"init_from is {folder}, a GPT-2 whose {name} is {found.get(name)}; this model's is {value}"
            )
    if found.get("n_positions", 0) < model.causal.context:
        raise InputError(
            f"init_from is {folder}, a GPT-2 of {found.get('n_positions')} positions; the context is "
            f"{model.causal.context}: set model.context"
        )
    given = _weights(folder)
    try:
        return {f"causal.{name}": tensor.contiguous() for name, tensor in _renamed(given, model).items()}
    except KeyError as missing:
        raise InputError(f"init_from is {folder}, a GPT-2 without {missing}; it is truncated or foreign") from None


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "pytorch_model.bin"
    if path.is_file() and not (folder / "model.safetensors").is_file():
        try:
            given = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            raise InputError(f"{path} is truncated or no file of weights") from None
    else:
        given = load_tensors(folder / "model.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in given.items()}


def _renamed(given: dict[str, Tensor], model: DualBranch) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices as [in, out], and queries, keys and values in one."""
    assert model.causal is not None
    embedding = model.causal.embedding.weight.detach().clone()
    embedding[: model.vocab_size] = given["wte.weight"]
    state = {
        "embedding.weight": embedding,
        "table.weight": given["wpe.weight"][: model.causal.context],
        "norm.weight": given["ln_f.weight"],
        "norm.bias": given["ln_f.bias"],
    }
    for i in range(model.causal.config.layers):
        old, new = f"h.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            turned = partial(torch.movedim, source=0, destination=-1)  # of a bias: itself
            query, key, value = given[f"{old}.attn.c_attn.{kind}"].chunk(3, -1)
            state |= {
                f"{new}.attention.query.{kind}": turned(query),
                f"{new}.attention.key_value.{kind}": turned(torch.cat([key, value], -1)),
                f"{new}.attention.out.{kind}": turned(given[f"{old}.attn.c_proj.{kind}"]),
                f"{new}.mlp.up.{kind}": turned(given[f"{old}.mlp.c_fc.{kind}"]),
                f"{new}.mlp.down.{kind}": turned(given[f"{old}.mlp.c_proj.{kind}"]),
                f"{new}.attention_norm.{kind}": given[f"{old}.ln_1.{kind}"],
                f"{new}.mlp_norm.{kind}": given[f"{old}.ln_2.{kind}"],
            }
    return state
