"""GPT-2 (Radford et al. 2019) in the layout of `transformers`: a model of its own, or the start of a causal branch."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caddf.checkpoint import read_json
from caddf.errors import InputError
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig
from caddf.models.config import BranchConfig
from caddf.models.published.checkpoint import Published, Settings, State

MODULES = {
    "ln_1": "attention_norm",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
"""The parts of a layer that are only renamed."""
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def is_gpt2(values: dict[str, Any]) -> bool:
    """By the model's type."""
    return values.get("model_type") == "gpt2"


def gpt2(values: dict[str, Any], tokens: int) -> Published:
    """A causal model; its head is its embedding."""
    config = Settings(values)
    width, layers, context = config.whole("n_embd"), config.whole("n_layer"), config.whole("n_positions")
    rows = config.whole("vocab_size")
    config.only(
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        layer_norm_epsilon=(1e-5,),
        n_inner=(None, 4 * width),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        tie_word_embeddings=(True,),
        add_cross_attention=(False,),
    )
    vocab_size = min(rows, tokens)
    bos_id = values.get("bos_token_id")
    branch = BranchConfig(layers, width, config.whole("n_head"), positions="learned", bias=True)
    network = CausalConfig(
        vocab_size,
        context,
        branch,
        bos_id if isinstance(bos_id, int) and 0 <= bos_id < vocab_size else vocab_size - 1,
    )

    def convert(given: State) -> State:
        state = _renamed(given, layers)
        table = state["causal.embedding.weight"]
        padding = table.new_zeros(network.rows - vocab_size, width)
        return {**state, "causal.embedding.weight": torch.cat([table[:vocab_size], padding])}

    return Published("gpt2", "causal", network, plain, shapes(rows, context, width, layers), convert)


def shapes(rows: int, context: int, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Its tensors; matrices are [in, out]."""
    inner = {
        "ln_1": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    modules = {f"h.{i}.{name}": shape for i in range(layers) for name, shape in inner.items()} | {"ln_f": (width,)}
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    biases = {f"{name}.bias": shape[-1:] for name, shape in modules.items()}
    return {"wte.weight": (rows, width), "wpe.weight": (context, width), **weights, **biases}


def plain(given: State) -> State:
    """Names without `transformer.`, without masks that are stored as weights, and without a head that is tied."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in given.items()}
    head, embedding = found.get("lm_head.weight"), found.get("wte.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del found["lm_head.weight"]
    return {name: tensor for name, tensor in found.items() if not _MASKS.fullmatch(name)}


def causal_state(folder: Path, model: DualBranch) -> State:
    """GPT-2's weights under the names that `model` has for them; the rows of `[M]` and beyond stay `model`'s.

    A token shift, which GPT-2 has not, stays as it is, too.

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
    state = gpt2(found, model.vocab_size).state(folder)
    embedding = model.causal.embedding.weight.detach().clone()
    embedding[: model.vocab_size] = state["causal.embedding.weight"][: model.vocab_size]
    table = state["causal.table.weight"][: model.causal.context]
    shifted = {} if model.causal.shifted is None else {"causal.shifted.map": model.causal.shifted.map.detach()}
    return {**state, "causal.embedding.weight": embedding, "causal.table.weight": table, **shifted}


def _renamed(given: dict[str, Tensor], layers: int) -> State:
    """Matrices become [out, in]; queries, keys and values are one matrix there."""
    state = {
        "causal.embedding.weight": given["wte.weight"],
        "causal.table.weight": given["wpe.weight"],
        "causal.norm.weight": given["ln_f.weight"],
        "causal.norm.bias": given["ln_f.bias"],
    }
    turned = partial(torch.movedim, source=0, destination=-1)  # of a vector: itself
    for i in range(layers):
        old, new = f"h.{i}", f"causal.layers.{i}"
        for kind in ("weight", "bias"):
            query, key_value = turned(given[f"{old}.attn.c_attn.{kind}"]).tensor_split([len(given["ln_f.weight"])])
            state |= {
                f"{new}.attention.query.{kind}": query,
                f"{new}.attention.key_value.{kind}": key_value,
                **{f"{new}.{ours}.{kind}": turned(given[f"{old}.{name}.{kind}"]) for name, ours in MODULES.items()},
            }
    return state
