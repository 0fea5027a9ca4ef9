"""Fewer bytes of weights for decoding on CPUs: int8, or bfloat16.

Matrices are rounded, and stay a model like any other, in float32: every likelihood and decoder is that of the rounded
model. Compiled kernels (`caddf.compile`) then read a quarter or half of the bytes; what they multiply by int8 they
round as well, to 16 bits, so that all products are of integers.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.errors import InputError

Quantisation = Literal["int8", "bf16"]
Model = TypeVar("Model", bound=nn.Module)

WEIGHT_LEVELS = 127
"""Largest integers on either side."""


def integers(matrix: Float[Tensor, "out in"]) -> tuple[Int[Tensor, "out in"], Float[Tensor, " out"]]:
    """int8 numbers and a float32 scale for each output, of which the matrix is about the product.

    Those of a matrix that was made of such a product are the same again.
    """
    scales = matrix.float().abs().amax(1).clamp(min=1e-12) / WEIGHT_LEVELS
    return (matrix.float() / scales[:, None]).round().to(torch.int8), scales


def is_bf16(model: nn.Module) -> bool:
    """Whether all numbers of all matrices are such of bfloat16, so that nothing is lost by reading them as that."""
    return all(torch.equal(p.bfloat16().to(p.dtype), p) for p in model.parameters() if p.ndim > 1)


def quantised(model: Model, kind: Quantisation) -> Model:
    """A copy of `model` for inference whose matrices are rounded; `weights_kind` says how.

    `int8`: to integers with a scale for each output (for each token, in embeddings); `bf16`: to bfloat16.
    Raises `InputError` for another kind, or a model that is not on a CPU or not in float32.
    """
    if kind not in get_args(Quantisation):
        raise InputError(f"quantize is {kind}; it must be {' or '.join(get_args(Quantisation))}, or not set")
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise InputError(
            f"quantize is {kind} with device {weight.device}, dtype {weight.dtype}; it needs cpu and float32"
        )
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        if parameter.ndim == 2 and kind == "int8":
            whole, scales = integers(parameter.data)
            parameter.data = whole * scales[:, None]
        elif parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16().float()
    cast(Any, copied).weights_kind = kind
    return copied
