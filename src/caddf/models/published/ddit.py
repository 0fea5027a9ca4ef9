"""SEDD, RADD and MDLM: one bidirectional backbone in three layouts, as their authors' code saves it.

SEDD (Lou et al. 2024; louaaron/Score-Entropy-Discrete-Diffusion, `model/transformer.py`) is told sbar through adaLN.
RADD (Ou et al. 2025; ML-GSAI/RADD, `model/transformer.py`) is the same without time, with biases in the norms in its
place. MDLM (Sahoo et al. 2024; kuleshov-group/mdlm, `models/dit.py`) is SEDD's, read at sbar = 0 whatever the time.

All have an embedding and a linear head with a row for `[M]`, the last; rotary positions of base 10,000, which turn the
first half of a head's channels with the second; MLPs with biases and tanh GELU; attention without biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caddf.errors import InputError
from caddf.models.config import BranchConfig
from caddf.models.published.checkpoint import ROTARY, Published, Settings, State
from caddf.models.single import SingleConfig

MODULES = {
    "norm1": "attention_norm",
    "attn_out": "attention.out",
    "norm2": "mlp_norm",
    "mlp.0": "mlp.up",
    "mlp.2": "mlp.down",
}
"""The parts of a layer that are only renamed."""
TIME = {
    "sigma_map.mlp.0": "diffusion.level.up",
    "sigma_map.mlp.2": "diffusion.level.down",
    "output_layer.adaLN_modulation": "diffusion.last_modulation.linear",
}
FREQUENCIES = 128
"""Sines and cosines each of sbar."""
RADD_METHODS = {
    "t_DSE": "radd-dse",
    "t_DCE": "radd-t-dce",
    "lambda_DCE": "radd-lambda-dce",
    "k_DCE": "radd-ao",
}
"""RADD's names of its losses."""


def is_sedd(values: dict[str, Any]) -> bool:
    """By its settings of a forward process, which RADD's have not."""
    return {"tokens", "model", "graph"} <= values.keys() and not is_radd(values)


def sedd(values: dict[str, Any], tokens: int) -> Published:
    """A score network: scaled or not, absorbing or uniform. Its scores are scaled by its own number of tokens.

    So there is no padding: raises `InputError` where the tokenizer has fewer.
    """
    config = Settings(values)
    model, graph, noise = config.part("model"), config.part("graph"), config.part("noise")
    graph.only(type=("absorb", "uniform"))
    noise.only(type=("loglinear", "geometric"))
    if noise.values.get("type") == "geometric":
        noise.only(sigma_min=(1e-4, "1e-4"), sigma_max=(20,))  # YAML reads 1e-4 as a word
    absorbing = graph.values.get("type") != "uniform"
    if not absorbing:
        model.only(scale_by_sigma=(False,))
    kind = "uniform" if not absorbing else "scaled" if model.values.get("scale_by_sigma") else "unscaled"
    branch, level_width, vocab_size = _branch(model), model.whole("cond_dim"), config.whole("tokens")
    if vocab_size > tokens:
        raise InputError(f"the checkpoint's tokens is {vocab_size}; its tokenizer has {tokens}")
    network = SingleConfig(
        vocab_size,
        model.whole("length"),
        branch,
        rows=vocab_size + 1,
        level_width=level_width,
        level_scale="linear",
        score="scaled" if kind == "scaled" else "unscaled",
        process="absorbing" if absorbing else "uniform",
        mlp_bias=True,
    )
    return Published(
        f"sedd-{kind}",
        "single",
        network,
        _plain(branch),
        _shapes(branch, vocab_size + absorbing, level_width),
        lambda given: _renamed(given, branch, vocab_size, masked=absorbing),
        {"schedule": noise.values.get("type", "loglinear")},
    )


def is_radd(values: dict[str, Any]) -> bool:
    """By the type of its network, "without time"."""
    return "tokens" in values and Settings(values).part("model").values.get("type") == "ddit_wot"


def radd(values: dict[str, Any], tokens: int) -> Published:
    """A denoiser without time: its output is log q(x0_i | x_t), the row of `[M]` aside."""
    config = Settings(values)
    model, loss = config.part("model"), config.part("training").values.get("loss_type")
    declared, branch = config.whole("tokens"), _branch(model)
    vocab_size = min(declared, tokens)
    return Published(
        RADD_METHODS.get(str(loss), "radd-lambda-dce"),
        "single",
        _timeless(vocab_size, model.whole("length"), branch),
        _plain(branch),
        _shapes(branch, declared + 1, None),
        lambda given: _renamed(given, branch, vocab_size),
    )


def is_mdlm(values: dict[str, Any]) -> bool:
    """By the model's type."""
    return values.get("model_type") == "mdlm"


def mdlm(values: dict[str, Any], tokens: int) -> Published:
    """A denoiser without time (SUBS), its network's modulation at sbar = 0 worked into the weights."""
    config = Settings(values)
    config.only(time_conditioning=(False,))
    branch = _branch(config, "hidden_dim")
    rows, level_width = config.whole("vocab_size"), config.whole("cond_dim")
    vocab_size = min(rows - 1, tokens)
    return Published(
        "mdlm",
        "single",
        _timeless(vocab_size, config.whole("model_length"), branch),
        _plain(branch),
        _shapes(branch, rows, level_width),
        lambda given: _renamed(_at_level_zero(given, branch.layers), branch, vocab_size),
    )


