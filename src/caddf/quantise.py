"""Fewer bytes of weights for decoding on CPUs: int8, or bfloat16.

Int8 is a quarter of the bytes to read, and several positions for the price of one.
A linear map's weights are rounded to int8 with a scale per output channel, its inputs to int8 with a scale per position
(as in LLM.int8(), Dettmers et al. 2022, without their outliers). Products are summed exactly, in integers, and nothing
depends on what else is read in the same pass: the quantised model is a model of its own, the same whether its positions
are read one by one, in a batch, or verified together.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from caddf.errors import InputError
from caddf.interface import Head

Quantisation = Literal["int8", "bf16"]
Model = TypeVar("Model", bound=nn.Module)

WEIGHT_LEVELS, INPUT_LEVELS = 63, 127
"""Largest integers on either side: without VNNI pairs of products are summed in 16 bits, 2 * 63 * 255 < 2**15."""


class QuantisedLinear(nn.Module):
    """`x W^T + b` with W and x in int8; the result is that of the rounded numbers, exactly, but for its float32 scale.

    Needs float32 inputs on a CPU. `weight` only stands for the packed numbers where parameters are counted. There is no
    state to save: what is saved is the model as it was before.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1).clamp(min=1e-12).double() / WEIGHT_LEVELS
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # torch means to drop its quantised tensors one day; its kernels take no other
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            whole = torch.quantize_per_channel(weight.float().contiguous(), scale, zero, 0, torch.qint8)
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8, device="meta"), requires_grad=False)
        self.packed = torch.ops.quantized.linear_prepack(whole, None)
        self.bias = bias

    def _save_to_state_dict(self, *args: Any) -> None:
        raise InputError("a quantised model is not saved; save the one that it was made of (load it without quantize)")

    def __len__(self) -> int:
        """The number of outputs."""
        return self.out_features

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Rounds each position's inputs by their largest, multiplies, and scales back."""
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / INPUT_LEVELS, INPUT_LEVELS + 1, self.packed
        )
        return y * largest if self.bias is None else torch.addcmul(self.bias, y, largest)


def quantised(model: Model, kind: Quantisation) -> Model:
    """A copy of `model` for inference whose linear maps and heads are quantised.

    With `bf16` all matrices are rounded to bfloat16, and arithmetic stays in float32; compiled kernels then read half
    of the bytes (`caddf.compile`).

    Raises `InputError` for another kind, a model that is not on a CPU or not in float32, or one whose weights are read
    otherwise than through its maps and heads: the dual branch and GPT-2 can be quantised.
    """
    if kind not in get_args(Quantisation):
        raise InputError(f"quantize is {kind}; it must be {' or '.join(get_args(Quantisation))}, or not set")
    if not hasattr(model, "readouts"):
        raise InputError(
            f"quantize is {kind} with a {type(model).__name__}; it is there for the dual branch and GPT-2: leave it out"
        )
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise InputError(
            f"quantize is {kind} with device {weight.device}, dtype {weight.dtype}; it needs cpu and float32"
        )
    if kind == "bf16":
        rounded = copy.deepcopy(model).eval()
        for parameter in rounded.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16().float()
        cast(Any, rounded).weights_bfloat16 = True
        return rounded
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, dict(shared)).eval()
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantisedLinear(child.weight.detach(), child.bias))
    _quantise_heads(cast(_Heads, copied))
    return copied


class _Heads(Protocol):
    heads: frozenset[Head]
    readouts: dict[str, nn.Module]

    def tokens_of(self, head: Head) -> Float[Tensor, "V D"]: ...


def _quantise_heads(model: _Heads) -> None:
    """Heads are the rows of embeddings, which stay for reading; heads of the same rows share one map."""
    maps: dict[int, QuantisedLinear] = {}
    for head in sorted(model.heads):
        table = model.tokens_of(head).detach()
        if table.data_ptr() not in maps:
            maps[table.data_ptr()] = QuantisedLinear(table)
        model.readouts[head] = maps[table.data_ptr()]
    if (small := getattr(model, "draft_tokens", None)) is not None:
        model.readouts["chain"] = QuantisedLinear(model.tokens_of("draft").detach()[small])
