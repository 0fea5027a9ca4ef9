"""GPT-2's published weights, for the causal branch (Radford et al. 2019; the layout of `transformers`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from caddf.checkpoint import load_tensors, read_json
from caddf.errors import InputError
from caddf.models.config import ModelConfig


def is_gpt2(folder: Path) -> bool:
    """Whether a model folder is a GPT-2 in the layout of `transformers`."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "gpt2"


def causal_state(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The causal branch's weights by their names here; raises `InputError` where the branch is built differently."""
    if config.causal is None or config.causal.positions != "learned" or not config.causal.bias:
        raise InputError(
            f"init_from is {folder}, a GPT-2; it needs a causal branch with learned positions and biases "
            "(model.positions learned, model.bias true)"
        )
    path = folder / "model.safetensors"
    given = load_tensors(path) if path.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    given = {name.removeprefix("transformer."): tensor for name, tensor in given.items()}
    width = config.causal.width
    table = torch.zeros(config.rows, width)
    known = given["wte.weight"][: config.vocab_size]
    table[: len(known)] = known
    state = {
        "embedding.weight": table,
        "table.weight": given["wpe.weight"][: config.context],
        "norm.weight": given["ln_f.weight"],
        "norm.bias": given["ln_f.bias"],
    }
    for i in range(config.causal.layers):
        if f"h.{i}.ln_1.weight" not in given:
            raise InputError(
                f"init_from is {folder}, which has {i} layers; the causal branch has {config.causal.layers}"
            )
        old, new = f"h.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            # GPT-2 keeps its matrices as [in, out], and queries, keys and values in one.
            query, key_value = given[f"{old}.attn.c_attn.{kind}"].split([width, 2 * width], -1)
            state |= {
                f"{new}.attention.query.{kind}": query.T,
                f"{new}.attention.key_value.{kind}": key_value.T,
                f"{new}.attention.out.{kind}": given[f"{old}.attn.c_proj.{kind}"].T,
                f"{new}.mlp.up.{kind}": given[f"{old}.mlp.c_fc.{kind}"].T,
                f"{new}.mlp.down.{kind}": given[f"{old}.mlp.c_proj.{kind}"].T,
                f"{new}.attention_norm.{kind}": given[f"{old}.ln_1.{kind}"],
                f"{new}.mlp_norm.{kind}": given[f"{old}.ln_2.{kind}"],
            }
    return {f"causal.{name}": tensor.contiguous() for name, tensor in state.items()}