def _branch(model: Settings, width: str = "hidden_size") -> BranchConfig:
    return BranchConfig(model.whole("n_blocks"), model.whole(width), model.whole("n_heads"))


def _timeless(vocab_size: int, context: int, branch: BranchConfig) -> SingleConfig:
    return SingleConfig(
        vocab_size, context, branch, rows=vocab_size + 1, time=False, norm_bias=True, mlp_bias=True, tied=False
    )


def _shapes(branch: BranchConfig, rows: int, level_width: int | None) -> dict[str, tuple[int, ...]]:
    """Its tensors; without a level, norms have biases instead of modulations."""
    width, norm = branch.width, ("weight",) if level_width is not None else ("weight", "bias")
    norms, maps = ["output_layer.norm_final"], {"output_layer.linear": (rows, width)}
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (rows, width)}
    if level_width is not None:
        maps["sigma_map.mlp.0"] = (level_width, 2 * FREQUENCIES)
        maps["sigma_map.mlp.2"] = (level_width, level_width)
        maps["output_layer.adaLN_modulation"] = (2 * width, level_width)
    for block in (f"blocks.{i}" for i in range(branch.layers)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        maps |= {f"{block}.mlp.0": (4 * width, width), f"{block}.mlp.2": (width, 4 * width)}
        if level_width is not None:
            maps[f"{block}.adaLN_modulation"] = (6 * width, level_width)
        shapes |= {f"{block}.attn_qkv.weight": (3 * width, width), f"{block}.attn_out.weight": (width, width)}
    for name, (out, into) in maps.items():
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return shapes | {f"{name}.{kind}": (width,) for name in norms for kind in norm}


def _plain(branch: BranchConfig) -> Callable[[State], State]:
    """Names without `backbone.`, and without the rotary frequencies; raises `InputError` where those are others."""

    def plain(given: State) -> State:
        found = {name.removeprefix("backbone."): tensor for name, tensor in given.items()}
        size = branch.width // branch.heads
        own = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        frequencies = found.pop(ROTARY, own).float()
        # Half precision is good to a hundredth.
        if frequencies.shape != own.shape or not torch.allclose(frequencies, own, rtol=0.01):
            raise InputError(f"the checkpoint's {ROTARY} is not that of base 10,000 and heads of {size} channels")
        return found

    return plain


def _renamed(given: State, branch: BranchConfig, vocab_size: int, masked: bool = True) -> State:
    """The network's names; without `masked` there is no row of `[M]`, and its embedding is 0."""
    table, head = given["vocab_embed.embedding"], "output_layer.linear"
    mask = table[-1:] if masked else torch.zeros_like(table[:1])
    state = {
        "diffusion.embedding.weight": torch.cat([table[:vocab_size], mask]),
        **{f"output.{kind}": given[f"{head}.{kind}"][:vocab_size] for kind in ("weight", "bias")},
    }
    modules = {**TIME, "output_layer.norm_final": "diffusion.norm"}
    for i in range(branch.layers):
        old, new = f"blocks.{i}", f"diffusion.layers.{i}"
        modules |= {f"{old}.{name}": f"{new}.{ours}" for name, ours in MODULES.items()}
        modules[f"{old}.adaLN_modulation"] = f"diffusion.modulations.{i}.linear"
        query, key_value = given[f"{old}.attn_qkv.weight"].tensor_split([branch.width])
        state |= {f"{new}.attention.query.weight": query, f"{new}.attention.key_value.weight": key_value}
    for name, tensor in given.items():
        module, _, kind = name.rpartition(".")
        if module in modules:
            state[f"{modules[module]}.{kind}"] = tensor
    return state


def _at_level_zero(given: State, layers: int) -> State:
    """The same function at sbar = 0 in RADD's layout, in float64.

    Shift and scale become bias and weight of the norm before them, and a gate part of the map before it.
    """
    state = {name: tensor.double() for name, tensor in given.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))

    waves = torch.cat([torch.ones(FREQUENCIES), torch.zeros(FREQUENCIES)]).double()  # cos 0, sin 0
    level = F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", waves))))

    def modulate(norm: str, shift: Tensor, scale: Tensor) -> None:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = state[f"{norm}.weight"] * (1 + scale), shift

    for block in (f"blocks.{i}" for i in range(layers)):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = linear(f"{block}.adaLN_modulation", level).chunk(6)
        modulate(f"{block}.norm1", shift, scale)
        modulate(f"{block}.norm2", mlp_shift, mlp_scale)
        for name, by in {
            "attn_out.weight": gate[:, None],
            "mlp.2.weight": mlp_gate[:, None],
            "mlp.2.bias": mlp_gate,
        }.items():
            state[f"{block}.{name}"] = by * state[f"{block}.{name}"]
    modulate("output_layer.norm_final", *linear("output_layer.adaLN_modulation", level).chunk(2))
    return state
